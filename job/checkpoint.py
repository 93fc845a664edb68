"""Checkpoints of a training run: complete or invisible, checked when they are read, two kept."""

import hashlib
import io
import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from job import log
from job.config import UserError
from job.output import CHECKPOINTS, OutputDir

Arrays = dict[str, npt.NDArray[Any]]

_FORMAT = 1
_KEPT = 2
_DIGITS = 16
_NAME = re.compile(rf"(\d+)-step-(\d+)-([0-9a-f]{{{_DIGITS}}})\.npz")
_METADATA = "metadata"


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after a step.

    Attributes:
        step: Steps done since the start of the run.
        arrays: The variables of network and optimizer, by name.
        metadata: A JSON object: everything else that the run needs to go on.
    """

    step: int
    arrays: Arrays
    metadata: dict[str, Any]

    def to_bytes(self) -> bytes:
        """Arrays and metadata as the content of an ``.npz`` file."""
        buffer = io.BytesIO()
        metadata = json.dumps({"format": _FORMAT, **self.metadata}, allow_nan=False)
        members: dict[str, Any] = {**self.arrays, _METADATA: np.array(metadata)}
        np.savez(buffer, **members)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, step: int, content: bytes) -> "Checkpoint":
        """What `to_bytes` made of a checkpoint.

        Raises:
            ValueError: If it has the format of another version of this program.
        """
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        metadata = json.loads(str(arrays.pop(_METADATA)))
        received = metadata.pop("format")
        if received != _FORMAT:
            raise ValueError(f"received format {received}, expected {_FORMAT}")
        return cls(step, arrays, metadata)


class CheckpointStore:
    """The checkpoints of an output folder.

    A checkpoint is one file, ``<number>-step-<step>-<checksum>.npz``: the checksum, the first
    digits of the SHA-256 of its content, tells a damaged file, and numbers tell the order.

    Args:
        output: The folder that has them in ``checkpoints/``.
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
        """Load the newest checkpoint that is intact, and say which ones were not.

        Returns:
            None if there is none.

        Raises:
            UserError: If none is intact, one cannot be read at all, or the newest is of another
                version of this program.
        """
        checkpoints = self._list()
        for number, path in reversed(checkpoints):
            self._last_number = max(self._last_number, number)
            try:
                content = path.read_bytes()
            except OSError as error:
                raise _unreadable(path, error) from error
            if _name(number, _step_of(path), content) != path.name:
                _report_damaged(path)
                continue
            self._kept = [path]
            return _parse(path, content)
        if checkpoints:
            raise UserError(
                f"no checkpoint in {self._folder} is intact, expected one to go on from; restore "
                f"one from a backup, or start over with --fresh"
            )
        return None

    def save(self, checkpoint: Checkpoint) -> int:
        """Write a checkpoint, then remove all but the two last good ones.

        Returns:
            Its size in bytes.

        Raises:
            UserError: If it cannot be written; all earlier ones are still there.
        """
        content = checkpoint.to_bytes()
        if not self._kept:
            self._output.make_folder(CHECKPOINTS)
        self._last_number += 1
        name = _name(self._last_number, checkpoint.step, content)
        self._output.write_bytes(f"{CHECKPOINTS}/{name}", content)
        self._kept = [*self._kept, self._folder / name][-_KEPT:]
        self._output.remove([path for _, path in self._list() if path not in self._kept])
        return len(content)

    def _list(self) -> list[tuple[int, Path]]:
        """Numbers and paths of all checkpoints, in order."""
        try:
            paths = list(self._folder.iterdir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _unreadable(self._folder, error) from error
        matches = [(path, _NAME.fullmatch(path.name)) for path in paths]
        return sorted((int(match[1]), path) for path, match in matches if match)


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot read {path}: {error.strerror or error}; mend the volume or give user "
        f"{os.getuid()} access, or remove it to go on without it"
    )


def _name(number: int, step: int, content: bytes) -> str:
    digest = hashlib.sha256(content).hexdigest()[:_DIGITS]
    return f"{number:06d}-step-{step:08d}-{digest}.npz"


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match[2]) if match else 0


def _parse(path: Path, content: bytes) -> Checkpoint:
    try:
        return Checkpoint.from_bytes(_step_of(path), content)
    except ValueError as error:
        raise UserError(
            f"cannot use the checkpoint {path}: {error}; go on with the version of this program "
            f"that wrote it, or start over with --fresh"
        ) from error


def _report_damaged(path: Path) -> None:
    log.event(
        "checkpoint_damaged",
        logging.WARNING,
        path=str(path),
        message=f"the checkpoint {path} is damaged: its content does not have the checksum in its "
        f"name; going on without it",
    )
