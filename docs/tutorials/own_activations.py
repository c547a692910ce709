# %% [markdown]
# # Bring your own activations
#
# Any array [rows, D] will do: a vision model's, audio, proteins, a simulation. No language model is needed. Here the
# rows are the 1,797 pictures of handwritten digits that come with scikit-learn, 64 pixels each. They are few and small,
# so that this runs in seconds; take millions of rows where you have them.

# %%
import numpy as np
from sklearn.datasets import load_digits

from hafs_jax import load, preset, train, with_fields, write_array_store

digits = load_digits()
acts = digits.data.astype(np.float32)
print(acts.shape)

# %% [markdown]
# ## From an array to a store
#
# A store is a folder of shuffled, checksummed shards with a held-out part. The array may be an `.npy` file larger than
# memory (give its path), or several. `groups` keeps rows that belong together, such as the patches of one picture, on
# one side of the split. The command `hafs import ACTS.npy --profile digits` does the same.

# %%
stores = write_array_store("store", acts, name="digits", heldout_fraction=0.1, norm_multiple=None)
print(sorted(stores))

# %% [markdown]
# ## Train
#
# Few rows, so many passes. k is the number of active latents in a row: the one setting to choose
# ([how](../training.md#pick-k)). The held-out rows are measured while it trains, and the best checkpoint is kept.

# %%
config = with_fields(
    preset("baseline", "topk"),
    {
        "tokens": 120_000,
        "batch_size": 128,
        "evaluate_every_steps": 200,
        "sae": {"n_latents": 128, "k": 8},
    },
)
run = train(config, stores["train"], "runs")
summary = run.summary()
print(f"FVU {summary.final['fvu_ema']:.2f} on training rows, {summary.best['heldout_fvu']:.2f} on held-out rows")

# %% [markdown]
# The gap says that 1,600 rows are too few for 128 latents: it overfits. `load(run.folder, "best")` takes the checkpoint
# that was best on held-out rows.
#
# ## What does a latent stand for?
#
# Labels help where you have them. For each digit, the latent that tells it best from the others:

# %%
sae = load(run.folder, "best")
latents = np.asarray(sae.encode(acts))
active = latents > 0
for digit in range(10):
    of_digit = digits.target == digit
    recall, alarm = active[of_digit].mean(0), active[~of_digit].mean(0)
    best = int(np.argmax(recall - alarm))
    print(f"{digit}: recall {recall[best]:.2f}, false alarms {alarm[best]:.2f}")

# %% [markdown]
# The digit 0 has a latent of its own. Most others are put together of strokes that several digits share: a latent need
# not be a class that you have a name for.
#
# **Next:** `hafs inspect RUN` says whether a run is healthy; [export](../interchange.md) takes it to SAELens.
