import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from job.run.stop import StopRequest
from tests.conftest import REPOSITORY

# A call that Python cannot interrupt stands for a compiled one.
PROGRAM = """
import hashlib, os, signal, sys, time
from job.run.stop import listen_to_signals
stop = listen_to_signals()
with (
    stop.last_words(lambda reason: print("first", reason, flush=True)),
    stop.last_words(lambda reason: print("second", reason, flush=True)),
    stop.last_words(lambda reason: {last_words}),
):
    print("ready", flush=True)
    {body}
"""
UNINTERRUPTIBLE = "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"
LOOP = """stop.defer()
    while not stop.reason: time.sleep(0.01)
    print("saving because of", stop.reason, flush=True)
    time.sleep({seconds})
    sys.exit(75)"""


@pytest.fixture(autouse=True)
def hearing_of_hangups() -> Iterator[None]:
    """Processes inherit what is ignored, and these tests may run under nohup."""
    handler = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, handler)


@contextmanager
def running(body: str, last_words: str = "None") -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(body=body, last_words=last_words)],
        cwd=REPOSITORY,
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


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_signal_with_nothing_to_save_ends_at_once(name: str) -> None:
    with running(UNINTERRUPTIBLE) as process:
        start = time.monotonic()
        process.send_signal(getattr(signal, name))
        output, errors = process.communicate()
    assert (process.returncode, errors) == (75, "")
    assert output == f"second {name}\nfirst {name}\n"
    assert time.monotonic() - start < 3


def test_last_words_that_hang_do_not_keep_the_process() -> None:
    with running(UNINTERRUPTIBLE, last_words="time.sleep(60)") as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 75


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_is_left_to_a_loop_that_has_work_to_save(name: str) -> None:
    with running(LOOP.format(seconds=0.3)) as process:
        time.sleep(0.2)
        process.send_signal(getattr(signal, name))
        output, _ = process.communicate()
    assert (process.returncode, output) == (75, f"saving because of {name}\n")


def test_a_second_interrupt_ends_at_once() -> None:
    with running(LOOP.format(seconds=30)) as process:
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert process.stdout.readline() == "saving because of SIGINT\n"
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)  # no second SIGINT
        time.sleep(0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait() == 75
        assert time.monotonic() - start < 5


def test_a_time_limit_is_a_reason_once_it_is_over() -> None:
    stop = StopRequest()
    stop.stop_after(0.2)
    assert stop.reason is None
    time.sleep(0.3)
    assert stop.reason == "--stop-after 0.2"


def test_a_request_that_was_deferred_is_not_forgotten() -> None:
    body = """stop.defer()
    os.kill(os.getpid(), signal.SIGTERM)
    while not stop.reason: time.sleep(0.01)
    stop.resume_ending_at_once()"""
    with running(body) as process:
        assert process.wait(timeout=10) == 75


def test_a_process_under_nohup_does_not_hear_of_the_terminals_end() -> None:
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with running("time.sleep(1); sys.exit(0)") as process:
            process.send_signal(signal.SIGHUP)
            assert process.wait(timeout=10) == 0
    finally:
        signal.signal(signal.SIGHUP, handler)


def test_being_asked_waits_until_something_is_done() -> None:
    body = """stop.ask("another", "it goes on")
    time.sleep(0.5)
    stop.defer()
    print(stop.reason, stop.advice, flush=True)
    stop.resume_ending_at_once()"""
    with running(body) as process:
        output, _ = process.communicate(timeout=10)
    assert (process.returncode, output) == (0, "another it goes on\n")


def test_the_first_reason_counts() -> None:
    stop = StopRequest()
    stop.defer()
    stop.request("SIGTERM")
    stop.request("SIGUSR1")
    assert stop.reason == "SIGTERM"
