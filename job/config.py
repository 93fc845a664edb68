"""The options of a run, and the errors and exit codes of the program.

Standard library only, so that the command line can respond before TensorFlow is imported.
"""

import enum
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

Precision = Literal["auto", "float32", "bfloat16"]
Switch = Literal["auto", "on", "off"]

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
WEEK_SECONDS = 604_800

_DEVICES = re.compile(r"auto|(?:cpu|gpu):[1-9]\d{0,2}")


class ExitCode(enum.IntEnum):
    """The exit codes of the process."""

    DONE = 0
    DEFECT = 1
    USER_ERROR = 2
    GPU_MISSING = 3
    RUN_AGAIN = 75


class JobError(Exception):
    """An error that is reported in one line instead of a traceback."""

    exit_code = ExitCode.DEFECT


class UserError(JobError):
    """A user error: an option, the data or a folder must be fixed."""

    exit_code = ExitCode.USER_ERROR


class GpuMissingError(JobError):
    """A GPU that is expected or required cannot be used; another node can have one."""

    exit_code = ExitCode.GPU_MISSING


class StoppedError(JobError):
    """The run was stopped, usually on request; the same command resumes it."""

    exit_code = ExitCode.RUN_AGAIN


class LostWorkerError(StoppedError):
    """Another worker of the run was lost or did not connect; no checkpoint is saved then.

    This worker's variables can be in a state between two steps.
    """


class DownloadError(StoppedError):
    """The data cannot be downloaded now, for a temporary reason."""


class DeviceRequest(str):
    """The replicas to use: ``auto``, ``cpu:N`` or ``gpu:N``.

    Raises:
        ValueError: If the text is none of these.
    """

    def __new__(cls, text: str) -> "DeviceRequest":
        """Check the text."""
        if not _DEVICES.fullmatch(text):
            raise ValueError(
                f"received {text!r}, expected auto, cpu:N or gpu:N with N from 1 to 999"
            )
        return super().__new__(cls, text)

    @property
    def kind(self) -> Literal["auto", "cpu", "gpu"]:
        """The devices; "auto" is every visible GPU, or one CPU replica if no GPU is visible."""
        kind = self.partition(":")[0]
        return "cpu" if kind == "cpu" else "gpu" if kind == "gpu" else "auto"

    @property
    def replicas(self) -> int:
        """The requested number of replicas; 0 with "auto"."""
        return int(self.partition(":")[2] or 0)


def list_recipes() -> tuple[str, ...]:
    """Names of the recipes: the modules of ``job/recipes`` that are not private."""
    return _list_modules("recipes")


def list_datasets() -> tuple[str, ...]:
    """Names of the data sets: the modules of ``job/data`` that are not private, except one."""
    return tuple(name for name in _list_modules("data") if name != "image_files")


def _list_modules(package: str) -> tuple[str, ...]:
    # Excludes the hidden files that an editor creates next to an open module.
    paths = Path(__file__).with_name(package).glob("[!._]*.py")
    return tuple(sorted(path.stem for path in paths))


@dataclass(frozen=True)
class Option:
    """The command-line settings of a field of `TrainConfig`.

    Attributes:
        help: One or two sentences.
        minimum: The smallest value of an integer; a float must be greater than it.
        maximum: The largest value.
        suffix: The required suffix of a file name.
        choices: Returns the valid values, if the type does not list them.
    """

    help: str
    minimum: int | None = None
    maximum: int | None = None
    suffix: str | None = None
    choices: Callable[[], tuple[str, ...]] | None = None


def _option(default: Any, help: str, **settings: Any) -> Any:  # noqa: A002 (click's name)
    return field(default=default, metadata={"option": Option(help, **settings)})


@dataclass(frozen=True)
class TrainConfig:
    """The configuration of a run, and the only definition of its options.

    A field ``batch_size`` is the option ``--batch-size``, the environment variable
    ``JOB_BATCH_SIZE`` and the entry ``batch_size`` of ``config`` in ``run.json``. Times are in
    seconds.
    """

    output_dir: Path = _option(Path("output"), "Folder for the files of the run.")
    data_dir: Path = _option(Path("data"), "Folder of the data set.")
    dataset: str = _option(
        "cifar10", "synthetic is generated from the seed and needs no files.", choices=list_datasets
    )
    cifar10_url: str = _option(
        CIFAR10_URL, "Address to download CIFAR-10 from if it is not in --data-dir."
    )
    seed: int = _option(42, "Seed for all random numbers.", minimum=0, maximum=2**31 - 1)
    recipe: str = _option("classic", "Network, optimizer and augmentation.", choices=list_recipes)
    epochs: int = _option(50, "Passes over the training set.", minimum=1)
    batch_size: int = _option(256, "Images per step, over all replicas together.", minimum=1)
    learning_rate: float = _option(1e-4, "Learning rate of the optimizer.", minimum=0)
    limit: int | None = _option(None, "Use only the first N training images.", minimum=1)
    precision: Precision = _option("auto", "auto is bfloat16 if the hardware supports it.")
    jit: Switch = _option(
        "auto",
        "XLA: auto compiles the network on GPUs, and augmentation and optimizer on all devices.",
    )
    deterministic: Switch = _option(
        "auto", "Use only operations with bit-identical results; auto is on for CPUs, off for GPUs."
    )
    devices: DeviceRequest = _option(
        DeviceRequest("auto"),
        "Replicas to use; auto is every visible GPU, or the CPU if no GPU is visible.",
    )
    require_gpus: int = _option(
        0, "End with exit code 3 unless at least this many GPUs are visible.", minimum=0
    )
    join_timeout: float = _option(
        300.0,
        "Seconds to wait for the other workers, if the scheduler started several.",
        minimum=0,
        maximum=WEEK_SECONDS,
    )
    stall_timeout: float = _option(
        600.0,
        "End the run with exit code 1 if a call does not return within this many seconds.",
        minimum=0,
        maximum=WEEK_SECONDS,
    )
    checkpoint_every: float = _option(60.0, "Seconds between two checkpoints.", minimum=0)
    stop_after: float | None = _option(
        None,
        "Stop with a checkpoint and exit code 75 after the process has run this many seconds.",
        minimum=0,
    )
    fresh: bool = _option(False, "Start over: discard the run in the output folder.")
    run_id: str | None = _option(
        None,
        "Name of the run, the same for all its attempts; by default the ID of the scheduler's "
        "job. "
        "A later attempt takes over the output folder from an earlier one.",
    )
    compile_cache: Path | None = _option(
        None, "Folder for code that XLA compiles for a single GPU; by default one in --output-dir."
    )
    tensorboard: bool = _option(False, "Write an event file for TensorBoard to the output folder.")
    metrics_textfile: Path | None = _option(
        None, "Keep this .prom file up to date for Prometheus' node exporter.", suffix=".prom"
    )

    def __post_init__(self) -> None:
        """Reject values below an option's minimum, which the record of a run can contain.

        Raises:
            ValueError: If a value is too small.
        """
        for one in fields(self):
            value, minimum = getattr(self, one.name), one.metadata["option"].minimum
            if minimum is not None and value is not None and value < minimum:
                raise ValueError(f"{one.name} is {value}, expected at least {minimum}")


Value = bool | int | float | str | None
"""The value of an option in JSON."""

RECIPE_OPTIONS = ("epochs", "batch_size", "learning_rate")
"""The options for which a recipe can have its own defaults."""

_RUN_OPTIONS = ("recipe", "dataset", "limit", "seed", "batch_size", "learning_rate")


def option_name(name: str) -> str:
    """Return the option of a field: ``--batch-size``."""
    return f"--{name.replace('_', '-')}"


def describe_config(config: TrainConfig) -> dict[str, Value]:
    """Return every option as a JSON value, by field name and without passwords."""
    config = redacted(config)
    values = {one.name: getattr(config, one.name) for one in fields(config)}
    return {
        name: value if isinstance(value, Value) else str(value) for name, value in values.items()
    }


def run_options(config: TrainConfig) -> dict[str, Value]:
    """Return the options that all attempts of a run share, by field name."""
    described = describe_config(config)
    return {name: described[name] for name in _RUN_OPTIONS}


def encodable(text: str) -> str:
    r"""Make a text encodable: a byte of a name that is not UTF-8 becomes ``\udcff``."""
    return text.encode(errors="backslashreplace").decode()


REMOVED = "REMOVED"
"""Replaces a confidential part of an address."""

_USER = re.compile(r"^([\w+.-]*://)?[^/?#]*@")
_QUERY = re.compile(r"(?<=[?#]).+", re.DOTALL)


def redacted(config: TrainConfig) -> TrainConfig:
    """Return the configuration without a password in its address, for display and storage."""
    return replace(config, cifar10_url=redact_url(config.cifar10_url))


def redact_url(url: str) -> str:
    """Remove user, password, query and fragment from an address.

    Args:
        url: An address such as ``https://user:password@host/file?token=...``.

    Returns:
        An address such as ``https://REMOVED@host/file?REMOVED``.
    """
    return _QUERY.sub(REMOVED, _USER.sub(rf"\g<1>{REMOVED}@", url))
