"""The output folder: the names of its files, each written whole or not at all."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from job.config import UserError
from job.lease import Lease

MODEL = "cifar10_model.h5"
EVALUATION = "evaluation.json"
PREDICTION = "prediction.png"
PREDICTIONS = "predictions.npz"
REPORT = "report.html"
PICTURES = "report"
METRICS = "metrics.jsonl"
RUN = "run.json"
CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"

_PICTURE_NAMES = (
    *("accuracy", "loss", "throughput", "confusion", "classes", "reliability"),
    *("mistakes", "augmentation"),
)
REPORT_PICTURES = tuple(f"{PICTURES}/{name}.png" for name in _PICTURE_NAMES)

_ARTIFACTS = (
    *(MODEL, EVALUATION, PREDICTION, PREDICTIONS, METRICS, RUN),
    *(REPORT, *REPORT_PICTURES),
)
EVENT_FILES = f"{TENSORBOARD}/events.out.tfevents.{'[0-9]' * 6}"
"""Pattern of the names that the job gives its event files; other programs give longer ones."""
_PARTIAL = ".partial"
_DISCARDED = ".discarded"


class OutputDir:
    """A folder that this process may write into.

    Args:
        path: The folder.
        lease: Asked before each change whether the folder is still this process's; None where
            nobody else can want it.
    """

    def __init__(self, path: Path, lease: Lease | None = None) -> None:
        self.path = path
        self._lease = lease
        # Part of the name of temporary files, so that two processes do not share any.
        self._token = lease.token if lease else "0" * 8

    def check(self) -> None:
        """Make sure that the folder is still this process's to write into.

        Raises:
            LeaseLostError: If another attempt has taken it over.
            UserError: If it cannot be read any more.
        """
        if self._lease:
            self._lease.check()

    @contextlib.contextmanager
    def replacing(self, name: str) -> Iterator[Path]:
        """Write a file under a temporary name beside it, to take its name once it is on the disk.

        Args:
            name: The file to create or replace, relative to the folder.

        Yields:
            The temporary path, with the same suffix, for the caller to write and close.

        Raises:
            UserError: If the file cannot be written; an earlier one is still there, unchanged.
        """
        path = self.path / name
        temporary = path.with_name(f".{path.stem}.{self._token}{_PARTIAL}{path.suffix}")
        self.check()
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            self.check()
            temporary.replace(path)
            _flush_folder(path.parent)
        except OSError as error:
            self.check()  # who takes the folder over tidies it up, temporary files included
            raise _cannot_write(path, error) from error
        finally:
            # A volume that is gone has nothing left to tidy up, and that error came first.
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def write_bytes(self, name: str, content: bytes) -> None:
        """Replace a file.

        Raises:
            UserError: If it cannot be written.
        """
        with self.replacing(name) as temporary:
            temporary.write_bytes(content)

    def write_text(self, name: str, text: str) -> None:
        """Replace a text file.

        Raises:
            UserError: If it cannot be written.
        """
        self.write_bytes(name, text.encode())

    def write_json(self, name: str, document: dict[str, Any]) -> None:
        """Replace a JSON file, indented for people.

        Raises:
            UserError: If it cannot be written.
        """
        text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
        self.write_text(name, text + "\n")

    def append_bytes(self, name: str, content: bytes) -> None:
        """Add to the end of a file whose readers stop at the last whole record.

        Raises:
            UserError: If it is not there or cannot be written.
        """
        path = self.path / name
        self.check()
        try:
            # Never made anew: another attempt may have removed it to write its own.
            with path.open("rb+") as file:
                file.seek(0, os.SEEK_END)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            self.check()
            raise _cannot_write(path, error) from error

    def make_folder(self, name: str) -> None:
        """Make a folder in this one, if it is not there.

        Raises:
            UserError: If it cannot be made.
        """
        try:
            (self.path / name).mkdir(exist_ok=True)
            _flush_folder(self.path)
        except OSError as error:
            raise UserError(
                f"cannot make the folder {self.path / name}: {error.strerror or error}; mend the "
                f"volume or give user {os.getuid()} access, then run again"
            ) from error

    def remove(self, paths: list[Path]) -> None:
        """Remove files of this folder.

        Raises:
            UserError: If one cannot be removed.
        """
        for path in paths:
            self.check()
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise UserError(
                    f"cannot remove {path}: {error.strerror or error}; remove it, then run again"
                ) from error

    def discard(self) -> None:
        """Remove checkpoints and artifacts of an earlier run, and nothing else.

        All checkpoints go at once, so that a kill in between leaves none to be resumed from.

        Raises:
            UserError: If something cannot be removed.
        """
        self.check()
        checkpoints = self.path / CHECKPOINTS
        if checkpoints.exists():
            try:
                checkpoints.rename(self.path / f"{_DISCARDED}.{self._token}")
                _flush_folder(self.path)
            except OSError as error:
                raise UserError(
                    f"cannot remove {checkpoints}: {error.strerror or error}; remove it, then run "
                    f"again"
                ) from error
        self.remove([*(self.path / name for name in _ARTIFACTS), *self.path.glob(EVENT_FILES)])
        for folder in (PICTURES, TENSORBOARD):
            with contextlib.suppress(OSError):
                (self.path / folder).rmdir()  # unless somebody keeps a file of his own there
        self.tidy()

    def tidy(self) -> None:
        """Remove what killed processes left half-written, as far as that is possible."""
        with contextlib.suppress(OSError):
            for name in (".", CHECKPOINTS, PICTURES, TENSORBOARD):
                for path in self.path.glob(f"{name}/.*{_PARTIAL}*"):
                    path.unlink(missing_ok=True)
        for path in self.path.glob(f"{_DISCARDED}.*"):
            shutil.rmtree(path, ignore_errors=True)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty where there is none.

    Raises:
        UserError: If there is a file that cannot be read.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror or error}; mend the volume or give user "
            f"{os.getuid()} access"
        ) from error
    return document if isinstance(document, dict) else {}


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write {path}: {error.strerror or error}; free some space or mend the volume, then "
        f"run again"
    )


def _flush_folder(folder: Path) -> None:
    """Put a folder's entries on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
