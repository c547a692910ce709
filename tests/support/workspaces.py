"""A profile's folder with finished runs of a tiny model, ready to be evaluated; `conftest` makes it a fixture."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from hafs_evaluate.config import EvalConfig
from hafs_evaluate.stages import evaluate
from hafs_evaluate.workspace import Workspace, finished_runs, open_workspace
from hafs_extract.models import LanguageModel
from hafs_jax.runs import Run
from hafs_jax.store.manifest import TokenizerInfo
from tests.support.runs import STORE, config_of, finished_run
from tests.support.stores import resealed, write_store
from tests.support.torch_saes import saved_sae

D, F, HOOK = 20, 33, "blocks.2.hook_resid_post"
TASK = "117_us_state_FL"
CONFIG = EvalConfig(contexts=4, tasks=(TASK,), ks=(1, 2), hierarchy_ks=(1, 2), hierarchy_folds=3, device="cpu")


def make_workspace(out: Path, model: LanguageModel) -> Workspace:
    """OUT/offline: two finished runs, exported already, on stores of `model`; an unfinished one."""
    for split in ("train", "heldout"):
        folder = out / "offline" / "store" / split
        tokens = torch.randint(3, 300, (12, 9), generator=torch.Generator().manual_seed(len(split)))
        tokens[:, 0] = model.bos_token_id
        acts = model.activations(tokens, HOOK)[:, 1:].flatten(0, 1)
        write_store(
            folder,
            acts.numpy(),
            split=split,
            length=9,
            model=model.info,
            tokenizer=TokenizerInfo("tiny", 401, model.bos_token_id, True),
            hook_point=HOOK,
            profile={"requested": "offline", "resolved": "offline", "reason": "a test"},
        )
        np.save(folder / "tokens.npy", tokens.flatten().numpy().astype(np.int32))
        resealed(folder)
    for seed, name in enumerate(("baseline-s0", "strict-s0")):
        folder = out / "offline" / "runs" / name
        saved_sae(folder / "sae", D, F, seed=seed, hook=HOOK)
        finished_run(folder)
    Run(out / "offline" / "runs" / "adaptive-s0").write_config(config_of("adaptive"), STORE)
    return open_workspace(out, "offline")


def run(workspace: Workspace, config: EvalConfig = CONFIG, skip: Sequence[str] = (), names: Sequence[str] = ()) -> None:
    """Evaluates the finished runs `names`, or all of them."""
    evaluate(workspace, config, finished_runs(workspace, names), skip)
