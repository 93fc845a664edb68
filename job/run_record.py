"""What an output folder tells of its run, finished or not, without TensorFlow and the data set.

Its files may have been cut off, edited or mixed up on their way here: whatever is read of them is
checked first.
"""

import json
import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from job.addresses import without_secrets
from job.config import UserError
from job.output import EVALUATION, METRICS, REPORT, RUN
from job.predictions import Predictions, confusion_matrix
from job.run_shapes import EPOCH, EVALUATION_DOCUMENT, MANIFEST
from job.shapes import MismatchError, Shape, shown


class DamagedError(UserError):
    """A file is there, and is not what this program has written."""


@dataclass(frozen=True)
class RunRecord:
    """What is known of a run.

    Attributes:
        manifest: Its ``run.json``, empty where there is none.
        epochs: The lines of its ``metrics.jsonl``, none where there is none.
        evaluation: Its ``evaluation.json``, empty where there is none.
        predictions: What its model makes of the test images; None where it is not known.
    """

    manifest: dict[str, Any]
    epochs: list[dict[str, Any]]
    evaluation: dict[str, Any]
    predictions: Predictions | None

    @classmethod
    def load(cls, folder: Path, *, with_predictions: bool = True) -> "RunRecord":
        """Read an output folder.

        Args:
            folder: The folder.
            with_predictions: Whether to read them, which are of some size.

        Raises:
            UserError: If it holds no run, or a file that cannot be read.
            DamagedError: If one is damaged.
        """
        evaluation = _read_evaluation(folder)
        # Without the evaluation they are what a killed process was about to replace.
        wanted = with_predictions and evaluation
        record = cls(
            manifest=read_manifest(folder),
            epochs=_read_epochs(folder),
            evaluation=evaluation,
            predictions=Predictions.load(folder) if wanted else None,
        )
        if not (record.manifest or record.epochs or record.evaluation):
            raise UserError(
                f"{folder} holds no run: it has neither {RUN} nor {METRICS} nor {EVALUATION}; name "
                f"the --output-dir of a training"
            )
        if record.predictions:
            _require_same_model(folder, record.predictions, evaluation)
        return record

    @property
    def class_names(self) -> list[str]:
        """Name of each label, as the evaluation has them."""
        return list(self.evaluation.get("classes", ()))

    @property
    def restarts(self) -> list[tuple[int, float]]:
        """Where the run went on after an interruption: steps, and seconds since its start."""
        steps = [0, *(line["step"] for line in self.epochs)]
        seconds = [0.0, *(line["elapsed_seconds"] for line in self.epochs)]
        if self._last_step > steps[-1]:
            steps.append(self._last_step)
            seconds.append(max(seconds[-1], self.manifest["elapsed_seconds"]))
        return [
            (after["first_step"], float(np.interp(after["first_step"], steps, seconds)))
            for before, after in pairwise(self._trained)
            # More epochs for a finished run, or its report alone, are no restart of it.
            if before["outcome"] != "done"
        ]

    @property
    def steps(self) -> int:
        """Steps done, as far as they are known."""
        return max(self._last_step, self.epochs[-1]["step"] if self.epochs else 0)

    @property
    def steps_per_epoch(self) -> int | None:
        """Steps of an epoch; None where nothing tells."""
        if self.epochs:
            return int(self.epochs[-1]["step"]) // len(self.epochs)
        examples = (self.manifest.get("data") or {}).get("train_examples")
        return examples // self.manifest["config"]["batch_size"] or None if examples else None

    @property
    def elapsed_seconds(self) -> float:
        """Time in training and validation, as far as it is known."""
        last = self.epochs[-1]["elapsed_seconds"] if self.epochs else 0.0
        return float(max(last, self.manifest.get("elapsed_seconds", 0.0)))

    @property
    def _trained(self) -> list[dict[str, Any]]:
        """The attempts that got as far as training."""
        attempts = self.manifest.get("attempts", [])
        return [attempt for attempt in attempts if attempt["first_step"] is not None]

    @property
    def _last_step(self) -> int:
        """The step of the last checkpoint; 0 before any."""
        return max((attempt["last_step"] or 0 for attempt in self._trained), default=0)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the ``run.json`` of an output folder; empty where there is none.

    Raises:
        UserError: If there is one that cannot be read.
        DamagedError: If it is damaged.
    """
    advice = (
        "run the same train command again, which writes it anew from its checkpoint, or start over "
        "with --fresh"
    )
    document = _parse_file(folder / RUN, advice, MANIFEST)
    config = document.get("config", {})
    if "cifar10_url" in config:
        # Earlier versions kept it as it was given.
        config["cifar10_url"] = without_secrets(config["cifar10_url"])
    return document


def _read_evaluation(folder: Path) -> dict[str, Any]:
    path = folder / EVALUATION
    advice = f"write it anew with python -m job evaluate --output-dir {folder}"
    document = _parse_file(path, advice, EVALUATION_DOCUMENT)
    if document:
        matrix, classes = document["confusion_matrix"], len(document["classes"])
        sizes = {len(matrix), *map(len, matrix)}
        if sizes != {classes} or sum(map(sum, matrix)) != document["examples"]:
            raise DamagedError(
                f"{path}: confusion_matrix: received {len(matrix)} rows of {sorted(sizes)} and "
                f"{sum(map(sum, matrix))} images, expected the {classes} classes and "
                f"{document['examples']} examples that it names; {advice}"
            )
    return document


def _read_epochs(folder: Path) -> list[dict[str, Any]]:
    path = folder / METRICS
    advice = (
        f"remove {REPORT} and run the same train command again, which writes both anew from its "
        f"checkpoint, or start over with --fresh"
    )
    epochs = []
    for number, line in enumerate((_read(path) or b"").splitlines(), 1):
        document = _parse(line, f"{path}, line {number}", advice, EPOCH)
        if document["epoch"] != number:
            raise DamagedError(
                f"{path}, line {number}: epoch: received {document['epoch']}, expected {number}, "
                f"for each epoch has its line; {advice}"
            )
        epochs.append(document)
    return epochs


def _parse_file(path: Path, advice: str, shape: Shape) -> dict[str, Any]:
    content = _read(path)
    return _parse(content, str(path), advice, shape) if content is not None else {}


def _read(path: Path) -> bytes | None:
    """A file's content; None where there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror or error}; mend the volume or give user "
            f"{os.getuid()} access"
        ) from error


def _parse(text: bytes, place: str, advice: str, shape: Shape) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        received = shown(text.decode(errors="backslashreplace"))
        raise DamagedError(
            f"{place}: received {received}, expected a JSON object ({error}); {advice}"
        ) from error
    try:
        shape(document)
    except MismatchError as mismatch:
        raise DamagedError(f"{place}: {mismatch}; {advice}") from mismatch
    return document


def _require_same_model(folder: Path, predictions: Predictions, evaluation: dict[str, Any]) -> None:
    counted = confusion_matrix(predictions.labels, predictions.probabilities)
    if counted.tolist() != evaluation["confusion_matrix"]:
        raise UserError(
            f"the predictions in {folder} are of another model than its {EVALUATION}; write both "
            f"anew with python -m job evaluate --output-dir {folder}"
        )
