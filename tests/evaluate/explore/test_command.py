"""`hafs explore` on the command line: what it says, and how it ends."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hafs_evaluate.explore.command import main
from hafs_evaluate.explore.ports import HOST, listening_socket
from hafs_evaluate.workspace import Workspace
from hafs_jax.base.errors import UserError
from hafs_jax.cli import main as hafs
from tests.support.stores import planted, write_store

SERVER = """
import sys, threading, time
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from hafs_evaluate.explore.ports import listening_socket
from hafs_evaluate.explore.serve import serve
from hafs_evaluate.explore.worker import Worker

worker = Worker()
async def slow(request):
    await worker.submit(lambda job: time.sleep(60)).result
listening = listening_socket(None)
serve(Starlette(routes=[Route("/slow", slow)]), listening, lambda: print(listening.getsockname()[1], flush=True))
"""


def error(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """The one line of a mistake."""
    with pytest.raises(SystemExit) as stop:
        hafs(["explore", *arguments])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_what_must_be_run_first_is_said_in_one_line(workspace: Workspace, tmp_path: Path, capsys) -> None:
    assert "run `hafs extract`" in error(capsys, "--out", str(tmp_path / "none"))
    place = ("--out", str(workspace.folder.parent), "--profile", "offline")
    assert "found none; run `make eval`" in error(capsys, *place)
    assert "no run 'strict-s1'" in error(capsys, *place, "--runs", "strict-s1")
    write_store(tmp_path / "bare" / "store" / "train", planted(20, 5, 6, 2)[0])
    assert "run `make train`" in error(capsys, "--out", str(tmp_path), "--profile", "bare")


def test_runs_without_evaluated_latents_are_left_out(workspace: Workspace, monkeypatch, capsys) -> None:
    path = workspace.result("strict-s0", "latents.json")
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    served: list = []
    monkeypatch.setattr("hafs_evaluate.explore.explorer.Explorer", lambda workspace, runs, device: runs)
    monkeypatch.setattr(
        "hafs_evaluate.explore.app.make_app", lambda runs, report, port, command: served.append((runs, command))
    )
    monkeypatch.setattr(
        "hafs_evaluate.explore.serve.serve", lambda app, listening, started: (started(), listening.close())
    )
    assert main(["--out", str(workspace.folder.parent), "--profile", "offline"]) == 0
    ((runs, command),) = served
    assert [run.name for run in runs] == ["strict-s0"]
    said = capsys.readouterr()
    assert "left out, since their latents are not evaluated: baseline-s0; run `make eval`" in said.err
    assert "`make report` writes one" in said.err
    assert said.out.startswith(f"http://{HOST}:") and command.startswith("hafs explore --out ")


@pytest.mark.parametrize("port", ["0", "65536", "-1", "8o80", "", "1e3", "٣"])
def test_a_wrong_port_is_one_line(port: str, capsys) -> None:
    assert "expected a number from 1 to 65,535" in error(capsys, f"--port={port}")


def test_no_flag_binds_elsewhere(capsys) -> None:
    assert HOST == "127.0.0.1"
    for flag in ("--host", "--bind", "--address"):
        assert f"unknown argument '{flag}'" in error(capsys, flag, "0.0.0.0")


def test_a_port_that_is_taken() -> None:
    with socket.socket() as other:
        other.bind((HOST, 0))
        other.listen()
        taken = other.getsockname()[1]
        with pytest.raises(UserError, match=f"port {taken} of 127.0.0.1 cannot be had .*give another --port"):
            listening_socket(taken)
    with listening_socket(None) as first, listening_socket(None) as second:  # PORT itself may be taken already
        ports = {one.getsockname() for one in (first, second)}
    assert len(ports) == 2 and {host for host, _ in ports} == {HOST}


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_a_missing_extra_is_named(package: str, workspace: Workspace, monkeypatch, capsys) -> None:
    path = workspace.result("strict-s0", "latents.json")
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    (workspace.report).mkdir()
    (workspace.report / "index.html").write_text("")
    for module in ("app", "guard", "serve"):
        monkeypatch.delitem(sys.modules, f"hafs_evaluate.explore.{module}", raising=False)
    for module in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as stop:
        hafs(["explore", "--out", str(workspace.folder.parent), "--profile", "offline"])
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(
        f"error: `hafs explore` needs the package {package}, which is not installed: pip install 'hafs-jax["
    )
    assert last.endswith("explore]'")


def test_ctrl_c_ends_it_at_once_with_one_line_though_the_model_is_at_work() -> None:
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        port = int(server.stdout.readline())
        with socket.create_connection((HOST, port)) as connection:
            connection.sendall(b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n")
            time.sleep(0.3)
            began = time.monotonic()
            server.send_signal(signal.SIGINT)
            _, err = server.communicate(timeout=20)
        assert time.monotonic() - began < 5
        assert err.strip() == "explorer stopped" and server.returncode == 128 + signal.SIGINT
    finally:
        server.kill()
        server.wait()
