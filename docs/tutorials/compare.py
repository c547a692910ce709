# %% [markdown]
# # Compare variants on a world whose truth is known
#
# A *variant* says which penalty acts on the dictionary while it is trained. `baseline` has none. `adaptive` keeps
# dictionary vectors from pointing the same way, weakly early in training and while the error is large. `yielding` does
# so with a tenth of the strength, and turns only the rarer latent of a pair ([formulas](../method.md)).
#
# The problem that they are made for is *absorption*: where "dog" always comes with "animal", an SAE saves a latent by
# letting the latent of "dog" carry "animal" too. Then the latent of "animal" is silent on dogs.

# %%
import numpy as np

from hafs_jax import load, preset, train, with_fields, write_array_store

rng = np.random.default_rng(1)
PARENTS, CHILDREN, D, ROWS = 12, 3, 48, 60_000
F = PARENTS * (1 + CHILDREN)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


directions = unit(rng.normal(size=(F, D)))  # first the parents, then the children of each
parent = rng.random((ROWS, PARENTS)) < 0.12
which = rng.integers(0, CHILDREN + 1, (ROWS, PARENTS))  # the last value: a parent without any child
child = (parent[:, :, None] & (which[:, :, None] == np.arange(CHILDREN))).reshape(ROWS, -1)
present = np.concatenate([parent, child], axis=1)
acts = ((present * rng.uniform(0.8, 1.6, present.shape)) @ directions).astype(np.float32)
print(f"{F} features, {present.sum(1).mean():.1f} of them in a row")

# %% [markdown]
# Three SAEs on the same rows, with the same seed. `adaptive` and `yielding` take their threshold tau from the finished
# baseline, so that comes first.

# %%
stores = write_array_store("store", acts)
size = {"tokens": 240_000, "batch_size": 256, "sae": {"n_latents": F, "k": round(present.sum(1).mean())}}
runs = {
    variant: train(with_fields(preset(variant, "batchtopk"), size), stores["train"], "runs")
    for variant in ("baseline", "adaptive", "yielding")
}


def scores(run):
    """FVU; the mean cosine of each feature with its best latent; the mean hole of the parents."""
    sae, rows = load(run.folder), slice(0, 10_000)
    latents = np.asarray(sae.encode(acts[rows]))
    recon = np.asarray(sae.decode(latents))
    fvu = ((acts[rows] - recon) ** 2).sum() / ((acts[rows] - acts[rows].mean(0)) ** 2).sum()
    cosines = directions @ unit(np.asarray(sae.W_dec)).T
    best = cosines[:PARENTS].argmax(1)
    active = latents[:, best] > 0
    alone, with_child = which[rows] == CHILDREN, which[rows] < CHILDREN
    holes = [
        active[parent[rows, p] & alone[:, p], p].mean() - active[parent[rows, p] & with_child[:, p], p].mean()
        for p in range(PARENTS)
    ]
    return fvu, cosines.max(1).mean(), np.mean(holes)


for variant, run in runs.items():
    fvu, cosine, hole = scores(run)
    print(f"{variant:9} FVU {fvu:.3f}   cosine with the truth {cosine:.2f}   hole {hole:.2f}")

# %% [markdown]
# *Hole* is the recall of a parent's latent on rows without a child minus its recall on rows with one: 0 is none.
#
# Here both penalties close most of the hole, and both cost reconstruction, `adaptive` more than `yielding`. How close
# the dictionary comes to the truth hardly changes. With three other seeds (`"seed": 1` and so on in `size`) the
# baseline's hole was 0.12 to 0.26, adaptive's 0.02 to 0.06 and yielding's 0.05 to 0.12; the order of the FVUs was the
# same.
#
# Do not take more from it. This world was made to have the problem: every feature is a parent or the child of one.
#
# Train several seeds before you believe a difference: `hafs sweep --grid "variant=baseline,yielding seed=0..3"`
# trains them in one pass, and [experiments](../evaluation.md#experiments) compare with intervals. On a language model
# no gain of `adaptive` in interpretability is resolved ([findings](../findings.md)).
