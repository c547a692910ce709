"""Workers on a local Ray cluster give the stores of one process. Skipped where Ray is not installed."""

import os
import signal
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="the extra extract-ray is not installed")

from hafs_extract import run
from hafs_extract.config import ExtractConfig
from hafs_extract.parts import makers, on_ray
from hafs_extract.parts.engine import Engine
from hafs_extract.parts.pool import Pool
from hafs_extract.profiles import resolve
from hafs_jax.base.errors import UserError
from tests.extract.test_workers import _digests, config, made, pools, small_parts  # noqa: F401 - fixtures

RESOLVED = resolve("pythia70m")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def three_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster of three cores, whatever the machine has."""
    import ray

    init = ray.init
    monkeypatch.delenv(on_ray.ADDRESS, raising=False)
    monkeypatch.setattr(ray, "init", lambda **options: init(num_cpus=3, **options))


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_on_a_cluster_give_the_same_stores(
    config: ExtractConfig,  # noqa: F811
    made: dict,  # noqa: F811
    tmp_path: Path,
    small_parts: None,  # noqa: F811
    workers: int,
) -> None:
    run.extract(config, RESOLVED, tmp_path, engine=Engine("ray", workers))
    assert _digests(tmp_path / "pythia70m" / "store") == made


def test_an_actor_that_is_killed_costs_its_part(
    config: ExtractConfig,  # noqa: F811
    made: dict,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    small_parts: None,  # noqa: F811
    pools: list[Pool],  # noqa: F811
) -> None:
    send, killed = on_ray.Actors.send, list[int]()

    def killing(actors: on_ray.Actors, worker: int, job) -> None:
        send(actors, worker, job)
        if job.part.number == 2 and not killed:
            place = pools[0]._ready[worker]
            killed.append(int(place.split()[1]))
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(on_ray.Actors, "send", killing)
    run.extract(config, RESOLVED, tmp_path, engine=Engine("ray", 2))
    assert _digests(tmp_path / "pythia70m" / "store") == made
    starts = sorted(pools[0].starts.values())
    assert killed and starts == [1] * (len(starts) - 1) + [2]


def test_a_cluster_without_room_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"workers=9: the Ray cluster has 3 CPUs; give fewer, or a larger cluster"):
        makers.open_maker(Engine("ray", 9))
    import ray

    assert not ray.is_initialized()


def test_a_cluster_that_does_not_answer_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(on_ray.ADDRESS, "127.0.0.1:9")
    with pytest.raises(UserError, match="expected a Ray cluster, found nothing that answers"):
        makers.open_maker(Engine("ray"))
