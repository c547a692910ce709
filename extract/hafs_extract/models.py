"""The language model: loading it, its activations at a hook point, its logits with a splice. PyTorch, never JAX.

A splice replaces the activations at a hook point during a forward pass. Hook points on the residual stream are read
from the transformers model itself: that is faster than TransformerLens's bridge, and a test holds the two equal. All
others go through the bridge.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor
from torch.fx.experimental import _config as shape_config

from hafs_extract import packaged
from hafs_extract.hub import go_offline, hub_problem
from hafs_jax.base.errors import UserError
from hafs_jax.base.options import did_you_mean
from hafs_jax.store.manifest import Manifest, ModelInfo

_RESID = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")
_BLOCK = re.compile(r"blocks\.(\d+)\.")

Splice = Callable[[Tensor], Tensor]


class _Stop(Exception):
    """Ends a forward pass when all wanted activations are there."""


class LanguageModel:
    """A causal language model and its tokenizer. Places in it are named as TransformerLens names its hook points."""

    def __init__(self, hf: Any, tokenizer: Any, info: ModelInfo, device: torch.device) -> None:
        self.hf = hf.eval().requires_grad_(False).to(device)
        self.tokenizer = tokenizer
        self.info = info
        self.device = device
        self._compiled = False

    @property
    def bos_token_id(self) -> int | None:
        return self.tokenizer.bos_token_id

    @property
    def prepend_bos(self) -> bool:
        """Whether every context begins with BOS: it does where the tokenizer has one."""
        return self.bos_token_id is not None

    @property
    def max_context_length(self) -> int | None:
        """The most positions that the model was made for; None where its config does not say."""
        return getattr(self.hf.config.get_text_config(), "max_position_embeddings", None)

    @cached_property
    def bridge(self) -> Any:
        """The model as a TransformerBridge of TransformerLens. It shares the weights, and is made without the hub."""
        try:
            from transformer_lens.model_bridge import TransformerBridge
        except ImportError as error:
            raise UserError(f"{error.name} is not installed; pip install 'hafs-jax[extract]'") from error
        bridge = TransformerBridge.boot_transformers(
            self.info.name, hf_model=self.hf, tokenizer=self.tokenizer, device=self.device, dtype=self.hf.dtype
        )
        return bridge.requires_grad_(False)  # the bridge turns gradients on

    def tokenize(self, texts: list[str]) -> list[np.ndarray]:
        """The token ids of each text, [tokens] int32, without BOS. Names of special tokens count as plain text."""
        encoded = self.tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )
        return [np.asarray(ids, np.int32) for ids in encoded["input_ids"]]

    def check_hook_point(self, hook_point: str) -> int:
        """The width D of the activations at `hook_point`; `UserError` with a suggestion where there is none."""
        resid = _RESID.fullmatch(hook_point)
        if resid and int(resid[1]) < self.info.n_layers:
            return self.info.d_model
        last = f"blocks.{self.info.n_layers - 1}.hook_resid_post"
        if resid or hook_point not in self.bridge.hook_dict:
            near = last if resid else did_you_mean(hook_point, self.bridge.hook_dict).removeprefix("; ")
            raise UserError(
                f"hook point {hook_point!r}: {self.info.name} has {self.info.n_layers} layers and no such hook point;"
                f" {near if near and not resid else f'the last is {last}'}"
            )
        tokens = torch.zeros(1, 2, dtype=torch.long, device=self.device)
        return self.activations(tokens, hook_point).shape[-1]

    def activations(self, tokens_BL: Int[Tensor, "B L"], hook_point: str) -> Float[Tensor, "B L D"]:
        """The activations at `hook_point`, in the model's dtype. Layers after it are not run.

        Shorter contexts may be padded on the right with any token: attention is causal, so that no position sees it.
        The activations of several heads are joined: [B, L, heads, width] becomes [B, L, heads * width].
        """
        return self.activations_at(tokens_BL, (hook_point,))[hook_point]

    @torch.no_grad()
    def activations_at(
        self, tokens_BL: Int[Tensor, "B L"], hook_points: Sequence[str]
    ) -> dict[str, Float[Tensor, "B L D"]]:
        """The `activations` at each of `hook_points`, from one forward pass. Their widths D may differ."""
        found: dict[str, Tensor] = {}
        tokens_BL = tokens_BL.to(self.device)
        modules = {hook_point: self._resid_module(hook_point) for hook_point in hook_points}
        if self.compiles(hook_points):

            def keep(hook_point: str, acts: Tensor) -> Tensor:
                found[hook_point] = acts
                if len(found) == len(modules):
                    raise _Stop
                return acts

            with contextlib.ExitStack() as hooks:
                for hook_point, (module, before) in modules.items():
                    hooks.enter_context(_hooked(module, before, partial(keep, hook_point)))
                if self._compiled:  # shapes that the blocks were not compiled for, such as a batch of one, run eagerly
                    hooks.enter_context(torch.compiler.set_stance("eager_on_recompile"))
                hooks.enter_context(contextlib.suppress(_Stop))
                self.hf(tokens_BL, use_cache=False)
        else:
            blocks = [_BLOCK.match(hook_point) for hook_point in modules]
            self.bridge.run_with_hooks(
                tokens_BL,
                stop_at_layer=max(int(block[1]) for block in blocks if block) + 1 if all(blocks) else None,
                return_type=None,
                fwd_hooks=[(point, lambda acts, hook, point=point: found.update({point: acts})) for point in modules],
            )
        return {hook_point: found[hook_point].flatten(2) for hook_point in hook_points}

    def compiles(self, hook_points: Sequence[str]) -> bool:
        """Whether `compile_blocks` helps. It does where all are on the residual stream; the bridge is not compiled."""
        return all(self._resid_module(hook_point)[0] is not None for hook_point in hook_points)

    def compile_blocks(self, hook_points: Sequence[str], shape: tuple[int, int]) -> None:
        """Compiles the blocks that `activations_at(hook_points)` runs with `torch.compile`, once for all batch sizes.

        `shape` [B, L] is that of a usual batch, of at least two contexts; the code is tuned to it. Compiled activations
        differ from others by rounding, since fused operations skip intermediate rounding. Raises `UserError` where
        compiling fails, for example without a C++ compiler. The model is then as it was.
        """
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(packaged.cache_folder() / "torch"))  # not in /tmp
        (B, L), blocks = shape, self._blocks()
        assert blocks is not None and self.compiles(hook_points)
        depth = 1 + max(int(match[1]) for match in map(_RESID.fullmatch, hook_points) if match)
        plain = [block.forward for block in blocks[:depth]]
        try:
            for block in blocks[:depth]:
                block.forward = torch.compile(block.forward, dynamic=True)
            with cast(Any, shape_config).patch(use_duck_shape=False):  # two sizes that are equal now may differ later
                self.activations_at(torch.zeros(B, L, dtype=torch.long), hook_points)
        except (RuntimeError, OSError) as error:
            for block, forward in zip(blocks, plain, strict=False):
                block.forward = forward
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"torch.compile fails on {self.info.name}: {reason}") from error
        self._compiled = True

    @torch.no_grad()
    def logits(
        self, tokens_BL: Int[Tensor, "B L"], splice: Splice | None = None, hook_point: str | None = None
    ) -> Float[Tensor, "B L V"]:
        """The logits of a full forward pass. `splice` maps the activations at `hook_point` to their replacement."""
        tokens_BL = tokens_BL.to(self.device)
        if splice is None or hook_point is None:
            return self.hf(tokens_BL, use_cache=False).logits
        module, before = self._resid_module(hook_point)
        if module is not None:
            with _hooked(module, before, splice):
                return self.hf(tokens_BL, use_cache=False).logits
        hook = (hook_point, lambda acts, hook: splice(acts.flatten(2)).reshape(acts.shape))
        return self.bridge.run_with_hooks(tokens_BL, return_type="logits", fwd_hooks=[hook])

    def _resid_module(self, hook_point: str) -> tuple[Any, bool]:
        """The transformers block of a hook point, and whether its input is meant. None off the residual stream."""
        resid, blocks = _RESID.fullmatch(hook_point), self._blocks()
        return (None, False) if resid is None or blocks is None else (blocks[int(resid[1])], resid[2] == "pre")

    def _blocks(self) -> torch.nn.ModuleList | None:
        """The transformers blocks; None where the model keeps them in no list."""
        lists = (module for module in self.hf.base_model.modules() if isinstance(module, torch.nn.ModuleList))
        return next((found for found in lists if len(found) == self.info.n_layers), None)


@contextlib.contextmanager
def _hooked(module: Any, before: bool, change: Splice) -> Iterator[None]:
    """Passes the hidden states that enter (`before`) or leave a block through `change`."""

    def enter(_: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    def leave(_: Any, args: tuple, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handle = (
        module.register_forward_pre_hook(enter, with_kwargs=True) if before else module.register_forward_hook(leave)
    )
    try:
        yield
    finally:
        handle.remove()


def load_model(name: str, dtype: str, revision: str | None = None, device: str = "auto") -> LanguageModel:
    """The model `name`: a packaged one, a local folder, or one of the hub (`revision` is for the hub alone).

    Raises `UserError` where it cannot be loaded.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; pip install 'hafs-jax[extract]'") from error
    if name in packaged.MODELS:
        wheel = packaged.MODELS[name].wheel
        where, origin, revision_used = str(packaged.model_folder(name)), f"wheel:{wheel.requirement}", wheel.sha256
        revision = None
    elif Path(name).is_dir():
        where, origin, revision_used = name, f"folder:{Path(name).resolve()}", None
        revision = None
    else:
        where, origin, revision_used = name, "hub", revision
    transformers.utils.logging.disable_progress_bar()  # there is one for each file, and it is over in a moment
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, revision=revision)
        hf = transformers.AutoModelForCausalLM.from_pretrained(where, revision=revision, dtype=getattr(torch, dtype))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"model {name!r} does not load from {origin}: {reason}") from error
    config = hf.config.get_text_config()
    if origin == "hub":
        revision_used = getattr(hf.config, "_commit_hash", None) or revision
    info = ModelInfo(name, revision_used, origin, dtype, config.num_hidden_layers, config.hidden_size)
    return LanguageModel(hf, tokenizer, info, pick_device(device))


def load_for_manifest(manifest: Manifest, dtype: str | None = None, device: str = "auto") -> LanguageModel:
    """The model that made a store, in the same revision. `dtype` overrides the dtype that it computed in."""
    info = manifest.model
    if not manifest.has_tokens:
        raise UserError(
            f"the store of {info.name} ({info.origin}) was imported from an array: it has no language model"
        )
    name = info.origin.removeprefix("folder:") if info.origin.startswith("folder:") else info.name
    if name != info.name and not Path(name).is_dir():
        raise UserError(f"the store's model was read from {name}, where there is no folder now; put it back there")
    if info.origin.startswith("wheel:") and name not in packaged.MODELS:
        raise UserError(f"the store's model {name!r} ({info.origin}) is not packaged in this version; extract again")
    if info.origin == "hub" and hub_problem():
        go_offline()  # its cache may have the model; without this, it would retry for minutes
    model = load_model(name, dtype or info.dtype, info.revision, device)
    if (found := (model.info.revision, model.info.d_model)) != (info.revision, info.d_model):
        raise UserError(f"model {name}: the store was made by {(info.revision, info.d_model)}, found {found}")
    return model


def pick_device(device: str) -> torch.device:
    """The torch device: `auto` is CUDA where there is one, else the CPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r} cannot be used ({str(error).splitlines()[0]}); say --device cpu") from error
    return torch.device(device)
