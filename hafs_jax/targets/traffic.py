"""What the devices of a mesh tell each other in a step: the table of docs/scaling.md as a function.

Numbers and small arrays are left out, and so is what a step does only now and then: the auxiliary loss while latents
are dead, resampling, new parents. A test holds this to the compiled program.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from hafs_jax.config import TrainConfig
from hafs_jax.fast.lanes import lane_rows
from hafs_jax.method.architectures import ARCHITECTURES, batchtopk, topk
from hafs_jax.method.matryoshka import fixed_ends
from hafs_jax.ops.axes import Axes


@dataclass(frozen=True)
class Message:
    """One kind of message of a step."""

    what: str
    kind: str  # all-gather, reduce-scatter, all-reduce or all-to-all
    along: str  # data, latent, or devices for all
    among: int  # devices that exchange it
    size: int  # bytes of its result on one device
    times: int = 1

    @property
    def received(self) -> int:
        """The bytes that one device receives, on a ring; of an all-to-all from each other device its part."""
        others, n = self.among - 1, self.among
        once = {
            "all-gather": self.size * others // n,
            "reduce-scatter": self.size * others,
            "all-reduce": 2 * self.size * others // n,
            "all-to-all": self.size * others // n,
        }[self.kind]
        return self.times * once


def messages(config: TrainConfig, d_model: int, d_out: int, axes: Axes) -> list[Message]:
    """The messages of a step of the resolved config, those of one device left out."""
    sae, architecture = config.sae, ARCHITECTURES[config.sae.architecture]
    rows, latents, owned = config.batch_size // axes.data, sae.F // axes.latent, sae.F // axes.devices
    wide = jnp.dtype(sae.compute_dtype).itemsize
    found = [
        Message(f"{name}: the latents of a place", "all-gather", "data", axes.data, latents * width * wide)
        for name, width in (("W_enc", d_model), ("W_dec", d_out))
    ]
    found += [
        Message(f"gradient of {name}", "reduce-scatter", "data", axes.data, owned * width * 4)
        for name, width in (("W_enc", d_model), ("W_dec", d_out))
    ]
    bands = 1
    if architecture.nested:
        bands = sae.sampled_prefixes or len(fixed_ends(sae))
    elif architecture.budgets:
        bands = len(sae.budgets)
    extra = int(architecture.extra is not None)
    found.append(Message("reconstruction", "all-reduce", "latent", axes.latent, rows * d_out * 4, bands + extra))
    if architecture.activate is topk:
        each = rows * min(sae.largest_k, latents) * axes.latent * 4
        found.append(
            Message("largest values of each row", "all-gather", "latent", axes.latent, each, 1 + architecture.budgets)
        )
    if architecture.activate is batchtopk:
        found.append(Message("counts above a threshold", "all-reduce", "devices", axes.devices, 7 * 4, 11))
    if config.penalty.kind == "hinge" and config.penalty.sharing != "cofiring":
        lanes = axes.devices * lane_rows(owned, axes.devices) * 4
        found.append(Message("rows to their chunks, and back", "all-to-all", "devices", axes.devices, lanes * d_out, 2))
        found.append(Message("their places", "all-to-all", "devices", axes.devices, lanes, 2))
    elif config.penalty.kind != "none":
        found.append(Message("the decoder", "all-gather", "devices", axes.devices, sae.F * d_out * 4))
    found.append(Message("how often each latent fires", "all-reduce", "data", axes.data, latents * 4))
    return [message for message in found if message.among > 1]
