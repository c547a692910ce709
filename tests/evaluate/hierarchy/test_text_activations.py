"""Activations of labelled texts: their cache, and means over the tokens that the store would keep."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hafs_evaluate.hierarchy.text_activations import fill_text_cache
from tests.support.workspaces import D


def test_an_interrupted_pass_goes_on_and_means_are_of_the_kept_tokens(workspace, model_folder, monkeypatch):
    from tests.support.torch_saes import tiny_model

    monkeypatch.setattr("hafs_evaluate.hierarchy.text_activations.PART_TEXTS", 3)
    model, manifest, root = tiny_model(model_folder), workspace.train.manifest, workspace.cache / "labelled"
    texts = [f"the cell of glass {'and iron ' * n}{n}" for n in range(8)]
    calls = []

    class Failing:
        tokenize = staticmethod(model.tokenize)

        def activations(self, tokens_BL, hook_point):
            calls.append(len(tokens_BL))
            if len(calls) == 3:
                raise KeyboardInterrupt
            return model.activations(tokens_BL, hook_point)

    with pytest.raises(KeyboardInterrupt):
        fill_text_cache(texts, manifest, root, Failing, max_tokens=16)
    assert sum(calls[:2]) == 6
    calls.append(0)  # past the failure
    acts = fill_text_cache(texts, manifest, root, Failing, max_tokens=16)
    assert sum(calls[4:]) == 2  # only the last part
    assert (
        fill_text_cache(texts, manifest, root, lambda: pytest.fail("all is there"), max_tokens=16).where == acts.where
    )
    pooled = acts.pooled(texts)
    limit = manifest.norm_filter.max_norm or np.inf
    for text, mean in zip(texts, pooled, strict=True):
        (ids,) = model.tokenize([text])
        tokens = torch.tensor([[model.bos_token_id, *ids[:15]]])
        rows = model.activations(tokens, manifest.hook_point)[0, 1:].numpy()
        rows = rows[np.linalg.norm(rows, axis=1) <= limit]
        np.testing.assert_allclose(mean, rows.mean(0), atol=1e-4)
    doubling = SimpleNamespace(W_dec=torch.eye(2 * D, D), device="cpu", dtype=torch.float32)
    doubling.encode = lambda acts_BD: acts_BD.repeat(1, 2)
    doubled = acts.pooled(texts, doubling)
    np.testing.assert_allclose(doubled, np.tile(pooled, 2), rtol=1e-6)


@pytest.mark.parametrize("suffix", [".npy", ".json"])
def test_a_damaged_part_is_computed_again(workspace, model_folder, suffix, caplog):
    from tests.support.torch_saes import tiny_model

    model, manifest, root = tiny_model(model_folder), workspace.train.manifest, workspace.cache / "labelled"
    texts = [f"the cell of glass {'and iron ' * n}{n}" for n in range(8)]
    whole = fill_text_cache(texts, manifest, root, lambda: model).pooled(texts)
    (part,) = root.rglob(f"*{suffix}")
    data = part.read_bytes()
    part.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    again = fill_text_cache(texts, manifest, root, lambda: model).pooled(texts)
    np.testing.assert_array_equal(again, whole)
    assert part.read_bytes() == data and "they are computed again" in caplog.text
