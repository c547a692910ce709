"""Processes that meet, here threads of one: exchanges, deaths, and who is refused."""

import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from hafs_jax.base.errors import UserError
from hafs_jax.base.process import meetings
from hafs_jax.base.process.meetings import Address, Ended, Meeting, join


@pytest.fixture(autouse=True)
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The codes with which a process would have been ended from outside."""
    found: list[int] = []
    monkeypatch.setattr(meetings, "SILENT_SECONDS", 0.5)
    monkeypatch.setattr(meetings, "GRACE_SECONDS", 0.1)
    monkeypatch.setattr(os, "_exit", found.append)
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def each(*calls: Callable[[], Any]) -> list[Any]:
    """What each call returned or raised, all called at once."""

    def outcome(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (UserError, Ended) as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(outcome, call) for call in calls]]


def joined(*numbers: tuple[int, int], seconds: float = 5) -> list[Any]:
    """The meetings of processes (index, count) at one address."""
    port = free_port()
    return each(*[lambda own=own: join(Address("127.0.0.1", port, *own), seconds) for own in numbers])


def test_an_exchange_gives_all_values_in_order() -> None:
    three: list[Meeting] = joined((2, 3), (0, 3), (1, 3))
    for turn in range(3):
        values = each(*[lambda one=one: one.exchange(f"{turn} {one.index}\n") for one in three])  # noqa: B023
        assert values == [[f"{turn} {index}\n" for index in range(3)]] * 3
    for one in three:
        one.close()
    time.sleep(0.2)
    assert all(one.ended is None for one in three)


def test_silence_is_a_death_and_life_is_shown(exits: list[int], capfd: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    zero, two, silent = each(
        *[lambda own=own: join(Address("127.0.0.1", port, own, 3), 5) for own in (0, 2)],
        lambda: meetings._connect(Address("127.0.0.1", port, 1, 3), 5),
    )
    for found in each(lambda: zero.exchange(""), lambda: two.exchange("")):
        assert isinstance(found, Ended)
        assert (found.process, found.code) == (1, 1)
        assert "process 1 has died (it was silent for 0.5 s); start all processes again" in found.line
    time.sleep(0.3)
    assert exits == [1, 1]
    assert capfd.readouterr().err.count("error: process 1 has died") == 2
    for one in (zero, two, silent):
        one.close()


@pytest.mark.parametrize("leaving", [0, 1])
def test_who_leaves_says_why_to_all(leaving: int, exits: list[int]) -> None:
    three: list[Meeting] = sorted(joined((0, 3), (1, 3), (2, 3)), key=lambda one: one.index)
    rest = [one for one in three if one.index != leaving]
    three[leaving].leave(143, "process x was interrupted")
    three[leaving].close()
    for found in each(*[lambda one=one: one.exchange("") for one in rest]):
        assert isinstance(found, Ended)
        assert (found.process, found.code, found.line) == (leaving, 143, "process x was interrupted")
    for one in rest:
        one.leave(143, "")
    time.sleep(0.3)
    assert exits == []  # each ends by itself
    for one in rest:
        one.close()


def test_processes_that_are_not_told_apart_are_refused() -> None:
    for numbers, expected in (
        (((0, 2), (1, 3)), "expected the same number on all, found 2 processes on process 0 and 3 on process 1"),
        (((0, 3), (1, 3), (1, 3)), "expected each of the processes 0 to 2 once, found a second process 1"),
        (((0, 2), (7, 2)), "expected each of the processes 0 to 1 once, found process 7"),
    ):
        for found in joined(*numbers):
            assert isinstance(found, UserError)
            assert expected in str(found)


def test_processes_that_do_not_come_are_waited_for_in_vain() -> None:
    for numbers, expected in (
        (((0, 3), (2, 3)), r"expected 3 processes within 0.5 s, found no process 1;"),
        (((1, 2),), "expected process 0 to answer within 0.5 s, found none (Connection refused)"),
    ):
        for found in joined(*numbers, seconds=0.5):
            assert isinstance(found, UserError)
            assert expected in str(found)


def test_a_port_that_is_taken_is_refused_and_who_else_listens_is_none() -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match="expected a port that process 0 can listen on, found one that it cannot"):
            join(Address("127.0.0.1", port, 0, 2), 1)

        def answer() -> None:
            with server.accept()[0] as connection:
                connection.sendall(b"SSH-2.0\r\n")
                connection.recv(100)

        other = threading.Thread(target=answer)
        other.start()
        with pytest.raises(UserError, match="found none"):
            join(Address("127.0.0.1", port, 1, 2), 0.5)
        other.join()


@pytest.mark.parametrize("said", [b"GET / HTTP/1.0\r\n\r\n", b"[1]\n", b'{"process": "1"}\n', b""])
def test_someone_else_who_connects_does_not_count(said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does one who says nothing hold up the others."""
    monkeypatch.setattr(meetings, "_HELLO_SECONDS", 0.5)
    port = free_port()

    def stranger() -> None:
        time.sleep(0.2)
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(said)
            time.sleep(0 if said else 3)

    zero, one, _ = each(
        lambda: join(Address("127.0.0.1", port, 0, 2), 2),
        lambda: (time.sleep(0.5), join(Address("127.0.0.1", port, 1, 2), 2))[1],
        stranger,
    )
    assert isinstance(zero, Meeting) and isinstance(one, Meeting)
    zero.close()
    one.close()


def test_processes_at_work_elsewhere_show_that_they_live() -> None:
    two: list[Meeting] = joined((0, 2), (1, 2))
    time.sleep(1.5)  # three times what is taken for silence
    assert all(one.ended is None for one in two)
    for one in two:
        one.close()


def test_a_message_without_end_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meetings, "_LONGEST", 1_000)
    ours, theirs = _connected()
    link = meetings._Link(ours)
    link.patient_for(1)
    theirs.sendall(b'{"process": 1}\n' + b" " * 5_000)
    assert link.read() == {"process": 1}
    assert link.read() is None and "broke" in link.reason
    link.close()
    theirs.close()


def _connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        return server.accept()[0], theirs
