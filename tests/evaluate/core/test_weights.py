"""Geometry of a dictionary against the full matrix of its cosines."""

import numpy as np
import pytest
import torch

from hafs_evaluate.core import weights
from hafs_evaluate.core.weights import nearest_vectors

D, F = 5, 11


@pytest.mark.parametrize("batch_floats", [13, 1 << 20])
def test_nearest_vectors_equal_the_full_cosine_matrix(monkeypatch, batch_floats):
    monkeypatch.setattr(weights, "CHUNK_FLOATS", batch_floats)
    vectors = torch.randn(F, D, generator=torch.Generator().manual_seed(0)) * torch.arange(1, F + 1)[:, None]
    index, cosine = nearest_vectors(vectors)
    unit = vectors.numpy() / np.linalg.norm(vectors.numpy(), axis=1, keepdims=True)
    full = unit @ unit.T - 3 * np.eye(F)
    assert index.tolist() == full.argmax(1).tolist()
    np.testing.assert_allclose(cosine, full.max(1), atol=1e-6)
