"""The language model and the SAEs behind the explorer, and its answers as JSON values. Imports torch, not jax.

All methods but `state` run one at a time (`worker`): they read the model and fill the caches.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hafs_evaluate.explore.loaded import LoadedRun, load_run, summary_of
from hafs_evaluate.explore.reading import (
    Reading,
    latents_of,
    read_text,
    strongest_by_token,
    strongest_on_text,
    text_scores,
)
from hafs_evaluate.explore.requests import CompareRequest, LatentRequest, ReadRequest, SearchRequest, SteerRequest
from hafs_evaluate.explore.steering import Edit, continuation
from hafs_evaluate.latents.attribution import attributions
from hafs_evaluate.latents.neighbours import rounded
from hafs_evaluate.latents.token_text import TokenText
from hafs_evaluate.workspace import FinishedRun, Workspace
from hafs_jax.base.errors import UserError
from hafs_jax.base.options import did_you_mean
from hafs_jax.store.manifest import Manifest

KEPT_READINGS = 16  # texts whose activations are kept
NEIGHBOURS = 8
PROMOTED = 10
ON_TEXT = 12  # strongest latents of a whole text that are listed


class Explorer:
    """Answers to requests about the runs of one workspace, which must be finished and evaluated."""

    def __init__(self, workspace: Workspace, runs: Sequence[FinishedRun], device: str = "auto") -> None:
        """Loads the language model. `UserError` where it cannot be had."""
        from hafs_extract.models import load_for_manifest

        self.workspace = workspace
        self.runs = {run.name: run for run in runs}
        self.manifest: Manifest = workspace.heldout.manifest
        started = time.monotonic()
        self.model = load_for_manifest(self.manifest, None, device)
        self.model_seconds = time.monotonic() - started
        self.text = TokenText(self.model.tokenizer)
        self._summaries = {run.name: summary_of(run) for run in runs}
        self._loaded: dict[str, LoadedRun] = {}
        self._readings: OrderedDict[str, Reading] = OrderedDict()

    def state(self) -> dict[str, Any]:
        """What there is to explore, and what of it is in memory. Safe while a job runs."""
        loaded = dict(self._loaded)
        parameters = sum(value.numel() * value.element_size() for value in self.model.hf.parameters())
        return {
            "profile": self.workspace.profile,
            "model": self.model.info.name,
            "hook_point": self.manifest.hook_point,
            "seconds": round(self.model_seconds, 1),
            "megabytes": round(parameters / 1e6),
            "trained_context": self.manifest.context_length,
            "runs": [
                {
                    "name": name,
                    **self._summaries[name],
                    "seconds": round(loaded[name].seconds, 1) if name in loaded else None,
                    "megabytes": round(loaded[name].megabytes, 1) if name in loaded else None,
                }
                for name in self.runs
            ],
        }

    def read(self, request: ReadRequest) -> dict[str, Any]:
        """The tokens of a text, and of each run the strongest latents on each token and on the whole text."""
        reading = self._reading(request.text)
        return {
            **self._tokens(reading),
            "runs": {name: self._strongest(self._run(name), reading, request.top) for name in request.runs},
        }

    def latent(self, request: LatentRequest) -> dict[str, Any]:
        """One latent: what the evaluation found of it, its activations on the text, its neighbours, its logits."""
        run, index = self._run(request.run), request.latent
        self._check_latent(run, request.run, index)
        live = None
        if request.text:
            reading = self._reading(request.text)
            live = {**self._tokens(reading), "activations": _numbers(latents_of(run.sae, reading)[:, index])}
        vector_D = run.unit_FD[index]
        return {
            "run": request.run,
            "index": index,
            **run.figures(index),
            "rows_scanned": run.values["rows_scanned"],
            "dashboard": run.dashboards.get(index),
            "live": live,
            "neighbours": run.nearest(vector_D, NEIGHBOURS + 1, leave_out=index),
            **attributions(run.sae.W_dec.detach()[index][None], self.model, PROMOTED)[0],
            "random_logit_effect": run.values.get("random_logit_effect"),
            "matches": {name: self._run(name).nearest(vector_D, 1)[0] for name in request.runs if name != request.run},
        }

    def search(self, request: SearchRequest) -> dict[str, Any]:
        """The latents of a run with the highest `text_scores` on the text."""
        run, reading = self._run(request.run), self._reading(request.text)
        latents_TF = latents_of(run.sae, reading)[~reading.is_left_out_L.cpu()]
        if not len(latents_TF):
            raise UserError("the text has no token that the SAEs were trained on: type more")
        score_F, strength_F, share_F = text_scores(latents_TF, run.density_F, run.max_F, run.values["rows_scanned"])
        best = torch.sort(score_F, descending=True, stable=True).indices[: request.top].tolist()
        found = [
            {
                **run.figures(index),
                "score": rounded(float(score_F[index])),
                "strength": rounded(float(strength_F[index])),
                "share": rounded(float(share_F[index])),
            }
            for index in best
            if score_F[index] > 0
        ]
        return {**self._tokens(reading), "counted": len(latents_TF), "latents": found}

    def compare(self, request: CompareRequest) -> dict[str, Any]:
        """The strongest latents of run A on the text, each with that of run B whose dictionary vector is nearest.

        `correlation` is that of the two latents' activations over the tokens; None where one of them is constant.
        """
        reading = self._reading(request.text)
        (a, latents_a), (b, latents_b) = (
            (run := self._run(name), latents_of(run.sae, reading)) for name in request.runs
        )
        pairs = []
        for index, peak, place in strongest_on_text(latents_a, request.top):
            match = b.nearest(a.unit_FD[index], 1)[0]
            values_a, values_b = latents_a[:, index], latents_b[:, match["index"]]
            pairs.append(
                {
                    "index": index,
                    "label": a.label(index),
                    "peak": rounded(peak),
                    "place": place,
                    "match": match,
                    "match_peak": rounded(float(values_b.max())),
                    "correlation": _correlation(values_a, values_b),
                    "activations": [_numbers(values_a), _numbers(values_b)],
                }
            )
        return {**self._tokens(reading), "pairs": pairs}

    def steer(self, request: SteerRequest, is_stopped: Callable[[], bool]) -> Iterator[dict[str, Any]]:
        """The plain and the steered continuation, one token of each in turn, as they are computed.

        Each entry has `which` continuation, its `text` so far and the number of `tokens`. The last one is
        {"done": True, ...}. It ends early once `is_stopped`.
        """
        run = self._run(request.run)
        self._check_latent(run, request.run, request.latent)
        maximum = float(run.max_F[request.latent])
        if maximum <= 0:
            raise UserError(
                f"latent {request.latent} of {request.run} fired on none of the {run.values['rows_scanned']:,} rows"
                " that were evaluated, so that its maximum is not known; choose another"
            )
        reading = self._reading(request.text)
        edit = Edit(run.sae, request.latent, request.mode, request.strength * maximum)
        yield {**self._tokens(reading), "maximum": rounded(maximum), "value": rounded(edit.value)}
        ways = {
            which: continuation(
                self.model, self.manifest, reading.ids_L, change, request.new_tokens, request.temperature, request.seed
            )
            for which, change in (("plain", None), ("steered", edit))
        }
        ids: dict[str, list[int]] = {which: [] for which in ways}
        while ways and not is_stopped():
            for which, tokens in list(ways.items()):
                token = next(tokens, None)
                if token is None:
                    del ways[which]
                    continue
                ids[which].append(token)
                text = self.model.tokenizer.decode(ids[which], clean_up_tokenization_spaces=False)
                yield {"which": which, "text": text, "tokens": len(ids[which])}
        same = next((n for n, (a, b) in enumerate(zip(*ids.values(), strict=False)) if a != b), None)
        yield {"done": True, "first_difference": same, "is_same": ids["plain"] == ids["steered"]}

    def _run(self, name: str) -> LoadedRun:
        """The run, loaded when it is first asked for."""
        if name not in self.runs:
            raise UserError(f"no run {name!r} here{did_you_mean(name, self.runs)}")
        if name not in self._loaded:
            self._loaded[name] = load_run(self.workspace, self.runs[name], self.manifest, str(self.model.device))
        return self._loaded[name]

    def _reading(self, text: str) -> Reading:
        if text not in self._readings:
            self._readings[text] = read_text(self.model, self.manifest, text)
            while len(self._readings) > KEPT_READINGS:
                self._readings.popitem(last=False)
        self._readings.move_to_end(text)
        return self._readings[text]

    def _tokens(self, reading: Reading) -> dict[str, Any]:
        left_out = reading.is_left_out_L.tolist()
        kinds = ["large" if one else "text" for one in left_out]
        if reading.has_bos:
            kinds[0] = "bos"
        tokens = [self.text(token) for token in reading.ids_L.tolist()]
        return {"tokens": tokens, "kinds": kinds, "cut": reading.cut}

    def _strongest(self, run: LoadedRun, reading: Reading, top: int) -> dict[str, Any]:
        latents_LF = latents_of(run.sae, reading)
        by_token = strongest_by_token(latents_LF, top)
        on_text = strongest_on_text(latents_LF, ON_TEXT)
        named = {index for row in by_token for index, _ in row} | {index for index, _, _ in on_text}
        return {
            "by_token": [[[index, rounded(value)] for index, value in row] for row in by_token],
            "on_text": [[index, rounded(value), place] for index, value, place in on_text],
            "l0": (latents_LF > 0).sum(1).tolist(),
            "labels": {index: run.label(index) for index in sorted(named)},
            "max": {index: rounded(float(run.max_F[index])) for index in sorted(named)},
        }

    def _check_latent(self, run: LoadedRun, name: str, index: int) -> None:
        if index >= (n := len(run.unit_FD)):
            raise UserError(f"latent {index}: {name} has {n:,} latents; expected an index from 0 to {n - 1:,}")


def _numbers(values_L: Tensor) -> list[float]:
    return [rounded(value) for value in values_L.tolist()]


def _correlation(a_L: Tensor, b_L: Tensor) -> float | None:
    if len(a_L) < 2 or float(a_L.std()) == 0 or float(b_L.std()) == 0:
        return None
    return rounded(float(torch.corrcoef(torch.stack([a_L, b_L]))[0, 1]))
