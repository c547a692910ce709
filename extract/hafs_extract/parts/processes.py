"""Workers as processes of this machine. They end with this one, however it ends: see `worker`."""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from typing import Any

from hafs_extract.parts.files import Entry
from hafs_extract.parts.jobs import Job, Setup
from hafs_extract.parts.pool import Died, Made, Ready, Refused, Said
from hafs_jax.base.options import from_dict, to_dict

COMMAND = ("-m", "hafs_extract.parts.worker")


class Processes:
    """A crew (`pool.Crew`) of processes that speak JSON lines over pipes."""

    def __init__(self, setup: Setup, size: int, gpus: list[str]) -> None:
        """`gpus` are the names, as CUDA_VISIBLE_DEVICES has them, of those that the workers take in turn."""
        self.size, self._setup, self._gpus = size, json.dumps(to_dict(setup)), gpus
        self._processes: dict[int, subprocess.Popen] = {}
        self._said: queue.SimpleQueue[tuple[subprocess.Popen, int, Said]] = queue.SimpleQueue()

    def start(self, worker: int) -> None:
        environment = dict(os.environ)
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus[worker % len(self._gpus)]
        process = subprocess.Popen(
            [sys.executable, *COMMAND],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # a Ctrl-C is for this process, whose end ends them
        )
        if worker in self._processes:
            _close(self._processes[worker])
        self._processes[worker] = process
        threading.Thread(target=self._listen, args=(process, worker), daemon=True).start()
        self._write(process, self._setup)

    def depth(self, made_by: dict[str, Any]) -> int:
        """On a CPU one: a part that is written beside another would be lost with it."""
        return 1 if str(made_by["device"]).startswith("cpu") else 2

    def send(self, worker: int, job: Job) -> None:
        self._write(self._processes[worker], json.dumps(to_dict(job)))

    def wait(self) -> tuple[int, Said]:
        while True:
            process, worker, said = self._said.get()
            if self._processes.get(worker) is process:  # and not one that was ended
                return worker, said

    def close(self) -> None:
        processes, self._processes = list(self._processes.values()), {}
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
            _close(process)

    def _write(self, process: subprocess.Popen, line: str) -> None:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died, which `_listen` says
            process.stdin.write(line.encode() + b"\n")
            process.stdin.flush()

    def _listen(self, process: subprocess.Popen, worker: int) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                self._said.put((process, worker, _said(json.loads(line), process.pid)))
        code = process.wait()
        reason = f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        self._said.put((process, worker, Died(reason)))


def _close(process: subprocess.Popen) -> None:
    """Closes the pipe to a process that has ended."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # of a job that it has not read
        process.stdin.close()


def _said(record: dict[str, Any], pid: int) -> Said:
    if "ready" in record:
        return Ready(record["ready"], f"process {pid}")
    if "made" in record:
        return Made(from_dict(Entry, record["made"], "a worker's answer"))
    return Refused(record["refused"])
