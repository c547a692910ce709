"""Workers: who gets which part, what a death costs, who is refused, and stores that do not depend on any of it."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from collections import Counter, deque
from importlib import metadata
from pathlib import Path

import pytest

from hafs_extract import run
from hafs_extract.cli import main
from hafs_extract.config import ExtractConfig, parse_source
from hafs_extract.parts import files, makers, making, on_ray, plan, processes
from hafs_extract.parts.engine import Engine
from hafs_extract.parts.files import Entry
from hafs_extract.parts.jobs import TOKEN, Job, Setup
from hafs_extract.parts.plan import Part
from hafs_extract.parts.pool import Died, Made, Pool, Ready, Refused, Said
from hafs_extract.profiles import PYTHIA70M, resolve
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import read_json, sha256_of
from hafs_jax.store.manifest import ModelInfo
from tests.support.tiny_models import save_model, save_wikitext

RESOLVED = resolve("pythia70m")
JOBS = [Job("train", "text", "parts", Part(n, n, n + 1, n, 1)) for n in range(7)]


def _entry(job: Job) -> Entry:
    return Entry(job.part, (1,), ("0" * 16,), "0" * 16)


class Fakes:
    """A crew whose workers do their jobs at once, or die of them."""

    def __init__(self, size: int, dies: dict[int, int] | None = None, depth: int = 1) -> None:
        self.size, self.dies, self._depth = size, Counter(dies or {}), depth
        self.made_by = [{"device": "cpu AVX2", "torch": "2"} for _ in range(size)]
        self.answers: deque[tuple[int, Said]] = deque()
        self.dead, self.sent = set[int](), list[tuple[int, int]]()

    def start(self, worker: int) -> None:
        self.dead.discard(worker)
        self.answers.append((worker, Ready(self.made_by[worker], f"machine {worker}")))

    def depth(self, made_by: dict) -> int:
        return self._depth

    def send(self, worker: int, job: Job) -> None:
        number = job.part.number
        self.sent.append((worker, number))
        if worker in self.dead:
            return
        if self.dies[number] > 0:
            self.dies[number] -= 1
            self.dead.add(worker)
            self.answers.append((worker, Died("killed by signal 9")))
        else:
            self.answers.append((worker, Made(_entry(job))))

    def wait(self) -> tuple[int, Said]:
        return self.answers.popleft()

    def close(self) -> None:
        self.answers.clear()


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("workers", [1, 2, 3, 9])
def test_every_part_is_made_once(workers: int, depth: int) -> None:
    crew, made = Fakes(workers, depth=depth), list[int]()
    pool = Pool(crew)
    pool.make(JOBS, lambda job, entry: made.append(entry.part.number))
    assert sorted(made) == list(range(7)) and set(pool.starts.values()) == {1}
    assert len({worker for worker, _ in crew.sent}) == min(workers, 7)  # no more than there are parts
    pool.make([], lambda *_: pytest.fail("nothing was to be made"))
    pool.rest()
    pool.make(JOBS[:1], lambda job, entry: made.append(entry.part.number))
    assert made[-1] == 0


@pytest.mark.parametrize("workers", [1, 3])
def test_a_dead_worker_costs_its_part_and_three_retries_are_made(workers: int, caplog) -> None:
    made = list[int]()
    pool = Pool(Fakes(workers, dies={2: 3, 5: 1}))
    pool.make(JOBS, lambda job, entry: made.append(entry.part.number))
    assert sorted(made) == list(range(7))
    assert [pool.starts[job] for job in JOBS] == [1, 1, 4, 1, 1, 2, 1]
    assert "part 5 of the train split failed on machine" in caplog.text and "killed by signal 9" in caplog.text
    with pytest.raises(
        UserError, match=r"part 2 of the train split failed 4 times, .*machine .*signal 9.*same command"
    ):
        Pool(Fakes(workers, dies={2: 4})).make(JOBS, lambda *_: None)


def test_a_part_that_waits_behind_another_is_not_lost_with_it() -> None:
    made = list[int]()
    pool = Pool(Fakes(2, dies={0: 1}, depth=2))
    pool.make(JOBS, lambda job, entry: made.append(entry.part.number))
    assert sorted(made) == list(range(7)) and pool.starts[JOBS[0]] == 2 and sum(pool.starts.values()) <= 9


def test_workers_that_never_start_end_the_extraction() -> None:
    crew = Fakes(1)
    crew.start = lambda worker: crew.answers.append((worker, Died("ended with exit code 1")))  # type: ignore[method-assign]
    with pytest.raises(UserError, match="a worker's start failed 4 times, the last time on worker 0"):
        Pool(crew).make(JOBS, lambda *_: None)


@pytest.mark.parametrize("name", ["device", "torch"])
def test_workers_of_different_kinds_are_refused(name: str) -> None:
    crew = Fakes(2)
    crew.made_by[1][name] = "another"
    with pytest.raises(UserError, match=f"the same bits, found {name} another on machine 1 and .* on another"):
        Pool(crew).make(JOBS, lambda *_: None)


def test_a_workers_refusal_is_the_extractions() -> None:
    crew = Fakes(1)
    crew.send = lambda worker, job: crew.answers.append((worker, Refused("the disk is full")))  # type: ignore[method-assign]
    with pytest.raises(UserError, match="the disk is full"):
        Pool(crew).make(JOBS, lambda *_: None)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ExtractConfig:
    folder = tmp_path_factory.mktemp("inputs")
    model, text = save_model(folder / "m"), save_wikitext(folder / "w", 60)
    fields = {"model": str(model), "sources": (parse_source(f"wikitext={text}", PYTHIA70M.sources),)}
    fields |= {"context_length": 17, "shard_rows": 300, "batch_tokens": 256, "dtype": "float32"}
    return dataclasses.replace(PYTHIA70M, heldout_fraction=0.2, norm_multiple=1.1, **fields)


def _digests(root: Path) -> dict[str, str]:
    found = sorted(path for path in root.rglob("*") if path.is_file() and path.name not in ("timing.json", ".lock"))
    return {str(path.relative_to(root)): sha256_of(path) for path in found}


@pytest.fixture(scope="module")
def made(config: ExtractConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The checksums of the stores that one process makes, in one part for each split."""
    out = tmp_path_factory.mktemp("made")
    run.extract(config, RESOLVED, out)
    return _digests(out / "pythia70m" / "store")


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "LEAST_BYTES", 40_000)


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[Pool]:
    """The pools that are made."""
    found: list[Pool] = []

    class Noted(Pool):
        def __init__(self, crew) -> None:
            super().__init__(crew)
            found.append(self)

    monkeypatch.setattr(makers, "Pool", Noted)
    return found


KILLED_ONCE = """
import os, signal, sys
from hafs_extract.parts import making
original = making.write_part
def dying(folder, part, *args):
    if part.number == 2:
        try:
            os.close(os.open(sys.argv[1], os.O_CREAT | os.O_EXCL))
            os.kill(os.getpid(), signal.SIGKILL)
        except FileExistsError:
            pass
    return original(folder, part, *args)
making.write_part = dying
from hafs_extract.parts.worker import main
main()
"""


def test_a_worker_that_is_killed_costs_its_part_and_changes_no_byte(
    config: ExtractConfig, made: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_parts, pools, caplog
) -> None:
    monkeypatch.setattr(processes, "COMMAND", ("-c", KILLED_ONCE, str(tmp_path / "killed")))
    ((_, folders),) = run.extract(config, RESOLVED, tmp_path / "out", engine=Engine(workers=2)).items()
    assert _digests(folders["train"].parent) == made
    (pool,) = pools
    assert sorted(pool.starts.values()) == [1] * (len(pool.starts) - 1) + [2] and len(pool.starts) >= 8
    assert "failed on process" in caplog.text and "killed by signal 9" in caplog.text
    timing = read_json(folders["train"] / "timing.json", "timing")
    assert timing["workers"] == 2 and timing["made_by"]["torch"] == metadata.version("torch")


class Killed(BaseException):
    """Stands for the driver's SIGKILL."""


def test_a_killed_driver_goes_on_with_another_number_of_workers(
    config: ExtractConfig, made: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_parts, pools
) -> None:
    note, noted = files.Parts.note, list[str]()

    def stopping(parts: files.Parts, entry: Entry) -> None:
        note(parts, entry)
        noted.append(entry.part.name)
        if len(noted) == 3:
            raise Killed

    started: list[int] = []
    begin = processes.subprocess.Popen

    def popen(*args, **kwargs):
        started.append((process := begin(*args, **kwargs)).pid)
        return process

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(files.Parts, "note", stopping)
        patch.setattr(processes.subprocess, "Popen", popen)
        run.extract(config, RESOLVED, tmp_path, engine=Engine(workers=3))
    assert len(started) == 3
    for pid in started:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    work = tmp_path / "pythia70m" / "store" / ".work"
    there = {path.stem for path in work.glob("train-parts/*.json")}
    assert 3 <= len(there) < len(pools[0].starts) + 9
    again, write = list[tuple[str, str]](), making.write_part

    def counted(folder: Path, part: Part, *args):
        again.append((folder.name, part.name))
        return write(folder, part, *args)

    monkeypatch.setattr(making, "write_part", counted)
    run.extract(config, RESOLVED, tmp_path)
    assert _digests(tmp_path / "pythia70m" / "store") == made
    assert again and not there & {name for folder, name in again if folder == "train-parts"}
    assert len(set(again)) == len(again)


def test_parts_that_are_damaged_in_either_pass_are_made_again(
    config: ExtractConfig, made: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_parts, caplog
) -> None:
    write_stores, write, again = run.write_stores, making.write_part, list[str]()
    work = tmp_path / "pythia70m" / "store" / ".work"

    def damaged(*args):
        with open(work / "train-parts" / "part-00001.bin", "r+b") as file:
            file.seek(1000)
            byte = file.read(1)[0]
            file.seek(1000)
            file.write(bytes([byte ^ 1]))
        return write_stores(*args)

    def counted(folder: Path, part: Part, *args):
        again.append(f"{folder.name}/{part.name}")
        return write(folder, part, *args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run, "write_stores", lambda *_: (_ for _ in ()).throw(Killed))
        run.extract(config, RESOLVED, tmp_path)
    with open(work / "train-parts" / "part-00003.bin", "r+b") as file:
        file.truncate(100)
    monkeypatch.setattr(run, "write_stores", damaged)
    monkeypatch.setattr(making, "write_part", counted)
    run.extract(config, RESOLVED, tmp_path)
    assert again == ["train-parts/part-00003", "train-parts/part-00001"]  # heldout's pass 2 damages it no more
    assert _digests(tmp_path / "pythia70m" / "store") == made
    assert "1 parts of the train split are damaged; they are made again" in caplog.text


def test_a_worker_ends_when_its_stdin_does() -> None:
    command = [sys.executable, *processes.COMMAND]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and out == b""


def _setup(config: ExtractConfig, folder: Path) -> Setup:
    info = ModelInfo(config.model, None, f"folder:{config.model}", "float32", 5, 20)
    return Setup(config, (20,), info, True, 100, str(folder), "token")


def test_a_folder_that_is_not_shared_is_refused(config: ExtractConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"expected {tmp_path} to be a folder that all machines share, found none here"):
        making.Worker(_setup(config, tmp_path))
    (tmp_path / TOKEN).write_text("another")
    with pytest.raises(UserError, match="found another here; give --out on a file system that all of them see"):
        making.Worker(_setup(config, tmp_path))


def test_another_model_is_refused(config: ExtractConfig, tmp_path: Path) -> None:
    (tmp_path / TOKEN).write_text("token")
    setup = _setup(config, tmp_path)
    other = dataclasses.replace(setup.model, fingerprint="0" * 64)
    with pytest.raises(UserError, match="weights have changed: the extraction that a worker takes part in has"):
        making.Worker(dataclasses.replace(setup, model=other))


def test_workers_move_to_another_folder(config: ExtractConfig, tmp_path: Path) -> None:
    setups: list[Setup] = []

    def crew(setup: Setup) -> Fakes:
        setups.append(setup)
        return Fakes(2)

    maker = makers.Workers(2, crew, lambda: None)
    maker.prepare(_setup(config, tmp_path), None)  # type: ignore[arg-type]
    maker.move(tmp_path / "windows")
    first, second = setups
    assert second.folder == str(tmp_path / "windows") and second.token != first.token
    assert (tmp_path / "windows" / TOKEN).read_text() == second.token


def _said(capsys: pytest.CaptureFixture, *flags: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["extract", "--profile", "offline", *flags])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_flags_that_cannot_be_meant_are_refused(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _said(capsys, "--workers", "0") == "error: --workers 0: expected 1 to 65,536, or none\n"
    assert "--engine: invalid choice: 'spark' (choose from 'local', 'ray')" in _said(capsys, "--engine", "spark")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = "error: --engine ray needs the package ray, which is not installed: pip install 'hafs-jax[extract-ray]'\n"
    assert _said(capsys, "--engine", "ray") == said


def test_room_on_machines() -> None:
    assert [on_ray.threads_each([16, 4], n) for n in (1, 2, 3, 4, 5, 20, 21)] == [16, 8, 5, 4, 4, 1, 0]
    assert on_ray.threads_each([], 1) == 0


def test_an_address_that_does_not_answer_is_said_soon() -> None:
    with pytest.raises(UserError, match=r"RAY_ADDRESS=127.0.0.1:9: expected a Ray cluster, found nothing that answers"):
        on_ray._check_answers("127.0.0.1:9")
    on_ray._check_answers("auto")
