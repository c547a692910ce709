"""A run's folder: its files, its name, and the only code that reads and writes them. No JAX.

config.json      the resolved config, the store that the run trains on and what its manifest says; written first
metrics.jsonl    one object per logged step
tensorboard/     TensorBoard events, where they were asked for
wandb/           Weights & Biases' own files, and in wandb.json its id of the run, where it was asked for
checkpoints/     Orbax's, the last two
best/            the checkpoint of the best held-out FVU, where that is measured
run.json         a `RunSummary`; written last, when training has finished
sae/             the SAELens folder, once the run has been exported

Beside it lie .locks/<name>, which says who is at work on it, and .<name>.old, while `--force` removes that folder.
"""

import dataclasses
import hashlib
import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hafs_jax.base.checksums.checked import check_folder
from hafs_jax.base.checksums.sealed import sealed_line
from hafs_jax.base.errors import UserError, arg
from hafs_jax.base.files import read_json, read_jsonl, sha256_of, write_figures, write_record, write_text
from hafs_jax.base.options import did_you_mean, from_dict, to_dict
from hafs_jax.base.process.locks import locked
from hafs_jax.config import TrainConfig, arm_name
from hafs_jax.presets import preset
from hafs_jax.store.manifest import Manifest, read_manifest

EXPORT_FORMAT = 1  # raise it when a run's export would be another


@dataclass(frozen=True)
class RunSummary:
    """What run.json says of a finished run."""

    name: str
    variant: str
    architecture: str
    seed: int
    k: int  # active latents per row, or the target of the mean L0
    tag: str
    arm: str  # what the run is one seed of, beside its architecture and k: see `hafs_jax.config.arm_name`
    n_latents: int
    d_model: int
    d_out: int  # of a transcoder the width of its target's rows, else d_model
    steps: int
    tokens: int
    seconds: float
    stopped_early: bool
    trained_together: int  # SAEs that shared the program, this one among them
    tau: float | None  # the gate's threshold, FVU; None where there is no gate
    tau_reached: bool | None
    best: dict[str, Any] | None  # {"step", "heldout_fvu"}, None where it was not measured
    final: dict[str, Any]  # the last logged step
    store_fingerprint: str
    logged_steps: int | None = None  # in metrics.jsonl; None where that is not known


_NO_COUNTS = dict.fromkeys(("tokens", "seconds", "tokens_per_second", "dead_fraction", "bad_batches"))
"""What each logged step has beside its number, and no step lacks or has as null."""

_NOT_YET = {"stopped_early": False, "trained_together": 1, "tau": None, "tau_reached": None, "best": None,
            "logged_steps": None}  # fmt: skip
"""What holds for a run whose run.json is from before there was such a key."""


@dataclass(frozen=True)
class Run:
    """One run's folder."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def config_path(self) -> Path:
        return self.folder / "config.json"

    @property
    def metrics_path(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def best(self) -> Path:
        return self.folder / "best"

    @property
    def result_path(self) -> Path:
        return self.folder / "run.json"

    @property
    def sae(self) -> Path:
        return self.folder / "sae"

    def finished(self) -> bool:
        return self.result_path.exists()

    def begun(self) -> bool:
        """Whether anything was trained: a step is logged or saved. If not, another config may have the folder."""
        saved = self.checkpoints.is_dir() and any(path.name.isdigit() for path in self.checkpoints.iterdir())
        logged = self.metrics_path.exists() and self.metrics_path.stat().st_size > 0
        return saved or logged or self.finished()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Locks the run for a training; `UserError` where another process trains it or holds it."""
        with locked(self._lock, "a training", self.folder):
            self._remove_leftovers()
            yield

    @contextmanager
    def held(self, work: str) -> Iterator[None]:
        """Holds the run as it is for `work` ("an evaluation"); `UserError` where a training is at work on it.

        Nothing is held, and no lock is made, of a folder that is no run's, such as a language model's.
        """
        try:
            self.record()
        except UserError:  # whoever reads it says what is wrong
            yield
            return
        with locked(self._lock, work, self.folder, shared=True):
            yield

    @property
    def _lock(self) -> Path:
        return self.folder.parent / ".locks" / self.folder.name

    def remove(self) -> None:
        """Removes the folder. It loses its name first, so that a kill leaves no half of it under that name.

        Only for who has locked the run.
        """
        if self.folder.is_symlink():
            self.folder.unlink()
        elif self.folder.exists():
            self.folder.rename(self._being_removed)
            self._remove_leftovers()

    @property
    def _being_removed(self) -> Path:
        return self.folder.with_name(f".{self.folder.name}.old")

    def _remove_leftovers(self) -> None:
        if self._being_removed.exists():
            shutil.rmtree(self._being_removed)

    def result(self) -> dict[str, Any]:
        """run.json as it stands there; `UserError` where the run has not finished."""
        return read_json(self.result_path, "a finished run's run.json")

    def checkpoint(self, which: str = "last") -> tuple[Path, int | None]:
        """The folder of the `last` checkpoints or of the `best` one, and the step of it that a finished run names."""
        folder = self.best if which == "best" else self.checkpoints
        if not self.finished():
            return folder, None
        result = self.result()
        return folder, result.get("steps") if which == "last" else (result.get("best") or {}).get("step")

    def state(self) -> str:
        """A hash of config.json and run.json, which an export notes: it is current as long as they are the same."""
        digests = [sha256_of(path) for path in (self.config_path, self.result_path)]
        return f"{EXPORT_FORMAT} " + hashlib.sha256(" ".join(digests).encode()).hexdigest()

    def is_exported(self) -> bool:
        """Whether `sae` holds the export of this finished run, whole; `UserError` where it holds a damaged one."""
        return check_folder(self.sae, "an exported SAE's file", "it is exported again").get("of") == self.state()

    def summary(self) -> RunSummary:
        """run.json, typed; `UserError` where the run has not finished.

        A file of an earlier version lacks keys. They are taken from config.json, and the widths from the stores.
        """
        result = self.result()
        names = [field.name for field in dataclasses.fields(RunSummary)]
        if not set(names) <= set(result):
            result = _NOT_YET | self._from_config(set(names) - set(result)) | result
        if missing := [name for name in names if name not in result]:
            raise UserError(
                f"{self.result_path}: expected a finished run's summary, found none of {', '.join(missing)}; "
                f"train the run again with {arg('force', True)}"
            )
        found = {name: result[name] for name in names} | {"name": self.name}  # it may have been renamed
        summary = from_dict(RunSummary, found, str(self.result_path))
        for name, value in {**summary.final, **(summary.best or {})}.items():
            if not isinstance(value, int | float | None):
                raise UserError(
                    f"{self.result_path}: expected a number for {name}, found {value!r}; train the run again with "
                    f"{arg('force', True)}"
                )
        return summary

    def metrics(self) -> list[dict[str, Any]]:
        """The logged steps so far, ascending; of a step that was logged again after a resume, the last.

        Raises `UserError` for a line that is damaged, and where a finished run has not all steps that it logged.
        """
        by_step: dict[int, dict[str, Any]] = {}
        for record in read_jsonl(self.metrics_path):
            if not _is_whole(record.get("step")):
                raise UserError(f"{self.metrics_path}: expected a step in each line, found one without; remove it")
            for name, value in (_NO_COUNTS | record).items():
                if not isinstance(value, int | float) and (value is not None or name in _NO_COUNTS):
                    raise UserError(
                        f"{self.metrics_path}, step {record['step']}: expected a number for {name}, "
                        f"found {'none' if value is None else repr(value)}; "
                        "restore the file, or remove the line"
                    )
            by_step[record["step"]] = record
        logged = self.result().get("logged_steps") if self.finished() else None
        if logged is not None and logged != len(by_step):
            raise UserError(
                f"{self.metrics_path}: expected the {logged} steps that the finished run logged, found {len(by_step)}; "
                "restore the file"
            )
        return [by_step[step] for step in sorted(by_step)]

    def drop_metrics(self, after: int) -> list[dict[str, Any]]:
        """Rewrites metrics.jsonl without the steps after step `after`, and returns what it has left."""
        kept = [record for record in self.metrics() if record["step"] <= after]
        write_text(self.metrics_path, "".join(map(sealed_line, kept)))
        return kept

    def config(self) -> TrainConfig:
        """The resolved config that the run was started with."""
        return from_dict(TrainConfig, self.record()["config"], str(self.config_path))

    def record(self) -> dict[str, Any]:
        """config.json as it stands there: {"variant", "architecture", "seed", "config", "store"}.

        The config of an earlier version may lack fields, or have others.
        """
        record = read_json(self.config_path, "a run's config.json")
        if not isinstance(record, dict) or not {"config", "store"} <= set(record):
            raise UserError(f"{self.config_path}: expected the keys config and store, found {sorted(record)}")
        if not _is_store(record["store"]) or not _is_store(record["store"].get("target", record["store"])):
            raise UserError(f"{self.config_path}: expected a store with its folder, found {str(record['store'])[:80]}")
        return record

    def store_record(self) -> dict[str, Any]:
        """{"folder", "fingerprint", "manifest"} of the store that the run trains on, and of a transcoder's "target".

        Folders are relative to the run's. The manifest is as `store_record` leaves it; earlier versions have none.
        """
        return self.record()["store"]

    def manifests(self) -> tuple[Manifest, Manifest | None]:
        """What is known of the run's store, and of a transcoder's target's, without shards, checksums and mean.

        It is recorded in config.json. For a run of an earlier version it is read from the store, and `UserError` says
        where the store is expected.
        """
        record = self.store_record()
        return self._manifest(record), self._manifest(record["target"]) if "target" in record else None

    def _manifest(self, record: dict[str, Any]) -> Manifest:
        if "manifest" in record:
            return from_dict(Manifest, record["manifest"], f"{self.config_path}: store")
        folder = self.folder / record["folder"]
        if not folder.exists():  # a folder above the run's is a link
            folder = Path(os.path.normpath(self.folder.absolute() / record["folder"]))
        return read_manifest(folder)

    @property
    def is_transcoder(self) -> bool:
        """Whether the run reconstructs the rows of another store."""
        return "target" in self.store_record()

    def widths(self) -> tuple[int, int]:
        """D of the rows that are encoded and of those that are reconstructed."""
        result = self.result() if self.finished() else {}
        if "d_model" in result and "d_out" in result:
            return result["d_model"], result["d_out"]
        source, target = self.manifests()
        return source.d_model, (target or source).d_model

    def write_config(self, config: TrainConfig, store: dict[str, Any]) -> None:
        names = {"variant": config.variant, "architecture": config.sae.architecture, "seed": config.seed}
        write_record(self.config_path, {**names, "config": to_dict(config), "store": store})

    def write_result(self, summary: RunSummary) -> None:
        """Writes run.json: the run has finished."""
        write_figures(self.result_path, dataclasses.asdict(summary))

    def check_same(self, config: TrainConfig, store: dict[str, Any]) -> None:
        """Raises `UserError` naming the first difference where the folder's run has another config or store."""
        old, new = identity(self.config()), identity(config)
        if old["products"] == "auto":  # of a version that chose anew at each start
            old["products"] = new["products"]
        if (difference := _first_difference(old, new)) is not None:
            path, before, after = difference
            raise UserError(
                f"{self.folder} holds a run with {path}={before}, this one has {after}; pass {arg('tag', 'NAME')} to "
                f"keep both, {arg('force', True)} to replace it, or choose another seed or folder"
            )
        found, expected = self.store_record(), store
        if "target" in expected and found["fingerprint"] == expected["fingerprint"]:
            found, expected = found.get("target", found), expected["target"]
        if found["fingerprint"] != expected["fingerprint"]:
            raise UserError(
                f"{self.folder} was trained on another store ({found['fingerprint']}, now "
                f"{expected['fingerprint']}); pass {arg('force', True)} to replace it, or choose another folder"
            )

    def _from_config(self, names: set[str]) -> dict[str, Any]:
        """Those of the summary's `names` that config.json and the stores tell."""
        record = self.record()
        config, sae = record["config"], record["config"].get("sae", {})
        known = {name: record.get(name, config.get(name)) for name in ("variant", "seed")}
        known |= {"name": self.name, "architecture": record.get("architecture", sae.get("architecture"))}
        known |= {"k": sae.get("k"), "n_latents": sae.get("n_latents"), "tag": config.get("tag", "")}
        known["arm"] = config.get("arm") or arm_name(known["variant"], known["tag"], known["k"])
        known["store_fingerprint"] = record["store"].get("fingerprint")
        if names & {"d_model", "d_out"}:
            known["d_model"], known["d_out"] = self.widths()
        return {name: value for name, value in known.items() if name in names and value is not None}


def _is_store(value: Any) -> bool:
    """Whether it names a store as config.json does."""
    return isinstance(value, dict) and isinstance(value.get("folder"), str)


def _is_whole(value: Any) -> bool:
    """Whether it is a whole number, such as a step is."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def all_runs(folder: Path) -> list[Run]:
    """The runs in `folder`, by name, finished or not."""
    found = [Run(path) for path in sorted(folder.glob("[!.]*")) if path.is_dir()]
    return [run for run in found if is_run(run.folder)]


def finished_runs(folder: Path) -> list[Run]:
    """The runs in `folder` that have finished, by name."""
    return [run for run in all_runs(folder) if run.finished()]


def is_run(folder: Path) -> bool:
    """Whether the folder is a run's, finished or not."""
    return Run(folder).config_path.exists() or Run(folder).finished()


def find_run(name: str | Path, out: Path, profile: str = "auto") -> Run:
    """The run whose folder `name` is, or the run of that name in `<out>/<profile>/runs`; `UserError` where none is."""
    folder = Path(name)
    if folder.is_dir():
        return Run(folder)
    if folder.name != str(name) or folder.name == "":
        raise UserError(f"expected a run's folder at {folder}, found none")
    try:
        runs = profile_folder(out, profile) / "runs"
    except UserError as error:
        raise UserError(f"no run's folder at {folder}, nor a run of that name: {error}") from None
    names = [run.name for run in all_runs(runs)]
    if str(name) not in names:
        known = ", ".join(names) if names else "none"
        raise UserError(f"no run {str(name)!r} in {runs}{did_you_mean(name, names)}; found {known}")
    return Run(runs / str(name))


def store_record(folder: Path, manifest: Manifest, run: Run) -> dict[str, Any]:
    """What the run's config.json says of a store: where it lies, which it is, and its manifest without what is long."""
    relative = os.path.relpath(folder, run.folder)
    here = run.folder.parent.resolve() / run.folder.name
    if not Path(os.path.normpath(here / relative)).exists():  # a folder above the run's is a link
        relative = os.path.relpath(folder.resolve(), here)
    described = replace(manifest, shards=(), files_sha256={}, mean=())
    return {"folder": relative, "fingerprint": manifest.fingerprint, "manifest": to_dict(described)}


_NOT_IDENTITY = ("arm", "tensorboard", "wandb", "kernels", "mesh")
# a name, where metrics are shown, how sums are computed, who computes


def identity(config: TrainConfig) -> dict[str, Any]:
    """The config as plain values, without what does not change a training: two with the same identity are one run."""
    return {name: value for name, value in to_dict(config).items() if name not in _NOT_IDENTITY}


def profile_folder(out: Path, profile: str) -> Path:
    """`<out>/<profile>`; `auto` stands for the profile that was extracted last, as noted in `<out>/auto.json`.

    Raises `UserError` where nothing was extracted or the profile has no folder. Nothing is guessed.
    """
    if profile == "auto":
        noted = out / "auto.json"
        if not noted.exists():
            raise UserError(
                f"profile auto: expected {noted}, found none; run `hafs extract`, or name the {arg('profile')}"
            )
        profile = read_json(noted, "the profile that was extracted last").get("profile", "")
        if profile != "" and not is_inside(profile):
            raise UserError(f"{noted}: expected the name of a folder in {out}, found profile {profile!r}; correct it")
    if profile and not is_inside(profile):
        raise UserError(f"{arg('profile', profile)}: expected the name of a folder in {out}")
    folder = out / profile
    if not profile or not folder.is_dir():
        known = sorted(path.parent.name for path in out.glob("*/store"))
        found = f"found {', '.join(known)}{did_you_mean(profile, known)}" if known else "found no profile's folder"
        raise UserError(
            f"profile {profile!r}: expected a folder {folder}, {found}; run `hafs extract`, or name another "
            f"{arg('profile')}"
        )
    return folder


def is_inside(name: Any) -> bool:
    """Whether `name` names a folder below the one that it is joined to: no way out of it, no name of that itself."""
    if not isinstance(name, str) or "\0" in name:
        return False
    path = Path(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def baseline_tau(runs: Path, config: TrainConfig, fingerprint: str) -> tuple[float, str]:
    """tau = tau_factor x the final FVU of the seed-0 baseline of the same SAE on the same store, and that run's name.

    The baseline has the same tag, or what is left of it without axes that a baseline does not have. Raises `UserError`
    where that run is missing, unfinished, of another SAE or on another store.
    """
    baseline = replace(preset("baseline", config.sae.architecture), seed=0)
    axes = config.tag.split(",") if config.tag else []
    tags = [",".join(some) for n in range(len(axes), -1, -1) for some in itertools.combinations(axes, n)]
    found = [Run(runs / replace(baseline, tag=tag).run_name) for tag in tags]
    run = next((run for run in found if run.finished()), found[-1])
    remedy = (
        f"{config.variant} needs tau, a predefined FVU threshold: train the baseline first "
        f'(`hafs train --variant baseline`, preset("baseline")) or give {arg("penalty.tau")}'
    )
    if not run.finished():
        raise UserError(f"{remedy}; found no finished run at {run.folder}")
    if (difference := _first_difference(to_dict(run.config().sae), to_dict(config.sae), "sae.")) is not None:
        raise UserError(f"{remedy}; {run.folder} has {difference[0]}={difference[1]}, this run {difference[2]}")
    if run.store_record()["fingerprint"] != fingerprint:
        raise UserError(f"{remedy}; {run.folder} was trained on another store")
    return config.penalty.tau_factor * final_fvu(run), run.folder.name


def final_fvu(run: Run) -> float:
    """The final FVU (moving average) of a finished run; `UserError` where it is not finite."""
    found = run.summary().final.get("fvu_ema")
    if found is None:
        raise UserError(f"{run.result_path}: expected a final fvu_ema, found null (it was not finite); train it again")
    return float(found)


def _first_difference(old: Any, new: Any, prefix: str = "") -> tuple[str, Any, Any] | None:
    for key in sorted(set(old) | set(new)):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            if (inner := _first_difference(before, after, f"{prefix}{key}.")) is not None:
                return inner
        elif before != after:
            return prefix + key, before, after
    return None
