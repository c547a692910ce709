"""Processes that work as one, on one machine or on several: what they tell each other. Standard library only.

Process 0 listens at an address, and each other process keeps a connection to it. Over these go

- exchanges: a text of each process to all, for which all wait;
- signs of life: a process whose connection ends, or that is silent for `SILENT_SECONDS`, has died;
- the end of a process, with its exit code and what it said.

The end of one is the end of all. Who waits for an exchange gets `Ended`. A process that is at work elsewhere, such as
in a library that waits for the one that ended, is ended from outside after `GRACE_SECONDS`, with one line.

Messages are JSON, one a line. Whoever reaches the address can take part, so it belongs on a network of one's own.
"""

import contextlib
import json
import os
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any

from hafs_jax.base.errors import UserError, in_one_line

SILENT_SECONDS = 20.0
GRACE_SECONDS = 3.0
_AGAIN_SECONDS = 0.2  # between two attempts to connect
_HELLO_SECONDS = 5.0
_LONGEST = 2**24  # bytes of a message: whoever reaches the port may send without end
_AGAIN = "start all processes again: the run goes on from its last checkpoint"


@dataclass(frozen=True)
class Address:
    """Where process 0 listens, and which of how many processes this one is."""

    host: str
    port: int
    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class Ended(Exception):
    """Another process has ended. `code` is its exit code, `line` what to say of it."""

    def __init__(self, process: int, code: int, line: str) -> None:
        super().__init__(line)
        self.process, self.code, self.line = process, code, line


class Meeting:
    """The connections of one process. `exchange` is for one thread; all processes call it in the same order."""

    def __init__(self, index: int, count: int, links: "dict[int, _Link]") -> None:
        self.index, self.count, self._links = index, count, links
        self._turn, self._is_over = 0, False
        self._ending = threading.Lock()  # taken once: by who ends this process, from inside or from outside
        self._values: dict[int, dict[int, str]] = {}  # by turn and process, at process 0
        self._results: dict[int, list[str]] = {}  # by turn
        self._changed = threading.Condition()
        self.ended: Ended | None = None
        """The first other process that ended."""
        for process, link in links.items():
            threading.Thread(target=self._listen, args=(process, link), name=f"process-{process}", daemon=True).start()
        threading.Thread(target=self._show_life, name="signs-of-life", daemon=True).start()

    def exchange(self, value: str) -> list[str]:
        """The values of all processes, by their number. Raises `Ended` where one of them ends instead."""
        self._turn += 1
        if self.index == 0:
            self._collect(self._turn, 0, value)
        else:
            self._links[0].send({"turn": self._turn, "value": value})
        with self._changed:
            self._changed.wait_for(lambda: self._turn in self._results or self.ended is not None)
            if self._turn in self._results:
                return self._results.pop(self._turn)
            assert self.ended is not None
            raise self.ended

    def wait_for_end(self, seconds: float) -> Ended | None:
        """The first other process that ended, waiting for it so long; None where none does."""
        with self._changed:
            self._changed.wait_for(lambda: self.ended is not None, seconds)
            return self.ended

    def leave(self, code: int, line: str) -> None:
        """Tells the others that this process ends, and with what exit code; nothing where they end before it.

        From then on it is not ended from outside.
        """
        self._ending.acquire()
        if self.ended is None:
            self._tell(self.index, code, line)

    def close(self) -> None:
        """Ends the connections, when all processes have done their work."""
        self._is_over = True
        for link in self._links.values():
            link.send({"done": True})
            link.close()

    def _listen(self, process: int, link: "_Link") -> None:
        """Takes in what the other end of a link says, until it ends."""
        while (message := link.read()) is not None:
            if "done" in message:
                return
            if "ended" in message:
                self._note(Ended(message["ended"], message["code"], message["line"]))
            elif "values" in message:
                with self._changed:
                    self._results[message["turn"]] = message["values"]
                    self._changed.notify_all()
            elif "turn" in message:
                self._collect(message["turn"], process, message["value"])
        if not self._is_over:
            self._note(Ended(process, 1, f"process {process} has died ({link.reason}); {_AGAIN}"))

    def _collect(self, turn: int, process: int, value: str) -> None:
        """At process 0: notes a value, and tells all of them once the last has come."""
        with self._changed:
            values = self._values.setdefault(turn, {})
            values[process] = value
            if len(values) < self.count:
                return
            found = [values[process] for process in range(self.count)]
            del self._values[turn]
        for link in self._links.values():
            link.send({"turn": turn, "values": found})
        with self._changed:
            self._results[turn] = found
            self._changed.notify_all()

    def _note(self, end: Ended) -> None:
        with self._changed:
            if self.ended is not None or self._is_over:
                return
            self.ended = end
            self._changed.notify_all()
        if self.index == 0:
            self._tell(end.process, end.code, end.line)
        time.sleep(GRACE_SECONDS)
        if self._ending.acquire(blocking=False):
            after_bar = "" if self.index else "\n"
            os.write(2, f"{after_bar}error: {in_one_line(end.line)}\n".encode())
            os._exit(end.code)

    def _tell(self, process: int, code: int, line: str) -> None:
        for other, link in self._links.items():
            if other != process:
                link.send({"ended": process, "code": code, "line": line})

    def _show_life(self) -> None:
        while not self._is_over:
            for link in self._links.values():
                link.send({})
            time.sleep(SILENT_SECONDS / 5)


class _Link:
    """A connection, and why it ended."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection, self._lock, self._file = connection, threading.Lock(), connection.makefile("rb")
        self.reason = ""

    def patient_for(self, seconds: float) -> None:
        self._connection.settimeout(max(0.01, seconds))

    def read(self) -> dict[str, Any] | None:
        """The next message; None at the connection's end, which also one is that is no message."""
        try:
            line = self._file.readline(_LONGEST)
            found = json.loads(line) if line else None
        except TimeoutError:
            self.reason = f"it was silent for {self._connection.gettimeout():g} s"
            return None
        except (OSError, ValueError) as error:
            self.reason = f"its connection broke: {getattr(error, 'strerror', None) or error}"
            return None
        self.reason = "its connection ended"
        return found if isinstance(found, dict) else None

    def send(self, message: dict[str, Any]) -> None:
        """Sends; where the other end is gone, reading from it says so."""
        with self._lock, contextlib.suppress(OSError):
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._file.close()
        self._connection.close()


def join(address: Address, seconds: float) -> Meeting:
    """Meets the other processes. Raises `UserError` on all that came where not all come within so many seconds."""
    links = _gather(address, seconds) if address.index == 0 else {0: _connect(address, seconds)}
    for link in links.values():
        link.patient_for(SILENT_SECONDS)
    return Meeting(address.index, address.count, links)


def _gather(address: Address, seconds: float) -> dict[int, _Link]:
    """At process 0: a link to each other process."""
    links: dict[int, _Link] = {}
    until = time.monotonic() + seconds
    with _listening(address) as server:
        while len(links) < address.count - 1:
            server.settimeout(max(0.01, until - time.monotonic()))
            try:
                link = _Link(server.accept()[0])
            except TimeoutError:
                missing = ", ".join(str(one) for one in range(1, address.count) if one not in links)
                refusal = (
                    f"coordinator {address}: expected {address.count} processes within {seconds:g} s, found no process "
                    f"{missing}; start each with the same coordinator and a number of its own"
                )
                raise _refused(refusal, links.values()) from None
            link.patient_for(_HELLO_SECONDS)
            hello = link.read()
            if hello is None or not isinstance(other := hello.get("process"), int):
                link.close()  # someone else, such as a scan of ports
                continue
            if hello.get("processes") != address.count:
                found = f"{address.count} processes on process 0 and {hello.get('processes')} on process {other}"
                raise _refused(
                    f"coordinator {address}: expected the same number on all, found {found}", [link, *links.values()]
                )
            if other in links or not 0 < other < address.count:
                found = f"{'a second ' if other in links else ''}process {other}"
                refusal = f"coordinator {address}: expected each of the processes 0 to {address.count - 1} once"
                raise _refused(f"{refusal}, found {found}", [link, *links.values()])
            links[other] = link
    for link in links.values():
        link.send({"welcome": True})
    return links


def _listening(address: Address) -> socket.socket:
    is_dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if is_dual else socket.AF_INET
    try:
        return socket.create_server(("", address.port), family=family, dualstack_ipv6=is_dual, backlog=address.count)
    except OSError as error:
        raise UserError(
            f"coordinator {address}: expected a port that process 0 can listen on, found one that it cannot "
            f"({error.strerror}); choose another port"
        ) from None


def _refused(line: str, links: Any) -> UserError:
    for link in links:
        link.send({"refused": line})
        link.close()
    return UserError(line)


def _connect(address: Address, seconds: float) -> _Link:
    """The link of another process to process 0."""
    until, why = time.monotonic() + seconds, "nobody answers"
    while (left := until - time.monotonic()) > 0:
        try:
            link = _Link(socket.create_connection((address.host, address.port), timeout=min(left, _HELLO_SECONDS)))
        except OSError as error:
            why = error.strerror or str(error)
            time.sleep(_AGAIN_SECONDS)
            continue
        link.send({"process": address.index, "processes": address.count})
        link.patient_for(left + _HELLO_SECONDS)
        answer = link.read() or {}
        if "welcome" in answer:
            return link
        link.close()
        if "refused" in answer:
            raise UserError(str(answer["refused"]))
        why = link.reason or "it gave no answer of a training"
        time.sleep(_AGAIN_SECONDS)
    raise UserError(
        f"coordinator {address}: expected process 0 to answer within {seconds:g} s, found none ({why}); start it "
        "there, or give its address"
    )
