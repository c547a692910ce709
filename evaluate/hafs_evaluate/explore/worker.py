"""One job at a time in a thread of its own, so that the server's event loop never waits for the model."""

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any

MAX_WAITING = 16


class Busy(Exception):
    """Too many jobs are waiting."""


class Job:
    """A job that was submitted: await `result`; `cancel` drops it while it waits, and asks it to end while it runs."""

    def __init__(self, work: Callable[["Job"], Any]) -> None:
        self.work = work
        self._loop = asyncio.get_running_loop()
        self.result: asyncio.Future[Any] = self._loop.create_future()
        self.result.add_done_callback(lambda done: done.exception())  # of a page that has gone, nobody else asks for it
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        self._cancelled.set()

    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()

    def run(self) -> None:
        """Does the work in the calling thread, and hands what comes of it to the event loop."""
        value, error = None, None
        if not self.is_cancelled():
            try:
                value = self.work(self)
            except Exception as raised:
                error = raised
        self.tell(self._finish, value, error)

    def tell(self, function: Callable[..., Any], *values: Any) -> None:
        """Calls the function in the event loop's thread; nothing where the loop has ended."""
        try:
            self._loop.call_soon_threadsafe(function, *values)
        except RuntimeError:
            self.cancel()

    def _finish(self, value: Any, error: Exception | None) -> None:
        if self.result.done():
            return
        if error is not None:
            self.result.set_exception(error)
        else:
            self.result.set_result(value)


class Worker:
    """The thread and its queue. The thread is a daemon: it keeps no process alive."""

    def __init__(self) -> None:
        self._jobs: queue.Queue[Job] = queue.Queue()
        self._at_work = 0  # jobs that run or wait
        self._lock = threading.Lock()
        threading.Thread(target=self._run, name="explorer", daemon=True).start()

    @property
    def at_work(self) -> int:
        """The jobs that run or wait."""
        return self._at_work

    def submit(self, work: Callable[[Job], Any]) -> Job:
        """Queues `work`, which gets its `Job`; `Busy` where too many are waiting. Called in the event loop."""
        job = Job(work)
        with self._lock:
            if self._at_work > MAX_WAITING:
                raise Busy(f"{self._at_work} requests are waiting for the model already; try again in a moment")
            self._at_work += 1
        self._jobs.put(job)
        return job

    def _run(self) -> None:
        while True:
            self._jobs.get().run()
            with self._lock:
                self._at_work -= 1
