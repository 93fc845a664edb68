"""The command line: each command parses its options, builds one configuration and makes one call.

TensorFlow is imported inside the commands that need it, so that ``--help`` answers at once.
"""

import contextlib
import json
import logging
import math
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TextIO

import click

from job import __version__, config, log
from job.config import DataConfig, DeviceRequest, ExitCode, JobError, TrainConfig
from job.preemption import StopRequest


class _DevicesType(click.ParamType[DeviceRequest]):
    name = "auto|cpu:N|gpu:N"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> DeviceRequest:
        try:
            return value if isinstance(value, DeviceRequest) else DeviceRequest.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _PositiveFloatType(click.FloatRange):
    """A number above 0; "nan" passes every comparison of the class it extends."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


def _option(name: str, **settings: Any) -> Callable[[Any], Any]:
    """An option that is also the environment variable ``JOB_<NAME>``."""
    variable = "JOB_" + name.removeprefix("--").replace("-", "_").upper()
    return click.option(name, envvar=variable, show_envvar=True, show_default=True, **settings)


_FOLDER = click.Path(path_type=Path)
_POSITIVE = click.IntRange(min=1)
_POSITIVE_FLOAT = _PositiveFloatType(min=0, min_open=True)
_WEEK_SECONDS = 604_800.0

_output_dir = _option(
    "--output-dir", type=_FOLDER, default="output", help="Folder that receives the artifacts."
)
_devices = _option(
    "--devices",
    type=_DevicesType(),
    default="auto",
    help="Replicas to use; auto takes every visible GPU, or the CPU where there is none.",
)
_require_gpus = _option(
    "--require-gpus",
    type=click.IntRange(min=0),
    default=0,
    help="End with exit code 3 unless this many GPUs are visible.",
)
_stall_timeout = _option(
    "--stall-timeout",
    type=_PositiveFloatType(min=0, max=_WEEK_SECONDS, min_open=True),
    default=600.0,
    help="Seconds after which a call that does not return ends the run with exit code 1.",
)
_run_id = _option(
    "--run-id",
    help="Name of the run, which all of its attempts have in common; else that of the "
    "scheduler's job. A later attempt takes the folder over from an earlier one.",
)
_log_format = _option(
    "--log-format",
    type=click.Choice(log.LOG_FORMATS),
    default="auto",
    help="auto is text on a terminal and JSON lines elsewhere.",
)


def _data_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say where the examples come from."""
    for option in (
        _option(
            "--cifar10-url",
            default=config.CIFAR10_URL,
            help="Where to download CIFAR-10 from if --data-dir holds none.",
        ),
        _option(
            "--seed",
            type=click.IntRange(0, 2**31 - 1),
            default=42,
            help="The one seed of everything random.",
        ),
        _option(
            "--dataset",
            type=click.Choice(config.DATASETS),
            default="cifar10",
            help="synthetic is drawn from the seed and needs no files.",
        ),
        _option("--data-dir", type=_FOLDER, default="data", help="Folder that holds the data set."),
    ):
        command = option(command)
    return command


@click.group(context_settings={"max_content_width": 100})
@click.version_option(__version__, prog_name="cifar10-job")
def cli() -> None:
    """Train CIFAR-10 data-parallel on every visible GPU, as a batch job.

    Every option is also an environment variable. Exit codes: 0 done, 1 a defect, 2 you must change
    something, 3 a GPU is missing, 75 stopped: the same command goes on.
    """


@cli.command()
@_output_dir
@_data_options
@_option(
    "--recipe",
    type=click.Choice(config.RECIPES),
    default="classic",
    help="Network, optimizer and augmentation.",
)
@_option("--epochs", type=_POSITIVE, default=50, help="Passes over the training set.")
@_option(
    "--batch-size", type=_POSITIVE, default=256, help="Images a step, over all replicas together."
)
@_option("--learning-rate", type=_POSITIVE_FLOAT, default=1e-4, help="Of the optimizer.")
@_option("--limit", type=_POSITIVE, help="Use only the first N training images.")
@_option(
    "--precision",
    type=click.Choice(config.PRECISIONS),
    default="auto",
    help="auto is bfloat16 where the hardware computes it.",
)
@_option(
    "--jit",
    type=click.Choice(config.SWITCHES),
    default="auto",
    help="XLA: auto compiles the network on GPUs, and augmentation and optimizer everywhere.",
)
@_option(
    "--deterministic",
    type=click.Choice(config.SWITCHES),
    default="auto",
    help="Use only operations that give the same bits each time; auto is on for CPUs.",
)
@_option(
    "--checkpoint-every",
    type=_POSITIVE_FLOAT,
    default=60.0,
    help="Seconds between two checkpoints.",
)
@_option(
    "--stop-after",
    type=_POSITIVE_FLOAT,
    help="Stop with a checkpoint and exit code 75 this many seconds after the start.",
)
@_option("--fresh", is_flag=True, help="Start over: discard the run that the folder holds.")
@_devices
@_require_gpus
@_stall_timeout
@_run_id
@_log_format
@click.pass_obj
def train(stop: StopRequest, /, log_format: log.LogFormat, **options: Any) -> None:
    """Train, and leave model, evaluation and prediction picture in the output folder.

    A run that was stopped or killed goes on where its last checkpoint was; a finished one is done.
    """
    log.configure(log_format)
    run_config = _train_config(options)
    from job.attempt import open_attempt

    with open_attempt(run_config, stop) as attempt:
        if attempt.is_finished:
            _report_finished(run_config)
            return
        _load_tensorflow()
        from job.train import train_and_evaluate

        train_and_evaluate(run_config, attempt)


def _report_finished(run_config: TrainConfig) -> None:
    folder = run_config.output_dir
    log.event(
        "finished",
        output_dir=str(folder),
        message=f"the run in {folder}/ is finished; raise --epochs to go on with it, start over "
        f"with --fresh, or name another --output-dir",
    )


@cli.command()
@_output_dir
@_data_options
@_option(
    "--recipe",
    type=click.Choice(config.RECIPES),
    default="classic",
    help="The recipe that the model was trained with.",
)
@_devices
@_require_gpus
@_stall_timeout
@_log_format
@click.pass_obj
def evaluate(stop: StopRequest, /, log_format: log.LogFormat, **options: Any) -> None:
    """Evaluate the model of an output folder again, and draw its prediction picture again."""
    log.configure(log_format)
    run_config = _train_config(options)
    from job.attempt import hold_output_dir
    from job.output import MODEL, require_model

    require_model(run_config.output_dir / MODEL)
    with hold_output_dir(run_config.output_dir, stop) as output:
        _load_tensorflow()
        from job.saved_model import evaluate_output_dir

        evaluate_output_dir(run_config, output)


@cli.command()
@_output_dir
@_option("--data-dir", type=_FOLDER, default="data", help="Folder that holds the data set.")
@_require_gpus
@_log_format
def doctor(log_format: log.LogFormat, output_dir: Path, data_dir: Path, require_gpus: int) -> None:
    """Examine this machine: versions, GPUs, a test computation, folders."""
    log.configure(log_format)
    startup_lines = _load_tensorflow(verbose=True)
    from job.doctor import as_text, examine

    folders = [("--output-dir", output_dir), ("--data-dir", data_dir)]
    report, exit_code = examine(folders, require_gpus, startup_lines)
    click.echo(json.dumps(report) if log.is_json() else as_text(report))
    sys.exit(exit_code)


def _train_config(options: dict[str, Any]) -> TrainConfig:
    """Build the configuration from options under their command line's names."""
    renamed = {
        "batch_size": "global_batch_size",
        "stall_timeout": "stall_timeout_seconds",
        "checkpoint_every": "checkpoint_every_seconds",
        "stop_after": "stop_after_seconds",
    }
    options = {renamed.get(name, name): value for name, value in options.items()}
    data = {
        name: options.pop(name)
        for name in ("dataset", "data_dir", "cifar10_url", "limit")
        if name in options
    }
    return TrainConfig(data=DataConfig(**data, seed=options["seed"]), **options)


def _load_tensorflow(*, verbose: bool = False) -> list[str]:
    from job.startup import load_tensorflow

    return load_tensorflow(verbose=verbose)


def main(stop: StopRequest) -> NoReturn:
    """Run the command line and end the process with one of the job's exit codes.

    Args:
        stop: Is asked by signals.
    """
    # While TensorFlow is imported, descriptor 2 leads elsewhere.
    stderr = _duplicate_stderr()

    def say_why(reason: str) -> None:
        _report(f"{reason}; run the same command again to go on", ExitCode.RUN_AGAIN, stderr)

    with stop.last_words(say_why):
        try:
            cli.main(prog_name="cifar10-job", standalone_mode=False, obj=stop)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            sys.exit(ExitCode.USER_ERROR)
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
