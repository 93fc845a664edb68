"""The command line: each command parses its options, builds one configuration and makes one call.

TensorFlow is imported only inside the commands that need it, to keep ``--help`` fast.
"""

import contextlib
import faulthandler
import gc
import logging
import os
import platform
import sys
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TextIO

import click

from job import __version__, log
from job.commands.options import (
    MODEL_FILE,
    PNG_FILE,
    config_options,
    describe_unknown_option,
    log_format_option,
    option,
    output_dir_argument,
    require_writable_folder,
    warn_about_misspelt_variables,
)
from job.commands.terminal import DownloadBar, EpochBar, printable
from job.config import ExitCode, JobError, TrainConfig
from job.environment import explain, require_capable_machine, require_threads
from job.registry import explaining_user_code
from job.report import MATPLOTLIB_VARIABLES, tolerate_drawing_errors
from job.run.stop import StopRequest, Watchdog


class _Command(click.Command):
    """A command that first checks for NumPy's threads and for misspelt environment variables."""

    def invoke(self, ctx: click.Context) -> Any:
        require_threads()
        warn_about_misspelt_variables(self, os.environ)
        return super().invoke(ctx)


class _ResultsCommand(_Command):
    """A command that writes only results to stdout, even if its options are wrong."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        log.configure("text", stream="stderr")
        return super().make_context(*args, **kwargs)


class _Group(click.Group):
    command_class = _Command


@click.group(cls=_Group, context_settings={"max_content_width": 100})
@click.version_option(__version__, prog_name="cifar10-job")
def cli() -> None:
    """Train CIFAR-10 data-parallel on every visible GPU, as a batch job.

    Every option can also be set by an environment variable.

    Exit codes: 0 done; 1 a defect; 2 a user error: fix what the message names; 3 a GPU is missing;
    75 stopped: run the same command again to resume.
    """


@cli.command()
@config_options()
@option(
    "--expect-mount",
    is_flag=True,
    help="Warn if the output folder is not on a mounted volume, and so is lost with its container.",
)
@log_format_option
@option("--dry-run", is_flag=True, help="Print what the training would do, and write nothing.")
@click.pass_obj
def train(
    stop: StopRequest,
    /,
    log_format: log.LogFormat,
    expect_mount: bool,
    dry_run: bool,
    **options: Any,
) -> None:
    """Train a model, evaluate it and write a report.

    All files go to the output folder. A run that was stopped or killed resumes from its last
    checkpoint. A finished run is left unchanged.
    """
    log.configure(log_format)
    config = TrainConfig(**options)
    from job.cluster.scheduler import cluster_spec, refuse_shell_of_tasks
    from job.run.folder import warn_unless_mounted

    refuse_shell_of_tasks(os.environ)
    spec = cluster_spec(os.environ)
    if expect_mount and spec.is_chief:
        warn_unless_mounted(config.output_dir)
    if dry_run:
        load_tensorflow()
        from job.commands.dry_run import print_dry_run

        print_dry_run(config, stop)
        return
    with _bars(enabled=spec.is_chief, stop=stop) as (download_bar, epoch_bar):
        if spec.count > 1:
            log.configure(log_format, worker=spec.index)
            from job.data import load_ahead

            load = load_ahead(config, download_bar)
            # The checkpoint's oneDNN setting is not known yet: only the chief reads the checkpoint,
            # and only after all workers have connected.
            load_tensorflow(onednn=None)
            from job.training.train import train_as_worker

            train_as_worker(config, spec, stop, load, [epoch_bar])
        else:
            _train_alone(config, stop, download_bar, epoch_bar)


@contextlib.contextmanager
def _bars(*, enabled: bool, stop: StopRequest) -> Iterator[tuple[DownloadBar, EpochBar]]:
    """Open progress bars, which are erased however the process ends."""
    enabled = enabled and not log.is_json()
    with (
        contextlib.closing(DownloadBar(enabled=enabled)) as download_bar,
        contextlib.closing(EpochBar(enabled=enabled)) as epoch_bar,
        stop.on_exit(lambda _code, _reason: epoch_bar.close()),
        stop.on_exit(lambda _code, _reason: download_bar.close()),
    ):
        yield download_bar, epoch_bar


def _train_alone(
    config: TrainConfig, stop: StopRequest, download_bar: DownloadBar, epoch_bar: EpochBar
) -> None:
    from job.run.attempt import open_attempt

    watchdog = Watchdog(config.stall_timeout, stop.end_hung)
    with open_attempt(config, stop, watchdog) as attempt:
        if attempt.is_finished:
            from job.training.prometheus import write_finished

            write_finished(config, attempt)
            return
        from job.data import load_ahead
        from job.run.fingerprint import ONEDNN

        load = load_ahead(config, download_bar)
        onednn: str | None = "1"
        if attempt.checkpoint:  # a resumed run keeps its setting: its bits depend on it
            onednn = attempt.checkpoint.fingerprint.environment.variables.get(ONEDNN)
        with watchdog.watch("the import of TensorFlow", compiling=True, native=True):
            load_tensorflow(onednn=onednn)
            from job.cluster.devices import open_devices
            from job.training.train import run_attempt

        run_attempt(config, attempt, open_devices, load, watchdog, [epoch_bar])


@cli.command()
@config_options(
    *("output_dir", "data_dir", "dataset", "cifar10_url", "seed", "recipe"),
    *("devices", "require_gpus", "stall_timeout"),
    recipe="The recipe that the model was trained with.",
)
@log_format_option
@click.pass_obj
def evaluate(stop: StopRequest, /, log_format: log.LogFormat, **options: Any) -> None:
    """Evaluate the model in an output folder again.

    The pictures and the report are drawn again too.
    """
    log.configure(log_format)
    config = TrainConfig(**options)
    from job.run.attempt import hold_output_dir
    from job.run.folder import MODEL, require_model

    require_model(config.output_dir / MODEL)
    bars, watchdog = _bars(enabled=True, stop=stop), Watchdog(config.stall_timeout, stop.end_hung)
    holding = hold_output_dir(config.output_dir, stop, watchdog=watchdog)
    with holding as output, bars as (download_bar, _):
        with watchdog.watch("the import of TensorFlow", compiling=True, native=True):
            load_tensorflow()
        from job.cluster.devices import open_devices
        from job.data import load_dataset
        from job.report.page import write_report
        from job.training.saved_model import evaluate_output_dir

        devices, load = open_devices(config), partial(load_dataset, bar=download_bar)
        evaluate_output_dir(config, output, devices, load, watchdog)
        with tolerate_drawing_errors("the report"):
            write_report(output)


@cli.command()
@output_dir_argument
@log_format_option
@click.pass_obj
def report(stop: StopRequest, /, log_format: log.LogFormat, output_dir: Path) -> None:
    """Draw the report of the run in OUTPUT_DIR again.

    This writes report.html and the pictures in report/ from the files in the folder. The run need
    not be finished. OUTPUT_DIR can also be set by the environment variable JOB_OUTPUT_DIR; its
    default is output.
    """
    log.configure(log_format)
    from job.report.page import write_report
    from job.run.attempt import hold_output_dir
    from job.run.record import RunRecord

    RunRecord.load(output_dir)  # fails before the next line creates a missing folder
    with hold_output_dir(output_dir, stop) as output:
        write_report(output)


@cli.command(cls=_ResultsCommand)
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
@config_options(
    *("output_dir", "devices", "require_gpus"),
    output_dir="Output folder of the training whose model is used; it is not changed.",
)
@option("--model", type=MODEL_FILE, help="Model file to use instead of the one in --output-dir.")
@option(
    "--top", type=click.IntRange(min=1), default=3, help="Number of classes to report per image."
)
@option("--json", is_flag=True, help="Write JSON lines.")
@option(
    "--png", type=PNG_FILE, help="Also draw the first 100 images with their classes as a PNG file."
)
@click.pass_obj
def predict(
    stop: StopRequest,
    /,
    images: tuple[str, ...],
    model: Path | None,
    top: int,
    json: bool,
    png: Path | None,
    **options: Any,
) -> None:
    """Predict the classes of images.

    IMAGE is an image file of any format and size, a folder, or - for standard input. Images that
    cannot be read are reported, and the exit code is then 2.
    """
    stop.advice = "run the same command again"
    config = TrainConfig(**options)
    from job.data.image_files import find_images, require_no_image
    from job.run.folder import MODEL, require_model

    path = model or config.output_dir / MODEL
    require_model(path)
    files = find_images(images)
    if png:
        require_writable_folder(png)
        require_no_image(png, files)
    load_tensorflow()
    from job.cluster.devices import open_devices
    from job.commands.predict import predict_images

    predict_images(open_devices(config), path, files, top, as_json=json, png=png)


@cli.command(cls=_ResultsCommand)
@click.argument("folders", metavar="DIR...", nargs=-1, required=True)
@option("--json", is_flag=True, help="Write one JSON object instead of tables.")
@option("--png", type=PNG_FILE, help="Also draw the runs' curves and accuracies as a PNG file.")
def compare(folders: tuple[str, ...], json: bool, png: Path | None) -> None:
    """Compare runs: means, standard deviations and the best run.

    DIR is the output folder of a run, or a folder that contains output folders. Unfinished runs are
    reported and excluded from the means.
    """
    if png:
        require_writable_folder(png)
    from job.commands.compare import print_comparison

    print_comparison(folders, as_json=json, png=png)


@cli.command()
@config_options("output_dir", "data_dir", "require_gpus")
@log_format_option
def doctor(log_format: log.LogFormat, output_dir: Path, data_dir: Path, require_gpus: int) -> None:
    """Check this machine: versions, GPUs, test computations, folders."""
    log.configure(log_format)
    startup_lines = load_tensorflow(verbose=True)
    from job.commands.doctor import print_examination

    folders = [("--output-dir", output_dir), ("--data-dir", data_dir)]
    sys.exit(print_examination(folders, require_gpus, startup_lines))


def main(stop: StopRequest, stderr: TextIO | None = None) -> NoReturn:
    """Run the command line and end the process with one of the job's exit codes.

    Args:
        stop: Receives the stop requests of signals.
        stderr: Stream for error messages; by default a copy of the current file descriptor 2.
    """
    # Descriptor 2 is redirected while TensorFlow is imported.
    stderr = stderr or os.fdopen(
        os.dup(2), "w", encoding=sys.stderr.encoding, errors="backslashreplace"
    )

    def report_exit(exit_code: ExitCode, reason: str) -> None:
        stopped = exit_code == ExitCode.RUN_AGAIN
        advice = (
            stop.advice
            if stopped
            else "run the same command again; if it fails again, report the error"
        )
        _report(f"{reason}; {advice}", exit_code, stderr)

    with stop.on_exit(report_exit):
        # A provisional setting for errors in the command's options.
        log.configure(os.environ.get("JOB_LOG_FORMAT", "auto"))
        try:
            with explaining_user_code():
                cli.main(prog_name="cifar10-job", standalone_mode=False, obj=stop)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            sys.exit(ExitCode.USER_ERROR)
        except click.NoSuchOption as error:
            of_a_command = error.ctx is not None and error.ctx.command is not cli
            advice = "" if of_a_command else " Options go after the command: train --epochs 3."
            _fail(describe_unknown_option(error) + advice, ExitCode.USER_ERROR, stderr)
        except click.ClickException as error:
            _fail(error.format_message(), ExitCode.USER_ERROR, stderr)
        except JobError as error:
            _fail(str(error), error.exit_code, stderr)
        except Exception as error:
            if explained := explain(error):
                _fail(str(explained), explained.exit_code, stderr)
            trace = traceback.format_exc()
            with contextlib.suppress(OSError):
                print(trace, end="", file=stderr, flush=True)
            problem = "this is a defect in the job; report the traceback above"
            _fail(problem, ExitCode.DEFECT, stderr)
    sys.exit(ExitCode.DONE)


def _fail(message: str, exit_code: ExitCode, stderr: TextIO) -> NoReturn:
    """Report the end of the run in one line and end the process."""
    _report(message, exit_code, stderr)
    sys.exit(exit_code)


def _report(message: str, exit_code: ExitCode, stderr: TextIO) -> None:
    line = printable(" ".join(message.split()))
    stopped = exit_code == ExitCode.RUN_AGAIN
    # The exit code must be right even if stderr has been closed.
    with contextlib.suppress(OSError):
        text = f"cifar10-job: {'stopped' if stopped else 'error'}: {line}"
        print(text, file=stderr, flush=True)
    if log.is_json():
        name, level = ("stopped", logging.WARNING) if stopped else ("error", logging.ERROR)
        log.event(name, level, message=line, exit_code=int(exit_code))


def load_tensorflow(*, verbose: bool = False, onednn: str | None = "1") -> list[str]:
    """Import TensorFlow and detect GPUs, capturing what the native code prints.

    Must run before anything else imports TensorFlow.

    Args:
        verbose: Whether to enable all of TensorFlow's messages instead of errors only. A level that
            the user sets in TF_CPP_MIN_LOG_LEVEL has priority.
        onednn: The value of `fingerprint.ONEDNN` on x86-64, unless the user sets the variable. By
            default TensorFlow uses oneDNN only on processors with VNNI, bfloat16 or AMX. On other
            processors a float32 step takes a third less time with oneDNN. None leaves the choice
            to TensorFlow.

    Returns:
        The lines written to stderr in the meantime. If a GPU was not found, they contain the
        reason.

    Raises:
        UserError: If TensorFlow cannot run on this machine.
        RuntimeError: If the process cannot start enough threads.
    """
    require_capable_machine()
    # Keras reads its settings once. Other programs of the user can share keras.json. If KERAS_HOME
    # is not a folder, Keras uses its defaults and writes no file.
    for name in [name for name in os.environ if name.startswith("KERAS_")]:
        del os.environ[name]
    os.environ |= {"KERAS_BACKEND": "tensorflow", "KERAS_HOME": os.devnull}
    os.environ.pop("TF_USE_LEGACY_KERAS", None)
    # TensorFlow loads a test library that otherwise searches for a temporary folder.
    os.environ["TEST_TMPDIR"] = os.devnull
    # Native code reads the level once, when it is loaded.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "0" if verbose else "2")
    # Set before TensorFlow starts threads: it is unsafe to set a variable while they read others.
    os.environ |= MATPLOTLIB_VARIABLES
    from job.run.fingerprint import ONEDNN

    if onednn and platform.machine() == "x86_64":
        os.environ.setdefault(ONEDNN, onednn)
    lines: list[str] = []
    # XLA ends the process on an unknown flag, with a line on stderr that must stay visible.
    capture = contextlib.nullcontext() if "TF_XLA_FLAGS" in os.environ else _captured_stderr(lines)
    with capture, _fast_imports():
        import tensorflow as tf

        tf.config.list_physical_devices()
        tf.get_logger().setLevel("ERROR")
        # Keras logs through absl; its warning about HDF5 is not useful to the users of this job.
        import absl.logging

        absl.logging.set_verbosity(absl.logging.ERROR)
    return lines


@contextlib.contextmanager
def _fast_imports() -> Iterator[None]:
    """Disable what takes a third of TensorFlow's import time and is not needed.

    Keras imports matplotlib for plots that this program does not use. The garbage collector scans
    a million objects repeatedly, none of which can be freed.
    """
    hides_matplotlib = "matplotlib" not in sys.modules
    if hides_matplotlib:
        sys.modules["matplotlib"] = None  # type: ignore[assignment]
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        if hides_matplotlib:
            del sys.modules["matplotlib"]


@contextlib.contextmanager
def _captured_stderr(lines: list[str]) -> Iterator[None]:
    """Collect what is written to file descriptor 2; native code does not use `sys.stderr`."""
    sys.stderr.flush()
    original = os.dup(2)
    # The traceback of a crash during the import must still go to the real stderr.
    faulthandler.enable(original)
    # In memory, because a container can be without a writable temporary folder.
    with os.fdopen(os.memfd_create("stderr"), "w+b") as sink:
        os.dup2(sink.fileno(), 2)
        try:
            yield
        except BaseException as error:
            sink.seek(0)
            error.add_note(sink.read().decode(errors="replace"))  # at the end of the traceback
            raise
        finally:
            sys.stderr.flush()
            os.dup2(original, 2)
            faulthandler.enable(2)
            os.close(original)
            sink.seek(0)
            lines.extend(sink.read().decode(errors="replace").splitlines())
