"""The language model: loading it, its activations at a hook point, its logits with a splice. PyTorch, never JAX.

A splice replaces the activations at a hook point during a forward pass. Hook points on the residual stream are read
from the transformers model itself: that is faster than TransformerLens's bridge, and a test holds the two equal. All
others go through the bridge.
"""

import contextlib
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.fx.experimental import _config as shape_config

from hafs_extract import packaged
from hafs_extract.hub.files import plan_model
from hafs_extract.hub.presence import fetched_record, go_offline, hub_problem, model_file
from hafs_extract.loading.files import fingerprint, library_errors, some
from hafs_extract.text.documents import Chat
from hafs_jax.base.errors import UserError
from hafs_jax.base.options import did_you_mean
from hafs_jax.store.manifest import Manifest, ModelInfo

_RESID = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")
_BLOCK = re.compile(r"blocks\.(\d+)\.")
_COMMIT = re.compile(r"[0-9a-f]{40}")

_CAUSAL_TOKENS = 16
_ROUNDING = {torch.float32: (1e-4, 1e-3), torch.float16: (0.01, 0.05), torch.bfloat16: (0.05, 0.1)}
"""The largest change, relative to the norm, that may be rounding: between contexts of one shape, of two shapes."""

Splice = Callable[[Tensor], Tensor]


class _Stop(Exception):
    """Ends a forward pass when all wanted activations are there."""


class LanguageModel:
    """A causal language model and its tokenizer. Places in it are named as TransformerLens names its hook points."""

    def __init__(
        self, hf: Any, tokenizer: Any, info: ModelInfo, device: torch.device, missing_head: Sequence[str] = ()
    ) -> None:
        """`missing_head` names parameters of the output head that the weights lack: then there are no logits."""
        self.hf = hf.eval().requires_grad_(False).to(device)
        self.tokenizer = tokenizer
        self.info = info
        self.device = device
        self.missing_head = missing_head
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
        try:
            bridge = TransformerBridge.boot_transformers(
                self.info.name, hf_model=self.hf, tokenizer=self.tokenizer, device=self.device, dtype=self.hf.dtype
            )
        except Exception as error:  # of an architecture that the library does not know, it raises whatever comes
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"TransformerLens does not serve {self.info.name} ({type(error).__name__}: {reason});"
                f" choose a hook point on the residual stream, such as blocks.{self.info.n_layers - 1}.hook_resid_post"
            ) from error
        return bridge.requires_grad_(False)  # the bridge turns gradients on

    def tokenize(self, texts: list[str]) -> list[np.ndarray]:
        """The token ids of each text, [tokens] int32, without BOS. Names of special tokens count as plain text."""
        encoded = self.tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )
        return [np.asarray(ids, np.int32) for ids in encoded["input_ids"]]

    @property
    def chat(self) -> Chat:
        """The tokenizer's way with chat messages."""
        return Chat(self._chat_text, self._tokenize_chats)

    def _chat_text(self, messages: list[dict[str, Any]]) -> str:
        """The messages as one text, by the tokenizer's chat template; `UserError` where that does not take them."""
        import jinja2  # of torch's dependencies

        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False)
        except (ValueError, TypeError, KeyError, jinja2.TemplateError) as error:
            raise UserError(f"the chat template of {self.info.name} does not take these messages: {error}") from error

    def _tokenize_chats(self, texts: list[str]) -> list[np.ndarray]:
        """As `tokenize`, but names of special tokens stand for the tokens. A BOS that the template puts first goes."""
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        found = [np.asarray(ids, np.int32) for ids in encoded["input_ids"]]
        return [ids[1:] if self.prepend_bos and len(ids) and ids[0] == self.bos_token_id else ids for ids in found]

    def check_hook_point(self, hook_point: str) -> int:
        """The width D of the activations at `hook_point`.

        Raises `UserError` where there is no such hook point (with a suggestion), where the model never comes by it, and
        where it does not hold one vector for each token: attention scores [B, heads, L, L], say.
        """
        resid = _RESID.fullmatch(hook_point)
        if (resid and int(resid[1]) >= self.info.n_layers) or (not resid and hook_point not in self.bridge.hook_dict):
            last = f"blocks.{self.info.n_layers - 1}.hook_resid_post"
            near = "" if resid else did_you_mean(hook_point, self.bridge.hook_dict).removeprefix("; ")
            raise UserError(
                f"hook point {hook_point!r}: {self.info.name} has {self.info.n_layers} layers and no such hook point;"
                f" {near or f'the last is {last}'}"
            )
        shapes = []
        for B, L in ((2, 3), (1, 5)):  # a size that equals L by chance differs from it in the second
            with library_errors(self.info.name, self.info.origin, "run"):
                acts = self._read(torch.zeros(B, L, dtype=torch.long), (hook_point,))[hook_point]
            shapes.append(list(acts.shape))
            if acts.ndim < 3 or shapes[-1][:2] != [B, L] or not acts.is_floating_point():
                raise UserError(
                    f"hook point {hook_point!r}: expected one vector for each of {B} x {L} tokens, found {acts.dtype}"
                    f" {shapes[-1]}; choose another, such as blocks.{self.info.n_layers - 1}.hook_resid_post"
                )
        width = math.prod(shapes[0][2:])
        if shapes[0][2:] != shapes[1][2:] or (resid and width != self.info.d_model):
            wanted = f"width {self.info.d_model}" if resid else "one width"
            raise UserError(
                f"hook point {hook_point!r}: expected vectors of {wanted},"
                f" found {shapes[0]} and {shapes[1]} for contexts of 3 and 5 tokens"
            )
        return width

    def check_causal(self, hook_points: Sequence[str], context_length: int) -> None:
        """Raises `UserError` where the activations of a context's first tokens depend on what follows them.

        Contexts of different lengths go through the model together, so that they would be those of another text with
        another batch size: BERT's are. Some tokens are run alone, with other tokens after them up to `context_length`,
        and padded. The relative differences of a causal model are rounding: none between contexts of one shape, and
        little between shapes. Each is the median over the tokens, since a mixture of experts may, by rounding alone,
        send one token elsewhere.
        """
        n = min(_CAUSAL_TOKENS, context_length - 1)
        rows = self.hf.get_input_embeddings().weight.shape[0]
        tokens_L = 7 * torch.arange(1, context_length + 1) % rows
        padded_L = torch.where(torch.arange(context_length) < n, tokens_L, 0)
        acts, padded, alone = (
            self.activations_at(tokens[None], hook_points) for tokens in (tokens_L, padded_L, tokens_L[:n])
        )
        one_shape, two_shapes = _ROUNDING[self.hf.dtype] if self.hf.dtype in _ROUNDING else _ROUNDING[torch.bfloat16]
        for hook_point in hook_points:
            acts_nD = acts[hook_point][0, :n].double()
            for others, most in ((padded, one_shape), (alone, two_shapes)):
                change_n = (others[hook_point][0, :n].double() - acts_nD).norm(dim=-1) / acts_nD.norm(dim=-1)
                if (change := change_n.median().item()) > most:
                    raise UserError(
                        f"{self.info.name} is not causal at {hook_point}: the activations of {n} tokens change by"
                        f" {change:.2g} of their norm with what follows them (at most {most:g} is rounding); expected a"
                        " model whose tokens see only those before them: a decoder, not BERT"
                    )

    def activations(self, tokens_BL: Int[Tensor, "B L"], hook_point: str) -> Float[Tensor, "B L D"]:
        """The activations at `hook_point`, in the model's dtype. Layers after it are not run.

        Shorter contexts may be padded on the right with any token: attention is causal, so that no position sees it.
        The activations of several heads are joined: [B, L, heads, width] becomes [B, L, heads * width].
        """
        return self.activations_at(tokens_BL, (hook_point,))[hook_point]

    def activations_at(
        self, tokens_BL: Int[Tensor, "B L"], hook_points: Sequence[str]
    ) -> dict[str, Float[Tensor, "B L D"]]:
        """The `activations` at each of `hook_points`, from one forward pass. Their widths D may differ."""
        return {hook_point: acts.flatten(2) for hook_point, acts in self._read(tokens_BL, hook_points).items()}

    @torch.no_grad()
    def _read(self, tokens_BL: Int[Tensor, "B L"], hook_points: Sequence[str]) -> dict[str, Tensor]:
        """What lies at each of `hook_points`, in the shape that the model gives it."""
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
        if unseen := [hook_point for hook_point in hook_points if not isinstance(found.get(hook_point), Tensor)]:
            raise UserError(
                f"hook point {', '.join(unseen)}: {self.info.name} never comes by it with a tensor in a forward pass;"
                f" choose another, such as blocks.{self.info.n_layers - 1}.hook_resid_post"
            )
        return {hook_point: found[hook_point] for hook_point in hook_points}

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
        if self.missing_head:
            raise UserError(
                f"model {self.info.name!r} has no logits: its weights lack the output head ({some(self.missing_head)});"
                " its activations can be extracted, but what compares logits needs the whole model"
            )
        tokens_BL = tokens_BL.to(self.device)
        if splice is None or hook_point is None:
            return self.hf(tokens_BL, use_cache=False).logits
        if self._resid_module(hook_point)[0] is not None:
            with self.spliced(splice, hook_point):
                return self.hf(tokens_BL, use_cache=False).logits
        hook = (hook_point, lambda acts, hook: splice(acts.flatten(2)).reshape(acts.shape))
        return self.bridge.run_with_hooks(tokens_BL, return_type="logits", fwd_hooks=[hook])

    @contextlib.contextmanager
    def spliced(self, splice: Splice, hook_point: str) -> Iterator[None]:
        """While inside, `hf` goes on with `splice` of the activations at `hook_point`, on the residual stream."""
        module, before = self._resid_module(hook_point)
        if module is None:
            raise UserError(f"hook point {hook_point!r}: expected one on the residual stream of {self.info.name}")
        with _hooked(module, before, splice):
            yield

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
    """The model `name`: a packaged one, a local folder or GGUF file, or one of the hub (whose `revision` is meant).

    Raises `UserError` where it cannot be loaded whole.
    """
    try:
        from hafs_extract.loading.weights import load
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; pip install 'hafs-jax[extract]'") from error
    where, gguf, commit, path = name, None, None, Path(name)
    if name in packaged.MODELS:
        wheel = packaged.MODELS[name].wheel
        where, origin, commit = str(packaged.model_folder(name)), f"wheel:{wheel.requirement}", wheel.sha256
    elif path.is_dir():
        origin = f"folder:{path.resolve()}"
    elif path.exists():
        if path.suffix != ".gguf":
            raise UserError(f"model {name!r} is a file; expected a model's folder, a .gguf file, or a name on the hub")
        where, gguf, origin = str(path.parent), path.name, f"file:{path.resolve()}"
    else:
        fetched = plan_model(name, revision).run()
        where, origin, commit = str(fetched.folder), "hub", fetched.commit
    loaded = load(name, origin, where, getattr(torch, dtype), gguf)
    with library_errors(name, origin):
        text = loaded.hf.config.get_text_config()
        size = text.num_hidden_layers, text.hidden_size
    files = fingerprint(path) if origin.startswith(("folder:", "file:")) else None
    info = ModelInfo(name, commit, origin, dtype, *size, fingerprint=files)
    with library_errors(name, origin):
        return LanguageModel(loaded.hf, loaded.tokenizer, info, pick_device(device), loaded.missing_head)


def load_for_manifest(manifest: Manifest, dtype: str | None = None, device: str = "auto") -> LanguageModel:
    """The model that made a store, in the same revision. `dtype` overrides the dtype that it computed in."""
    info = manifest.model
    if not manifest.has_tokens:
        raise UserError(
            f"the store of {info.name} ({info.origin}) was imported from an array: it has no language model"
        )
    kind, _, place = info.origin.partition(":")
    name = place if kind in ("folder", "file") else info.name
    if name != info.name and not Path(name).exists():
        raise UserError(f"the store's model was read from {name}, where there is no {kind} now; put it back there")
    if kind == "wheel" and name not in packaged.MODELS:
        raise UserError(f"the store's model {name!r} ({info.origin}) is not packaged in this version; extract again")
    is_missing = info.origin == "hub" and not fetched_record("model", info.name, info.revision).exists()
    if is_missing and hub_problem(model_file(info.name, info.revision)):
        go_offline()  # another program may have put the model into its cache
    model = load_model(name, dtype or info.dtype, info.revision, device)
    check_same_model(model.info, info, "the store was made by")
    return model


def check_same_model(found: ModelInfo, recorded: ModelInfo, who: str, advice: str = "extract again") -> None:
    """Raises `UserError` where `found` is not the model in `recorded`. What was not recorded is not compared.

    Versions before this one recorded no fingerprint, and of a hub's model the revision that the user named, or none.
    """
    place = found.origin.partition(":")[2] or found.name
    if recorded.fingerprint is not None and found.fingerprint != recorded.fingerprint:
        raise UserError(
            f"{place}: config, tokenizer or weights have changed: {who} {recorded.name} with fingerprint"
            f" {recorded.fingerprint[:12]}, found {str(found.fingerprint)[:12]}; put the files back, or {advice}"
        )
    pinned = found.origin != "hub" or _COMMIT.fullmatch(recorded.revision or "")
    wanted = recorded.revision if pinned else found.revision, recorded.d_model
    if (has := (found.revision, found.d_model)) != wanted:
        raise UserError(f"model {found.name}: {who} (revision, width) {wanted}, found {has}; {advice}")


def pick_device(device: str) -> torch.device:
    """The torch device: `auto` is CUDA where there is one, else the CPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r} cannot be used ({str(error).splitlines()[0]}); say --device cpu") from error
    return torch.device(device)


def pick_dtype(device: str) -> str:
    """`bfloat16` where `device` (as of `pick_device`) multiplies it natively, else `float32`.

    A CPU does with AMX or AVX-512 BF16 on x86, or BF16 on ARM, as Linux reports them. On any other, torch emulates
    bfloat16: one linear layer of SmolLM2-135M was 6.0 times as slow as in float32 on a processor with AVX2 alone.
    """
    where = pick_device(device)
    if where.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(where)[0] >= 8 else "float32"  # from Ampere on
    if where.type != "cpu":
        return "float32"
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return "float32"
    return "bfloat16" if flags & {"amx_bf16", "avx512_bf16", "bf16"} else "float32"
