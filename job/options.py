"""The options of the command line, each of them also an environment variable."""

import difflib
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from job import config, log
from job.config import DataConfig, DeviceRequest, TrainConfig
from job.own_picture import is_own
from job.terminal import printable


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


class _PathType(click.Path):
    """A path whose name can be written into the run's records."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = super().convert(value, param, ctx)
        try:
            str(path).encode()
        except UnicodeEncodeError:
            self.fail(f"received {printable(str(path))}, expected a name in UTF-8.", param, ctx)
        return path


class _TextfileType(_PathType):
    """A file that the node exporter will read: it takes no other names."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(str(super().convert(value, param, ctx)))
        if path.suffix != ".prom":
            self.fail(f"received {str(path)!r}, expected a name that ends in .prom.", param, ctx)
        return path


class OwnPictureType(click.Path):
    """A picture to draw, over nothing but what such an option drew earlier."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(str(super().convert(value, param, ctx)))
        try:
            is_free = not os.path.lexists(path) or is_own(path)
        except OSError as error:
            self.fail(f"cannot read {printable(str(path))}: {error.strerror}.", param, ctx)
        if not is_free:
            self.fail(
                f"received {printable(str(path))}, which this program did not draw by this option, "
                f"expected a new name or an earlier such picture; name another file.",
                param,
                ctx,
            )
        return path


def option(name: str, **settings: Any) -> Callable[[Any], Any]:
    """An option that is also the environment variable ``JOB_<NAME>``."""
    variable = "JOB_" + name.removeprefix("--").replace("-", "_").upper()
    return click.option(name, envvar=variable, show_envvar=True, show_default=True, **settings)


def warn_of_misspelt_variables(command: click.Command, environ: Mapping[str, str]) -> None:
    """Warn of variables that are almost options of a command; those it has are read by `click`.

    Other names with this prefix are not for this program: schedulers have such, too.
    """
    known = [str(parameter.envvar) for parameter in command.params if parameter.envvar]
    for name in sorted(environ.keys() - {*known}):
        short = name.removeprefix("JOB_")
        options = [one.removeprefix("JOB_") for one in known]
        close = difflib.get_close_matches(short, options, n=1, cutoff=_ALIKE)
        close = close or [option for option in options if option.startswith(f"{short}_")]
        if name != short and close:
            log.event(
                "misspelt_variable",
                logging.WARNING,
                variable=name,
                option=f"JOB_{close[0]}",
                message=f"the environment variable {printable(name)} is no option and is ignored; "
                f"did you mean JOB_{close[0]}?",
            )


# Whether a folder can be read is found out where it is, with advice for that folder.
FOLDER = _PathType(path_type=Path, readable=False)
_POSITIVE = click.IntRange(min=1)
_POSITIVE_FLOAT = _PositiveFloatType(min=0, min_open=True)
_WEEK_SECONDS = 604_800.0
# So that EPOCH is like EPOCHS, and INPUT_DIR, which may be another program's, is unlike OUTPUT_DIR.
_ALIKE = 0.8

output_dir_option = option(
    "--output-dir", type=FOLDER, default="output", help="Folder that receives the artifacts."
)
model_dir_option = option(
    "--output-dir",
    type=FOLDER,
    default="output",
    help="Folder of the training whose model predicts; nothing is written there.",
)
output_dir_argument = click.argument(
    "output_dir", type=FOLDER, envvar="JOB_OUTPUT_DIR", default="output"
)
devices_option = option(
    "--devices",
    type=_DevicesType(),
    default="auto",
    help="Replicas to use; auto takes every visible GPU, or the CPU where there is none.",
)
require_gpus_option = option(
    "--require-gpus",
    type=click.IntRange(min=0),
    default=0,
    help="End with exit code 3 unless this many GPUs are visible.",
)
expect_mount_option = option(
    "--expect-mount",
    is_flag=True,
    help="Warn if the output folder is no mounted volume and so is lost with its container.",
)
stall_timeout_option = option(
    "--stall-timeout",
    type=_PositiveFloatType(min=0, max=_WEEK_SECONDS, min_open=True),
    default=600.0,
    help="Seconds after which a call that does not return ends the run with exit code 1.",
)
run_id_option = option(
    "--run-id",
    help="Name of the run, which all of its attempts have in common; else that of the "
    "scheduler's job. A later attempt takes the folder over from an earlier one.",
)
log_format_option = option(
    "--log-format",
    type=click.Choice(log.LOG_FORMATS),
    default="auto",
    help="auto is text on a terminal and JSON lines elsewhere.",
)


def data_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say where the examples come from."""
    for decorate in (
        option(
            "--cifar10-url",
            default=config.CIFAR10_URL,
            help="Where to download CIFAR-10 from if --data-dir holds none.",
        ),
        option(
            "--seed",
            type=click.IntRange(0, 2**31 - 1),
            default=42,
            help="The one seed of everything random.",
        ),
        option(
            "--dataset",
            type=click.Choice(config.DATASETS),
            default="cifar10",
            help="synthetic is drawn from the seed and needs no files.",
        ),
        option("--data-dir", type=FOLDER, default="data", help="Folder that holds the data set."),
    ):
        command = decorate(command)
    return command


_TRAINING_OPTIONS = (
    option(
        "--recipe",
        type=click.Choice(config.RECIPES),
        default="classic",
        help="Network, optimizer and augmentation.",
    ),
    option("--epochs", type=_POSITIVE, default=50, help="Passes over the training set."),
    option(
        "--batch-size",
        type=_POSITIVE,
        default=256,
        help="Images a step, over all replicas together.",
    ),
    option("--learning-rate", type=_POSITIVE_FLOAT, default=1e-4, help="Of the optimizer."),
    option("--limit", type=_POSITIVE, help="Use only the first N training images."),
    option(
        "--precision",
        type=click.Choice(config.PRECISIONS),
        default="auto",
        help="auto is bfloat16 where the hardware computes it.",
    ),
    option(
        "--jit",
        type=click.Choice(config.SWITCHES),
        default="auto",
        help="XLA: auto compiles the network on GPUs, and augmentation and optimizer everywhere.",
    ),
    option(
        "--deterministic",
        type=click.Choice(config.SWITCHES),
        default="auto",
        help="Use only operations that give the same bits each time; auto is on for CPUs.",
    ),
    option(
        "--join-timeout",
        type=_PositiveFloatType(min=0, max=_WEEK_SECONDS, min_open=True),
        default=300.0,
        help="Seconds to wait for the other workers, where the scheduler started several.",
    ),
    option(
        "--checkpoint-every",
        type=_POSITIVE_FLOAT,
        default=60.0,
        help="Seconds between two checkpoints.",
    ),
    option(
        "--stop-after",
        type=_POSITIVE_FLOAT,
        help="Stop with a checkpoint and exit code 75 this many seconds after the start.",
    ),
    option(
        "--tensorboard",
        is_flag=True,
        help="Write an event file for TensorBoard into the output folder.",
    ),
    option(
        "--metrics-textfile",
        type=_TextfileType(path_type=Path, dir_okay=False),
        help="Keep this .prom file up to date for Prometheus' node exporter.",
    ),
    option("--fresh", is_flag=True, help="Start over: discard the run that the folder holds."),
)


def training_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say how to train."""
    for decorate in reversed(_TRAINING_OPTIONS):
        command = decorate(command)
    return command


def train_config(options: dict[str, Any]) -> TrainConfig:
    """Build the configuration from options under their command line's names."""
    renamed = {
        "batch_size": "global_batch_size",
        "stall_timeout": "stall_timeout_seconds",
        "join_timeout": "join_timeout_seconds",
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
