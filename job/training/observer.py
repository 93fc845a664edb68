"""Where a training is and how fast it goes, for whoever watches it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # the command line answers before NumPy is imported
    from job.run.checkpoint import History
    from job.run.record import EpochRecord

Phase = Literal["compiling", "training", "validating"]

_RECENT_EXECUTIONS = 20


@dataclass(frozen=True)
class Status:
    """Where a training is.

    Attributes:
        phase: What it is doing; "compiling" until a process's first execution is over.
        epoch: Number of the epoch, from 1.
        epochs: Epochs of the whole run.
        steps: Steps of the epoch that are done.
        steps_per_epoch: Steps of an epoch.
        loss: Mean training loss of the epoch so far; None before the first of its steps.
        accuracy: Training accuracy of the epoch so far, 0 to 1; None as the loss.
        images_per_second: Over the last executions; None until one was measured.
        seconds_left: Time left to the end of the run; None until it can be told.
        seconds_left_is_least: Whether the time left is only that of the steps, because no
            validation was measured yet.
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
    """What a training begins or resumes with.

    Attributes:
        precision: Such as "bfloat16".
        devices: Such as "2 x NVIDIA H200".
        steps_per_epoch: Steps of an epoch.
        history: What the run has been through in earlier attempts.
    """

    precision: str
    devices: str
    steps_per_epoch: int
    history: History


class Observer:
    """Watches a run while it trains. Does nothing by itself."""

    def begin(self, start: Start) -> None:
        """The training begins or resumes."""

    def show(self, status: Status) -> None:
        """An execution is over, or another phase begins."""

    def finish_epoch(self, line: EpochRecord) -> None:
        """An epoch is over."""

    def evaluate(self) -> None:
        """The training is over, and the saved model is being evaluated."""


class Pace:
    """How fast this process trains and validates, by what it has measured."""

    def __init__(self) -> None:
        self._executions: deque[tuple[int, float]] = deque(maxlen=_RECENT_EXECUTIONS)
        self._compiled: set[int] = set()
        self._validation_seconds: float | None = None

    def add_execution(self, steps: int, seconds: float) -> None:
        """Count an execution, unless it is the first of its length: that one was compiled."""
        if steps in self._compiled:
            self._executions.append((steps, seconds))
        self._compiled.add(steps)

    def add_validation(self, seconds: float) -> None:
        """Count a validation. The first includes compilation and counts until the second."""
        self._validation_seconds = seconds

    @property
    def steps_per_second(self) -> float | None:
        """Over the last executions; None until one was measured."""
        seconds = sum(seconds for _, seconds in self._executions)
        return sum(steps for steps, _ in self._executions) / seconds if seconds else None

    @property
    def has_validated(self) -> bool:
        """Whether a validation was measured."""
        return self._validation_seconds is not None

    def seconds_left(self, steps: int, validations: int) -> float | None:
        """Time that so much takes; without the validations if none was measured yet."""
        rate = self.steps_per_second
        if rate is None:
            return None
        return steps / rate + validations * (self._validation_seconds or 0.0)
