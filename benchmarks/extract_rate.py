"""Tokens per second of `LanguageModel.activations` by dtype and batch size, and of TransformerLens's bridge.

    python benchmarks/extract_rate.py [--model NAME] [--hook-point POINT] [--context-length 128] [--seconds 10]

The cases run in turn, three times. The best rate of each is shown, since other work of the machine only slows them.
"""

import argparse
import os
import time
from collections.abc import Callable

import torch

from hafs_extract.models import LanguageModel, load_model
from hafs_extract.profiles import OFFLINE

BATCH_TOKENS = (2_048, 4_096, 8_192)
ROUNDS = 3


def rate(run: Callable[[torch.Tensor], object], tokens_BL: torch.Tensor, seconds: float) -> float:
    """Tokens per second over at least `seconds`, after one call that is not counted."""
    run(tokens_BL)
    calls, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        run(tokens_BL)
        calls += 1
    return calls * tokens_BL.numel() / elapsed


def through_bridge(model: LanguageModel, hook_point: str) -> Callable[[torch.Tensor], object]:
    layer = int(hook_point.split(".")[1])

    def run(tokens_BL: torch.Tensor) -> None:
        hook = (hook_point, lambda acts, hook: None)
        with torch.no_grad():
            model.bridge.run_with_hooks(tokens_BL, stop_at_layer=layer + 1, return_type=None, fwd_hooks=[hook])

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=OFFLINE.model)
    parser.add_argument("--hook-point", default=OFFLINE.hook_point)
    parser.add_argument("--context-length", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    cases: dict[str, tuple[Callable[[torch.Tensor], object], torch.Tensor]] = {}
    for dtype in ("bfloat16", "float32"):
        model = load_model(options.model, dtype)
        bridged = load_model(options.model, dtype)  # booting the bridge changes the model it wraps
        for batch_tokens in BATCH_TOKENS:
            shape = (max(1, batch_tokens // options.context_length), options.context_length)
            tokens_BL = torch.randint(0, len(model.tokenizer), shape)
            cases[f"{dtype} batch {batch_tokens}"] = (
                lambda tokens, model=model: model.activations(tokens, options.hook_point),
                tokens_BL,
            )
        cases[f"{dtype} batch {batch_tokens} bridge"] = (through_bridge(bridged, options.hook_point), tokens_BL)
    best = dict.fromkeys(cases, 0.0)
    for _ in range(ROUNDS):
        for name, (run, tokens_BL) in cases.items():
            best[name] = max(best[name], rate(run, tokens_BL, options.seconds))
    print(f"{options.model} at {options.hook_point}, {torch.get_num_threads()} threads of {os.cpu_count()} cores")
    for name, found in best.items():
        print(f"{name:34s} {found:9,.0f} tokens/s")


if __name__ == "__main__":
    main()
