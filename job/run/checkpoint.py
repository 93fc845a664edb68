"""Checkpoints of a run, and the history that they contain.

A checkpoint is either complete or absent, and is verified when it is read. The last two are kept.
"""

import hashlib
import io
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from job import log
from job.config import UserError
from job.run.fingerprint import Fingerprint
from job.run.folder import CHECKPOINTS, METRICS, OutputDir, refused
from job.run.record import BestEpoch, EpochRecord, decode, encode

Arrays = dict[str, npt.NDArray[Any]]

_KEPT = 2
_DIGITS = 16
_NAME = re.compile(rf"(\d+)-step-(\d+)-([0-9a-f]{{{_DIGITS}}})\.npz")
_METADATA = "metadata"


class Progress(msgspec.Struct, frozen=True):
    """Sums over the steps of an epoch so far.

    Attributes:
        steps: Steps done.
        loss: Sum over examples of the loss.
        correct: Examples predicted correctly.
    """

    steps: int = 0
    loss: float = 0.0
    correct: int = 0


class History(msgspec.Struct):
    """The history of a run over all of its attempts.

    Attributes:
        epochs: The line of ``metrics.jsonl`` for each finished epoch.
        progress: Sums of the unfinished epoch.
        epoch_seconds: Training time spent in that epoch.
        elapsed_seconds: Time spent in training and validation since the start of the run.
    """

    epochs: list[EpochRecord] = []
    progress: Progress = Progress()
    epoch_seconds: float = 0.0
    elapsed_seconds: float = 0.0

    @property
    def best(self) -> BestEpoch | None:
        """Epoch and accuracy of the best validation, the first one of equals; None before any."""
        if not self.epochs:
            return None
        best = max(self.epochs, key=lambda line: line.val_accuracy)
        return BestEpoch(best.epoch, best.val_accuracy)

    @property
    def epochs_begun(self) -> int:
        """Number of epochs that are finished or have at least one step done."""
        return len(self.epochs) + (self.progress.steps > 0)

    def finish_epoch(self, line: EpochRecord) -> None:
        """Add an epoch's line and begin the next epoch."""
        self.epochs.append(line)
        self.progress, self.epoch_seconds = Progress(), 0.0

    def write_metrics(self, output: OutputDir) -> None:
        """Write the whole ``metrics.jsonl``, so it never has a gap or an incomplete line.

        Raises:
            UserError: If it cannot be written.
        """
        output.write_bytes(METRICS, b"".join(encode(line) + b"\n" for line in self.epochs))


class _Metadata(msgspec.Struct):
    format: Literal[1]
    fingerprint: Fingerprint
    history: History


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after a step.

    Attributes:
        step: Steps done since the start of the run.
        arrays: The variables of network and optimizer, by name.
        fingerprint: Fingerprint of the attempt that saved it.
        history: History of the run so far.
    """

    step: int
    arrays: Arrays
    fingerprint: Fingerprint
    history: History

    def to_bytes(self) -> bytes:
        """Everything except the step, as the content of an ``.npz`` file."""
        buffer = io.BytesIO()
        metadata = encode(_Metadata(1, self.fingerprint, self.history)).decode()
        members: dict[str, Any] = {**self.arrays, _METADATA: np.array(metadata)}
        np.savez(buffer, **members)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, step: int, content: bytes) -> "Checkpoint":
        """The checkpoint with content from `to_bytes`.

        Raises:
            ValueError: If the content has the format of another version of this program.
        """
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        metadata = decode(str(arrays.pop(_METADATA)), _Metadata)
        return cls(step, arrays, metadata.fingerprint, metadata.history)


class CheckpointStore:
    """The checkpoints of an output folder.

    A checkpoint is one file, ``<number>-step-<step>-<checksum>.npz``. The checksum, the first
    digits of the content's SHA-256, reveals a damaged file. The numbers give the order.

    Args:
        output: The folder that contains them in ``checkpoints/``.
    """

    def __init__(self, output: OutputDir) -> None:
        self._output = output
        self._folder = output.path / CHECKPOINTS
        self._kept: list[Path] = []
        self._last_number = 0

    @property
    def latest(self) -> Path | None:
        """The checkpoint last saved or loaded by this process."""
        return self._kept[-1] if self._kept else None

    def load_latest(self) -> Checkpoint | None:
        """Load the newest intact checkpoint, and report the damaged ones.

        Returns:
            None if there is none.

        Raises:
            UserError: If all are damaged, one cannot be read at all, or the newest intact one is
                from another version of this program.
        """
        checkpoints = self._list()
        for number, step, path in reversed(checkpoints):
            self._last_number = max(self._last_number, number)
            try:
                content = path.read_bytes()
            except OSError as error:
                raise refused("read", path, error) from error
            if _name(number, step, content) != path.name:
                log.event(
                    "checkpoint_damaged",
                    logging.WARNING,
                    path=str(path),
                    message=f"the checkpoint {path} is damaged: its content does not match the "
                    f"checksum in its name; skipping it",
                )
                continue
            self._kept = [path]
            try:
                return Checkpoint.from_bytes(step, content)
            except ValueError as error:
                raise UserError(
                    f"cannot use the checkpoint {path}: {error}; resume with the version of this "
                    f"program that wrote it, or start over with --fresh"
                ) from error
        if checkpoints:
            raise UserError(
                f"no checkpoint in {self._folder} is intact, expected one to resume from; restore "
                f"one from a backup, or start over with --fresh"
            )
        return None

    def save(self, checkpoint: Checkpoint) -> int:
        """Write a checkpoint, then remove all but the two last good ones.

        Returns:
            Its size in bytes.

        Raises:
            UserError: If it cannot be written; all earlier ones are kept.
        """
        content = checkpoint.to_bytes()
        if not self._kept:
            self._output.make_folder(CHECKPOINTS)
        self._last_number += 1
        name = _name(self._last_number, checkpoint.step, content)
        self._output.write_bytes(f"{CHECKPOINTS}/{name}", content)
        self._kept = [*self._kept, self._folder / name][-_KEPT:]
        self._output.remove([path for *_, path in self._list() if path not in self._kept])
        return len(content)

    def _list(self) -> list[tuple[int, int, Path]]:
        """Numbers, steps and paths of all checkpoints, in order."""
        try:
            paths = list(self._folder.iterdir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise refused("read", self._folder, error) from error
        matches = [(path, _NAME.fullmatch(path.name)) for path in paths]
        return sorted((int(match[1]), int(match[2]), path) for path, match in matches if match)


def _name(number: int, step: int, content: bytes) -> str:
    digest = hashlib.sha256(content).hexdigest()[:_DIGITS]
    return f"{number:06d}-step-{step:08d}-{digest}.npz"
