"""Which rows a detector of a property is chosen on, and which it is measured on. Standard library and numpy only.

The *children* of a property are the tokens, or the words, that have it. In each trial the children are split into two
halves, those with the property and the others apart, and so are the documents, once. A detector is chosen on one half
of the children in one half of the documents and measured on the *other* children in the *other* documents.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from hafs_jax.base.errors import UserError

SPLITS, LEAST_CHILDREN, LEAST_ROWS = 5, 4, 20


class Trial(NamedTuple):
    """The cells of one trial, and of which of its rows each is. A cell is a token id in one half of the documents."""

    chosen_U: Bool[np.ndarray, "2U"]  # where the detector is chosen
    unseen_U: Bool[np.ndarray, "2U"]  # the other children, in the other documents
    seen_U: Bool[np.ndarray, "2U"]  # the children that it was chosen on, in the other documents


@dataclass(frozen=True)
class Property:
    """A property that has rows enough, with its trials."""

    name: str
    is_positive_U: Bool[np.ndarray, "2U"]  # cells of token ids with the property
    trials: tuple[Trial, ...]
    children: int  # those with rows
    rows: int  # with the property


@dataclass(frozen=True)
class Plan:
    """N rows in 2 U cells, of U token ids in two halves of the documents, and the trials of each property."""

    cell_N: Int[np.ndarray, "N"]
    rows_U: Int[np.ndarray, "2U"]  # rows of each cell
    token_U: Int[np.ndarray, "2U"]  # token id of each cell
    child_U: Int[np.ndarray, "2U"]  # number of the child of each cell
    properties: tuple[Property, ...]
    left_out: dict[str, str] = field(default_factory=dict)  # {property: why it has no trials}


def plan(
    token_ids: Int[np.ndarray, "N"],
    documents: Int[np.ndarray, "N"],
    properties: Mapping[str, Bool[np.ndarray, "V"]],
    children: Int[np.ndarray, "V"] | None = None,
    n_splits: int = SPLITS,
    seed: int = 0,
    least_children: int = LEAST_CHILDREN,
    least_rows: int = LEAST_ROWS,
) -> Plan:
    """The trials of each property over rows with these token ids and document numbers.

    `properties` are masks over token ids. `children` gives the child of each id (default: the id itself); ids of one
    child, such as the forms of a word, are never parted.

    - The documents are parted at random into two halves, the same in all trials.
    - The children are parted in each of `n_splits` splits. Those of which an id has the property, and the others, are
      each ordered by their rows, and every two neighbours are parted at random. So both halves have children of all
      frequencies.
    - Each split makes two trials: one chooses on the first half of the children in the first half of the documents, the
      other on the second half of both. Each measures on the other half of both.

    A property is left out where a trial has less than `least_children` children or `least_rows` rows with it, or
    `least_rows` rows without it, to choose or to measure on; or where the same rows have it as an earlier one. The
    splits of a property don't depend on the others. `UserError` where an id lies outside of a mask, or there are fewer
    than two documents.
    """
    token_ids, documents = np.asarray(token_ids, np.int64), np.asarray(documents, np.int64)
    for name, mask_V in [*properties.items(), *([] if children is None else [("children", children)])]:
        if len(token_ids) and not 0 <= token_ids.min() <= token_ids.max() < len(mask_V):
            ids = f"ids from {token_ids.min()} to {token_ids.max()}"
            raise UserError(f"{name}: expected a mask over all token ids, found {len(mask_V)} entries and {ids}")
    distinct, document_N = np.unique(documents, return_inverse=True)
    if len(distinct) < 2:
        raise UserError(f"expected rows of at least 2 documents, found {len(distinct)}; take more held-out text")
    half_N = (np.random.default_rng(seed).permutation(len(distinct)) % 2)[document_N]
    used, index_N = np.unique(token_ids, return_inverse=True)
    cell_N = half_N * len(used) + index_N
    rows_U = np.bincount(cell_N, minlength=2 * len(used))
    half_U, token_U = np.repeat([0, 1], len(used)), np.tile(used, 2)
    child_U = np.unique(token_U if children is None else np.asarray(children)[token_U], return_inverse=True)[1]
    found: list[Property] = []
    left_out: dict[str, str] = {}
    seen: dict[bytes, str] = {}
    for name, mask_V in properties.items():
        is_positive_U = np.asarray(mask_V, bool)[token_U]
        trials = tuple(_trials(is_positive_U, child_U, rows_U, half_U, n_splits, seed))
        reason = _problem(trials, is_positive_U, child_U, rows_U, least_children, least_rows)
        if not reason and (same := seen.setdefault(is_positive_U.tobytes(), name)) != name:
            reason = f"the same rows as {same}"
        if reason:
            left_out[name] = reason
            continue
        with_rows_U = is_positive_U & (rows_U > 0)
        n_children = len(np.unique(child_U[with_rows_U]))
        found.append(Property(name, is_positive_U, trials, n_children, int(rows_U[is_positive_U].sum())))
    return Plan(cell_N, rows_U, token_U, child_U, tuple(found), left_out)


def halves(
    counts_C: Int[np.ndarray, "C"], is_positive_C: Bool[np.ndarray, "C"], generator: np.random.Generator
) -> Int[np.ndarray, "C"]:
    """0 or 1 for each child. Positive children and the others are each ordered by their counts, and of every two
    neighbours a random one is 0; so is a last one without neighbour, half of the time."""
    half_C = np.zeros(len(counts_C), np.int64)
    for group in (np.flatnonzero(is_positive_C), np.flatnonzero(~is_positive_C)):
        ordered = group[np.argsort(-counts_C[group], kind="stable")]
        first = generator.integers(0, 2, -(-len(ordered) // 2))
        half_C[ordered] = np.stack([first, 1 - first], 1).ravel()[: len(ordered)]
    return half_C


def _trials(
    is_positive_U: np.ndarray, child_U: np.ndarray, rows_U: np.ndarray, half_U: np.ndarray, n_splits: int, seed: int
) -> Iterator[Trial]:
    n_children = int(child_U.max(initial=-1)) + 1
    counts_C = np.bincount(child_U, weights=rows_U, minlength=n_children).astype(np.int64)
    is_positive_C = np.bincount(child_U[is_positive_U], minlength=n_children) > 0
    for split in range(n_splits):
        side_U = halves(counts_C, is_positive_C, np.random.default_rng([seed, split]))[child_U]
        for side in (0, 1):
            other_U = half_U != side
            yield Trial((side_U == side) & ~other_U, (side_U != side) & other_U, (side_U == side) & other_U)


def _problem(
    trials: tuple[Trial, ...],
    is_positive_U: np.ndarray,
    child_U: np.ndarray,
    rows_U: np.ndarray,
    least_children: int,
    least_rows: int,
) -> str:
    """Why the trials don't do; empty where they do."""
    for trial in trials:
        for cells_U in (trial.chosen_U, trial.unseen_U):
            positive_U = cells_U & is_positive_U & (rows_U > 0)
            found = len(np.unique(child_U[positive_U]))
            if found < least_children:
                return f"{found} tokens in a half, expected {least_children}"
            for kind, kind_U in (("with it", positive_U), ("without it", cells_U & ~is_positive_U)):
                if (rows := int(rows_U[kind_U].sum())) < least_rows:
                    return f"{rows} rows {kind} in a half, expected {least_rows}"
    return ""
