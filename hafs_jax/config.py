"""The training config: frozen dataclasses, each default in one place, checked at construction. No JAX here."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from hafs_jax.base.errors import UserError
from hafs_jax.base.options import check, option


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _require_knots(name: str, fractions: tuple[float, ...], values: tuple[float, ...]) -> None:
    """A piecewise-linear schedule's knots: fractions that rise from 0 to 1, and as many values."""
    _require(
        len(fractions) == len(values) >= 2 and list(fractions) == sorted(set(fractions)),
        f"{name}_fractions={fractions}: expected rising knots, one for each of {name}_values={values}",
    )
    _require(
        fractions[0] == 0 and fractions[-1] == 1,
        f"{name}_fractions={fractions}: expected the first to be 0 and the last 1",
    )


@dataclass(frozen=True)
class SAEConfig:
    """The autoencoder: its architecture, width and what its activation needs."""

    architecture: str = option("batchtopk", "activation and sparsity: see `hafs_jax.method.architectures`")
    n_latents: int | None = option(None, "F, latents in the dictionary; none: expansion x D", least=1)
    expansion: int = option(4, "F as a multiple of D, where n_latents is none", least=1)
    k: int = option(40, "active latents per row: L0 of topk, mean L0 of batchtopk, target L0 of the others", least=1)
    k_fractions: tuple[float, ...] = option(
        (0.0, 1.0), "knots of k's schedule (topk, batchtopk), fraction of training", least=0, most=1
    )
    k_values: tuple[float, ...] = option((1.0, 1.0), "k at its knots, multiples of k: 4 1 anneals from 4 k", least=0)
    encoder: str = option(
        "tied", "W_enc at the start: the transposed W_dec, or random unit columns", ("tied", "random")
    )
    encoder_scale: float | None = option(
        None,
        "multiple of that at which W_enc starts; none: 1, or 2 D/F where half of all latents start active",
        above=0,
    )
    centre: str = option(
        "mean",
        "b_dec at the start: the store's mean, the geometric median of its first rows, or the origin",
        ("mean", "geometric_median", "origin"),
    )
    compute_dtype: str = option("float32", "dtype of the matrix products' inputs", ("float32", "bfloat16"))
    prefixes: tuple[float, ...] = option(
        (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0), "matryoshka: nested prefixes, as fractions of F", above=0, most=1
    )
    sampled_prefixes: int = option(
        0, "matryoshka: prefixes of random lengths per step instead; 0: the fixed ones", least=0
    )
    first_threshold: float | None = option(
        None,
        "jumprelu: the thresholds' first value; none: where 2 k latents of a random encoder would be active",
        least=0,
    )
    bandwidth: float = option(0.5, "jumprelu: width of the straight-through kernel, in the threshold's units", above=0)
    threshold_gradient_to_input: bool = option(False, "jumprelu: the kernel's gradient reaches the encoder too")
    l0_loss: str = option(
        "target",
        "jumprelu: the coefficient times k (mean L0 / k - 1)^2, L0, 2 (L0 - k)^2 / k of each row, or sum tanh(4 f)",
        ("target", "step", "quadratic", "tanh"),
    )
    transcode: bool = option(False, "reconstruct the rows of a second store (a transcoder); set by --target")

    @property
    def F(self) -> int:
        """The resolved number of latents; `hafs_jax.training.train.resolve` fills n_latents in from the store's D."""
        assert self.n_latents is not None
        return self.n_latents

    @property
    def largest_k(self) -> int:
        """The largest k that its schedule reaches, at most F."""
        return min(round(self.k * max(self.k_values)), self.F)

    def __post_init__(self) -> None:
        check(self, "sae.")
        F = self.n_latents
        _require(F is None or self.k <= F, f"sae.k={self.k}: expected at most n_latents={F}")
        _require_knots("sae.k", self.k_fractions, self.k_values)
        _require(
            self.prefixes[-1:] == (1.0,) and list(self.prefixes) == sorted(set(self.prefixes)),
            f"sae.prefixes={self.prefixes}: expected rising fractions of F, the last 1",
        )


PENALTY_KINDS = ["none", "hinge", "ortsae", "frob"]
"""What `penalty.kind` may say; `hafs_jax.register_penalty` adds to it."""


@dataclass(frozen=True)
class PenaltyConfig:
    """The decoder's orthogonality penalty, its schedule alpha(t) and its error-adaptive weight lambda(e)."""

    kind: str = option(
        "none",
        "none (lambda 0); hinge: one-sided squared hinge; ortsae: squared largest cosine; frob: all squared cosines",
        PENALTY_KINDS,
    )
    lam_max: float = option(3.0, "largest weight of the penalty, FVU per unit of penalty", least=0)
    lam_min: float = option(0.0, "smallest weight of the penalty, FVU per unit of penalty", least=0)
    ramp: bool = option(False, "relax the penalty by 1 - alpha(t); off: alpha is 0 throughout")
    alpha_fractions: tuple[float, ...] = option(
        (0.0, 0.05, 0.4, 0.8, 1.0), "alpha's knots, fraction of training", least=0, most=1
    )
    alpha_values: tuple[float, ...] = option((1.0, 0.9, 0.9, 0.0, 0.0), "alpha at its knots", least=0, most=1)
    gate: bool = option(False, "let lambda follow the reconstruction error; off: lambda is lam_max throughout")
    tau: float | None = option(
        None, "the gate's threshold, FVU; none: from the baseline run of the same setting", above=0
    )
    tau_factor: float = option(1.25, "tau as a multiple of the baseline's final FVU, where tau is none", above=0)
    gate_width: float = option(0.15, "w, the gate's width as a fraction of tau", above=0)
    ema_decay: float = option(0.99, "beta of the FVU's moving average, per step", least=0, below=1)
    mu0: float | None = option(None, "cosine margin; none: solved from the noise floor", least=0, below=1)
    noise_floor: float = option(0.25, "the penalty of random unit rows at the solved mu0", above=0)
    chunk_size: int = option(128, "m, latents per random chunk", least=2)
    sharing: str = option(
        "global",
        "T, which pairs may share direction under alpha: all, neighbours in groups of M, a parent's children, "
        "a Matryoshka level's latents, or pairs as far as they fire together",
        ("global", "contiguous", "parent", "level", "cofiring"),
    )
    group_size: int = option(16, "M, latents per group of contiguous sharing", least=1)
    parents: int = option(64, "P, the first latents, which are the parents of `parent` sharing", least=1)
    regroup_every_steps: int = option(500, "steps between assignments of children to parents", least=1)
    yielding: str = option(
        "both",
        "which latent of a pair the penalty moves: both, the one that fires less, or the later one",
        ("both", "rarer", "later"),
    )
    every_steps: int = option(
        1, "steps between new estimates of the penalty's gradient; in between the last one is used again", least=1
    )

    def __post_init__(self) -> None:
        check(self, "penalty.")
        _require_knots("penalty.alpha", self.alpha_fractions, self.alpha_values)
        _require(
            self.lam_min <= self.lam_max, f"penalty.lam_min={self.lam_min}: expected at most lam_max={self.lam_max}"
        )


@dataclass(frozen=True)
class SparsityConfig:
    """What keeps latents sparse and alive, beside the activation itself."""

    coefficient: float = option(
        2.0,
        "first (or fixed) weight of the sparsity cost: L1 x decoder norm (the original fixed one is 0.04), or L0",
        least=0,
    )
    coefficient_fractions: tuple[float, ...] = option(
        (0.0, 0.05, 1.0), "knots of the coefficient's schedule, fraction of training", least=0, most=1
    )
    coefficient_values: tuple[float, ...] = option(
        (0.0, 1.0, 1.0), "the coefficient at its knots, multiples of itself", least=0
    )
    match_l0: bool = option(True, "let a controller move the coefficient until L0 is sae.k; off: it stays")
    match_gain: float = option(
        0.02, "controller: doublings of the coefficient per step and doubling of L0 over its target", above=0
    )
    freeze_fraction: float = option(
        0.15, "last fraction of training in which the controller's coefficient is frozen", least=0, most=1
    )
    aux: float = option(0.03125, "weight of the dead latents' auxiliary reconstruction of the residual", least=0)
    aux_k: int = option(256, "dead latents that may reconstruct the residual, per row", least=1)
    pre_activation: float = option(
        0.0, "weight of the dead latents' pre-activation loss relu(threshold - pre)", least=0
    )
    resample_every_steps: int = option(0, "steps between resamplings of dead latents; 0: never", least=0)
    resample_until: float = option(0.5, "fraction of training after which nothing is resampled", least=0, most=1)
    dead_after_tokens: int = option(100_000, "a latent that has not fired for so many rows is dead", least=1)
    threshold_decay: float = option(
        0.99, "decay of batchtopk's moving-average inference threshold, per step", least=0, below=1
    )

    def __post_init__(self) -> None:
        check(self, "sparsity.")
        _require_knots("sparsity.coefficient", self.coefficient_fractions, self.coefficient_values)


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, its learning-rate schedule (linear warm-up, constant, decay to zero) and weight averaging."""

    name: str = option("adam", "any optax optimizer that takes a learning rate: adam, adamw, lion, sgd, ...")
    learning_rate: float = option(
        3e-3, "peak learning rate (inputs are scaled to unit variance, decoder rows to norm 1)", above=0
    )
    warmup: float = option(0.05, "fraction of training over which the rate rises from 0", least=0, most=1)
    decay: float = option(0.4, "last fraction of training over which the rate falls to 0", least=0, most=1)
    decay_shape: str = option("linear", "how it falls", ("linear", "cosine"))
    beta1: float = option(0.9, "decay of the first moment, for optimizers that have one", least=0, below=1)
    beta2: float = option(0.999, "decay of the second moment, for optimizers that have one", least=0, below=1)
    epsilon: float = option(1e-8, "the denominator's epsilon, for optimizers that have one", above=0)
    clip_norm: float | None = option(
        1.0,
        "largest norm of the gradient of a row's squared error (D x FVU), as other trainers clip; none: no clipping",
        above=0,
    )
    average: float | None = option(
        None, "decay of a moving average of the weights, which the SAE then is; none: off", above=0, below=1
    )

    def __post_init__(self) -> None:
        check(self, "optimizer.")
        _require(
            self.warmup + self.decay <= 1,
            f"optimizer.warmup={self.warmup} and decay={self.decay}: expected fractions that add up to at most 1",
        )


@dataclass(frozen=True)
class TrainConfig:
    """One training run. A variant is a preset of `penalty` (see `hafs_jax.presets`)."""

    variant: str = option("baseline", "the preset that this run's penalty came from")
    seed: int = option(
        0, "seed of the weights, the penalty's chunks and, unless data_seed is given, the data order", least=0
    )
    data_seed: int | None = option(None, "seed of the data order; none: the seed", least=0)
    frozen: str = option(
        "nothing",
        "what never trains: nothing, W_dec, or everything (thresholds and the encoder's bias still follow L0)",
        ("nothing", "decoder", "everything"),
    )
    tokens: int | None = option(None, "activation rows to train on; none: passes x the store's rows", least=1)
    passes: float = option(1.4, "passes over the store, where tokens is none", above=0)
    batch_size: int = option(1024, "B, rows per step", least=1)
    steps_per_dispatch: int = option(8, "steps run in one call of the compiled program", least=1)
    checkpoint_every_steps: int = option(400, "steps between checkpoints", least=1)
    log_every_steps: int = option(8, "steps between lines of metrics.jsonl", least=1)
    max_bad_fraction: float = option(
        0.01, "share of non-finite batches (skipped) above which the run stops", least=0, below=1
    )
    coherence_every_steps: int = option(
        80, "steps between measurements of the decoder's coherence: of 4,096 latents, at the last step of all", least=1
    )
    products: str = option(
        "auto",
        "multiply by all latents, or by the active ones alone (not jumprelu, gated); auto: the faster one on this "
        "machine, as measured, which the run then keeps",
        ("auto", "dense", "sparse"),
    )
    dictionary_shards: int = option(1, "devices along the latents; the others split the batch", least=1)
    evaluate_every_steps: int = option(
        0, "steps between held-out FVU measurements, the best checkpoint kept; 0: never", least=0
    )
    heldout_rows: int = option(16_384, "rows of the held-out store that they use", least=1)
    patience: int | None = option(None, "stop after so many of them without a better FVU; none: never", least=1)
    init_from: str | None = option(None, "start from the SAE in this SAELens folder; none: from random weights")
    tag: str = option("", "appended to the run's name")
    arm: str = option(
        "",
        "what this SAE is one seed of, beside its architecture and k, such as 'strict lam=0.3'; none: variant and tag",
    )
    tensorboard: bool = option(False, "also write TensorBoard events into the run's folder (extra tensorboard)")
    wandb: str | None = option(
        None, "also log to this Weights & Biases project (extra wandb; WANDB_MODE=offline: to disk); none: do not"
    )
    sae: SAEConfig = option(SAEConfig(), "the autoencoder")
    penalty: PenaltyConfig = option(PenaltyConfig(), "the orthogonality penalty")
    sparsity: SparsityConfig = option(SparsityConfig(), "sparsity and dead latents")
    optimizer: OptimizerConfig = option(OptimizerConfig(), "the optimizer")

    def __post_init__(self) -> None:
        check(self)
        _require(
            self.patience is None or self.evaluate_every_steps > 0,
            f"patience={self.patience}: expected evaluate_every_steps above 0, by which it counts",
        )
        _require(
            re.fullmatch(r"[\w.,=+-]*", self.tag) is not None,
            f"tag={self.tag!r}: expected letters, digits and any of _ . , = + -",
        )
        _require(self.arm.isprintable(), f"arm={self.arm!r}: expected one line of text")
        _require(
            self.tokens is None or self.tokens >= self.batch_size,
            f"tokens={self.tokens}: expected at least one batch ({self.batch_size})",
        )

    @property
    def steps(self) -> int:
        """Optimizer updates in the whole run: whole dispatches only, so that one program serves all. Needs `tokens`."""
        assert self.tokens is not None
        steps = self.tokens // self.batch_size
        return max(steps - steps % self.steps_per_dispatch, min(steps, self.steps_per_dispatch))

    @property
    def run_name(self) -> str:
        """The name of this training's run, see `run_name`."""
        return run_name(self.variant, self.sae.architecture, self.seed, self.tag)

    @property
    def arm_name(self) -> str:
        """`arm`, or where none is given what variant and tag say, see `arm_name`."""
        return self.arm or arm_name(self.variant, self.tag, self.sae.k)


def run_name(variant: str, architecture: str, seed: int, tag: str = "") -> str:
    """`<variant>[-<architecture>]-s<seed>[-<tag>]`; the default architecture is not named.

    Names are for people and for file systems. What a run is stands in its config.json and run.json.
    """
    named = "" if architecture == SAEConfig().architecture else f"-{architecture}"
    return f"{variant}{named}-s{seed}" + (f"-{tag}" if tag else "")


def axes_tag(axes: Mapping[str, str], first: str = "") -> str:
    """The tag that names a point of a grid: `first`, and each axis without the part of the config that it lies in.

    {"penalty.lam_max": "1", "k": "16"} gives "lam_max=1,k=16".
    """
    parts = (f"{name.rpartition('.')[2]}={value}" for name, value in axes.items())
    return ",".join([*([first] if first else []), *parts])


def arm_name(variant: str, tag: str, k: int) -> str:
    """An arm's name where nobody gave it one: the variant and the tag's parts, but not `k=<k>`.

    An arm is what is trained several times with other seeds. Its k and architecture are told apart from its name, so
    that "strict lam=0.3" names one method at every k.
    """
    return " ".join([variant, *(part for part in tag.split(",") if part not in ("", f"k={k}"))])
