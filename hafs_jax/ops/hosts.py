"""The processes of a training, of which there may be several: on one machine, or on many. No other module counts them.

One of them, the first, writes and prints; see `first`. They talk in texts (`hafs_jax.base.process.meetings`): no device
takes part, so that they may compare what they were given before anything compiles. All call `exchange`, and what is
built on it, in the same order. One process alone gets at once what it gave.
"""

import contextlib
import hashlib
import json
import logging
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax._src import distributed
from jax._src.clusters import ClusterEnv
from jaxlib import _jax

from hafs_jax import __version__
from hafs_jax.base.errors import UserError, arg, in_one_line
from hafs_jax.base.log import PACKAGES
from hafs_jax.base.places import make_folder
from hafs_jax.base.process import meetings
from hafs_jax.base.process.meetings import Address, Ended, Meeting

START_SECONDS = 120.0
"""How long processes wait for each other at the start."""

_SHARED_SECONDS = 5.0  # until a file that one host wrote is seen by another
_JAX_SECONDS = 60 * 60  # of silence, after which JAX would end a process: long after `meetings` has
_LONGEST = 120  # letters of a value in a message

_SERVICE = """
import signal, sys, time
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
from jaxlib import _jax
address, count, silence, linger = sys.argv[1], *map(int, sys.argv[2:])
service = _jax.get_distributed_runtime_service(address, count, heartbeat_timeout=silence, shutdown_timeout=linger)
print("ready", flush=True)
if not sys.stdin.read():
    time.sleep(linger)
"""
"""The program that runs JAX's coordination service. Where the service ends, JAX aborts all processes in many lines. So
it has a process of its own, which outlives the first process long enough for `meetings` to end the others."""

_meeting: Meeting | None = None
_told: list[Exception] = []  # the last that the others were told of, which passes further blocks


def count() -> int:
    """How many processes the training has."""
    return 1 if _meeting is None else _meeting.count


def index() -> int:
    """The number of this one."""
    return 0 if _meeting is None else _meeting.index


def first() -> bool:
    """Whether this is the process that writes the run's files and prints."""
    return index() == 0


def check_met() -> None:
    """Raises `UserError` where JAX has processes that have not met by `joined`."""
    if jax.process_count() > count():
        raise UserError(
            f"expected processes that met by `hafs train` with {arg('coordinator')}, found {jax.process_count()} of "
            "JAX's own; leave jax.distributed.initialize out"
        )


def exchange(value: str = "") -> list[str]:
    """The values of all processes. All wait for the last one; where one fails instead (`together`), `UserError`."""
    return _exchanged({"value": value})


def _exchanged(message: dict[str, str]) -> list[str]:
    if _meeting is None:
        return [message.get("value", "")]
    found = [json.loads(text) for text in _meeting.exchange(json.dumps(message))]
    for process, other in enumerate(found):
        if "failed" in other and process != _meeting.index:
            raise _ElsewhereError(f"process {process}: {other['failed']}")
    return [other.get("value", "") for other in found]


class _ElsewhereError(UserError):
    """What another process has found wrong."""


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Has all processes leave the block before any goes on. A `UserError` of one in it is raised on all."""
    try:
        yield
    except (UserError, OSError) as error:
        if _meeting is not None and not isinstance(error, _ElsewhereError) and error not in _told:
            _told[:] = [error]
            said = error.args[0] if isinstance(error, UserError) else f"{error.filename}: {error.strerror}"
            with contextlib.suppress(_ElsewhereError):
                _exchanged({"failed": said})
        raise
    exchange()


def check_same(what: dict[str, Any]) -> None:
    """Raises `UserError` on all processes where one has another value, of what may have parts, than process 0."""
    if _meeting is None:
        return
    own, *others = [json.loads(text) for text in exchange(json.dumps(what, sort_keys=True))]
    for process, other in enumerate(others, start=1):
        for name in sorted({*_flat(own), *_flat(other)}):
            here, there = _flat(own).get(name), _flat(other).get(name)
            if here != there:
                raise _ElsewhereError(
                    f"expected the same on all {count()} processes, found {name} {_short(here)} on process 0 and "
                    f"{_short(there)} on process {process}; start all with the same command, code and store"
                )


def _flat(parts: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in parts.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def check_shared(folder: Path) -> None:
    """Raises `UserError` on all processes where the folder, which the first one makes, is not one that all see."""
    if _meeting is None:
        return
    token = folder / exchange(f".shared-{secrets.token_hex(8)}")[0]
    with together():
        if first():
            make_folder(folder)
            token.touch()
    try:
        with together():
            until = time.monotonic() + _SHARED_SECONDS
            while not token.exists():
                if time.monotonic() > until:
                    raise UserError(
                        f"{folder}: expected the folder that process 0 writes to, found another one on "
                        f"{socket.gethostname()}; give all processes one {arg('out')} on a file system that they share"
                    )
                time.sleep(0.1)
    finally:
        if first():
            token.unlink(missing_ok=True)


def agreed(received: Sequence[int]) -> int | None:
    """The signal that any process has received, of those its list holds; the same on all. None where none has."""
    own = received[0] if received else 0
    return next((number for number in map(int, exchange(str(own))) if number), None)


@contextlib.contextmanager
def joined(coordinator: str | None, processes: int | None, process: int | None) -> Iterator[None]:
    """Makes this process one of those that meet at `coordinator`, while inside; alone, where none of these is given.

    `coordinator` is HOST:PORT, at which process 0 listens, or "auto", with which Slurm or Open MPI says all three.
    The end of one process inside is the end of all: with the same code where it was a signal or a user's mistake.
    Raises `UserError` where not all come, and where they are not told apart.
    """
    global _meeting
    if coordinator is None and processes is None and process is None:
        yield
        return
    address = _address(coordinator, processes, process)
    _meeting = meeting = meetings.join(address, START_SECONDS)
    try:
        check_same(_code())
        with _jax_over(meeting, address):
            if not first():
                for name in PACKAGES:
                    logging.getLogger(name).setLevel(logging.ERROR)
            yield
            exchange()
    except Ended as end:
        raise _said(end, meeting) from None
    except (UserError, SystemExit, KeyboardInterrupt) as error:
        meeting.leave(*_ending(error, meeting.index))
        raise
    except Exception as error:
        is_collective = isinstance(error, jax.errors.JaxRuntimeError | ValueError)  # which fails if another has ended
        if is_collective and (other := meeting.wait_for_end(1.5 * meetings.SILENT_SECONDS)) is not None:
            raise _said(other, meeting) from None
        meeting.leave(1, f"process {meeting.index} failed: {type(error).__name__}: {error}")
        raise
    else:
        meeting.close()
    finally:
        _meeting = None


def _said(end: Ended, meeting: Meeting) -> SystemExit:
    """Says the one line on another process's end, and is the end of this one."""
    meeting.leave(end.code, end.line)
    print(f"error: {in_one_line(end.line)}", file=sys.stderr, flush=True)
    return SystemExit(end.code)


def _ending(error: BaseException, number: int) -> tuple[int, str]:
    """The exit code of an exception that ends a command, and what other processes say of it."""
    if isinstance(error, UserError):
        return 2, f"process {number}: {error}"
    if isinstance(error, SystemExit):
        return (error.code if isinstance(error.code, int) else 1), f"process {number} ended with code {error.code}"
    return 128 + getattr(error, "number", 2), f"process {number} was interrupted; run the same commands again to resume"


def _address(coordinator: str | None, processes: int | None, process: int | None) -> Address:
    """The address that the flags, or a launcher's environment, give."""
    if coordinator == "auto":
        if processes is not None or process is not None:
            raise UserError(f"{arg('coordinator', 'auto')}: expected neither {arg('processes')} nor {arg('process')}")
        found, processes, process, devices = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, int(START_SECONDS)
        )
        if found is None or processes is None or process is None:
            raise UserError(
                f"{arg('coordinator', 'auto')}: expected a process that srun or mpirun started, found none; give "
                f"{arg('coordinator')} HOST:PORT with {arg('processes')} and {arg('process')}"
            )
        if devices:
            shown = ",".join(map(str, devices))
            jax.config.update("jax_cuda_visible_devices", shown)
            jax.config.update("jax_rocm_visible_devices", shown)
        coordinator = found
    if coordinator is None or processes is None or process is None:
        given = (("coordinator", coordinator), ("processes", processes), ("process", process))
        missing = ", ".join(arg(name) for name, value in given if value is None)
        raise UserError(f"expected coordinator, processes and process together, found none of {missing}")
    host, _, port = coordinator.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"{arg('coordinator', coordinator)}: expected HOST:PORT, such as node1:7733")
    if not 0 <= process < processes:
        raise UserError(
            f"{arg('process', process)}: expected a number from 0 to {processes - 1}, as there are "
            f"{arg('processes', processes)}"
        )
    return Address(host, int(port), process, processes)


def _code() -> dict[str, str]:
    """What this process runs."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)} ".encode() + path.read_bytes())
    return {"hafs-jax": f"{__version__} ({digest.hexdigest()[:12]})", "jax": jax.__version__}


@contextlib.contextmanager
def _jax_over(meeting: Meeting, address: Address) -> Iterator[None]:
    """JAX's own connection between the processes, while inside: their devices are then one computer's."""
    with contextlib.ExitStack() as stack:
        port = ""
        with together():
            if first():
                port = str(_free_port())
                stack.enter_context(_service(port, meeting.count))
        port = exchange(port)[0]
        at = f"[{address.host}]:{port}" if ":" in address.host else f"{address.host}:{port}"
        client = _jax.get_distributed_runtime_client(
            at, meeting.index, init_timeout=int(START_SECONDS), heartbeat_timeout=_JAX_SECONDS,
            shutdown_on_destruction=False, use_compression=True,
        )  # fmt: skip
        client.connect()
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        state = distributed.global_state
        state.client, state.coordinator_address = client, at
        state.process_id, state.num_processes = meeting.index, meeting.count
        yield
        state.client = None
        client.shutdown()


@contextlib.contextmanager
def _service(port: str, processes: int) -> Iterator[None]:
    """JAX's coordination service at the port, in a process of its own. Left by an exception, it lingers."""
    linger = int(2 * meetings.SILENT_SECONDS)
    command = [sys.executable, "-c", _SERVICE, f"[::]:{port}", str(processes), str(_JAX_SECONDS), str(linger)]
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )
    assert child.stdin is not None and child.stdout is not None
    if child.stdout.readline() != b"ready\n":
        raise UserError(f"expected JAX's coordination service to start at port {port}, found that it does not")
    yield
    with contextlib.suppress(OSError):
        child.stdin.write(b"done")
        child.stdin.close()
    child.wait()


def _free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])
