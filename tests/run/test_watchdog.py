import json
import threading

import pytest

from job import log
from job.run.stop import Watchdog


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
    assert "hanging_collective" in line["stacks"]
    assert "MainThread" in line["stacks"]


def test_a_call_that_returns_in_time_goes_on() -> None:
    stalled = threading.Event()
    for _ in range(3):
        with Watchdog(0.2, on_stall=stalled.set).watch("a test"):
            pass
    assert not stalled.wait(0.4)


def test_a_first_call_has_time_to_compile(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("job.run.stop.COMPILATION_SECONDS", 0.5)
    stalled = threading.Event()
    with Watchdog(0.05, on_stall=stalled.set).watch("a test", compiling=True):
        assert not stalled.wait(0.2)
        assert stalled.wait(30)


def test_a_log_that_cannot_be_written_does_not_save_a_hung_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("job.run.stop.thread_stacks", lambda: 1 / 0)
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    stalled = threading.Event()
    with Watchdog(0.05, on_stall=stalled.set).watch("a test"):
        assert stalled.wait(30)
