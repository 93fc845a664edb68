"""What an output folder tells of its run, finished or not, without TensorFlow and the data set."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from job.config import UserError
from job.output import EVALUATION, METRICS, RUN, read_json
from job.predictions import Predictions, confusion_matrix


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
    def load(cls, folder: Path) -> "RunRecord":
        """Read an output folder.

        Raises:
            UserError: If it holds no run, or a file that cannot be used.
        """
        evaluation = read_json(folder / EVALUATION)
        record = cls(
            manifest=read_json(folder / RUN),
            epochs=_read_lines(folder / METRICS),
            evaluation=evaluation,
            # Without the evaluation they are what a killed process was about to replace.
            predictions=Predictions.load(folder) if evaluation else None,
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
        attempts = self.manifest.get("attempts", [])
        trained = [one["first_step"] for one in attempts if one["first_step"] is not None]
        steps = [0, *(line["step"] for line in self.epochs)]
        seconds = [0.0, *(line["elapsed_seconds"] for line in self.epochs)]
        return [(step, float(np.interp(step, steps, seconds))) for step in trained[1:]]


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {path}: {error}; mend it, or go on with the training, which writes it"
        ) from error


def _require_same_model(folder: Path, predictions: Predictions, evaluation: dict[str, Any]) -> None:
    counted = confusion_matrix(predictions.labels, predictions.probabilities)
    if counted.tolist() != evaluation["confusion_matrix"]:
        raise UserError(
            f"the predictions in {folder} are of another model than its {EVALUATION}; write both "
            f"anew with python -m job evaluate --output-dir {folder}"
        )
