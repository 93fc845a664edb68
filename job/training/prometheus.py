"""The run's metrics in a textfile for Prometheus' node exporter."""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, get_args

from job import __version__, log
from job.config import TrainConfig, UserError, encodable
from job.run.attempt import Attempt, recording_end
from job.run.folder import refused
from job.run.record import EpochRecord
from job.training.observer import Observer, Phase, Start, Status

UPDATE_SECONDS = 5.0
"""Minimum time between two updates while an epoch is trained."""

STATES = ("running", "done", "stopped", "failed")

TextfilePhase = Literal["starting", Phase, "evaluating"]
PHASES: tuple[TextfilePhase, ...] = get_args(TextfilePhase)

GAUGES = {
    "planned_epochs": "Epochs of the whole run",
    "finished_epochs": "Epochs that are trained and validated",
    "planned_steps": "Steps of the whole run",
    "finished_steps": "Steps done since the start of the run",
    "training_loss": "Mean training loss of the epoch so far",
    "training_accuracy_ratio": "Training accuracy of the epoch so far, 0 to 1",
    "validation_loss": "Mean loss over all test images after the last epoch",
    "validation_accuracy_ratio": "Accuracy over all test images after the last epoch, 0 to 1",
    "learning_rate": "Learning rate after the last epoch",
    "images_per_second": "Training images per second over the last executions",
    "remaining_seconds": "Estimate of the time to the end of the run",
    "last_update_timestamp_seconds": "Unix time of this file's last update",
}
"""The help text of each gauge. The names begin with ``cifar10_job_``."""

_PREFIX = "cifar10_job_"


class MetricsTextfile(Observer):
    """Keeps a textfile up to date with a run, replacing it atomically.

    Metrics without a value yet are omitted. If a write fails while the run trains, there is a
    single warning: metrics must not stop the run.

    Args:
        path: The file, in the folder that the node exporter reads.
        config: The run's configuration.
        run_id: The run's name, empty if unknown; a label of every sample.
        check: Raises an error if another attempt has taken the run over; called before each write.

    Raises:
        UserError: If the file cannot be written.
    """

    def __init__(
        self, path: Path, config: TrainConfig, run_id: str, check: Callable[[], None]
    ) -> None:
        self._path, self._config, self._check = path, config, check
        self._run = {"run_id": run_id, "output_dir": encodable(str(config.output_dir.absolute()))}
        self._info: dict[str, str] = {}
        self._figures: dict[str, float] = {"planned_epochs": config.epochs}
        self._state = "running"
        self._phase: TextfilePhase = "starting"
        self._updated_at = 0.0
        self._warned = False
        try:
            self._write()
        except OSError as error:
            raise refused("write --metrics-textfile", path, error) from error

    def begin(self, start: Start) -> None:
        self._info = {
            "version": __version__,
            "recipe": self._config.recipe,
            "dataset": self._config.dataset,
            "precision": start.precision,
            "devices": start.devices,
        }
        finished = len(start.history.epochs)
        self._set(
            planned_steps=self._config.epochs * start.steps_per_epoch,
            finished_steps=finished * start.steps_per_epoch + start.history.progress.steps,
            finished_epochs=finished,
        )
        for line in start.history.epochs[-1:]:
            self._set_validation(line)
        self._update()

    def show(self, status: Status) -> None:
        self._set(
            finished_epochs=status.epoch - 1,
            finished_steps=status.step,
            training_loss=status.loss,
            training_accuracy_ratio=status.accuracy,
            images_per_second=status.images_per_second,
            remaining_seconds=status.seconds_left,
        )
        is_another = status.phase != self._phase
        self._phase = status.phase
        if is_another or time.monotonic() - self._updated_at >= UPDATE_SECONDS:
            self._update()

    def finish_epoch(self, line: EpochRecord) -> None:
        self._set(finished_epochs=line.epoch)
        self._set_validation(line)
        self._update()

    def evaluate(self) -> None:
        self._phase = "evaluating"
        self._update()

    def finish(self, state: str) -> None:
        """Write the attempt's end, one of `STATES`."""
        self._state = state
        if state == "done":
            self._set(remaining_seconds=0.0)
        self._update()

    def _set(self, **figures: float | None) -> None:
        """Set metrics; one that is None keeps its last value."""
        self._figures |= {name: value for name, value in figures.items() if value is not None}

    def _set_validation(self, line: EpochRecord) -> None:
        self._set(
            validation_loss=line.val_loss,
            validation_accuracy_ratio=line.val_accuracy,
            learning_rate=line.learning_rate,
        )

    def _update(self) -> None:
        self._updated_at = time.monotonic()
        self._check()
        try:
            self._write()
        except OSError as error:
            if not self._warned:
                self._warned = True
                log.event(
                    "textfile",
                    logging.WARNING,
                    path=str(self._path),
                    message=f"cannot write --metrics-textfile {self._path}: "
                    f"{error.strerror or error}; training continues, and each update tries again",
                )

    def _write(self) -> None:
        self._set(last_update_timestamp_seconds=time.time())
        content = self._render()
        # Always the same name: a killed process leaves at most one file, which the next write
        # removes. It does not end in .prom, so the node exporter ignores it.
        temporary = self._path.with_name(f".{self._path.name}.partial")
        temporary.unlink(missing_ok=True)
        try:
            with temporary.open("xb") as file:
                # Readable for the node exporter, which runs as another user, whatever the umask.
                # On volumes without file modes, the mount determines them.
                with contextlib.suppress(OSError):
                    os.fchmod(file.fileno(), 0o644)
                file.write(content)
            temporary.replace(self._path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise

    def _render(self) -> bytes:
        # Not at the top: a run without a textfile does not need the library.
        from prometheus_client import CollectorRegistry, Enum, Gauge, generate_latest

        registry, run = CollectorRegistry(), self._run
        for name, value in self._figures.items():
            gauge = Gauge(_PREFIX + name, GAUGES[name], run, registry=registry)
            gauge.labels(**run).set(value)
        if self._info:
            info = {**run, **self._info}
            text = "The run's properties as labels; always 1"
            gauge = Gauge(f"{_PREFIX}info", text, info, registry=registry)
            gauge.labels(**info).set(1)
        text = "Whether the attempt is in this state, 1 or 0"
        state = Enum(f"{_PREFIX}state", text, tuple(run), states=STATES, registry=registry)
        state.labels(**run).state(self._state)
        text = "Whether the attempt is in this phase, or ended in it, 1 or 0"
        phase = Enum(f"{_PREFIX}phase", text, tuple(run), states=PHASES, registry=registry)
        phase.labels(**run).state(self._phase)
        return generate_latest(registry)


def require_folder(path: Path) -> None:
    """Refuse a textfile whose folder cannot be written, without writing to it.

    Raises:
        UserError: If the folder is missing or not writable.
    """
    if not path.parent.is_dir():
        raise _cannot_write(path, "No such folder")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise _cannot_write(path, "Permission denied")


def _cannot_write(path: Path, reason: str) -> UserError:
    return UserError(
        f"cannot write --metrics-textfile {path}: {reason}; use a file in an existing folder that "
        f"user {os.getuid()} can write"
    )


@contextlib.contextmanager
def open_textfile(path: Path, config: TrainConfig, attempt: Attempt) -> Iterator[MetricsTextfile]:
    """Keep a textfile during the body, and write in it how the body ends.

    Raises:
        UserError: If the file cannot be written.
    """
    run_id, check = attempt.manifest.run_id or "", attempt.output.check
    textfile = MetricsTextfile(path, config, run_id, check)
    with recording_end(attempt.stop, lambda outcome, _reason: textfile.finish(outcome)):
        yield textfile


def write_finished(config: TrainConfig, attempt: Attempt) -> None:
    """Update the textfile of a run that is already finished.

    If the previous attempt was killed, the file still contains its last state.

    Raises:
        UserError: If the file cannot be written.
    """
    manifest, checkpoint = attempt.manifest.document, attempt.checkpoint
    if config.metrics_textfile is None:
        return
    with open_textfile(config.metrics_textfile, config, attempt) as textfile:
        if manifest and checkpoint:
            model = manifest.devices[0].model if manifest.devices else None
            devices = f"{manifest.replicas} x {model}"
            steps_per_epoch = checkpoint.step // config.epochs
            precision = manifest.precision or ""
            textfile.begin(Start(precision, devices, steps_per_epoch, checkpoint.history))
