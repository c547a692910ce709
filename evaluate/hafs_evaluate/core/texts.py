"""The language model over texts of different lengths, with little padding. Imports torch, not jax."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

BATCH_TEXTS = 256


@torch.no_grad()
def text_batches(
    model: Any,
    ids: Sequence[Int[np.ndarray, "_"]],
    hook_point: str,
    batch_tokens: int,
    progress: Callable[[int], Any] = lambda tokens: None,
) -> Iterator[tuple[list[int], Float[Tensor, "B L D"]]]:
    """(indices of texts, their activations) for all texts, whose token ids are `ids`, in batches of near lengths.

    The texts are padded on the right to the longest of the batch, L tokens, which attention, being causal, hides from
    them; the activations of the padding mean nothing. `progress` is told the number of tokens of each batch.
    """
    for batch in by_length([len(each) for each in ids], batch_tokens):
        tokens_BL = torch.zeros(len(batch), len(ids[batch[-1]]), dtype=torch.long)
        for row, index in enumerate(batch):
            tokens_BL[row, : len(ids[index])] = torch.from_numpy(ids[index].astype(np.int64))
        yield batch, model.activations(tokens_BL, hook_point)
        progress(sum(len(ids[index]) for index in batch))


def by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of texts in batches, shortest first, so that padding is nearly nothing.

    A batch has at most BATCH_TEXTS texts and `batch_tokens` tokens, padding included, or a single text.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if batch and (len(batch) == BATCH_TEXTS or (len(batch) + 1) * lengths[index] > batch_tokens):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
