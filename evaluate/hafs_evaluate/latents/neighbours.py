"""A latent's neighbours within its SAE: those that share its direction, and those that fire with it.

Imports torch, not jax.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float

COVERS = 0.5  # a parent fires on at least this share of its child's rows,
RATIO = 2.0  # and this share is at least so many times that of the parent's rows on which the child fires


CHUNK_FLOATS = 1 << 24  # cosines computed at once: 64 MiB


@torch.no_grad()
def nearest(W_dec: Float[torch.Tensor, "F D"], n: int) -> tuple[np.ndarray, np.ndarray]:
    """The `n` other dictionary vectors nearest to each by cosine, the nearest first, and these cosines: [F, n] both."""
    unit_FD = torch.nn.functional.normalize(W_dec.float(), dim=1)
    n, parts = min(n, len(unit_FD) - 1), []
    step = max(1, CHUNK_FLOATS // len(unit_FD))
    for start in range(0, len(unit_FD), step):
        cosine_CF = unit_FD[start : start + step] @ unit_FD.T
        cosine_CF.diagonal(start).fill_(-2.0)  # never its own neighbour
        best = cosine_CF.topk(n)
        parts.append((best.indices.cpu().numpy(), best.values.clamp(-1, 1).cpu().numpy()))
    return np.concatenate([index for index, _ in parts]), np.concatenate([cosine for _, cosine in parts])


@torch.no_grad()
def sharing(
    W_dec: Float[torch.Tensor, "F D"],
    chosen_C: np.ndarray,
    together_CF: np.ndarray,
    count_F: np.ndarray,
    floor: float,
    most: int,
) -> list[list[dict[str, Any]]]:
    """For each chosen latent i, at most `most` latents j with u_i . u_j >= `floor`, highest cosine first.

    u_i is the dictionary vector of i, normalised; `together_CF` counts the rows on which i and j both fire, `count_F`
    those on which each fires. Each entry is {"index": j, "cosine": u_i . u_j, "covered": P(j fires | i fires),
    "covers": P(i fires | j fires), "kind"}. The kind of j is

    - "parent" where covered >= COVERS and covered >= RATIO x covers;
    - "child" where the same holds with the two exchanged;
    - "peer" else. A child that has absorbed its parent is a peer too, since it fires without it.
    """
    unit_FD = torch.nn.functional.normalize(W_dec.float(), dim=1)
    found: list[list[dict[str, Any]]] = []
    for place, index in enumerate(chosen_C.tolist()):
        cosine_F = unit_FD @ unit_FD[index]
        cosine_F[index] = -2.0
        best = cosine_F.topk(min(most, len(cosine_F)))
        entries = []
        for cosine, other in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            if cosine < floor:
                break
            both = int(together_CF[place, other])
            covered, covers = both / max(count_F[index], 1), both / max(count_F[other], 1)
            entries.append(
                {
                    "index": other,
                    "cosine": rounded(cosine),
                    "covered": rounded(covered),
                    "covers": rounded(covers),
                    "kind": _kind(covered, covers),
                }
            )
        found.append(entries)
    return found


def _kind(covered: float, covers: float) -> str:
    if covered >= COVERS and covered >= RATIO * covers:
        return "parent"
    return "child" if covers >= COVERS and covers >= RATIO * covered else "peer"


def partners(
    chosen_C: np.ndarray, together_CF: np.ndarray, count_F: np.ndarray, rows: int, least: int, most: int
) -> list[list[dict[str, Any]]]:
    """For each chosen latent i, at most `most` latents j that fire with it on at least `least` rows, highest phi first.

    phi = (N n_ij - n_i n_j) / sqrt(n_i (N - n_i) n_j (N - n_j)) is the correlation of the two firings, where n_i counts
    the rows on which i fires, n_ij those on which both do, and N = `rows` all rows. Only j with phi > 0 are given. Each
    entry is {"index": j, "phi", "pmi": log2(N n_ij / (n_i n_j)), "rows": n_ij}. Pointwise mutual information (pmi) is
    no good for ranking: it prefers rare latents, and one shared row of two of them would be at the top.
    """
    found: list[list[dict[str, Any]]] = []
    n_F = count_F.astype(np.float64)
    for place, index in enumerate(chosen_C.tolist()):
        both_F, n = together_CF[place].astype(np.float64), n_F[index]
        scale_F = np.sqrt(n * (rows - n) * n_F * (rows - n_F))
        phi_F = np.divide(rows * both_F - n * n_F, scale_F, out=np.zeros_like(n_F), where=scale_F > 0)
        phi_F[both_F < max(least, 1)] = 0.0
        phi_F[index] = 0.0
        best = [int(other) for other in np.argsort(-phi_F, kind="stable")[:most] if phi_F[other] > 0]
        found.append(
            [
                {
                    "index": other,
                    "phi": rounded(phi_F[other]),
                    "pmi": rounded(np.log2(rows * both_F[other] / (n * n_F[other]))),
                    "rows": int(both_F[other]),
                }
                for other in best
            ]
        )
    return found


def rounded(value: float, digits: int = 5) -> float:
    """The value to `digits` significant digits, which is what a page shows and takes a fraction of the bytes."""
    return float(f"{float(value):.{digits}g}")
