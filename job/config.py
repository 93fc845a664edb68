"""What one run is asked to do, and how the program reports that it could not.

Standard library only, so that the command line answers before TensorFlow is imported.
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
    """What the process returns to the scheduler that started it."""

    DONE = 0
    DEFECT = 1
    USER_ERROR = 2
    GPU_MISSING = 3
    RUN_AGAIN = 75


class JobError(Exception):
    """An end of the run that is explained in one line instead of a traceback."""

    exit_code = ExitCode.DEFECT


class UserError(JobError):
    """The user must change something: an option, the data or a folder."""

    exit_code = ExitCode.USER_ERROR


class GpuMissingError(JobError):
    """A GPU that is expected or required cannot be used; another node may have one."""

    exit_code = ExitCode.GPU_MISSING


class StoppedError(JobError):
    """The run stops for now, mostly because it was asked to; the same command resumes it."""

    exit_code = ExitCode.RUN_AGAIN


class LostWorkerError(StoppedError):
    """Another worker of the run is gone or has not come; nothing was saved for that.

    This worker's variables may be those between two steps.
    """


class DownloadError(StoppedError):
    """The data cannot be downloaded now, for a reason that passes."""


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
        """The devices; "auto" is every visible GPU, or one CPU replica where there is none."""
        kind = self.partition(":")[0]
        return "cpu" if kind == "cpu" else "gpu" if kind == "gpu" else "auto"

    @property
    def replicas(self) -> int:
        """Replicas asked for; 0 with "auto"."""
        return int(self.partition(":")[2] or 0)


def list_recipes() -> tuple[str, ...]:
    """Names of the recipes: the modules of ``job/recipes`` that are not private."""
    return _list_modules("recipes")


def list_datasets() -> tuple[str, ...]:
    """Names of the data sets: the same of ``job/data``, where `job.data.image_files` is none."""
    return tuple(name for name in _list_modules("data") if name != "image_files")


def _list_modules(package: str) -> tuple[str, ...]:
    # Not what an editor leaves beside a module while it is open.
    paths = Path(__file__).with_name(package).glob("[!._]*.py")
    return tuple(sorted(path.stem for path in paths))


@dataclass(frozen=True)
class Option:
    """How the command line offers a field of `TrainConfig`.

    Attributes:
        help: One sentence.
        minimum: The least value of an integer; a number with a fraction has to be above it.
        maximum: The largest value.
        suffix: What a file's name has to end in.
        choices: Gives the values to choose from, where the type does not list them.
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
    """Everything that one run is asked to do: the one definition of its options.

    A field ``batch_size`` is the option ``--batch-size``, the environment variable
    ``JOB_BATCH_SIZE`` and the entry ``batch_size`` of ``config`` in ``run.json``. Times are in
    seconds.
    """

    output_dir: Path = _option(Path("output"), "Folder that receives the artifacts.")
    data_dir: Path = _option(Path("data"), "Folder that holds the data set.")
    dataset: str = _option(
        "cifar10", "synthetic is drawn from the seed and needs no files.", choices=list_datasets
    )
    cifar10_url: str = _option(
        CIFAR10_URL, "Where to download CIFAR-10 from if --data-dir holds none."
    )
    seed: int = _option(42, "The one seed of everything random.", minimum=0, maximum=2**31 - 1)
    recipe: str = _option("classic", "Network, optimizer and augmentation.", choices=list_recipes)
    epochs: int = _option(50, "Passes over the training set.", minimum=1)
    batch_size: int = _option(256, "Images a step, over all replicas together.", minimum=1)
    learning_rate: float = _option(1e-4, "Learning rate of the optimizer.", minimum=0)
    limit: int | None = _option(None, "Use only the first N training images.", minimum=1)
    precision: Precision = _option("auto", "auto is bfloat16 where the hardware computes it.")
    jit: Switch = _option(
        "auto",
        "XLA: auto compiles the network on GPUs, and augmentation and optimizer everywhere.",
    )
    deterministic: Switch = _option(
        "auto", "Use only operations that give the same bits each time; auto is on for CPUs."
    )
    devices: DeviceRequest = _option(
        DeviceRequest("auto"),
        "Replicas to use; auto takes every visible GPU, or the CPU where there is none.",
    )
    require_gpus: int = _option(
        0, "End with exit code 3 unless this many GPUs are visible.", minimum=0
    )
    join_timeout: float = _option(
        300.0,
        "Seconds to wait for the other workers, where the scheduler started several.",
        minimum=0,
        maximum=WEEK_SECONDS,
    )
    stall_timeout: float = _option(
        600.0,
        "Seconds after which a call that does not return ends the run with exit code 1.",
        minimum=0,
        maximum=WEEK_SECONDS,
    )
    checkpoint_every: float = _option(60.0, "Seconds between two checkpoints.", minimum=0)
    stop_after: float | None = _option(
        None,
        "Stop with a checkpoint and exit code 75 once the process has run this many seconds.",
        minimum=0,
    )
    fresh: bool = _option(False, "Start over: discard the run that the folder holds.")
    run_id: str | None = _option(
        None,
        "Name of the run, which all of its attempts have in common; else that of the scheduler's "
        "job. A later attempt takes the folder over from an earlier one.",
    )
    compile_cache: Path | None = _option(
        None, "Folder for the code that XLA compiles for a single GPU; else one in --output-dir."
    )
    tensorboard: bool = _option(
        False, "Write an event file for TensorBoard into the output folder."
    )
    metrics_textfile: Path | None = _option(
        None, "Keep this .prom file up to date for Prometheus' node exporter.", suffix=".prom"
    )

    def __post_init__(self) -> None:
        """Refuse values below an option's minimum, as a run's record may have them.

        Raises:
            ValueError: If there is one.
        """
        for one in fields(self):
            value, least = getattr(self, one.name), one.metadata["option"].minimum
            if least is not None and value is not None and value < least:
                raise ValueError(f"{one.name} is {value}, expected at least {least}")


Value = bool | int | float | str | None
"""An option's value as JSON has it."""

RECIPE_OPTIONS = ("epochs", "batch_size", "learning_rate")
"""The options that a recipe may have defaults of its own for."""

_RUN_OPTIONS = ("recipe", "dataset", "limit", "seed", "batch_size", "learning_rate")


def option_name(name: str) -> str:
    """The command line's name of a field: ``--batch-size``."""
    return f"--{name.replace('_', '-')}"


def describe_config(config: TrainConfig) -> dict[str, Value]:
    """Every option by its field's name, as JSON has it and without passwords."""
    config = redacted(config)
    values = {one.name: getattr(config, one.name) for one in fields(config)}
    return {
        name: value if isinstance(value, Value) else str(value) for name, value in values.items()
    }


def run_options(config: TrainConfig) -> dict[str, Value]:
    """The options that all attempts of a run have in common, by name."""
    described = describe_config(config)
    return {name: described[name] for name in _RUN_OPTIONS}


def encodable(text: str) -> str:
    r"""Text as a file can hold it: in a name a byte that is no UTF-8 becomes ``\udcff``."""
    return text.encode(errors="backslashreplace").decode()


REMOVED = "REMOVED"
"""Stands in an address for what was there."""

_USER = re.compile(r"^([\w+.-]*://)?[^/?#]*@")
_QUERY = re.compile(r"(?<=[?#]).+", re.DOTALL)


def redacted(config: TrainConfig) -> TrainConfig:
    """The configuration as it may be shown and kept: without a password in the address."""
    return replace(config, cifar10_url=redact_url(config.cifar10_url))


def redact_url(url: str) -> str:
    """An address without user, password, query and fragment.

    Args:
        url: As ``https://user:password@host/file?token=...``.

    Returns:
        As ``https://REMOVED@host/file?REMOVED``.
    """
    return _QUERY.sub(REMOVED, _USER.sub(rf"\g<1>{REMOVED}@", url))
