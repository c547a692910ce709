"""Dictionary vectors beside one another: nearest, sharing direction, firing together; across runs. Torch; no jax."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float

COVERS = 0.5  # a parent fires on at least this share of its child's rows
RATIO = 2.0  # and covers the child at least so many times better than the child covers it


@torch.no_grad()
def sharing(
    W_dec: Float[torch.Tensor, "F D"],
    chosen_C: np.ndarray,
    together_CF: np.ndarray,
    count_F: np.ndarray,
    floor: float,
    most: int,
) -> list[list[dict[str, Any]]]:
    """Of each chosen latent i, the at most `most` latents j with u_i . u_j >= `floor`, highest cosine first.

    Each is {"index": j, "cosine", "covered": P(j fires | i fires), "covers": P(i fires | j fires), "kind"}: j is i's
    `parent` where it fires on at least COVERS of i's rows and at least RATIO times as much of i's as i of its own, its
    `child` the other way round, and else a `peer`. A child that has absorbed its parent fires without it: a peer.
    """
    unit_FD = torch.nn.functional.normalize(W_dec.float(), dim=1)
    found: list[list[dict[str, Any]]] = []
    for slot, index in enumerate(chosen_C.tolist()):
        cosine_F = unit_FD @ unit_FD[index]
        cosine_F[index] = -2.0
        best = cosine_F.topk(min(most, len(cosine_F)))
        entries = []
        for cosine, other in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            if cosine < floor:
                break
            both = int(together_CF[slot, other])
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
    """Of each chosen latent i, the at most `most` latents j of the highest phi > 0 that fire with it on `least` rows.

    phi = (N n_ij - n_i n_j) / sqrt(n_i (N - n_i) n_j (N - n_j)) is the correlation of the two firings over N rows.
    (Pointwise mutual information, which is also given, ranks by rarity: one shared row of two rare latents tops it.)
    Each is {"index", "phi", "pmi": log2(N n_ij / (n_i n_j)), "rows": n_ij}.
    """
    found: list[list[dict[str, Any]]] = []
    n_F = count_F.astype(np.float64)
    for slot, index in enumerate(chosen_C.tolist()):
        both_F, n = together_CF[slot].astype(np.float64), n_F[index]
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
    """`digits` significant digits: what a page shows, in a fraction of the bytes."""
    return float(f"{float(value):.{digits}g}")
