"""The SAE classes of the library dictionary_learning, and which SAELens architecture each of them computes.

One table, CLASSES, serves import and export. Numpy alone: a class is told by the arrays of its state_dict.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
Meta = dict[str, Any]


@dataclass(frozen=True)
class LibraryClass:
    """One of dictionary_learning's SAE classes, and the SAELens architecture that computes the same."""

    saelens: str  # SAELens's name of that architecture
    keys: tuple[str, ...]  # all keys of its state_dict
    read: Callable[[Arrays], Arrays]  # state_dict -> SAELens's tensors
    write: Callable[[Arrays, Meta], Arrays] | None  # (weights under our names, metadata) -> state_dict; None: never
    trained_as: str = ""  # the one architecture of ours that is written so; none: all others that SAELens calls this
    subtracts_b_dec: bool = True  # whether its encoder subtracts b_dec from the input
    has_thresholds: bool = False  # whether its threshold is one of each latent


def library_class(saelens: str, trained_as: str = "") -> str:
    """The class for an SAE that SAELens calls `saelens` and that we trained as the architecture `trained_as`."""
    fitting = {name: known for name, known in CLASSES.items() if known.saelens == saelens and known.write is not None}
    written = {known.trained_as: name for name, known in fitting.items()}
    return written.get(trained_as, written[""])


def _linear(state: Arrays, b_dec: str) -> Arrays:
    found = {"W_enc": state["encoder.weight"].T, "W_dec": state["decoder.weight"].T, "b_dec": state[b_dec]}
    return found | ({"b_enc": state["encoder.bias"]} if "encoder.bias" in state else {})


def _own(state: Arrays) -> Arrays:
    return {name: state[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}


def _repeated(state: Arrays, tensors: Arrays) -> Arrays:
    return tensors | {"threshold": np.full(tensors["W_enc"].shape[1], float(state["threshold"]))}


def _gated(state: Arrays) -> Arrays:
    renamed = {"b_gate": state["gate_bias"], "b_mag": state["mag_bias"], "r_mag": state["r_mag"]}
    return _linear(state, "decoder_bias") | renamed


def _matrices(weights: Arrays) -> Arrays:
    return {"encoder.weight": weights["W_enc"].T, "decoder.weight": weights["W_dec"].T}


def _state_plain(weights: Arrays, known: Meta) -> Arrays:
    return _matrices(weights) | {"bias": weights["b_dec"], "encoder.bias": weights["b_enc"]}


def _state_gated(weights: Arrays, known: Meta) -> Arrays:
    biases = {"gate_bias": weights["b_enc"], "mag_bias": weights["b_mag"], "r_mag": weights["r_mag"]}
    return _matrices(weights) | {"decoder_bias": weights["b_dec"]} | biases


def _state_topk(weights: Arrays, known: Meta) -> Arrays:
    return _matrices(weights) | {"encoder.bias": weights["b_enc"], "b_dec": weights["b_dec"]} | _buffers(weights, known)


def _state_matryoshka(weights: Arrays, known: Meta) -> Arrays:
    ends = known.get("prefixes") or [len(weights["b_enc"])]
    return _own(weights) | _buffers(weights, known) | {"group_sizes": np.diff([0, *ends]).astype(np.int64)}


def _state_jumprelu(weights: Arrays, known: Meta) -> Arrays:
    """Its encoder subtracts no b_dec: the bias is b_enc - b_dec @ W_enc."""
    shift_F = weights["b_dec"].astype(np.float64) @ weights["W_enc"].astype(np.float64)
    return _own(weights) | {"b_enc": (weights["b_enc"] - shift_F).astype(np.float32), "threshold": weights["threshold"]}


def _buffers(weights: Arrays, known: Meta) -> Arrays:
    threshold = weights["threshold"][0] if "threshold" in weights else -1  # of a topk: as one that was never set
    return {"k": np.asarray(known["k"], np.int32), "threshold": np.asarray(threshold, np.float32)}


MATRICES = ("encoder.weight", "decoder.weight", "W_enc", "W_dec")
"""The keys of two dimensions."""
SCALARS = ("k", "threshold")
"""The keys that hold one number, but for `has_thresholds`."""
COUNTS = ("k", "group_sizes")
"""The keys that hold whole numbers."""

_LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")
_TOPK = (*_LINEAR, "b_dec", "k", "threshold")
_GATED = ("encoder.weight", "decoder.weight", "decoder_bias", "r_mag", "gate_bias", "mag_bias")
_OWN = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")

CLASSES: dict[str, LibraryClass] = {
    "AutoEncoder": LibraryClass("standard", (*_LINEAR, "bias"), lambda state: _linear(state, "bias"), _state_plain),
    "AutoEncoderNew": LibraryClass(
        "standard",
        (*_LINEAR, "decoder.bias"),
        lambda state: _linear(state, "decoder.bias"),
        write=None,
        subtracts_b_dec=False,
    ),
    "GatedAutoEncoder": LibraryClass("gated", _GATED, _gated, _state_gated),
    "AutoEncoderTopK": LibraryClass("topk", _TOPK, lambda state: _linear(state, "b_dec"), _state_topk),
    "BatchTopKSAE": LibraryClass(
        "jumprelu", _TOPK, lambda state: _repeated(state, _linear(state, "b_dec")), _state_topk, trained_as="batchtopk"
    ),
    "MatryoshkaBatchTopKSAE": LibraryClass(
        "jumprelu",
        (*_OWN, "k", "group_sizes"),
        lambda state: _repeated(state, _own(state)),
        _state_matryoshka,
        trained_as="matryoshka",
    ),
    "JumpReluAutoEncoder": LibraryClass(
        "jumprelu",
        _OWN,
        lambda state: _own(state) | {"threshold": state["threshold"]},
        _state_jumprelu,
        subtracts_b_dec=False,
        has_thresholds=True,
    ),
}
"""dictionary_learning's classes by name."""
