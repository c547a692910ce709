"""`python -m hafs_extract.parts.worker`: a worker, as `processes` starts it.

It reads JSON lines from stdin: a `Setup`, then jobs. It answers on stdout: {"ready": what made_by says}, then {"made":
entry} for each job, or {"refused": message} for a user's mistake. When stdin ends, it ends at once: the extraction has.
"""

import contextlib
import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from hafs_extract.parts.jobs import Job, Setup
from hafs_jax.base.errors import UserError, disk_errors
from hafs_jax.base.options import from_dict, to_dict


def main() -> None:
    """Works until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    lock = threading.Lock()

    def say(what: str, value: Any) -> None:
        with lock:
            answers.write(json.dumps({what: value}) + "\n")
            answers.flush()

    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    try:
        _work(lines, say)
    except UserError as error:
        say("refused", error.args[0])


def _read(lines: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)


def _work(lines: queue.SimpleQueue[str], say: Callable[[str, Any], None]) -> None:
    from hafs_extract.parts.making import Worker  # torch, once stdin is watched

    setup = from_dict(Setup, json.loads(lines.get()), "a worker's setup")
    with disk_errors(Path(setup.folder)):
        worker = Worker(setup)
        say("ready", worker.made_by)

        def written(future: Future) -> None:
            if future.exception() is None:
                say("made", to_dict(future.result()))
            elif isinstance(error := future.exception(), UserError):
                say("refused", error.args[0])
            else:
                traceback.print_exception(error)
                os._exit(1)

        while True:
            job = from_dict(Job, json.loads(lines.get()), "a worker's job")
            worker.begin(job).add_done_callback(written)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
