"""The files that describe a run, each defined once for its writer and its readers.

``run.json``, ``metrics.jsonl`` and ``evaluation.json`` are read without TensorFlow and the data
set. They may have been truncated, edited or mixed up in between, so they are checked first.
"""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import numpy as np
from msgspec import Meta, Struct

from job.cluster import Device
from job.config import TrainConfig, UserError, encodable, redacted, run_options
from job.environment import program
from job.run.folder import EVALUATION, METRICS, REPORT, RUN, folders_with, read_file
from job.run.predictions import Predictions, confusion_matrix

Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Share = Annotated[float, Meta(ge=0, le=1)]
Amount = Annotated[float, Meta(ge=0)]
Outcome = Literal["running", "done", "stopped", "failed"]

_Document = TypeVar("_Document")


class EpochRecord(Struct, frozen=True):
    """A line of ``metrics.jsonl``, and an epoch of the history in a checkpoint.

    Attributes:
        epoch: Number of the epoch, from 1.
        step: Steps done since the start of the run.
        loss: Mean training loss over the epoch, with augmentation and Dropout.
        accuracy: Training accuracy over the epoch.
        val_loss: Mean loss over all test images after the epoch.
        val_accuracy: Accuracy over all test images after the epoch.
        learning_rate: The optimizer's learning rate after the epoch.
        seconds: Training time without validation and checkpoints.
        images_per_second: Training images per second of that time.
        elapsed_seconds: Time in training and validation since the start of the run.
    """

    epoch: Positive
    step: Positive
    loss: float
    accuracy: Share
    val_loss: float
    val_accuracy: Share
    learning_rate: float
    seconds: Amount
    images_per_second: Amount
    elapsed_seconds: Amount


class ClassRecord(Struct, frozen=True):
    """The saved model's result on one class; None if a ratio is undefined."""

    precision: Share | None
    recall: Share | None
    support: Count


class EvaluationRecord(Struct, frozen=True):
    """``evaluation.json``: the saved model's result on the whole test set.

    Attributes:
        loss: Mean cross-entropy.
        accuracy: Fraction of the examples predicted correctly.
        examples: Test images, each counted once.
        classes: The result of each class by its name, in the order of the labels.
        confusion_matrix: Rows are true classes, columns predicted ones; entries count images.
        model: Name of the model file.
        model_sha256: Its SHA-256.
        accuracy_without_tta: The accuracy without test-time augmentation, from the unchanged
            images; None if the recipe uses no other view.
    """

    loss: float
    accuracy: Share
    examples: Positive
    classes: dict[str, ClassRecord]
    confusion_matrix: Annotated[list[list[Count]], Meta(min_length=1)]
    model: str | None = None
    model_sha256: str | None = None
    accuracy_without_tta: Share | None = None


class BestEpoch(Struct, frozen=True):
    """The epoch with the best validation, the first one of equals."""

    epoch: Positive
    val_accuracy: Share


class DataRecord(Struct, frozen=True):
    """The data set of a run; fingerprints are SHA-256 of images and labels."""

    name: str
    fingerprint: str
    test_fingerprint: str
    train_examples: Positive | None = None
    test_examples: Positive | None = None


class AttemptRecord(Struct):
    """An attempt at a run.

    Attributes:
        start: Start time, UTC.
        host: Name of its host.
        fresh: Whether it started over.
        end: End time, UTC; None while it is running or if it was lost.
        outcome: How it ended; "lost" if it was killed or its machine failed.
        reason: Why it ended.
        run_id: The run's name; None if it has no name.
        devices: Models of its devices.
        first_step: The step that it resumed from; None before the training.
        last_step: The step of its last checkpoint.
        changes: Differences from the previous attempt that change the computed bits.
    """

    start: str
    end: str | None
    outcome: Literal["running", "done", "stopped", "failed", "lost"]
    reason: str | None
    run_id: str | None
    fresh: bool
    host: str
    devices: list[str | None] = []
    first_step: Count | None = None
    last_step: Count | None = None
    changes: list[str] = []


class TrainingRecord(Struct):
    """How a run computes, and on which devices: null in ``run.json`` before the run trains.

    Attributes:
        devices: The device of each replica.
        workers: Processes that train together.
        replicas: Replicas that train in parallel, over all workers.
        threads: Processors that a process may run on.
        precision: What ``--precision`` resolved to.
        xla: Whether XLA compiles the network.
        deterministic: What ``--deterministic`` resolved to.
        data: The data set.
        recipe_fingerprint: SHA-256 of what the recipe computes.
    """

    devices: list[Device] | None = None
    workers: Positive | None = None
    replicas: Positive | None = None
    threads: Positive | None = None
    precision: str | None = None
    xla: bool | None = None
    deterministic: bool | None = None
    data: DataRecord | None = None
    recipe_fingerprint: str | None = None


class Manifest(TrainingRecord, kw_only=True):
    """``run.json``: what ran, on which devices, in which attempts, and how each ended.

    Attributes:
        config: Every option of the last attempt that trained.
        versions: Versions of this job, Python and the libraries that determine a run's numbers.
        git_commit: Commit of the checkout or image; None if unknown.
        start: Start of the first attempt, UTC.
        end: End of the last attempt, UTC; None while it is running.
        outcome: State of the run.
        error: Why it failed; None if it did not.
        best: The best epoch, as of the last checkpoint.
        elapsed_seconds: Time in training and validation over all attempts, as of the last
            checkpoint.
        attempts: All attempts, the first one first.
    """

    config: TrainConfig
    versions: dict[str, str]
    git_commit: str | None
    start: str
    end: str | None
    outcome: Outcome
    error: str | None
    best: BestEpoch | None = None
    elapsed_seconds: Amount
    attempts: Annotated[list[AttemptRecord], Meta(min_length=1)]


class DamagedError(UserError):
    """A file exists, but its content is not what this program writes."""


class RunRecord(Struct, frozen=True):
    """The records of a run in its output folder.

    Attributes:
        manifest: Its ``run.json``; None if the file does not exist.
        epochs: The lines of its ``metrics.jsonl``; empty if the file does not exist.
        evaluation: Its ``evaluation.json``; None if the file does not exist.
        predictions: The output of its model for the test images; None if unknown.
    """

    manifest: Manifest | None
    epochs: list[EpochRecord]
    evaluation: EvaluationRecord | None
    predictions: Predictions | None

    @classmethod
    def load(cls, folder: Path, *, with_predictions: bool = True) -> "RunRecord":
        """Read an output folder.

        Args:
            folder: The folder.
            with_predictions: Whether to read the predictions, a larger file.

        Raises:
            UserError: If it contains no run, or a file that cannot be read.
            DamagedError: If a file is damaged.
        """
        evaluation = read_evaluation(folder)
        # Without an evaluation they are old ones that a killed process was about to replace.
        wanted = with_predictions and evaluation
        record = cls(
            manifest=read_manifest(folder),
            epochs=read_epochs(folder),
            evaluation=evaluation,
            predictions=Predictions.load(folder) if wanted else None,
        )
        if not (record.manifest or record.epochs or record.evaluation):
            below = folders_with(RUN, folder)
            raise UserError(
                f"{folder} contains no run: it has neither {RUN} nor {METRICS} nor {EVALUATION}; "
                f"use {below or 'the --output-dir of a training'}"
            )
        if record.predictions and evaluation:
            predicted = record.predictions
            counted = confusion_matrix(predicted.labels, predicted.probabilities)
            if counted.tolist() != evaluation.confusion_matrix:
                raise UserError(
                    f"the predictions in {folder} are from another model than its {EVALUATION}; "
                    f"write both again with {program()} evaluate --output-dir {folder}"
                )
        return record

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do, as far as known."""
        return self.manifest is None or self.manifest.outcome == "done"

    @property
    def class_names(self) -> list[str]:
        """Name of each label, from the evaluation."""
        return list(self.evaluation.classes) if self.evaluation else []

    @property
    def restarts(self) -> list[tuple[int, float]]:
        """Where the run resumed after an interruption: steps, and seconds since its start."""
        steps = [0, *(line.step for line in self.epochs)]
        seconds = [0.0, *(line.elapsed_seconds for line in self.epochs)]
        if self._last_step > steps[-1]:
            steps.append(self._last_step)
            seconds.append(self.elapsed_seconds)
        return [
            (after.first_step or 0, float(np.interp(after.first_step or 0, steps, seconds)))
            for before, after in pairwise(self._trained)
            # Neither more epochs for a finished run nor only its report is a restart.
            if before.outcome != "done"
        ]

    @property
    def steps(self) -> int:
        """Steps done, as far as known."""
        return max(self._last_step, self.epochs[-1].step if self.epochs else 0)

    @property
    def steps_per_epoch(self) -> int | None:
        """Steps per epoch; None if unknown."""
        if self.epochs:
            return self.epochs[-1].step // len(self.epochs)
        if self.manifest is None or self.manifest.data is None:
            return None
        examples = self.manifest.data.train_examples
        return examples // self.manifest.config.batch_size or None if examples else None

    @property
    def elapsed_seconds(self) -> float:
        """Time in training and validation, as far as known."""
        last = self.epochs[-1].elapsed_seconds if self.epochs else 0.0
        return max(last, self.manifest.elapsed_seconds if self.manifest else 0.0)

    @property
    def _trained(self) -> list[AttemptRecord]:
        """The attempts that got as far as training."""
        attempts = self.manifest.attempts if self.manifest else []
        return [attempt for attempt in attempts if attempt.first_step is not None]

    @property
    def _last_step(self) -> int:
        """The step of the last checkpoint; 0 before the first one."""
        return max((attempt.last_step or 0 for attempt in self._trained), default=0)


def encode(document: object, *, indent: bool = False) -> bytes:
    """Encode one of these documents as JSON, indented for people if requested."""
    content = msgspec.json.encode(_encodable(msgspec.to_builtins(document, enc_hook=str)))
    return msgspec.json.format(content, indent=2) + b"\n" if indent else content


def _encodable(value: Any) -> Any:
    match value:
        case str():
            return encodable(value)
        case dict():
            return {_encodable(key): _encodable(one) for key, one in value.items()}
        case list() | tuple():
            return [_encodable(one) for one in value]
    return value


def decode(content: bytes | str, kind: type[_Document]) -> _Document:
    """Decode JSON that `encode` wrote.

    Raises:
        ValueError: If it is not JSON, or does not have the structure of ``kind``.
    """
    try:
        # Paths and similar values are text in JSON.
        return msgspec.json.decode(content, type=kind, dec_hook=lambda kind, text: kind(text))
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(str(error)) from error


# Options that must be present, without a default: they identify the run, and every version of this
# program has written them.
_IDENTIFYING = ("output_dir", "data_dir", "epochs", *run_options(TrainConfig()))


class _WrittenOptions(Struct):
    config: dict[str, Any]


def read_manifest(folder: Path) -> Manifest | None:
    """Read the ``run.json`` of an output folder; None if it does not exist.

    Raises:
        UserError: If it exists and cannot be read.
        DamagedError: If it is damaged.
    """
    advice = (
        "run the same train command again, which restores the file from the checkpoint, or start "
        "over with --fresh"
    )
    path = folder / RUN
    content = read_file(path)
    if content is None:
        return None
    manifest = _parse(content, str(path), advice, Manifest)
    written = decode(content, _WrittenOptions).config
    missing = [name for name in _IDENTIFYING if name not in written]
    if missing:
        raise DamagedError(f"{path} is damaged: config lacks {', '.join(missing)}; {advice}")
    manifest.config = redacted(manifest.config)  # earlier versions stored it unredacted
    return manifest


def read_evaluation(folder: Path) -> EvaluationRecord | None:
    """Read the ``evaluation.json`` of an output folder; None if it does not exist.

    Raises:
        UserError: If it exists and cannot be read.
        DamagedError: If it is damaged.
    """
    path = folder / EVALUATION
    advice = f"write it again with {program()} evaluate --output-dir {folder}"
    content = read_file(path)
    if content is None:
        return None
    document = _parse(content, str(path), advice, EvaluationRecord)
    matrix, classes = document.confusion_matrix, len(document.classes)
    sizes, images = {len(matrix), *map(len, matrix)}, sum(map(sum, matrix))
    if sizes != {classes} or images != document.examples:
        raise DamagedError(
            f"{path}: confusion_matrix: received {len(matrix)} rows of {sorted(sizes)} and "
            f"{images} images, expected the {classes} classes and {document.examples} examples "
            f"given in the same file; {advice}"
        )
    return document


def unless_damaged(read: Callable[[Path], _Document | None], folder: Path) -> _Document | None:
    """Read a file of an output folder with one of these functions; None if it is damaged.

    For callers that can do without the file or write it again: only the checkpoint determines how
    a run resumes.

    Raises:
        UserError: If the file exists and cannot be read.
    """
    try:
        return read(folder)
    except DamagedError:
        return None


def read_epochs(folder: Path) -> list[EpochRecord]:
    """Read the ``metrics.jsonl`` of an output folder; no lines if it does not exist.

    Raises:
        UserError: If it exists and cannot be read.
        DamagedError: If it is damaged.
    """
    path = folder / METRICS
    advice = (
        f"remove {REPORT} and run the same train command again, which restores both files from the "
        f"checkpoint, or start over with --fresh"
    )
    epochs = []
    for number, line in enumerate((read_file(path) or b"").splitlines(), 1):
        place = f"{path}, line {number}"
        epoch = _parse(line, place, advice, EpochRecord)
        if epoch.epoch != number:
            raise DamagedError(
                f"{place}: epoch: received {epoch.epoch}, expected {number}, because each epoch "
                f"has one line; {advice}"
            )
        epochs.append(epoch)
    return epochs


def _parse(content: bytes, place: str, advice: str, kind: type[_Document]) -> _Document:
    try:
        return decode(content, kind)
    except ValueError as error:
        raise DamagedError(f"{place} is damaged: {error}; {advice}") from error
