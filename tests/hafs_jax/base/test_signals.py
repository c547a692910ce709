"""Signals to a command: one line, exit code 128 + the signal, and a second Ctrl-C ends it at once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hafs_jax.base.process import signals
from tests.support.environments import importing

NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
COMMAND = """
import sys, time
from hafs_jax.base.errors import one_line_errors
from hafs_jax.base.process import children, signals
signals.of_a_command()
children.end_with_parent()
with one_line_errors():
    try:
{body}
    finally:
        signals.done()
"""
SLEEPS = "print('ready', flush=True); time.sleep(60)"


def started(body: str, *before: str, **options: object) -> subprocess.Popen:
    """A process that runs `body` as a command does, once it has said that it is ready."""
    script = COMMAND.format(body="\n".join(" " * 8 + line for line in body.splitlines()))
    process = subprocess.Popen(
        [*before, sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def ended(process: subprocess.Popen) -> tuple[int, list[str]]:
    """Its exit code and the lines on stderr."""
    said = process.communicate(timeout=60)[1]
    return process.returncode, said.strip().splitlines()


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_is_one_line_and_its_exit_code(number: int) -> None:
    process = started(SLEEPS)
    process.send_signal(number)
    assert ended(process) == (128 + number, [signals.LINE])


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_that_a_library_discards_ends_the_command_all_the_same(number: int) -> None:
    """In a callback of the garbage collection an exception is printed and lost; so it is in a bare except."""
    swallowing = "print('ready', flush=True)\nwhile True:\n    try: time.sleep(.1)\n    except BaseException: pass"
    process = started(swallowing)
    process.send_signal(number)
    assert ended(process) == (128 + number, [signals.LINE])


def test_a_signal_in_a_callback_of_the_garbage_collection_is_not_lost() -> None:
    collects = (
        "import gc\ngc.callbacks.append(lambda phase, info: time.sleep(.2))\nprint('ready', flush=True)\n"
        "for _ in range(1000): gc.collect(0)"
    )
    process = started(collects)
    process.send_signal(signal.SIGINT)
    code, lines = ended(process)
    assert code == 130 and lines[-1] == signals.LINE


def test_a_second_ctrl_c_ends_a_long_call_into_c_at_once() -> None:
    process = started("import hashlib\nprint('ready', flush=True)\nhashlib.pbkdf2_hmac('sha256', b'a', b'b', 10**9)")
    time.sleep(0.3)  # until it is in C
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(signals._DOUBLE_SECONDS + 0.2)
    process.send_signal(signal.SIGINT)
    code, lines = ended(process)
    assert code == 130 and lines == ["ended at once; run the same command again to resume"]
    assert time.monotonic() - start < signals._PATIENCE_SECONDS


def test_a_ctrl_c_that_comes_twice_in_a_moment_is_one() -> None:
    process = started(
        "with signals.deferred() as received:\n    print('ready', flush=True)\n    time.sleep(1)\n"
        "    print('saved', received, flush=True)\n    raise SystemExit(7)"
    )
    process.send_signal(signal.SIGINT)
    time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 7 and out.startswith("saved [")


@pytest.mark.parametrize("number", NUMBERS)
def test_state_is_saved_however_long_that_takes(number: int) -> None:
    """And the command ends after it, though who saved it did not say so."""
    seconds = signals._PATIENCE_SECONDS + 1
    process = started(
        f"with signals.deferred() as received:\n    print('ready', flush=True)\n    time.sleep({seconds})\n"
        "    print('saved', received, flush=True)\nprint('went on', flush=True)\ntime.sleep(60)"
    )
    process.send_signal(number)
    out, said = process.communicate(timeout=60)
    assert (process.returncode, out, said.strip()) == (128 + number, f"saved [{int(number)}]\n", signals.LINE)


def test_another_signal_does_not_disturb_what_the_first_one_ends() -> None:
    """Only Ctrl-C asks to end at once: a cluster's manager may send SIGTERM again and again."""
    process = started(
        "try:\n    print('ready', flush=True)\n    time.sleep(60)\nfinally:\n    time.sleep(1)\n"
        "    print('cleaned', flush=True)"
    )
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(signals._DOUBLE_SECONDS + 0.2)
    out, said = process.communicate(timeout=60)
    assert (process.returncode, out, said.strip()) == (143, "cleaned\n", signals.LINE)


def test_a_command_that_is_patient_ends_in_its_own_time() -> None:
    process = started(
        "with signals.patient():\n    try:\n        print('ready', flush=True)\n        time.sleep(60)\n    finally:\n"
        f"        time.sleep({signals._PATIENCE_SECONDS + 1})\n        print('cleaned', flush=True)"
    )
    process.send_signal(signal.SIGTERM)
    out, said = process.communicate(timeout=60)
    assert (process.returncode, out, said.strip()) == (143, "cleaned\n", signals.LINE)


def test_the_line_is_written_once_though_the_process_is_slow_to_end() -> None:
    process = started(f"import atexit\natexit.register(time.sleep, {signals._PATIENCE_SECONDS + 3})\n{SLEEPS}")
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (143, [signals.LINE])


def test_a_signal_to_a_command_that_is_done_changes_nothing() -> None:
    process = started("import atexit\natexit.register(lambda: (print('ready', flush=True), time.sleep(1)))")
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (0, [])


def test_a_second_ctrl_c_ends_a_save_that_hangs() -> None:
    process = started("with signals.deferred():\n    print('ready', flush=True)\n    time.sleep(60)")
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(signals._DOUBLE_SECONDS + 0.2)
    assert ended(process) == (130, ["ended at once; run the same command again to resume"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_was_ignored_stays_ignored(number: int) -> None:
    """As under nohup, and in the background of a script."""
    ignoring = ("sh", "-c", f'trap "" {int(number)}; exec "$@"', "sh")
    process = started("print('ready', flush=True); time.sleep(1)", *ignoring)
    process.send_signal(number)
    assert ended(process) == (0, [])


def test_a_signal_to_a_fork_is_none_to_the_command() -> None:
    process = started(
        "import os, signal\nif not (pid := os.fork()): time.sleep(60)\ntime.sleep(.2)\n"
        "os.kill(pid, signal.SIGTERM)\nassert os.waitpid(pid, 0)[1] == signal.SIGTERM\n"
        "print('ready', flush=True)\ntime.sleep(signals._PATIENCE_SECONDS + 1)"
    )
    assert ended(process) == (0, [])


@pytest.mark.parametrize("number", [*NUMBERS, signal.SIGKILL])
def test_children_end_with_their_parent(number: int, tmp_path: Path) -> None:
    """By SIGTERM, as `hafs` handles it: they save what they have."""
    plugin = tmp_path / "plugin_that_waits.py"
    plugin.write_text(
        "import time, pathlib, os, hafs_jax.base.process.signals as signals\n"
        "here = pathlib.Path(__file__).parent\n"
        "with signals.deferred() as received:\n"
        "    (here / 'pid').write_text(str(os.getpid()))\n"
        "    while not received: time.sleep(.05)\n"
        "    (here / 'saved').write_text(str(received))\n"
    )
    run = "with children.stopping():\n    children.run(['inspect', '--help'])"
    environment = importing(tmp_path, HAFS_PLUGINS=plugin.stem)
    process = started("print('ready', flush=True)\n" + run, env=environment)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    code, _ = ended(process)
    assert code == (-9 if number == signal.SIGKILL else 128 + number)
    while not (tmp_path / "saved").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (tmp_path / "saved").read_text() == "[15]"
    if number != signal.SIGKILL:  # it has waited for its child
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.parametrize("number", NUMBERS)
def test_in_python_signals_are_noted_while_deferred_and_come_after_it(number: int) -> None:
    body = (
        "import os, signal, sys\nfrom hafs_jax.base.process.signals import deferred\n"
        "with deferred() as received: os.kill(os.getpid(), int(sys.argv[1])); print(received, flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", body, str(int(number))], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == -number and done.stdout == f"[{int(number)}]\n"


def test_in_python_a_second_ctrl_c_is_one_and_what_was_ignored_stays_so() -> None:
    body = (
        "import os, signal, time\nfrom hafs_jax.base.process.signals import deferred\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "with deferred() as received: os.kill(os.getpid(), signal.SIGHUP)\n"
        "print(received)\n"
        "try:\n    with deferred() as received:\n"
        "        os.kill(os.getpid(), signal.SIGINT); print(received); os.kill(os.getpid(), signal.SIGINT)\n"
        "        print('not reached')\nexcept KeyboardInterrupt: print('raised')\n"
    )
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n[2]\nraised\n", "")
