import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from job import log
from job.run.stop import StopRequest, Watchdog
from tests.conftest import REPOSITORY

# A call that Python cannot interrupt represents a compiled one.
PROGRAM = """
import ctypes, hashlib, os, signal, sys, time
from job import log
from job.clock import running_seconds
from job.config import ExitCode
from job.run.stop import Watchdog, listen_to_signals
stop = listen_to_signals()
with (
    stop.on_exit(lambda code, reason: print("first", int(code), reason, flush=True)),
    stop.on_exit(lambda code, reason: print("second", int(code), reason, flush=True)),
    stop.on_exit(lambda code, reason: {callback}),
):
    log.configure("text")
    print("ready", flush=True)
    {body}
"""
UNINTERRUPTIBLE = "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"
LOOP = """stop.defer()
    while not stop.reason: time.sleep(0.01)
    print("saving because of", stop.reason, flush=True)
    time.sleep({seconds})
    sys.exit(75)"""
HOLD_THE_GIL = "ctypes.PyDLL(None).sleep(60)"
WATCHED = """end = lambda: stop.end(ExitCode.DEFECT, "a call hung")
    with Watchdog({timeout}, end, margin_seconds=1.0).watch("a call", native={native}):
        print("watched", flush=True)
        {call}
    print("returned", flush=True)"""


@pytest.fixture(autouse=True)
def no_signal_ignored() -> Iterator[None]:
    """Processes inherit ignored signals, and these tests may run under nohup."""
    handler = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, handler)


@contextmanager
def running(body: str, callback: str = "None") -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(body=body, callback=callback)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def watching(call: str, timeout: float, native: bool = False) -> Iterator[subprocess.Popen[str]]:
    body = WATCHED.format(call=call, timeout=timeout, native=native)
    with running(body) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "watched\n"
        yield process


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_signal_ends_a_process_with_nothing_to_save_immediately(name: str) -> None:
    with running(UNINTERRUPTIBLE) as process:
        start = time.monotonic()
        process.send_signal(getattr(signal, name))
        output, errors = process.communicate()
    assert (process.returncode, errors) == (75, "")
    assert output == f"second 75 {name}\nfirst 75 {name}\n"
    assert time.monotonic() - start < 3


def test_a_callback_that_hangs_does_not_prevent_the_end() -> None:
    with running(UNINTERRUPTIBLE, callback="time.sleep(60)") as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 75


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_is_left_to_a_loop_that_has_work_to_save(name: str) -> None:
    with running(LOOP.format(seconds=0.3)) as process:
        time.sleep(0.2)
        process.send_signal(getattr(signal, name))
        output, _ = process.communicate()
    assert process.returncode == 75
    assert f"saving because of {name}\n" in output
    assert (
        f"{name}: the run finishes its current computation, saves a checkpoint and stops" in output
    )
    assert ("a second Ctrl-C stops it without saving" in output) == (name == "SIGINT")


def test_a_second_interrupt_ends_the_process_immediately() -> None:
    with running(LOOP.format(seconds=30)) as process:
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert "saving because of SIGINT\n" in iter(process.stdout.readline, "")
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)  # not a second SIGINT
        time.sleep(0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait() == 75
        assert time.monotonic() - start < 5


def test_a_time_limit_is_a_reason_once_it_has_passed() -> None:
    stop = StopRequest()
    stop.stop_after(0.2)
    assert stop.reason is None
    time.sleep(0.3)
    assert stop.reason == "--stop-after 0.2"


def test_a_deferred_request_is_not_lost() -> None:
    body = """stop.defer()
    os.kill(os.getpid(), signal.SIGTERM)
    while not stop.reason: time.sleep(0.01)
    stop.end_deferral()"""
    with running(body) as process:
        assert process.wait(timeout=10) == 75


def test_a_process_under_nohup_ignores_the_end_of_the_terminal() -> None:
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with running("time.sleep(1); sys.exit(0)") as process:
            process.send_signal(signal.SIGHUP)
            assert process.wait(timeout=10) == 0
    finally:
        signal.signal(signal.SIGHUP, handler)


def test_a_handover_request_does_not_end_the_process_immediately() -> None:
    body = """stop.request_handover("another", "it resumes")
    time.sleep(0.5)
    stop.defer()
    print(stop.reason, stop.advice, flush=True)
    stop.end_deferral()"""
    with running(body) as process:
        output, _ = process.communicate(timeout=10)
    assert (process.returncode, output) == (0, "another it resumes\n")


def test_the_first_reason_counts() -> None:
    stop = StopRequest()
    stop.defer()
    stop.request("SIGTERM")
    stop.request("SIGUSR1")
    assert stop.reason == "SIGTERM"


def test_a_stall_logs_every_threads_stack_and_ends_the_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log.configure("json")
    stalled = threading.Event()
    watchdog = Watchdog(0.05, on_stall=stalled.set)

    def hanging_collective() -> None:
        assert stalled.wait(30)

    with watchdog.watch("a test"):
        hanging_collective()
    line = json.loads(capsys.readouterr().out)
    assert (line["event"], line["level"], line["what"]) == ("stalled", "critical", "a test")
    assert line["timeout_seconds"] == 0.05
    assert "hanging_collective" in line["stacks"]
    assert "MainThread" in line["stacks"]


def test_a_stall_ends_the_process_with_exit_code_1() -> None:
    with watching(UNINTERRUPTIBLE, timeout=0.2) as process:
        output, _ = process.communicate(timeout=10)
    assert process.returncode == 1
    assert output.endswith("second 1 a call hung\nfirst 1 a call hung\n")


def test_a_call_that_returns_in_time_does_not_end_the_run() -> None:
    stalled = threading.Event()
    watchdog = Watchdog(0.3, on_stall=stalled.set)
    for _ in range(5):
        with watchdog.watch("a test"):
            assert not stalled.wait(0.1)
    assert not stalled.wait(0.6)


def test_a_first_call_gets_extra_time_to_compile(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("job.run.stop.COMPILATION_SECONDS", 0.5)
    stalled = threading.Event()
    with Watchdog(0.05, on_stall=stalled.set).watch("a test", compiling=True):
        assert not stalled.wait(0.2)
        assert stalled.wait(30)


def test_a_call_has_its_full_time_again_after_a_nested_call(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log.configure("json")
    stalled = threading.Event()
    watchdog = Watchdog(1.0, on_stall=stalled.set)
    with watchdog.watch("the outer call"):
        assert not stalled.wait(0.6)
        with watchdog.watch("the inner call", seconds=30):
            assert not stalled.wait(1.5)
        assert not stalled.wait(0.6)
        assert stalled.wait(30)
    assert json.loads(capsys.readouterr().out)["what"] == "the outer call"


def test_a_hung_process_ends_even_if_the_log_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("job.run.stop.thread_stacks", lambda: 1 / 0)
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    stalled = threading.Event()
    with Watchdog(0.05, on_stall=stalled.set).watch("a test"):
        assert stalled.wait(30)


def test_a_hung_call_that_holds_the_global_lock_is_ended_natively() -> None:
    """No Python thread of the process runs any more."""
    with watching(HOLD_THE_GIL, timeout=0.5, native=True) as process:
        start = time.monotonic()
        output, errors = process.communicate(timeout=10)
        seconds = time.monotonic() - start
    assert (process.returncode, output) == (1, "")
    assert "Timeout (0:00:01.5" in errors
    assert 'File "<string>"' in errors
    assert 1.2 < seconds < 4


def test_a_suspension_counts_in_no_timer() -> None:
    """Neither in the watchdog nor in the clock of all other timers, here of --stop-after."""
    idle = "stop.stop_after(8); sys.stdin.readline(); print(stop.reason)"
    with watching(idle, timeout=8) as process:
        process.send_signal(signal.SIGSTOP)
        time.sleep(9)
        process.send_signal(signal.SIGCONT)
        time.sleep(2.5)  # enough for a check that could end it
        output, errors = process.communicate("\n", timeout=10)
    assert (process.returncode, output, errors) == (0, "None\nreturned\n", "")


def test_a_forked_process_receives_its_signals() -> None:
    """A user's own data set may use a pool of processes, which ends them with SIGTERM."""
    body = """import multiprocessing
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    child.terminate()
    child.join()
    print(child.exitcode, flush=True)"""
    with running(body) as process:
        output, errors = process.communicate(timeout=20)
    assert output == "-15\n", (process.returncode, errors)


def test_a_signal_is_received_whatever_handlers_native_code_installs() -> None:
    """TensorFlow's runtime installs such handlers while it connects workers."""
    ignore = "libc.signal.argtypes = ctypes.c_int, ctypes.c_void_p; libc.signal(15, 1)"
    with running(f"libc = ctypes.CDLL(None); {ignore}; print(1, flush=True); time.sleep(60)") as it:
        assert it.stdout is not None
        assert it.stdout.readline() == "1\n"
        it.send_signal(signal.SIGTERM)
        assert it.wait(timeout=10) == 75
