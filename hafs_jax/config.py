"""The training config: frozen dataclasses, each default in one place, checked at construction. It imports no JAX."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from hafs_jax.base.errors import UserError, arg
from hafs_jax.base.options import check, option

ALIASES = {
    "k": "sae.k",
    "l1": "sparsity.coefficient",
    "lam": "penalty.lam_max",
    "lr": "optimizer.learning_rate",
    "tau": "penalty.tau",
}
"""Short names of fields: in Python (`hafs_jax.with_fields`), as flags and as axes of a sweep's grid."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _require_knots(name: str, fractions: tuple[float, ...], values: tuple[float, ...]) -> None:
    """Raises `UserError` unless the fractions rise from 0 to 1 and there is one value for each."""
    _require(
        len(fractions) == len(values) >= 2 and list(fractions) == sorted(set(fractions)),
        f"{arg(name + '_fractions', fractions)}: expected rising fractions, one for each of "
        f"{arg(name + '_values', values)}",
    )
    _require(
        fractions[0] == 0 and fractions[-1] == 1,
        f"{arg(name + '_fractions', fractions)}: expected the first to be 0 and the last to be 1",
    )


@dataclass(frozen=True)
class SAEConfig:
    """The autoencoder: its architecture, its width and the settings of its activation function."""

    architecture: str = option(
        "batchtopk", "the activation function and its sparsity cost: see `hafs_jax.method.architectures`"
    )
    n_latents: int | None = option(None, "F, the number of latents; none: expansion x D", least=1)
    expansion: int = option(4, "F as a multiple of the activation width D, if n_latents is none", least=1)
    k: int = option(
        40,
        "active latents per row: exactly k for topk and hierarchical_topk, k on average over a batch for batchtopk "
        "and matryoshka, the target of L0 for the others",
        least=1,
    )
    k_fractions: tuple[float, ...] = option(
        (0.0, 1.0),
        "times of k's schedule (topk, batchtopk, matryoshka, hierarchical_topk), as fractions of training",
        least=0,
        most=1,
    )
    k_values: tuple[float, ...] = option(
        (1.0, 1.0), "k at these times, as multiples of k: `4 1` lowers it from 4 k to k", least=0
    )
    encoder: str = option(
        "tied", "initial W_enc: the transpose of W_dec (tied), or random unit columns (random)", ("tied", "random")
    )
    encoder_scale: float | None = option(
        None,
        "factor on the initial W_enc; none: 1, but min(1, 2 D / F) for relu, gated and matryoshka_relu, which start "
        "with half of their latents active",
        above=0,
    )
    centre: str = option(
        "mean",
        "initial b_dec: the mean of the store's rows, the geometric median of its first 16,384 rows, or the origin",
        ("mean", "geometric_median", "origin"),
    )
    compute_dtype: str = option(
        "float32", "dtype of the inputs of matrix products; sums are float32", ("float32", "bfloat16")
    )
    prefixes: tuple[float, ...] = option(
        (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0),
        "matryoshka: lengths of the nested prefixes, as fractions of F",
        above=0,
        most=1,
    )
    sampled_prefixes: int = option(
        0, "matryoshka: number of prefixes whose lengths are drawn anew at every step; 0: use `prefixes`", least=0
    )
    budgets: tuple[float, ...] = option(
        (1 / 8, 1 / 4, 1 / 2, 1.0),
        "hierarchical_topk: numbers of a row's largest latents that reconstruct on their own, as fractions of k",
        above=0,
        most=1,
    )
    first_threshold: float | None = option(
        None,
        "jumprelu: initial threshold; none: the value that 2 k latents of a random encoder exceed on average",
        least=0,
    )
    bandwidth: float = option(
        0.5, "jumprelu: width of the straight-through estimator's kernel, in units of the pre-activation", above=0
    )
    threshold_gradient_to_input: bool = option(
        False, "jumprelu: pass the kernel's gradient to the encoder too, not to the threshold alone"
    )
    l0_loss: str = option(
        "target",
        "jumprelu: the sparsity cost of a row, with L0 its number of active latents. target: k (mean L0 / k - 1)^2; "
        "step: L0; quadratic: 2 (L0 - k)^2 / k; tanh: the sum of tanh(4 latent)",
        ("target", "step", "quadratic", "tanh"),
    )
    transcode: bool = option(
        False, "reconstruct the rows of a second store, as a transcoder does; --target sets this option"
    )

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
        _require(
            F is None or self.k <= F,
            f"{arg('sae.k', self.k)}: expected at most {arg('sae.n_latents', F)}",
        )
        _require_knots("sae.k", self.k_fractions, self.k_values)
        _require(
            self.prefixes[-1:] == (1.0,) and list(self.prefixes) == sorted(set(self.prefixes)),
            f"{arg('sae.prefixes', self.prefixes)}: expected rising fractions of F, the last of them 1",
        )
        _require(
            self.budgets[-1:] == (1.0,) and list(self.budgets) == sorted(set(self.budgets)),
            f"{arg('sae.budgets', self.budgets)}: expected rising fractions of k, the last of them 1",
        )


PENALTY_KINDS = ["none", "hinge", "ortsae", "frob"]
"""The allowed values of `penalty.kind`. `hafs_jax.register_penalty` adds one."""


@dataclass(frozen=True)
class PenaltyConfig:
    """The decoder's orthogonality penalty, its schedule alpha(t) and its error-adaptive weight lambda(e)."""

    kind: str = option(
        "none",
        "the penalty on cosines of dictionary vectors. none: no penalty; hinge: (cosine - mu0)^2 of pairs above the "
        "margin mu0; ortsae: each latent's largest cosine in a chunk, squared; frob: the squared cosines of all pairs",
        PENALTY_KINDS,
    )
    lam_max: float = option(3.0, "largest lambda, the penalty's weight in the loss (FVU per unit of penalty)", least=0)
    lam_min: float = option(0.0, "smallest lambda under the gate (FVU per unit of penalty)", least=0)
    ramp: bool = option(
        False, "multiply the penalty of pairs that may share by 1 - alpha(t); off: alpha is 0 throughout"
    )
    alpha_fractions: tuple[float, ...] = option(
        (0.0, 0.05, 0.4, 0.8, 1.0), "times of alpha's schedule, as fractions of training", least=0, most=1
    )
    alpha_values: tuple[float, ...] = option(
        (1.0, 0.9, 0.9, 0.0, 0.0), "alpha at these times, linear in between: 1 no pressure, 0 full", least=0, most=1
    )
    gate: bool = option(
        False, "let lambda follow the reconstruction error: small while FVU is above tau; off: lambda is lam_max"
    )
    tau: float | None = option(
        None,
        "the gate's threshold: at an FVU of tau, lambda's target is halfway from lam_min to lam_max; none: tau_factor "
        "x the final FVU of the baseline run with the same settings",
        above=0,
    )
    tau_factor: float = option(1.25, "tau as a multiple of the baseline's final FVU, if tau is none", above=0)
    gate_width: float = option(
        0.15, "w, the width of the gate's sigmoid as a fraction of tau: sigmoid((tau - FVU) / (w tau))", above=0
    )
    ema_decay: float = option(
        0.99, "beta, the decay per step of the moving average of FVU that the gate reads", least=0, below=1
    )
    mu0: float | None = option(
        None,
        "the hinge's margin: cosines up to mu0 cost nothing; none: the margin that gives random rows the penalty "
        "noise_floor",
        least=0,
        below=1,
    )
    noise_floor: float = option(0.25, "expected penalty of random unit rows, from which mu0 is solved", above=0)
    chunk_size: int = option(
        128, "m, latents per chunk: each estimate of the penalty has random chunks and compares pairs in them", least=2
    )
    sharing: str = option(
        "global",
        "T, the pairs that may share direction under alpha. global: all; contiguous: neighbours in groups of "
        "group_size; parent: the children of one parent; level: the latents of one Matryoshka level; cofiring: in "
        "proportion to how often the two fire together",
        ("global", "contiguous", "parent", "level", "cofiring"),
    )
    group_size: int = option(16, "M, latents per group of `contiguous` sharing", least=1)
    parents: int = option(64, "P: the first P latents are the parents of `parent` sharing", least=1)
    regroup_every_steps: int = option(500, "steps between assignments of children to parents", least=1)
    yielding: str = option(
        "both",
        "which latent of a pair the penalty turns. both; rarer: the one that fires less; later: the one with the "
        "larger number",
        ("both", "rarer", "later"),
    )
    every_steps: int = option(
        1, "steps between new estimates of the penalty's gradient; the last one is reused in between", least=1
    )

    def __post_init__(self) -> None:
        check(self, "penalty.")
        _require_knots("penalty.alpha", self.alpha_fractions, self.alpha_values)
        _require(
            self.lam_min <= self.lam_max,
            f"{arg('penalty.lam_min', self.lam_min)}: expected at most {arg('penalty.lam_max', self.lam_max)}",
        )


@dataclass(frozen=True)
class SparsityConfig:
    """How latents are kept sparse and alive, beside the activation function itself."""

    coefficient: float = option(
        2.0,
        "initial weight of the sparsity cost: L1 x decoder norm for relu (the original fixed weight is 0.04), L1 of "
        "the gate for gated, l0_loss for jumprelu; without match_l0 the weight stays",
        least=0,
    )
    coefficient_fractions: tuple[float, ...] = option(
        (0.0, 0.05, 1.0), "times of the coefficient's schedule, as fractions of training", least=0, most=1
    )
    coefficient_values: tuple[float, ...] = option(
        (0.0, 1.0, 1.0), "factor on the coefficient at these times, linear in between", least=0
    )
    match_l0: bool = option(
        True, "let a controller change the coefficient until L0 is sae.k; off: only the schedule changes it"
    )
    match_gain: float = option(
        0.02, "gain of the L0 controller: each step multiplies the coefficient by (L0 / target) ** gain", above=0
    )
    freeze_fraction: float = option(
        0.15, "last fraction of training, in which the controller leaves the coefficient fixed", least=0, most=1
    )
    aux: float = option(
        0.03125, "weight of the auxiliary loss, in which dead latents reconstruct the residual", least=0
    )
    aux_k: int = option(256, "largest number of dead latents per row that reconstruct the residual", least=1)
    pre_activation: float = option(
        0.0, "weight of the pre-activation loss of dead latents, relu(threshold - pre-activation)", least=0
    )
    resample_every_steps: int = option(0, "steps between resamplings of dead latents; 0: never", least=0)
    resample_until: float = option(
        0.5, "fraction of training after which dead latents are not resampled", least=0, most=1
    )
    dead_after_tokens: int = option(
        100_000, "a latent is dead once it has not fired for this many activation rows", least=1, most=2**40
    )
    threshold_decay: float = option(
        0.99,
        "decay per step of the moving average that batchtopk and matryoshka use as their threshold at inference",
        least=0,
        below=1,
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
    warmup: float = option(
        0.05, "first fraction of training, in which the learning rate rises linearly from 0", least=0, most=1
    )
    decay: float = option(0.4, "last fraction of training, in which the learning rate falls to 0", least=0, most=1)
    decay_shape: str = option("linear", "shape of that fall: a line, or half a cosine", ("linear", "cosine"))
    beta1: float = option(0.9, "decay of the first moment, for optimizers that have one", least=0, below=1)
    beta2: float = option(0.999, "decay of the second moment, for optimizers that have one", least=0, below=1)
    epsilon: float = option(1e-8, "epsilon in the denominator, for optimizers that have one", above=0)
    clip_norm: float | None = option(
        1.0,
        "largest norm of the gradient. It is measured on D x loss, in which a row's squared error has weight 1, as in "
        "other trainers; none: no clipping",
        above=0,
    )
    average: float | None = option(
        None,
        "decay per step of a moving average of the weights; the finished SAE has the averaged weights; none: off",
        above=0,
        below=1,
    )

    def __post_init__(self) -> None:
        check(self, "optimizer.")
        _require(
            self.warmup + self.decay <= 1,
            f"{arg('optimizer.warmup', self.warmup)} and {arg('optimizer.decay', self.decay)}: expected "
            "fractions that add up to at most 1",
        )


@dataclass(frozen=True)
class TrainConfig:
    """One training run. A variant is a named preset of these fields (see `hafs_jax.presets`)."""

    FORMER: ClassVar = ("dictionary_shards",)  # keys of config.json that earlier versions wrote

    variant: str = option("baseline", "the preset that this run's penalty came from")
    seed: int = option(
        0,
        "seed of the weights, the penalty's chunks and, unless data_seed is given, the data order",
        least=0,
        most=2**63 - 1,
    )
    data_seed: int | None = option(None, "seed of the data order; none: `seed`", least=0, most=2**63 - 1)
    frozen: str = option(
        "nothing",
        "parameters that never train. decoder: W_dec; everything: all of them, though thresholds and the encoder's "
        "bias still follow L0",
        ("nothing", "decoder", "everything"),
    )
    tokens: int | None = option(
        None,
        "activation rows to train on, repeats included; none: passes x the rows of the store",
        least=1,
        most=2**40,
    )
    passes: float = option(1.4, "passes over the store, if tokens is none", above=0)
    batch_size: int = option(1024, "B, activation rows per step", least=1)
    steps_per_dispatch: int = option(8, "steps per call of the compiled program", least=1)
    checkpoint_every_steps: int = option(400, "steps between checkpoints", least=1)
    log_every_steps: int = option(8, "steps between lines of metrics.jsonl", least=1)
    max_bad_fraction: float = option(
        0.01,
        "largest fraction of batches with a loss that is not finite; such batches are skipped, and more stop the run",
        least=0,
        below=1,
    )
    coherence_every_steps: int = option(
        80,
        "steps between measurements of the decoder's coherence (cosines of nearest neighbours): of 4,096 latents, and "
        "of all latents at the last step",
        least=1,
    )
    products: str = option(
        "auto",
        "multiply by all latents (dense), or by the active ones alone (sparse; not for jumprelu and gated); auto: the "
        "one that was measured to be faster on such a machine; the choice is saved with the run",
        ("auto", "dense", "sparse"),
    )
    kernels: str = option(
        "auto",
        "compute sparse products and the decoder's update by this package's own kernels (on; NVIDIA GPUs from Hopper "
        "on, or a CPU for tests, where it is slow) or by XLA alone (off); auto: off, until they have been measured on "
        "a GPU. Sums round differently; a run may go on with another",
        ("auto", "on", "off"),
    )
    mesh: str = option(
        "",
        "how devices share a step, such as data=2,latent=4: 2 groups split the batch, in each of them 4 devices the "
        "latents. One of the two may be left out; empty: all devices split the batch. A run may go on with another",
    )
    evaluate_every_steps: int = option(
        0, "steps between measurements of FVU on held-out rows; the best checkpoint is kept; 0: never", least=0
    )
    heldout_rows: int = option(16_384, "rows of the held-out store that these measurements use", least=1)
    patience: int | None = option(
        None, "stop once this many held-out measurements in a row were no better than the best; none: never", least=1
    )
    init_from: str | None = option(None, "start from the SAE in this SAELens folder; none: from random weights")
    tag: str = option("", "text appended to the run's name")
    arm: str = option(
        "",
        "the arm of which this run is one seed: a name such as 'strict lam=0.3', without architecture and k; empty: "
        "made from variant and tag",
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
            f"{arg('patience', self.patience)}: expected {arg('evaluate_every_steps')} above 0, found 0; "
            "patience counts the held-out measurements",
        )
        _require(
            re.fullmatch(r"[\w.,=+-]*", self.tag) is not None,
            f"{arg('tag', self.tag)}: expected letters, digits and any of _ . , = + -",
        )
        _require(self.arm.isprintable(), f"{arg('arm', self.arm)}: expected one line of text")
        _require(
            self.tokens is None or self.tokens >= self.batch_size,
            f"{arg('tokens', self.tokens)}: expected at least one batch, {arg('batch_size', self.batch_size)}",
        )

    @property
    def steps(self) -> int:
        """The number of optimizer updates in the run. Needs `tokens`.

        It is a multiple of `steps_per_dispatch`, so that one compiled program serves all dispatches. A run of fewer
        steps than that is a single dispatch.
        """
        assert self.tokens is not None
        steps = self.tokens // self.batch_size
        return max(steps - steps % self.steps_per_dispatch, min(steps, self.steps_per_dispatch))

    @property
    def run_name(self) -> str:
        """The name of this config's run, see the function `run_name`."""
        return run_name(self.variant, self.sae.architecture, self.seed, self.tag)

    @property
    def arm_name(self) -> str:
        """`arm`, or, if it is empty, the name made from variant and tag: see the function `arm_name`."""
        return self.arm or arm_name(self.variant, self.tag, self.sae.k)


def run_name(variant: str, architecture: str, seed: int, tag: str = "") -> str:
    """`<variant>[-<architecture>]-s<seed>[-<tag>]`; the default architecture is left out.

    Names are for people and for file systems. Code reads a run's facts from its config.json and run.json.
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
    """The default name of an arm: the variant and the parts of the tag, without `k=<k>`.

    An arm is one method under comparison, trained with several seeds. k and the architecture are kept beside its name,
    so that "strict lam=0.3" names the same method at every k.
    """
    return " ".join([variant, *(part for part in tag.split(",") if part not in ("", f"k={k}"))])
