"""Runs as their output folders tell them: settings, accuracies, and whether they are finished."""

import os
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.config import TrainConfig, UserError
from job.fingerprint import run_options
from job.output import EVALUATION, METRICS, RUN
from job.run_record import RunRecord

SETTINGS = (
    *(name for name in run_options(TrainConfig()) if name != "seed"),
    *("epochs", "precision", "replicas", "data", "recipe_fingerprint"),
)
"""What decides a run's result, but for its seed: the options that all of its attempts have in
common, how far it goes, what it computes in, on how many replicas (each normalizes its own rows of
a batch), and the first digits of the fingerprints of its data and of what its recipe computes."""

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
        attempts: When and where those of its attempts began that have trained it; the same in a
            copy of its folder alone.
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
    attempts: tuple[tuple[str, str], ...] = ()

    @property
    def identity(self) -> tuple[Any, ...]:
        """What a copy of its folder has in common with it, and no other run has."""
        settings = tuple(self.settings.values())
        return (self.seed, settings, self.attempts, self.curve, self.elapsed_seconds)

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
        folders: Output folders, and folders that have such in them, as a sweep leaves them. One may
            be both, where a sweep has followed a single run.

    Returns:
        The output folders; one that holds no run, nor has any in it, as it was given.
    """
    found: dict[str, str] = {}
    for folder in folders:
        itself = [folder] if _holds_run(folder) else []
        for path in [*itself, *_runs_in(folder)] or [folder]:
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
        UserError: If that is too little to say which run it is, or damaged.
    """
    if not _holds_run(folder):
        there = os.path.isdir(folder)  # noqa: PTH112 (no error for a name that cannot be)
        raise UserError(
            f"it holds no {RUN}, nor does a folder in it" if there else "there is no such folder"
        )
    record = RunRecord.load(Path(folder), with_predictions=False)
    manifest, evaluation, problem = record.manifest, record.evaluation, _problem(record)
    return Run(
        folder=folder,
        seed=manifest["config"]["seed"],
        settings=_settings(manifest),
        curve=tuple(line["val_accuracy"] for line in record.epochs),
        accuracy=None if problem else evaluation["accuracy"],
        loss=None if problem else evaluation["loss"],
        elapsed_seconds=manifest["elapsed_seconds"],
        outcome=manifest["outcome"],
        problem=problem,
        attempts=tuple(
            (attempt["start"], attempt["host"])
            for attempt in manifest["attempts"]
            if (attempt["last_step"] or 0) > (attempt["first_step"] or 0)
        ),
    )


def _settings(manifest: dict[str, Any]) -> dict[str, Any]:
    fingerprint = (manifest.get("data") or {}).get("fingerprint")
    if manifest["config"]["dataset"] == "synthetic":
        fingerprint = None  # its images are drawn from the seed
    known = manifest["config"] | {
        "precision": manifest.get("precision"),
        "replicas": manifest.get("replicas"),
        "data": fingerprint and fingerprint[:8],
        # Earlier versions have none.
        "recipe_fingerprint": (manifest.get("recipe_fingerprint") or "")[:8] or None,
    }
    return {name: known[name] for name in SETTINGS}


def _problem(record: RunRecord) -> str | None:
    """Why a run cannot be compared."""
    outcome, epochs = record.manifest["outcome"], len(record.epochs)
    expected = record.manifest["config"]["epochs"]
    if outcome != "done":
        return f"{outcome} after {epochs} of {expected} epochs"
    if epochs != expected:
        return f"its {METRICS} has {epochs} lines, expected {expected}"
    return None if record.evaluation else f"it holds no {EVALUATION}"
