"""What one run is asked to do, and how the program reports that it could not.

Standard library only, so that the command line answers before TensorFlow is imported.
"""

import enum
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Precision = Literal["auto", "float32", "bfloat16"]
Switch = Literal["auto", "on", "off"]

PRECISIONS: tuple[Precision, ...] = ("auto", "float32", "bfloat16")
SWITCHES: tuple[Switch, ...] = ("auto", "on", "off")
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"

_DEVICES = re.compile(r"auto|(?:cpu|gpu):[1-9]\d{0,2}")


def modules_that_define(name: str, folder: Path) -> tuple[str, ...]:
    """Modules of a folder that define a name, found by their text.

    Importing them would take seconds, and the command line has to know its choices at once.
    """
    definition = re.compile(rf"^{name}\b[^=\n]*= ", re.MULTILINE)
    # Not what an editor leaves beside a module while it is open.
    paths = sorted(folder.glob("[!.]*.py"))
    return tuple(path.stem for path in paths if definition.search(path.read_text("utf-8")))


_HERE = Path(__file__).parent
DATASETS = modules_that_define("SOURCE", _HERE)
RECIPES = modules_that_define("RECIPE", _HERE)


class ExitCode(enum.IntEnum):
    """What the process tells the scheduler that started it."""

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
    """A GPU that was promised or required cannot be used; another node may have one."""

    exit_code = ExitCode.GPU_MISSING


class StoppedError(JobError):
    """The run was told to stop; the same command goes on where it was."""

    exit_code = ExitCode.RUN_AGAIN


class LostWorkerError(StoppedError):
    """Another worker of the run is gone or has not come; nothing was saved for that.

    This worker's variables may be those between two steps.
    """


@dataclass(frozen=True)
class DeviceRequest:
    """A parsed ``--devices`` value.

    Attributes:
        kind: "auto" takes every visible GPU, or one CPU replica where there is none.
        count: Replicas asked for; 0 with "auto".
    """

    kind: Literal["auto", "cpu", "gpu"]
    count: int

    @classmethod
    def parse(cls, text: str) -> "DeviceRequest":
        """Parse ``auto``, ``cpu:N`` or ``gpu:N``.

        Raises:
            ValueError: If the text is none of these.
        """
        if not _DEVICES.fullmatch(text):
            raise ValueError(
                f"received {text!r}, expected auto, cpu:N or gpu:N with N from 1 to 999"
            )
        kind, _, count = text.partition(":")
        return cls("cpu" if kind == "cpu" else "gpu" if kind == "gpu" else "auto", int(count or 0))


@dataclass(frozen=True)
class DataConfig:
    """Where the examples come from.

    Attributes:
        dataset: Name of a data set, one of `DATASETS`; "synthetic" is drawn from the seed and needs
            no files.
        data_dir: Folder that holds the data set or receives its download.
        cifar10_url: Address of the official CIFAR-10 archive, or of a mirror of it.
        seed: Seed of the synthetic data set.
        limit: Keep only the first this many training images; None keeps all.
    """

    dataset: str = "cifar10"
    data_dir: Path = Path("data")
    cifar10_url: str = CIFAR10_URL
    seed: int = 42
    limit: int | None = None


@dataclass(frozen=True)
class TrainConfig:
    """Everything that one training run is told, as given on the command line.

    Attributes:
        output_dir: Folder that receives the artifacts.
        data: Where the examples come from.
        recipe: Name of the network, optimizer and augmentation; one of `RECIPES`.
        epochs: Passes over the training set.
        global_batch_size: Images a step, over all replicas together.
        learning_rate: The optimizer's (initial) learning rate.
        seed: The one seed of initial weights, shuffling, augmentation and Dropout.
        precision: "auto" takes bfloat16 where the hardware computes it.
        jit: What XLA compiles: "auto" is everything on GPUs, and augmentation and optimizer
            update on CPUs.
        deterministic: Whether TensorFlow may only use ops that give the same bits each time; "auto"
            is on for CPUs.
        devices: Replicas to train on.
        require_gpus: Fail unless at least this many GPUs are visible.
        stall_timeout_seconds: Longest time that one compiled call may take once it is compiled.
        join_timeout_seconds: Longest time to wait for the run's other workers to start.
        checkpoint_every_seconds: Least time between two checkpoints.
        stop_after_seconds: Stop with a checkpoint this long after the start; None never does.
        fresh: Start over instead of resuming.
        run_id: What all attempts of this run have in common; None takes the scheduler's job.
        tensorboard: Whether to write an event file for TensorBoard.
        metrics_textfile: File for Prometheus' node exporter; None writes none.
    """

    output_dir: Path = Path("output")
    data: DataConfig = DataConfig()
    recipe: str = "classic"
    epochs: int = 50
    global_batch_size: int = 256
    learning_rate: float = 1e-4
    seed: int = 42
    precision: Precision = "auto"
    jit: Switch = "auto"
    deterministic: Switch = "auto"
    devices: DeviceRequest = DeviceRequest("auto", 0)
    require_gpus: int = 0
    stall_timeout_seconds: float = 600.0
    join_timeout_seconds: float = 300.0
    checkpoint_every_seconds: float = 60.0
    stop_after_seconds: float | None = None
    fresh: bool = False
    run_id: str | None = None
    tensorboard: bool = False
    metrics_textfile: Path | None = None
