# %% [markdown]
# # Train an SAE and look into it
#
# On made-up activations, so that the truth is known and all of it takes well under a minute on a CPU. On a language
# model's activations you do the same.
#
# Each *activation* (a row) is a sum of a few out of 64 random *directions* in 32 dimensions. An SAE that works finds
# these directions, one for each of its *latents*.

# %%
import numpy as np

from hafs_jax import load, preset, train, with_fields, write_array_store

rng = np.random.default_rng(0)
directions = rng.normal(size=(64, 32))
directions /= np.linalg.norm(directions, axis=1, keepdims=True)
present = rng.random((40_000, 64)) < 1 / 16  # which directions a row is made of: 4 on average
acts = ((present * rng.uniform(1, 2, present.shape)) @ directions).astype(np.float32)
print(acts.shape)

# %% [markdown]
# ## Train
#
# `write_array_store` shuffles the rows into a *store* on disk and keeps a held-out part. A *preset* is a whole config:
# of a variant, here `baseline`, which is a plain SAE, and of an architecture, here BatchTopK. `with_fields` changes
# some of it. Give the call again after a crash, and it goes on where it was.

# %%
stores = write_array_store("store", acts)
config = with_fields(
    preset("baseline", "batchtopk"),
    {"tokens": 200_000, "batch_size": 256, "sae": {"n_latents": 96, "k": 4}},
)
run = train(config, stores["train"], "runs")
final = run.summary().final
print(f"{run.name}: FVU {final['fvu_ema']:.2f}, L0 {final['l0']:.1f}, dead {final['dead_fraction']:.2f}")

# %% [markdown]
# FVU is the *fraction of variance unexplained*: 0 is a perfect reconstruction, 1 is what the mean alone would give. L0
# is the number of latents that are active on a row.
#
# ## Encode and decode
#
# Arrays of any shape [..., D] go in, in the units of the activations.

# %%
sae = load(run.folder)
print(sae)
some = acts[:5_000]
latents = np.asarray(sae.encode(some))
recon = np.asarray(sae.decode(latents))
fvu = ((some - recon) ** 2).sum() / ((some - some.mean(0)) ** 2).sum()
print(f"latents {latents.shape}, {np.mean((latents > 0).sum(1)):.1f} active on a row, FVU {fvu:.2f}")

# %% [markdown]
# ## Look at one latent
#
# Its dictionary vector is a row of `W_dec`. Its top rows are those on which it is most active.

# %%
density = (latents > 0).mean(0)
latent = int(np.argsort(density)[-10])  # one that is active on many rows
top = np.argsort(latents[:, latent])[::-1][:20]
cosines = directions @ np.asarray(sae.W_dec)[latent]
truth = int(np.argmax(cosines))
print(f"cosine with the nearest true direction: {cosines[truth]:.2f}")
print(f"that direction is present in {present[top, truth].mean():.0%} of the top 20 rows, in {1 / 16:.0%} of all")

# %% [markdown]
# ## Did it find them all?

# %%
cosines = directions @ np.asarray(sae.W_dec).T
found = (cosines.max(1) > 0.9).mean()
print(f"directions with a latent of cosine above 0.9: {found:.0%}")

# %% [markdown]
# A low loss does not say which latents stand for something. On real activations nobody knows the directions;
# [evaluation](../evaluation.md) says what is measured there instead.
#
# **Next:** [compare variants](compare.py), or [use an SAE](../using.md) in a language model.
