"""The epochs of a run: training, validation, and a state that survives every interruption."""

import math
import time
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np

from job import log
from job.config import JobError, StoppedError
from job.run.attempt import Attempt
from job.run.checkpoint import Arrays, Checkpoint, History, Progress
from job.run.fingerprint import Fingerprint
from job.run.record import EpochRecord
from job.run.stop import Watchdog
from job.training.engine import Engine
from job.training.evaluate import Evaluation, Evaluator
from job.training.observer import Observer, Pace, Phase, Status


class Trainer:
    """Trains the epochs of a run, each followed by a validation, and saves checkpoints.

    Args:
        engine: The engine that trains, in the state at the end of the history.
        evaluator: Validates the network.
        attempt: Receives checkpoints and metrics, and contains the requests to stop.
        history: The run's history so far; kept up to date.
        fingerprint: Saved in the checkpoints.
        watchdog: Ends the process if a call hangs.
        observers: Observers of the training.
    """

    def __init__(
        self,
        engine: Engine,
        evaluator: Evaluator,
        attempt: Attempt,
        history: History,
        fingerprint: Fingerprint,
        watchdog: Watchdog,
        observers: Sequence[Observer] = (),
    ) -> None:
        self._engine, self._evaluator, self._attempt = engine, evaluator, attempt
        self._history, self._fingerprint, self._watchdog = history, fingerprint, watchdog
        self._plan, self._workers = engine.plan, engine.workers
        self._stop = attempt.stop
        self._elapsed_before = history.elapsed_seconds
        self._start = time.perf_counter()
        # The first execution of an attempt is always saved. So a folder that cannot hold a
        # checkpoint is reported at once. And the code for saving is then in memory: later, a
        # scheduler's signal can end the process that mounts a container's files.
        self._saved_at = -math.inf
        self._is_saved = attempt.checkpoint is not None
        self._has_trained = False
        self._observers, self._pace = observers, Pace()

    @property
    def step(self) -> int:
        """Steps done since the start of the run."""
        return len(self._history.epochs) * self._plan.steps_per_epoch + self._history.progress.steps

    @property
    def _elapsed_seconds(self) -> float:
        """Time spent in training and validation since the start of the run."""
        return self._elapsed_before + time.perf_counter() - self._start

    def train(self, checkpoint_every_seconds: float) -> None:
        """Train until the run's last epoch is done and in a checkpoint.

        Args:
            checkpoint_every_seconds: Minimum time between two checkpoints.

        Raises:
            StoppedError: If a stop was requested; the state is in a checkpoint.
            JobError: If the loss or a variable becomes infinite or not a number.
            UserError: If a file cannot be written.
        """
        while len(self._history.epochs) < self._plan.epochs:
            for _ in self._train_epoch():
                self._save_if_due(checkpoint_every_seconds)
                self._stop_if_requested()
            self._finish_epoch(self._validate(), checkpoint_every_seconds)
            self._stop_if_requested()
        self._save_if_due(0.0)
        if self._workers.count > 1:
            # The scheduler can end all workers as soon as the first one ends.
            with self._watchdog.watch("waiting for the other workers to end"):
                self._workers.barrier()
        self._stop.end_deferral()

    def _train_epoch(self) -> Iterator[None]:
        """Train the rest of the epoch, handing control back after each execution."""
        history = self._history
        epoch, seconds_before = len(history.epochs), history.epoch_seconds
        self._show("training" if self._has_trained else "compiling")
        start = time.perf_counter()
        executions = self._engine.train_epoch(
            epoch, history.progress, lambda: self._stop.reason is not None
        )
        for progress in self._watched(executions):
            steps = progress.steps - history.progress.steps
            history.progress = progress
            self._require_finite("the training loss became", progress.loss)
            self._mark_unsaved()
            seconds = seconds_before + time.perf_counter() - start
            self._pace.add_execution(steps, seconds - history.epoch_seconds)
            history.epoch_seconds = seconds
            self._show("training")
            paused = time.perf_counter()
            yield
            start += time.perf_counter() - paused  # checkpoints do not count as training time

    def _watched(self, executions: Iterator[Progress]) -> Iterator[Progress]:
        """Yield an epoch's executions under the watchdog. The process's first one compiles."""
        while True:
            first = not self._has_trained
            with self._watchdog.watch("an execution of training steps", compiling=first):
                progress = next(executions, None)
            if progress is None:
                return
            self._has_trained = True
            yield progress

    def _validate(self) -> Evaluation:
        self._show("validating")
        start = time.perf_counter()
        with self._watchdog.watch("a validation", compiling=not self._pace.has_validated):
            validation = self._evaluator()
        self._pace.add_validation(time.perf_counter() - start)
        self._require_finite("the validation loss became", validation.loss)
        return validation

    def _finish_epoch(self, validation: Evaluation, checkpoint_every_seconds: float) -> None:
        line = self._epoch_line(validation)
        self._history.finish_epoch(line)
        self._mark_unsaved()
        with self._watchdog.watch("the end of an epoch"):
            if self._workers.count > 1 and len(self._history.epochs) == self._plan.epochs:
                self._require_same_state()
            # The checkpoint first: if it is due, the reported epoch is never trained again.
            self._save_if_due(checkpoint_every_seconds)
            self._history.write_metrics(self._attempt.output)
            for observer in self._observers:
                observer.finish_epoch(line)
        log.event(
            "epoch",
            **msgspec.structs.asdict(line),
            message=describe_epoch(line, self._plan.epochs),
        )

    def _require_same_state(self) -> None:
        """Check, before the last checkpoint, that all workers have the same bits.

        Raises:
            JobError: If they differ, because the training was then not data-parallel.
        """
        spec = self._workers.spec
        digests = self._workers.gather(self._engine.digest())
        others = [spec.name(rank) for rank, one in enumerate(digests) if one != digests[0]]
        if others:
            error = JobError(
                f"the variables of {', '.join(others)} differ from those of {spec.name(0)}, "
                f"expected the same bits on all workers; start all of them on machines of the same "
                f"kind"
            )
            self._workers.end(error)

    def _mark_unsaved(self) -> None:
        """Note that there is work to save, so that a signal no longer ends the process at once."""
        self._is_saved = False
        self._stop.defer()

    def _stop_if_requested(self) -> None:
        reason = self._reason_to_stop()
        if reason is None:
            return
        self._save_if_due(0.0)
        # The scheduler can end all workers as soon as the first one ends.
        with self._watchdog.watch("waiting for the other workers to end"):
            self._workers.shutdown()
        raise StoppedError(
            f"{reason}; everything up to step {self.step} of {self._plan.total_steps} is in "
            f"{self._attempt.checkpoints.latest or 'the checkpoint of worker 0'}; "
            f"{self._stop.advice}"
        )

    def _reason_to_stop(self) -> str | None:
        """The reason to stop, or None. Several workers stop only once all have the request."""
        if self._workers.count == 1:
            return self._stop.reason
        ranks = self._engine.stopping_ranks
        if not ranks:
            return None
        others = ", ".join(map(self._workers.spec.name, ranks))
        return self._stop.reason or f"{others} received a stop request"

    def _save_if_due(self, checkpoint_every_seconds: float) -> None:
        start = time.perf_counter()
        if not self._attempt.is_chief:
            return
        if self._is_saved or start - self._saved_at < checkpoint_every_seconds:
            return
        history = self._history
        history.elapsed_seconds = self._elapsed_seconds
        with self._watchdog.watch("a checkpoint"):
            arrays = self._engine.state()
            self._require_finite("a variable became", _worst(arrays), on_all_workers=False)
            checkpoint = Checkpoint(self.step, arrays, self._fingerprint, history)
            size = self._attempt.checkpoints.save(checkpoint)
            self._attempt.manifest.progress(self.step, history.best, history.elapsed_seconds)
        self._is_saved, self._saved_at = True, time.perf_counter()
        seconds = self._saved_at - start
        log.event(
            "checkpoint",
            step=self.step,
            bytes=size,
            seconds=round(seconds, 3),
            message=f"checkpoint at step {self.step} ({size / 2**20:.1f} MiB, {seconds:.2f} s)",
        )

    def _show(self, phase: Phase) -> None:
        """Send the current status to the observers."""
        history, plan, pace = self._history, self._plan, self._pace
        progress, rate = history.progress, pace.steps_per_second
        images = progress.steps * plan.global_batch_size
        # One more for the evaluation of the saved model after the last epoch.
        validations_left = plan.epochs - len(history.epochs) + 1
        status = Status(
            phase=phase,
            epoch=len(history.epochs) + 1,
            epochs=plan.epochs,
            steps=progress.steps,
            steps_per_epoch=plan.steps_per_epoch,
            loss=progress.loss / images if images else None,
            accuracy=progress.correct / images if images else None,
            images_per_second=rate and rate * plan.global_batch_size,
            seconds_left=pace.seconds_left(plan.total_steps - self.step, validations_left),
            seconds_left_is_least=not pace.has_validated,
        )
        for observer in self._observers:
            observer.show(status)

    def _require_finite(self, what: str, value: float, *, on_all_workers: bool = True) -> None:
        """Raise if a value is not finite; `on_all_workers` if all workers check the same value."""
        if math.isfinite(value):
            return
        advice = (
            f"the last good checkpoint is {latest}; resume with --precision float32, or start over "
            f"with --fresh and a lower --learning-rate"
            if (latest := self._attempt.checkpoints.latest)
            else "no checkpoint has been saved yet; run again with --precision float32 or a lower "
            "--learning-rate"
        )
        error = JobError(
            f"{what} {value} in epoch {len(self._history.epochs) + 1}, by step {self.step}; "
            f"{advice}"
        )
        if on_all_workers:
            self._workers.end(error)
        raise error

    def _epoch_line(self, validation: Evaluation) -> EpochRecord:
        history = self._history
        images = history.progress.steps * self._plan.global_batch_size
        seconds = history.epoch_seconds
        return EpochRecord(
            epoch=len(history.epochs) + 1,
            step=self.step,
            loss=history.progress.loss / images,
            accuracy=history.progress.correct / images,
            val_loss=validation.loss,
            val_accuracy=validation.accuracy,
            learning_rate=self._engine.learning_rate,
            seconds=round(seconds, 3),
            images_per_second=round(images / seconds, 1),
            elapsed_seconds=round(self._elapsed_seconds, 3),
        )


def _worst(arrays: Arrays) -> float:
    """Return the first value that is not finite, or 0 if all are."""
    for array in arrays.values():
        if not np.isfinite(array).all():
            return float(array[~np.isfinite(array)].flat[0])
    return 0.0


def describe_epoch(line: EpochRecord, epochs: int) -> str:
    """Format an epoch's figures in 70 columns; with the time in front they fit in 80 columns."""
    return (
        f"epoch {line.epoch}/{epochs} loss {line.loss:.4f} acc {_percent(line.accuracy)} "
        f"val {line.val_loss:.4f} {_percent(line.val_accuracy)} {line.seconds:.1f} s "
        f"{line.images_per_second:,.0f} img/s"
    )


def _percent(fraction: float) -> str:
    return f"{fraction:.1%}".replace("100.0", "100")
