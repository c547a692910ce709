"""What an evaluation depends on: one frozen config, saved with every result. Standard library only."""

from dataclasses import dataclass, replace
from typing import Any

from hafs_evaluate.saebench.suites import find_suite, suite_of
from hafs_jax.base.errors import UserError
from hafs_jax.base.options import check, option


@dataclass(frozen=True)
class EvalConfig:
    """Everything that decides the figures of an evaluation."""

    heldout_rows: int | None = option(None, "held-out rows of the core metrics; none takes all", least=2)
    contexts: int = option(64, "held-out contexts on which the SAE is spliced into the model", least=1)
    seed: int = option(0, "seed of the draw of those contexts", least=0, most=2**32 - 1)
    suite: str = option("auto", "suite of probing tasks, one of those below; auto takes the one of the store's profile")
    tasks: tuple[str, ...] = option((), "the suite's tasks to probe; none named: those below")
    ks: tuple[int, ...] = option((1, 2, 5, 10, 20, 50), "latents a sparse probe may use", least=1)
    # SAE-Bench's own default is l1: four times the seconds (saga), accuracies 0.005 apart on average
    penalty: str = option("l2", "regularisation of sae_probes' sparse probes", choices=("l1", "l2"))
    probe_seed: int = option(42, "seed of the probes' train and test splits", least=0, most=2**32 - 1)
    # 4,000 and 1,000 are SAE-Bench's own; its tasks balance four groups
    probe_train_texts: int = option(
        4_000, "training texts of each of standard's probes, half of each class; a multiple of 4", least=20, most=4_000
    )
    probe_test_texts: int = option(
        1_000, "test texts of each of standard's probes, half of each class; a multiple of 4", least=20, most=1_000
    )
    trees: tuple[str, ...] = option((), "label trees, by name or path of a .json file; none named: all bundled ones")
    hierarchy_ks: tuple[int, ...] = option((1, 2, 5, 10, 20, 50), "latents a probe of a tree's node may use", least=1)
    hierarchy_folds: int = option(
        5, "folds of the trees' cross-validation, documents kept whole; C is chosen inside", least=3
    )
    hierarchy_tokens: int = option(64, "tokens of a labelled text that are read, BOS included", least=2)
    hierarchy_seed: int = option(0, "seed of the trees' folds", least=0, most=2**32 - 1)
    lexicons: tuple[str, ...] = option((), "folders of lexicons (*.txt, one word a line) beside the bundled ones")
    token_rows: int | None = option(
        40_000, "held-out rows on which properties of tokens are measured; none takes all", least=2
    )
    token_f1: float = option(
        0.8, "a property of tokens counts where the model's own probe has this F1 on other documents", least=0, most=1
    )
    token_splits: int = option(5, "times that a property's tokens are split into two halves", least=1)
    token_seed: int = option(0, "seed of those splits", least=0, most=2**32 - 1)
    device: str = option("auto", "torch device; auto takes CUDA where there is one")

    def __post_init__(self) -> None:
        check(self)
        if self.suite != "auto":
            find_suite(self.suite)
        for name in ("probe_train_texts", "probe_test_texts"):
            if getattr(self, name) % 4:
                raise UserError(f"{name}={getattr(self, name)}: expected a multiple of 4")
        for name in ("ks", "hierarchy_ks"):
            ks = getattr(self, name)
            if not ks or len(set(ks)) < len(ks):
                raise UserError(f"{name}={ks}: expected at least one number, each once")
        if len(set(self.tasks)) < len(self.tasks):
            raise UserError(f"tasks={self.tasks}: expected different names")


def resolved(config: EvalConfig, profile: dict[str, Any]) -> EvalConfig:
    """`config` with the suite and the tasks that `auto` and none stand for on a store of the manifest's `profile`."""
    suite = find_suite(suite_of(profile) if config.suite == "auto" else config.suite)
    return replace(config, suite=suite.name, tasks=config.tasks or suite.tasks)
