"""Damaged, hostile and odd SAE files: imported with the same function, or refused in one line that names the file."""

import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from hafs_evaluate.core.loading import load_sae, load_saelens
from hafs_evaluate.core.reconstruction import core_metrics, store_moments
from hafs_evaluate.exchange.dictionary_learning import import_sae
from hafs_evaluate.workspace import hashed_export
from hafs_jax.base.errors import UserError
from hafs_jax.saelens_format import read_saelens
from hafs_jax.store.reader import Store
from tests.support.both_saes import D, F, K, assert_same, of_saelens, rows, saelens_folder
from tests.support.fuzz import Fuzz
from tests.support.stores import write_store

HUGE = "1" * 5000
VALUES = [None, [], {}, [3], "x", "3", -1, 0, 1.5, float("nan"), float("inf"), {"k": []}, HUGE]
ACTS = rows(2)


def test_links_are_not_followed_out_of_a_folder(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("SECRET-KEY")
    source, target = saelens_folder(tmp_path / "sae", "standard"), tmp_path / "target"
    for name in ("sparsity.safetensors", "sae_weights.safetensors", "cfg.json"):
        kept = (source / name).read_bytes() if (source / name).exists() else None
        (source / name).unlink(missing_ok=True)
        (source / name).symlink_to(secret)
        with pytest.raises(UserError, match=f"{name}: expected a file of this folder, found a link out of it"):
            import_sae(source, target)
        assert not target.exists()
        (source / name).unlink()
        if kept is not None:
            (source / name).write_bytes(kept)
    (source / "sparsity.safetensors").write_text("SECRET-KEY")
    with pytest.raises(
        UserError, match=r"sparsity\.safetensors: expected a safetensors file, found one that is damaged"
    ):
        import_sae(source, target)
    (source / "sparsity.safetensors").unlink()
    # the hub's cache: links to the same repository's blobs
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "c0ffee" / "sae", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in source.iterdir():
        (blobs / path.name).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(blobs / path.name)
    assert_same(of_saelens(import_sae(snapshot, target), ACTS)[1], of_saelens(source, ACTS)[1])
    assert not any(path.is_symlink() for path in target.iterdir())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_sae_in_half_precision_is_evaluated_in_float32(dtype: str, tmp_path: Path) -> None:
    folder = saelens_folder(tmp_path / "sae", "jumprelu", dtype=dtype)
    store = Store(write_store(tmp_path / "heldout", rows(), split="heldout"))
    assert load_saelens(folder).dtype == getattr(torch, dtype)
    sae = load_sae(hashed_export("half", folder), store.manifest)
    assert sae.dtype == torch.float32
    narrow = safetensors.torch.load_file(folder / "sae_weights.safetensors")["W_dec"]
    assert narrow.dtype == getattr(torch, dtype) and (sae.W_dec == narrow.float()).all()
    found = core_metrics(sae, store, store_moments(store))
    acts = rows().astype(np.float64)
    recon = sae(torch.tensor(rows())).numpy()
    fvu = np.square(acts - recon).sum() / np.square(acts - acts.mean(0)).sum()
    assert found.values["reconstruction"]["fvu"] == pytest.approx(fvu, rel=1e-5)
    # and as it is, wherever one is measured without `load_sae`
    own = core_metrics(load_saelens(folder), store, store_moments(store))
    assert own.latents["encoder_bias"].dtype == np.float32
    assert own.values["reconstruction"]["fvu"] == pytest.approx(fvu, rel=0.05)


def test_an_import_says_what_was_checked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        import_sae(saelens_folder(tmp_path / "sae", "topk"), tmp_path / "target")
    assert "the reconstruction of random rows are finite" in caplog.text
    wide = saelens_folder(tmp_path / "wide", "standard", dtype="float16")
    tensors = safetensors.torch.load_file(wide / "sae_weights.safetensors")
    safetensors.torch.save_file({k: 3e4 * v.sign() for k, v in tensors.items()}, wide / "sae_weights.safetensors")
    with pytest.raises(UserError, match=r"the reconstruction of random rows is not finite; .* for dtype 'float16'"):
        import_sae(wide, tmp_path / "target")
    with pytest.raises(UserError, match="a skip_transcoder reconstructs from more than its latents"):
        import_sae(saelens_folder(tmp_path / "skip", "skip_transcoder"), tmp_path / "target")


# One change of a file each: (folder, random numbers). They never make another valid SAE.
def cfg_value(folder: Path, chance: random.Random) -> None:
    cfg = json.loads((folder / "cfg.json").read_text())
    holder = cfg["metadata"] if chance.random() < 0.2 else cfg
    name = chance.choice([*sorted(holder), "activation_fn_str", "activation_fn", "activation_fn_kwargs", "d_out"])
    value = chance.choice(VALUES)
    if chance.random() < 0.2:
        holder.pop(name, None)
    else:
        holder[name] = value
    text = json.dumps(cfg).replace(f'"{HUGE}"', HUGE)
    (folder / "cfg.json").write_text(text)


def cfg_whole(folder: Path, chance: random.Random) -> None:
    text = (folder / "cfg.json").read_text()
    other = [
        "[]",
        "null",
        "3",
        '"cfg"',
        "",
        "{",
        "{}",
        HUGE,
        "[" * 100_000,
        "\x00",
        text[: chance.randrange(len(text))],
    ]
    (folder / "cfg.json").write_text(chance.choice(other))


def tensor(value: torch.Tensor, chance: random.Random) -> torch.Tensor:
    bad = value.clone()
    bad.view(-1)[chance.randrange(bad.numel())] = chance.choice([torch.nan, torch.inf, -torch.inf])
    wrong = [bad, value[None], value[..., :-1], value[..., :0], value.flatten()[0], value.unsqueeze(-1), value.int()]
    wrong += [value.double() * 1e300] if value.abs().max() > 0 else []
    wrong += [value.T.contiguous()] if value.ndim == 2 else []
    return chance.choice(wrong).clone()


def weights(folder: Path, chance: random.Random) -> None:
    path = folder / "sae_weights.safetensors"
    tensors = safetensors.torch.load_file(path)
    name = chance.choice(sorted(tensors))
    kind = chance.randrange(4)
    if kind == 0:
        tensors[chance.choice([name + "_", "", "encoder.weight"])] = tensors.pop(name)
    elif kind == 1:
        del tensors[name]
    elif kind == 2:
        tensors["scaling_factor" if chance.random() < 0.5 else "other"] = torch.full((F,), 2.0)
    else:
        tensors[name] = tensor(tensors[name], chance)
    safetensors.torch.save_file(tensors, path)


def weights_bytes(folder: Path, chance: random.Random) -> None:
    path = folder / "sae_weights.safetensors"
    data = bytearray(path.read_bytes())
    if chance.random() < 0.5:
        del data[chance.randrange(len(data)) :]
    else:  # the header alone: another byte of a weight is another SAE
        data[chance.randrange(8 + int.from_bytes(data[:8], "little"))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def config_json(folder: Path, chance: random.Random) -> None:
    config: Any = json.loads((folder / "config.json").read_text())
    kind = chance.randrange(3)
    if kind == 0:
        config = chance.choice(VALUES)
    else:
        holder = config if kind == 1 else config["trainer"]
        holder[chance.choice(sorted(holder))] = chance.choice(VALUES)
    (folder / "config.json").write_text(json.dumps(config).replace(f'"{HUGE}"', HUGE))


def state_dict(folder: Path, chance: random.Random) -> None:
    state = torch.load(folder / "ae.pt", weights_only=True)
    name = chance.choice(sorted(state))
    value, kind = state[name], chance.randrange(7)
    if kind == 0:
        state = chance.choice([[], None, 3, list(state.values()), {}, {"state": state}, {1: value}, state | {name: 3}])
    elif kind == 1:
        state[name + "_"] = state.pop(name)
    elif kind == 2:
        state = {key: torch.nn.Parameter(part) if part.is_floating_point() else part for key, part in state.items()}
    elif kind == 3:
        state[name] = chance.choice([value.to(torch.complex64), value.bool(), value.to_sparse()])
    elif kind == 4 and "threshold" in state:
        state["threshold"] = chance.choice([torch.ones(2), torch.ones(F, 1), torch.tensor(torch.nan), torch.ones(0)])
    elif kind == 5 and "k" in state:
        state["k"] = torch.tensor(chance.choice([0, -1, F + 1, 2.5, float("nan"), float("inf")]))
    elif value.is_floating_point() and value.ndim:
        state[name] = tensor(value, chance)
    torch.save(state, folder / "ae.pt")


def state_bytes(folder: Path, chance: random.Random) -> None:
    data = (folder / "ae.pt").read_bytes()
    other = [
        b"",
        b"PK\x03\x04",
        b"\x80\x02}.",
        b"\x80\x04N.",
        b"version https://git-lfs",
        data[: chance.randrange(len(data))],
    ]
    (folder / "ae.pt").write_bytes(chance.choice(other))


def library_folder(folder: Path, name: str) -> Path:
    """A folder of dictionary_learning without the library: a random state_dict of class `name`."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    shape = {"encoder.weight": (F, D), "decoder.weight": (D, F), "encoder.bias": (F,), "b_dec": (D,), "bias": (D,)}
    keys = ["encoder.weight", "encoder.bias", "decoder.weight", "bias" if name == "AutoEncoder" else "b_dec"]
    state = {key: torch.randn(shape[key], generator=generator) for key in keys}
    if name != "AutoEncoder":
        state |= {"k": torch.tensor(K), "threshold": torch.tensor(0.3)}
    torch.save(state, folder / "ae.pt")
    trainer = {"dict_class": name, "layer": 4, "lm_name": "a/b", "k": K, "submodule_name": "resid_post_layer_4"}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))
    return folder


def test_damaged_files_are_refused_or_mean_the_same(tmp_path: Path, fuzz: Fuzz) -> None:
    saelens = (cfg_value, cfg_value, cfg_whole, weights, weights_bytes)
    library = (config_json, state_dict, state_dict, state_bytes)
    sources: list[tuple[Path, tuple[Callable[[Path, random.Random], None], ...]]] = [
        (saelens_folder(tmp_path / kind, kind), saelens) for kind in ("standard", "topk", "jumprelu", "gated")
    ]
    sources += [(library_folder(tmp_path / name, name), library) for name in
                ("AutoEncoder", "AutoEncoderTopK", "BatchTopKSAE")]  # fmt: skip
    expected = []
    for place, (source, _) in enumerate(sources):
        expected.append(of_saelens(import_sae(source, tmp_path / f"whole-{place}"), ACTS)[1])
    target, folder = tmp_path / "target", tmp_path / "case"
    folder.mkdir()
    count, refused = 0, 0
    for chance in fuzz("SAE files"):
        count += 1
        place = chance.randrange(len(sources))
        source, changes = sources[place]
        for old in folder.iterdir():
            old.unlink()
        for path in source.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        change = chance.choice(changes)
        change(folder, chance)
        what = f"{change.__name__} of {source.name}"
        ways: list[Callable[[], np.ndarray]] = [lambda: of_saelens(import_sae(folder, target), ACTS)[1]]
        if changes is saelens:
            ways.append(lambda: of_weights(folder))
        for way in ways:
            try:
                found = way()
            except UserError as error:
                assert "\n" not in str(error) and str(folder) in str(error), what
                refused += 1
            except Exception as error:
                raise AssertionError(what) from error
            else:
                np.testing.assert_allclose(found, expected[place], rtol=1e-4, atol=1e-4, err_msg=what)
    assert count < 50 or count / 3 < refused < 2 * count


def of_weights(folder: Path) -> np.ndarray:
    """The reconstruction of ACTS by what `read_saelens` returns, from which a training starts."""
    found, cfg = read_saelens(folder)
    pre = (ACTS - found["b_dec"]) @ found["W_enc"] + found["b_enc"]
    if cfg["architecture"] == "topk":
        latents = np.where(pre >= np.sort(pre)[:, -cfg["k"], None], np.maximum(pre, 0), 0)
    elif cfg["architecture"] == "gated":
        magnitude = (pre - found["b_enc"]) * np.exp(found["r_mag"]) + found["b_mag"]
        latents = np.where(pre > 0, np.maximum(magnitude, 0), 0)
    else:
        latents = np.where(pre > found.get("threshold", 0), np.maximum(pre, 0), 0)
    return latents @ found["W_dec"] + found["b_dec"]
