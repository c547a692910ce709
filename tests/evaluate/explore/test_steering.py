"""An edit changes one latent and nothing else, and continuations are those of the model with and without it."""

import dataclasses

import pytest
import torch

from hafs_evaluate.core.encode import encode
from hafs_evaluate.explore import steering
from hafs_evaluate.explore.explorer import Explorer
from hafs_evaluate.explore.requests import SteerRequest
from hafs_evaluate.explore.steering import Edit, continuation, splice_of
from hafs_jax.base.errors import UserError
from tests.evaluate.explore.conftest import RUNS
from tests.support.workspaces import D

LATENT = 3
TEXT = "rivers carried salt"


def steer(explorer: Explorer, **fields):
    entries = list(explorer.steer(SteerRequest(TEXT, RUNS[0], LATENT, **{"new_tokens": 8, **fields}), lambda: False))
    texts = {
        which: [entry["text"] for entry in entries if entry.get("which") == which] for which in ("plain", "steered")
    }
    return texts["plain"][-1], texts["steered"][-1], entries


def test_an_added_vector_is_the_dictionary_vector_times_the_value(run) -> None:
    acts = torch.randn(6, D, generator=torch.Generator().manual_seed(0))
    edited = Edit(run.sae, LATENT, "add", 2.5)(acts)
    torch.testing.assert_close(edited, acts + 2.5 * run.sae.W_dec[LATENT])
    assert torch.equal(Edit(run.sae, LATENT, "add", 0.0)(acts), acts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_clamp_replaces_the_latents_part_and_keeps_the_rest_and_the_error(run, dtype) -> None:
    acts = torch.randn(6, D, generator=torch.Generator().manual_seed(1)).to(dtype)
    latents = encode(run.sae, acts)
    error = acts.float() - run.sae.decode(latents)
    clamped = latents.clone()
    clamped[:, LATENT] = 4.0
    rounding = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    edited = Edit(run.sae, LATENT, "clamp", 4.0)(acts)
    assert edited.dtype == dtype
    torch.testing.assert_close(edited.float(), run.sae.decode(clamped) + error, **rounding)
    for row, value in enumerate(
        latents[:, LATENT].tolist()
    ):  # a latent that has the value already: the same to the bit
        assert torch.equal(Edit(run.sae, LATENT, "clamp", value)(acts)[row], acts[row])


def test_what_no_sae_was_trained_on_is_left_alone(explorer: Explorer, run) -> None:
    manifest = dataclasses.replace(
        explorer.manifest, norm_filter=dataclasses.replace(explorer.manifest.norm_filter, max_norm=10.0)
    )
    acts = (
        torch.nn.functional.normalize(torch.ones(1, 4, D), dim=-1) * torch.tensor([5.0, 5.0, 11.0, 5.0])[None, :, None]
    )
    splice = splice_of(Edit(run.sae, LATENT, "add", 1.0), manifest)
    assert (splice(acts) != acts).any(-1).tolist() == [[False, True, False, True]]
    assert (splice(acts[:, :1]) != acts[:, :1]).any()  # a later pass has no BOS


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_coefficient_0_continues_as_the_plain_model_does(explorer: Explorer, temperature: float) -> None:
    plain, steered, entries = steer(explorer, strength=0.0, temperature=temperature, seed=3)
    assert plain == steered and entries[-1] == {"done": True, "first_difference": None, "is_same": True}
    assert entries[0]["value"] == 0


def test_steering_changes_the_continuation_and_the_seed_the_draw(explorer: Explorer) -> None:
    plain, steered, entries = steer(explorer, strength=20.0)
    assert plain != steered and not entries[-1]["is_same"]
    assert entries[0]["value"] == pytest.approx(20 * entries[0]["maximum"], rel=1e-4)
    assert steer(explorer, strength=20.0)[:2] == (plain, steered)
    drawn = {steer(explorer, strength=0.0, temperature=1.5, seed=seed)[0] for seed in range(4)}
    assert len(drawn) > 1 and steer(explorer, strength=0.0, temperature=1.5, seed=2)[0] in drawn


@pytest.mark.parametrize("mode", [None, "add", "clamp"])
def test_kept_keys_and_values_change_nothing(explorer: Explorer, run, mode, monkeypatch) -> None:
    ids = explorer._reading(TEXT).ids_L
    edit = Edit(run.sae, LATENT, mode, 30.0) if mode else None
    asked = (explorer.model, explorer.manifest, ids, edit, 12, 0.0, 0)
    cached = list(continuation(*asked))
    monkeypatch.setattr(steering, "_cached", steering._uncached)
    assert list(continuation(*asked)) == cached
    expected = ids
    for _ in cached:
        splice = splice_of(edit, explorer.manifest) if edit else None
        logits = explorer.model.logits(expected[None], splice, explorer.manifest.hook_point)
        expected = torch.cat([expected, logits[0, -1].argmax()[None]])
    assert expected[len(ids) :].tolist() == cached


def test_a_continuation_ends_at_its_limits(explorer: Explorer, monkeypatch) -> None:
    ids = explorer._reading(TEXT).ids_L
    asked = (explorer.model, explorer.manifest)
    assert len(list(continuation(*asked, ids, None, 5, 0.0, 0))) == 5
    whole = torch.cat([ids, torch.full((explorer.model.max_context_length - len(ids) - 2,), 5)])
    assert len(list(continuation(*asked, whole, None, 50, 0.0, 0))) == 2
    with pytest.raises(UserError, match="the text fills all 64 tokens that the model reads: shorten it"):
        next(continuation(*asked, torch.cat([whole, ids[:2]]), None, 1, 0.0, 0))
    first = next(continuation(*asked, ids, None, 1, 0.0, 0))
    monkeypatch.setattr(steering, "_end_tokens", lambda model: {first})
    assert list(continuation(*asked, ids, None, 5, 0.0, 0)) == [first]
    request = SteerRequest(TEXT, RUNS[0], LATENT, new_tokens=8)
    stopped = list(explorer.steer(request, lambda: True))
    assert len(stopped) == 2 and stopped[-1]["done"]


def test_a_latent_that_never_fired_has_no_unit(explorer: Explorer, run, monkeypatch) -> None:
    monkeypatch.setattr(run, "max_F", torch.zeros_like(run.max_F))
    with pytest.raises(UserError, match=r"latent 3 of baseline-s0 fired on none of the .* rows that were evaluated"):
        next(explorer.steer(SteerRequest(TEXT, RUNS[0], LATENT), lambda: False))
