"""The axis of the latents in each array of the training state, found by the array's name."""

from hafs_jax.method.architectures import ARCHITECTURES

_OTHERS = dict.fromkeys(("W_enc", "W_dec", "b_enc", "steps_since_fired_F", "rate_F", "groups_F"), 0)


def latent_axis(path: tuple) -> int | None:
    """The axis of the latents in the leaf at `path` of a state, parameters or moments; None if it has no such axis."""
    own = {name: 0 for architecture in ARCHITECTURES.values() for name in architecture.params}
    axes = _OTHERS | own
    names = [getattr(entry, "key", getattr(entry, "name", None)) for entry in path]
    return next((axes[name] for name in reversed(names) if name in axes), None)
