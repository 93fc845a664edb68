"""The program from its start to its exit code: the command line, and how its end is told."""

import contextlib
import logging
import os
import sys
import traceback
from typing import NoReturn, TextIO

import click

from job import log
from job.cli import cli
from job.config import ExitCode, JobError
from job.preemption import StopRequest


def main(stop: StopRequest) -> NoReturn:
    """Run the command line and end the process with one of the job's exit codes.

    Args:
        stop: Is asked by signals.
    """
    # While TensorFlow is imported, descriptor 2 leads elsewhere.
    stderr = _duplicate_stderr()

    def say_why(reason: str) -> None:
        _report(f"{reason}; {stop.advice}", ExitCode.RUN_AGAIN, stderr)

    with stop.last_words(say_why):
        # Until the command says otherwise: its options may be what is wrong.
        log.configure(log.wanted_format(os.environ.get("JOB_LOG_FORMAT")))
        try:
            cli.main(prog_name="cifar10-job", standalone_mode=False, obj=stop)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            sys.exit(ExitCode.USER_ERROR)
        except click.NoSuchOption as error:
            of_a_command = error.ctx is not None and error.ctx.command is not cli
            advice = "" if of_a_command else " Options come after a command: train --epochs 3."
            _fail(error.format_message() + advice, ExitCode.USER_ERROR, stderr)
        except click.ClickException as error:
            _fail(error.format_message(), ExitCode.USER_ERROR, stderr)
        except JobError as error:
            _fail(str(error), error.exit_code, stderr)
        except Exception:
            trace = traceback.format_exc()
            with contextlib.suppress(OSError):
                print(trace, end="", file=stderr, flush=True)
            problem = "this is a defect of the job: please report the trace above"
            _fail(problem, ExitCode.DEFECT, stderr)
    sys.exit(ExitCode.DONE)


def _duplicate_stderr() -> TextIO | None:
    try:
        return os.fdopen(os.dup(2), "w")
    except OSError:
        return None  # it is closed


def _fail(message: str, exit_code: ExitCode, stderr: TextIO | None) -> NoReturn:
    """Report the end of the run in one line and end the process."""
    _report(message, exit_code, stderr)
    sys.exit(exit_code)


def _report(message: str, exit_code: ExitCode, stderr: TextIO | None) -> None:
    line = " ".join(message.split())
    stopped = exit_code == ExitCode.RUN_AGAIN
    # The exit code counts, even if whoever read the message has gone.
    with contextlib.suppress(OSError):
        text = f"cifar10-job: {'stopped' if stopped else 'error'}: {line}"
        print(text, file=stderr, flush=True)
    if log.is_json():
        name, level = ("stopped", logging.WARNING) if stopped else ("error", logging.ERROR)
        log.event(name, level, message=line, exit_code=int(exit_code))
