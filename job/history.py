"""What a run has been through so far: every epoch's line, the best one, and the epoch begun."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from job.output import METRICS, OutputDir


@dataclass(frozen=True)
class Progress:
    """Sums over the steps of an epoch so far.

    Attributes:
        steps: Steps done.
        loss: Sum over examples of the loss.
        correct: Examples predicted correctly.
    """

    steps: int = 0
    loss: float = 0.0
    correct: int = 0


@dataclass
class History:
    """The history of a run over all of its attempts.

    Attributes:
        epochs: For each finished epoch its line of ``metrics.jsonl``.
        progress: Sums of the epoch that is not finished.
        epoch_seconds: Training time spent in that epoch.
        elapsed_seconds: Time spent in training and validation since the start of the run.
    """

    epochs: list[dict[str, Any]] = field(default_factory=list)
    progress: Progress = Progress()
    epoch_seconds: float = 0.0
    elapsed_seconds: float = 0.0

    @property
    def best(self) -> dict[str, Any] | None:
        """Epoch and accuracy of the best validation, the first among equals; None before any."""
        if not self.epochs:
            return None
        best = max(self.epochs, key=lambda line: float(line["val_accuracy"]))
        return {"epoch": best["epoch"], "val_accuracy": best["val_accuracy"]}

    def finish_epoch(self, line: dict[str, Any]) -> None:
        """Add an epoch's line and begin the next epoch."""
        self.epochs.append(line)
        self.progress, self.epoch_seconds = Progress(), 0.0

    def write_metrics(self, output: OutputDir) -> None:
        """Write ``metrics.jsonl``: the whole file, so that it never has a gap or half a line.

        Raises:
            UserError: If it cannot be written.
        """
        lines = [json.dumps(line, allow_nan=False) + "\n" for line in self.epochs]
        output.write_text(METRICS, "".join(lines))

    def document(self) -> dict[str, Any]:
        """This history as a JSON object."""
        return asdict(self)

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> "History":
        """The history that `document` described."""
        return cls(**(document | {"progress": Progress(**document["progress"])}))
