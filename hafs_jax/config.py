"""The training config: frozen dataclasses, each default in one place, checked at construction. No JAX here."""

from dataclasses import dataclass

from extract.format.config import check_choices, option
from extract.format.errors import UserError


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass(frozen=True)
class SAEConfig:
    """The autoencoder: its architecture, width and what its activation needs."""

    architecture: str = option("batchtopk", "activation and sparsity: see `hafs_jax.architectures`")
    n_latents: int | None = option(None, "F, latents in the dictionary; none: expansion x D")
    expansion: int = option(4, "F as a multiple of D, where n_latents is none")
    k: int = option(40, "active latents per row: the L0 of topk, the mean L0 of batchtopk, the target L0 of relu")
    encoder_scale: float = option(1.0, "W_enc starts as this times the transposed W_dec")
    compute_dtype: str = option("float32", "dtype of the matrix products' inputs", ("float32", "bfloat16"))

    @property
    def F(self) -> int:
        """The resolved number of latents; `hafs_jax.train.resolve` fills n_latents in from the store's D."""
        assert self.n_latents is not None
        return self.n_latents

    def __post_init__(self) -> None:
        check_choices(self)
        F = self.n_latents
        _require(F is None or F >= 1, f"sae.n_latents={F}: expected at least 1, or none")
        _require(self.expansion >= 1, f"sae.expansion={self.expansion}: expected at least 1")
        _require(self.k >= 1 and (F is None or self.k <= F), f"sae.k={self.k}: expected 1 to n_latents={F}")
        _require(self.encoder_scale > 0, f"sae.encoder_scale={self.encoder_scale}: expected a positive number")


@dataclass(frozen=True)
class PenaltyConfig:
    """The decoder's orthogonality penalty, its schedule alpha(t) and its error-adaptive weight lambda(e)."""

    kind: str = option("none", "none: no penalty (lambda 0); hinge: one-sided squared hinge", ("none", "hinge"))
    lam_max: float = option(3.0, "largest weight of the penalty, FVU per unit of penalty")
    lam_min: float = option(0.0, "smallest weight of the penalty, FVU per unit of penalty")
    ramp: bool = option(False, "relax the penalty by 1 - alpha(t); off: alpha is 0 throughout")
    alpha_fractions: tuple[float, ...] = option((0.0, 0.05, 0.4, 0.8, 1.0), "alpha's knots, fraction of training")
    alpha_values: tuple[float, ...] = option((1.0, 0.9, 0.9, 0.0, 0.0), "alpha at its knots, 0 to 1")
    gate: bool = option(False, "let lambda follow the reconstruction error; off: lambda is lam_max throughout")
    tau: float | None = option(None, "the gate's threshold, FVU; none: from the baseline run of the same setting")
    tau_factor: float = option(1.25, "tau as a multiple of the baseline's final FVU, where tau is none")
    gate_width: float = option(0.15, "w, the gate's width as a fraction of tau")
    ema_decay: float = option(0.99, "beta of the FVU's moving average, per step")
    mu0: float | None = option(None, "cosine margin; none: solved from the noise floor")
    noise_floor: float = option(0.25, "the penalty of random unit rows at the solved mu0")
    chunk_size: int = option(128, "m, latents per random chunk")
    sharing: str = option("global", "which pairs may share direction under alpha", ("global", "contiguous"))
    group_size: int = option(16, "M, latents per group of contiguous sharing")

    def __post_init__(self) -> None:
        check_choices(self)
        fractions, values = self.alpha_fractions, self.alpha_values
        _require(
            len(fractions) == len(values) >= 2 and list(fractions) == sorted(set(fractions)),
            f"penalty.alpha_fractions={fractions}: expected rising knots, one for each of alpha_values={values}",
        )
        _require(
            fractions[0] == 0 and fractions[-1] == 1 and all(0 <= value <= 1 for value in values),
            f"penalty alpha knots {list(zip(fractions, values, strict=False))}: expected 0 to 1 on both axes",
        )
        _require(0 <= self.lam_min <= self.lam_max, f"penalty.lam_min={self.lam_min}: expected 0 to {self.lam_max}")
        _require(self.tau is None or self.tau > 0, f"penalty.tau={self.tau}: expected a positive FVU or none")
        _require(self.tau_factor > 0, f"penalty.tau_factor={self.tau_factor}: expected a positive number")
        _require(self.gate_width > 0, f"penalty.gate_width={self.gate_width}: expected a positive number")
        _require(0 <= self.ema_decay < 1, f"penalty.ema_decay={self.ema_decay}: expected 0 up to 1")
        _require(self.mu0 is None or 0 <= self.mu0 < 1, f"penalty.mu0={self.mu0}: expected 0 up to 1, or none")
        _require(self.noise_floor > 0, f"penalty.noise_floor={self.noise_floor}: expected a positive number")
        _require(self.chunk_size >= 2, f"penalty.chunk_size={self.chunk_size}: expected at least 2")
        _require(self.group_size >= 1, f"penalty.group_size={self.group_size}: expected at least 1")


@dataclass(frozen=True)
class SparsityConfig:
    """What keeps latents sparse and alive, beside the activation itself."""

    l1: float = option(2.0, "first (or fixed) coefficient of relu's L1 x decoder norm; the original fixed one is 0.04")
    l1_warmup: float = option(0.05, "fraction of training over which the L1 coefficient rises from 0")
    match_l0: bool = option(True, "let a controller move the L1 coefficient until L0 is sae.k; off: it stays")
    match_gain: float = option(
        0.02, "controller: doublings of the coefficient per step and doubling of L0 over its target"
    )
    freeze_fraction: float = option(0.15, "last fraction of training in which the controller's coefficient is frozen")
    aux: float = option(0.03125, "weight of the dead latents' auxiliary reconstruction (topk, batchtopk)")
    aux_k: int = option(256, "dead latents that may reconstruct the residual, per row")
    dead_after_tokens: int = option(100_000, "a latent that has not fired for so many rows is dead")
    threshold_decay: float = option(0.99, "decay of batchtopk's moving-average inference threshold, per step")

    def __post_init__(self) -> None:
        _require(self.l1 >= 0, f"sparsity.l1={self.l1}: expected 0 or more")
        _require(0 <= self.l1_warmup <= 1, f"sparsity.l1_warmup={self.l1_warmup}: expected a fraction")
        _require(self.match_gain > 0, f"sparsity.match_gain={self.match_gain}: expected a positive number")
        _require(
            0 <= self.freeze_fraction <= 1, f"sparsity.freeze_fraction={self.freeze_fraction}: expected a fraction"
        )
        _require(self.aux >= 0, f"sparsity.aux={self.aux}: expected 0 or more")
        _require(self.aux_k >= 1, f"sparsity.aux_k={self.aux_k}: expected at least 1")
        _require(
            self.dead_after_tokens >= 1, f"sparsity.dead_after_tokens={self.dead_after_tokens}: expected 1 or more"
        )
        _require(0 <= self.threshold_decay < 1, f"sparsity.threshold_decay={self.threshold_decay}: expected 0 up to 1")


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam and its learning-rate schedule: linear warm-up, constant, linear decay to zero."""

    learning_rate: float = option(
        3e-3, "peak learning rate (inputs are scaled to unit variance, decoder rows to norm 1)"
    )
    warmup: float = option(0.05, "fraction of training over which the rate rises from 0")
    decay: float = option(0.4, "last fraction of training over which the rate falls to 0")
    beta1: float = option(0.9, "Adam's decay of the first moment")
    beta2: float = option(0.999, "Adam's decay of the second moment")
    epsilon: float = option(1e-8, "Adam's epsilon")
    clip_norm: float | None = option(1.0, "largest global gradient norm; none: no clipping")

    def __post_init__(self) -> None:
        _require(self.learning_rate > 0, f"optimizer.learning_rate={self.learning_rate}: expected a positive number")
        _require(
            self.warmup >= 0 and self.decay >= 0 and self.warmup + self.decay <= 1,
            f"optimizer.warmup={self.warmup} and decay={self.decay}: expected fractions that add up to at most 1",
        )
        _require(0 <= self.beta1 < 1 and 0 <= self.beta2 < 1, "optimizer.beta1 and beta2: expected 0 up to 1")
        _require(self.epsilon > 0, f"optimizer.epsilon={self.epsilon}: expected a positive number")
        _require(self.clip_norm is None or self.clip_norm > 0, f"optimizer.clip_norm={self.clip_norm}: expected > 0")


@dataclass(frozen=True)
class TrainConfig:
    """One training run. A variant is a preset of `penalty` (see `hafs_jax.presets`)."""

    variant: str = option("baseline", "the preset that this run's penalty came from")
    seed: int = option(0, "seed of the weights, the data order and the penalty's chunks")
    tokens: int | None = option(None, "activation rows to train on; none: passes x the store's rows")
    passes: float = option(1.4, "passes over the store, where tokens is none")
    batch_size: int = option(1024, "B, rows per step")
    steps_per_dispatch: int = option(8, "steps run in one call of the compiled program")
    checkpoint_every_steps: int = option(400, "steps between checkpoints")
    log_every_steps: int = option(8, "steps between lines of metrics.jsonl")
    max_bad_fraction: float = option(0.01, "share of non-finite batches (skipped) above which the run stops")
    coherence_every_steps: int = option(80, "steps between measurements of the decoder's coherence")
    dictionary_shards: int = option(1, "devices along the latents; the others split the batch")
    tensorboard: bool = option(False, "also write TensorBoard events (needs the tensorboardX package)")
    sae: SAEConfig = option(SAEConfig(), "the autoencoder")
    penalty: PenaltyConfig = option(PenaltyConfig(), "the orthogonality penalty")
    sparsity: SparsityConfig = option(SparsityConfig(), "sparsity and dead latents")
    optimizer: OptimizerConfig = option(OptimizerConfig(), "the optimizer")

    def __post_init__(self) -> None:
        _require(self.seed >= 0, f"seed={self.seed}: expected 0 or more")
        _require(self.batch_size >= 1, f"batch_size={self.batch_size}: expected at least 1")
        _require(self.steps_per_dispatch >= 1, f"steps_per_dispatch={self.steps_per_dispatch}: expected at least 1")
        _require(self.checkpoint_every_steps >= 1, "checkpoint_every_steps: expected at least 1")
        _require(self.log_every_steps >= 1, f"log_every_steps={self.log_every_steps}: expected at least 1")
        _require(0 <= self.max_bad_fraction < 1, f"max_bad_fraction={self.max_bad_fraction}: expected 0 up to 1")
        _require(self.passes > 0, f"passes={self.passes}: expected a positive number")
        _require(self.coherence_every_steps >= 1, "coherence_every_steps: expected at least 1")
        _require(self.dictionary_shards >= 1, f"dictionary_shards={self.dictionary_shards}: expected at least 1")
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
        """`<variant>-s<seed>`, with the architecture between them where it is not the default."""
        architecture = "" if self.sae.architecture == SAEConfig().architecture else f"-{self.sae.architecture}"
        return f"{self.variant}{architecture}-s{self.seed}"
