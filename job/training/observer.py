"""The progress and speed of a training, for its observers."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # the command line must not import NumPy at its start
    from job.run.checkpoint import History
    from job.run.record import EpochRecord

Phase = Literal["compiling", "training", "validating"]

_RECENT_EXECUTIONS = 20


@dataclass(frozen=True)
class Status:
    """The current state of a training.

    Attributes:
        phase: Current phase; "compiling" until the process's first execution is complete.
        epoch: Number of the epoch, from 1.
        epochs: Epochs of the whole run.
        steps: Finished steps of the epoch.
        steps_per_epoch: Steps of an epoch.
        loss: Mean training loss of the epoch so far; None before its first step.
        accuracy: Training accuracy of the epoch so far, 0 to 1; None before its first step.
        images_per_second: Rate over the last executions; None until one was measured.
        seconds_left: Estimated time to the end of the run; None until it can be estimated.
        seconds_left_is_least: Whether the time left contains only the steps, because no validation
            was measured yet.
    """

    phase: Phase
    epoch: int
    epochs: int
    steps: int
    steps_per_epoch: int
    loss: float | None = None
    accuracy: float | None = None
    images_per_second: float | None = None
    seconds_left: float | None = None
    seconds_left_is_least: bool = False

    @property
    def step(self) -> int:
        """Steps done since the start of the run."""
        return (self.epoch - 1) * self.steps_per_epoch + self.steps


@dataclass(frozen=True)
class Start:
    """The data with which a training begins or resumes.

    Attributes:
        precision: For example "bfloat16".
        devices: For example "2 x NVIDIA H200".
        steps_per_epoch: Steps of an epoch.
        history: The run's history in earlier attempts.
    """

    precision: str
    devices: str
    steps_per_epoch: int
    history: History


class Observer:
    """An observer of a run while it trains. The methods of this class do nothing."""

    def begin(self, start: Start) -> None:
        """Called when the training begins or resumes."""

    def show(self, status: Status) -> None:
        """Called after each execution, and when the phase changes."""

    def finish_epoch(self, line: EpochRecord) -> None:
        """Called at the end of each epoch."""

    def evaluate(self) -> None:
        """Called after the training, before the model is saved and evaluated."""


class Pace:
    """The speed of this process in training and validation, as measured."""

    def __init__(self) -> None:
        self._executions: deque[tuple[int, float]] = deque(maxlen=_RECENT_EXECUTIONS)
        self._compiled: set[int] = set()
        self._validation_seconds: float | None = None

    def add_execution(self, steps: int, seconds: float) -> None:
        """Count an execution, unless it is the first of its length, which includes compiling."""
        if steps in self._compiled:
            self._executions.append((steps, seconds))
        self._compiled.add(steps)

    def add_validation(self, seconds: float) -> None:
        """Count a validation. The first includes compilation and is used until the second."""
        self._validation_seconds = seconds

    @property
    def steps_per_second(self) -> float | None:
        """The rate over the last executions; None until one was measured."""
        seconds = sum(seconds for _, seconds in self._executions)
        return sum(steps for steps, _ in self._executions) / seconds if seconds else None

    @property
    def has_validated(self) -> bool:
        """Whether a validation was measured."""
        return self._validation_seconds is not None

    def seconds_left(self, steps: int, validations: int) -> float | None:
        """The time for this much work; without the validations until one was measured."""
        rate = self.steps_per_second
        if rate is None:
            return None
        return steps / rate + validations * (self._validation_seconds or 0.0)
