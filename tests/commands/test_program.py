import json
import sys
from typing import Any

import pytest

from job.commands import cli as program
from job.commands.cli import cli
from job.config import GpuMissingError, JobError, StoppedError, UserError
from job.run.stop import StopRequest
from tests.conftest import RunJob


def test_a_mistyped_command_is_one_line_and_one_event(run_job: RunJob) -> None:
    result = run_job("--epochs", "3")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "No such option '--epochs'. Options come after a command: train --epochs 3." in line
    (event,) = result.stdout.splitlines()
    assert json.loads(event)["exit_code"] == 2
    result = run_job("train", "--epoch", "3")
    assert "after a command" not in result.stderr


@pytest.mark.parametrize(("log_format", "lines"), [("text", 0), ("json", 1), ("nonsense", 1)])
def test_a_usage_error_keeps_to_the_variable_of_the_log_format(
    run_job: RunJob, log_format: str, lines: int
) -> None:
    result = run_job("train", "--epoch", "3", env={"JOB_LOG_FORMAT": log_format})
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert len(result.stdout.splitlines()) == lines


def end(monkeypatch: pytest.MonkeyPatch, error: BaseException | None) -> object:
    """The exit code of a command that ends like this."""

    def command(**settings: Any) -> None:
        if error:
            raise error

    monkeypatch.setattr(cli, "main", command)
    # A duplicate would stay open in this process, which does not end.
    monkeypatch.setattr(program, "_duplicate_stderr", lambda: sys.stderr)
    monkeypatch.setenv("JOB_LOG_FORMAT", "json")
    with pytest.raises(SystemExit) as ending:
        program.main(StopRequest())
    return ending.value.code


@pytest.mark.parametrize(
    ("error", "exit_code", "line"),
    [
        (JobError("a loss\nthat is no number"), 1, "error: a loss that is no number"),
        (UserError("name another"), 2, "error: name another"),
        (GpuMissingError("no GPU"), 3, "error: no GPU"),
        (StoppedError("SIGTERM"), 75, "stopped: SIGTERM"),
    ],
)
def test_an_explained_end_is_one_line_one_event_and_its_exit_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: JobError,
    exit_code: int,
    line: str,
) -> None:
    assert end(monkeypatch, error) == exit_code
    output, errors = capsys.readouterr()
    assert errors == f"cifar10-job: {line}\n"
    event = json.loads(output)
    assert (event["exit_code"], event["event"]) == (exit_code, line.partition(":")[0])
    assert event["level"] == ("warning" if exit_code == 75 else "error")


def test_a_defect_leaves_its_trace_above_the_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert end(monkeypatch, ZeroDivisionError("broken")) == 1
    *trace, line = capsys.readouterr().err.splitlines()
    assert trace[0] == "Traceback (most recent call last):"
    assert trace[-1] == "ZeroDivisionError: broken"
    assert line.endswith("this is a defect of the job: please report the trace above")


def test_a_command_that_returns_is_done_without_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert end(monkeypatch, None) == 0
    assert capsys.readouterr() == ("", "")
