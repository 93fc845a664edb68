import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import pytest

from job import log
from job.cluster import Environment
from job.cluster.scheduler import ALONE
from job.cluster.workers import Workers
from job.config import JobError, StoppedError, TrainConfig, run_options
from job.run.attempt import open_attempt
from job.run.checkpoint import Arrays, History, Progress
from job.run.fingerprint import Fingerprint
from job.run.record import EpochRecord
from job.run.stop import StopRequest, Watchdog
from job.training.engine import Engine, Plan
from job.training.evaluate import Evaluation, Evaluator
from job.training.observer import Observer, Pace, Status
from job.training.trainer import Trainer, describe_epoch

EPOCHS = 2
VALIDATION = Evaluation(1.0, np.eye(10, dtype=np.int64))

LINE = EpochRecord(50, 500, 0.12345, 0.62496, 1.98766, 0.06674, 1e-4, 0.4321, 123456.7, 90.0)


def test_the_line_of_an_epoch_contains_every_figure() -> None:
    assert describe_epoch(LINE, 50) == (
        "epoch 50/50 loss 0.1235 acc 62.5% val 1.9877 6.7% 0.4 s 123,457 img/s"
    )


@pytest.mark.parametrize(
    "figures",
    [
        {"seconds": 0.04, "images_per_second": 999_999.4, "val_accuracy": 0.9994},
        {"seconds": 0.04, "images_per_second": 999_999.4, "accuracy": 1.0, "val_accuracy": 0.9996},
        {"seconds": 123.4, "images_per_second": 9_999.4, "val_accuracy": 0.1},
    ],
)
def test_the_line_of_an_epoch_fits_in_79_columns_after_the_time(figures: dict[str, Any]) -> None:
    line = describe_epoch(msgspec.structs.replace(LINE, **figures), 50)
    assert len("12:00:00 " + line) <= 79
    assert re.fullmatch(r"epoch 50/50 loss \S+ acc \S+% val \S+ \S+% \S+ s \S+ img/s", line)


def test_the_first_execution_of_each_length_compiles_and_does_not_count() -> None:
    pace = Pace()
    pace.add_execution(15, 60.0)
    assert pace.seconds_left(1, 0) is None
    pace.add_execution(15, 3.0)
    pace.add_execution(4, 30.0)
    assert pace.steps_per_second == 5.0
    pace.add_execution(4, 0.8)
    assert pace.steps_per_second == pytest.approx(19 / 3.8)


def test_the_pace_is_that_of_the_last_executions() -> None:
    pace = Pace()
    for seconds in [1.0] * 50 + [4.0] * 50:
        pace.add_execution(20, seconds)
    assert pace.steps_per_second == 5.0


def test_the_time_left_contains_the_steps_and_measured_validations() -> None:
    assert Pace().seconds_left(100, 3) is None
    pace = Pace()
    pace.add_execution(10, 9.0)
    pace.add_execution(10, 2.0)
    assert pace.seconds_left(100, 3) == 20.0
    pace.add_validation(7.0)
    pace.add_validation(4.0)
    assert pace.seconds_left(100, 3) == 32.0


def test_a_status_counts_the_steps_of_the_run() -> None:
    status = Status("training", 3, 5, 15, 195)
    assert status.step == 405


class RecordingWatchdog(Watchdog):
    """A watchdog that records the names and times of the bodies, and never ends the process.

    Args:
        begin: Called with the name of each body before it begins.
    """

    def __init__(self, begin: Callable[[str], None] = lambda what: None) -> None:
        super().__init__(600.0, lambda: None)
        self._begin = begin
        self._open = ["outside"]
        self._since = time.process_time()
        self.watched: list[tuple[str, bool]] = []
        # CPU time, because computing takes most of the time here, and other processes on the
        # machine do not change it.
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def watch(
        self,
        what: str,
        *,
        compiling: bool = False,
        seconds: float | None = None,
        native: bool = False,
    ) -> Iterator[None]:
        self.watched.append((what, compiling))
        self._begin(what)
        self.count()
        self._open.append(what)
        try:
            yield
        finally:
            self.count()
            self._open.pop()

    def count(self) -> None:
        """Count the time up to now for the innermost body."""
        now = time.process_time()
        innermost = self._open[-1]
        self.seconds[innermost] = self.seconds.get(innermost, 0.0) + now - self._since
        self._since = now

    def compiling(self, phase: str) -> list[bool]:
        """For each body with this name, whether its time includes compilation."""
        return [compiling for what, compiling in self.watched if what == phase]


def make_fingerprint(config: TrainConfig) -> Fingerprint:
    environment = Environment("cpu", ["a processor"], 1, 2, "float32", "auto", True, {}, None, {})
    return Fingerprint(dict(run_options(config)), environment)


class InstantEngine:
    """Replaces the engine, with epochs of two executions that take no time."""

    workers, stopping_ranks, learning_rate = Workers(ALONE), (), 1e-3

    def __init__(self, loss: float, variable: float) -> None:
        self.plan = Plan(global_batch_size=2, steps_per_epoch=10, epochs=EPOCHS, seed=42)
        self._loss, self._variable = loss, variable

    def train_epoch(
        self, epoch: int, done: Progress, stop_requested: Callable[[], bool]
    ) -> Iterator[Progress]:
        for steps in range(done.steps + 5, 11, 5):
            yield Progress(steps, steps * self._loss, steps)

    def state(self) -> Arrays:
        return {"network/0000": np.array([0.0, self._variable])}


def train(
    config: TrainConfig,
    *,
    loss: float = 1.0,
    variable: float = 1.0,
    validation: Evaluation = VALIDATION,
    checkpoint_every: float = 3600.0,
    stop: StopRequest | None = None,
    watchdog: Watchdog | None = None,
    observers: Sequence[Observer] = (),
) -> None:
    """Run an attempt of two epochs."""
    with open_attempt(config, stop or StopRequest()) as attempt:
        Trainer(
            cast(Engine, InstantEngine(loss, variable)),
            cast(Evaluator, lambda: validation),
            attempt,
            attempt.checkpoint.history if attempt.checkpoint else History(),
            make_fingerprint(config),
            watchdog or RecordingWatchdog(),
            observers,
        ).train(checkpoint_every)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return TrainConfig(output_dir=tmp_path / "output", epochs=EPOCHS, batch_size=2)


@pytest.fixture
def stopped(config: TrainConfig) -> TrainConfig:
    """A run that was stopped after its first execution."""
    with pytest.raises(StoppedError, match="everything up to step 5 of 20 is in"):
        train(replace(config, stop_after=1e-9))
    return config


def checkpoints(config: TrainConfig) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in (config.output_dir / "checkpoints").iterdir()}


def test_checkpoints_are_written_when_they_are_due(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log.configure("json")
    train(config, checkpoint_every=1e-9)
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    steps = [event["step"] for event in events if event["event"] == "checkpoint"]
    # After each execution, and after each validation.
    assert steps == [5, 10, 10, 15, 20, 20]
    # An epoch is reported only when it can no longer be lost.
    assert [event["event"] for event in events[:4]] == [*["checkpoint"] * 3, "epoch"]
    train(replace(config, output_dir=tmp_path / "seldom"))
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    # The first execution and the end of the training are saved even with a long interval.
    assert [event["event"] for event in events] == ["checkpoint", "epoch", "epoch", "checkpoint"]


@pytest.mark.parametrize(
    ("bad", "what", "step"),
    [
        ({"loss": float("nan")}, "the training loss became nan in epoch 1, by step 10", 5),
        ({"variable": float("-inf")}, "a variable became -inf in epoch 1, by step 10", 5),
        (
            {"validation": Evaluation(float("inf"), VALIDATION.confusion)},
            "the validation loss became inf in epoch 1, by step 10",
            10,
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_number_that_is_not_finite_ends_the_run_and_keeps_the_last_good_checkpoint(
    stopped: TrainConfig, bad: dict[str, Any], what: str, step: int
) -> None:
    with pytest.raises(JobError) as caught:
        train(stopped, **bad)
    good = max(checkpoints(stopped))
    assert f"-step-{step:08d}-" in good.name
    assert f"{what}; the last good checkpoint is {good}; resume with" in str(caught.value)


def test_an_attempt_that_begins_with_a_validation_saves_it_and_then_compiles(
    stopped: TrainConfig,
) -> None:
    class Stop(StopRequest):
        deferred = False

        def defer(self) -> None:
            super().defer()
            self.deferred = True

    class EndOfEpoch(Observer):
        def finish_epoch(self, line: EpochRecord) -> None:
            deferred.append(stop.deferred)

    with pytest.raises(StoppedError, match="everything up to step 10 of 20 is in"):
        train(replace(stopped, stop_after=1e-9))  # before the validation of the first epoch
    stop, deferred, watchdog = Stop(), list[bool](), RecordingWatchdog()
    train(stopped, stop=stop, watchdog=watchdog, observers=[EndOfEpoch()])
    assert deferred == [True, True]
    # No execution left in the first epoch. Then the first execution, another one, and no more.
    executions = watchdog.compiling("an execution of training steps")
    assert executions == [True, True, False, False]
    assert watchdog.compiling("a validation") == [True, False]
