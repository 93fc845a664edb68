"""Runs as their output folders tell them: settings, accuracies, and whether they are finished."""

import json
import os
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.config import TrainConfig, UserError
from job.fingerprint import run_options
from job.output import EVALUATION, METRICS, RUN, read_json

SETTINGS = (
    *(name for name in run_options(TrainConfig()) if name != "seed"),
    *("epochs", "precision", "replicas", "data"),
)
"""What decides a run's result, but for its seed: the options that all of its attempts have in
common, how far it goes, what it computes in, on how many replicas (each normalizes its own rows of
a batch), and the first digits of its data's fingerprint."""

_LAST = 5


@dataclass(frozen=True)
class Run:
    """What the folder of a run tells.

    Attributes:
        folder: Its path.
        seed: The run's seed.
        settings: The values of `SETTINGS`.
        curve: Validation accuracy after each epoch so far, 0 to 1.
        accuracy: Of the saved model on the test set, 0 to 1; None before the end.
        loss: Of the saved model; None before the end.
        elapsed_seconds: Time in training and validation.
        outcome: As in ``run.json``.
        problem: Why it cannot be compared; None where it can.
    """

    folder: str
    seed: int
    settings: dict[str, Any]
    curve: tuple[float, ...]
    accuracy: float | None
    loss: float | None
    elapsed_seconds: float
    outcome: str
    problem: str | None

    @property
    def last(self) -> float | None:
        """Validation accuracy after the last epoch."""
        return self.curve[-1] if self.curve else None

    @property
    def last_mean(self) -> float | None:
        """Mean validation accuracy of the last five epochs, or of as many as there are."""
        return statistics.fmean(self.curve[-_LAST:]) if self.curve else None


def run_folders(folders: Iterable[str]) -> list[str]:
    """Find the folders of runs, each once.

    Args:
        folders: Output folders, and folders that have such in them, as a sweep leaves them.

    Returns:
        The output folders; one that holds no run, nor has any in it, as it was given.
    """
    found: dict[str, str] = {}
    for folder in folders:
        inside = [] if _holds_run(folder) else _runs_in(folder)
        for path in inside or [folder]:
            found.setdefault(os.path.realpath(path), path)
    return list(found.values())


def _runs_in(folder: str) -> list[str]:
    try:
        names = sorted(os.listdir(folder))  # noqa: PTH208 (a `Path` drops a leading ./)
    except OSError:
        return []  # reading it as a run says why
    return [path for name in names if _holds_run(path := str(Path(folder, name)))]


def _holds_run(folder: str) -> bool:
    return os.path.exists(Path(folder, RUN))  # noqa: PTH110 (no error for a name that cannot be)


def read_run(folder: str) -> Run:
    """Read what a run's folder tells.

    Raises:
        UserError: If that is too little to say which run it is; tells why without the folder.
    """
    path = Path(folder)
    if not _holds_run(folder):
        there = os.path.isdir(folder)  # noqa: PTH112 (no error for a name that cannot be)
        raise UserError(
            f"it holds no {RUN}, nor does a folder in it" if there else "there is no such folder"
        )
    document, evaluation = read_json(path / RUN), read_json(path / EVALUATION)
    try:
        curve = _read_curve(path / METRICS)
        problem = _problem(document, evaluation, len(curve))
        return Run(
            folder,
            int(document["config"]["seed"]),
            _settings(document),
            curve,
            None if problem else float(evaluation["accuracy"]),
            None if problem else float(evaluation["loss"]),
            float(document["elapsed_seconds"]),
            str(document["outcome"]),
            problem,
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"its {RUN}, {METRICS} or {EVALUATION} is damaged ({type(error).__name__}: {error})"
        ) from error


def _settings(document: dict[str, Any]) -> dict[str, Any]:
    fingerprint = (document["data"] or {}).get("fingerprint")
    if document["config"]["dataset"] == "synthetic":
        fingerprint = None  # its images are drawn from the seed
    known = document["config"] | {
        "precision": document["precision"],
        "replicas": document["replicas"],
        "data": fingerprint and fingerprint[:8],
    }
    settings = {name: known[name] for name in SETTINGS}
    for name, value in settings.items():
        if isinstance(value, list | dict):
            raise TypeError(f"{name} is {value}")
    return settings


def _read_curve(metrics: Path) -> tuple[float, ...]:
    try:
        lines = metrics.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise UserError(f"its {METRICS} cannot be read: {error.strerror}") from error
    return tuple(float(json.loads(line)["val_accuracy"]) for line in lines)


def _problem(document: dict[str, Any], evaluation: dict[str, Any], epochs: int) -> str | None:
    """Why a run cannot be compared."""
    expected = document["config"]["epochs"]
    if document["outcome"] != "done":
        return f"{document['outcome']} after {epochs} of {expected} epochs"
    if epochs != expected:
        return f"its {METRICS} has {epochs} lines, expected {expected}"
    if not {"accuracy", "loss"} <= evaluation.keys():
        return f"it holds no {EVALUATION}, or a damaged one"
    return None
