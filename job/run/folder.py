"""The output folder: the names of its files, and writing them atomically."""

import contextlib
import errno
import functools
import hashlib
import logging
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from job import log
from job.config import UserError
from job.environment import remedy

_FREE_BYTES = 64 * 2**20


def prepare_output_dir(output_dir: Path, *, make: bool = True) -> None:
    """Create the output folder and verify that it can be written, without changing its files.

    Args:
        output_dir: The folder.
        make: Whether to create it. If not, the nearest existing folder above it is checked instead.

    Raises:
        UserError: If it is a file, cannot be written, or its volume is full.
    """
    try:
        if output_dir.exists() and not output_dir.is_dir():
            raise UserError(
                f"--output-dir {output_dir} is a file, expected a folder; use another path"
            )
        folder = output_dir
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        else:
            above = (output_dir, *output_dir.absolute().parents)
            folder = next(path for path in above if path.exists())
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"probe")
            probe.flush()
    except OSError as error:
        raise UserError(
            f"cannot write to --output-dir {output_dir}: {error.strerror or error}; "
            f"{remedy(error)}, or use another folder"
        ) from error
    free = free_bytes(folder)
    if free is not None and free < _FREE_BYTES:
        raise UserError(
            f"--output-dir {output_dir} has {free // 2**20} MiB free, expected at least "
            f"{_FREE_BYTES // 2**20} MiB; free some space or use another folder"
        )


def free_bytes(folder: Path) -> int | None:
    """The free space of a folder's volume; None if the volume does not report it."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return usage.free if usage.total else None


def warn_unless_mounted(output_dir: Path, mounts: Path = Path("/proc/self/mountinfo")) -> None:
    """Warn if the output folder is not on a mounted volume: it is deleted with its container.

    Args:
        output_dir: The folder, which need not exist.
        mounts: The kernel's table of this process's mounts, see proc(5).
    """
    escaped = [line.split()[4] for line in mounts.read_bytes().splitlines()]
    points = [
        Path(os.fsdecode(re.sub(rb"\\(\d{3})", lambda code: bytes([int(code[1], 8)]), name)))
        for name in escaped
    ]
    folder = output_dir.resolve()
    if not any(folder.is_relative_to(point) for point in points if point != Path("/")):
        log.event(
            "not_mounted",
            logging.WARNING,
            output_dir=str(output_dir),
            message=f"--output-dir {output_dir} is not on a mounted volume: its contents are lost "
            f'with the container; mount a volume, as in docker run -v "$PWD/output:{folder}"',
        )


def require_model(path: Path) -> None:
    """Require a model file.

    Raises:
        UserError: If it does not exist, or the system refuses access.
    """
    if is_file(path):
        return
    if next(path.with_name(CHECKPOINTS).glob("*.npz"), None):
        advice = "the run in that folder is not finished: run its train command again"
    elif below := folders_with(MODEL, path.parent):
        advice = f"use --output-dir {below}"
    else:
        advice = "train a model first, or use the --output-dir of a finished run"
    raise UserError(f"no model file {path}; {advice}")


def folders_with(name: str, folder: Path) -> str:
    """Subfolders that contain a file of this name, at most three, joined with "or"."""
    found: list[str] = []
    with contextlib.suppress(OSError):  # if the folder cannot be read
        found += sorted(str(path.parent) for path in folder.glob(f"*/{name}"))
    return " or ".join(found[:3])


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

ARTIFACTS = (
    *(MODEL, EVALUATION, PREDICTION, PREDICTIONS, METRICS),
    *(REPORT, *REPORT_PICTURES),
)
"""Files that a run leaves, in addition to ``run.json``, checkpoints and event files."""

EVENT_FILES = f"{TENSORBOARD}/events.out.tfevents.{'[0-9]' * 6}"
"""Pattern of the names of the job's event files; other programs use longer names."""
_PARTIAL = ".partial"
_DISCARDED = ".discarded"


class OutputDir:
    """A folder that this process may write into.

    Args:
        path: The folder.
        check: Called before each change; raises if this process no longer holds the folder.
        token: Part of the names of temporary files, so that two processes never share one.

    Attributes:
        path: The folder.
        check: As given.

    Raises:
        UserError: By all methods except `tidy`, if a file cannot be written or removed.
    """

    def __init__(
        self, path: Path, check: Callable[[], None] = lambda: None, token: str | None = None
    ) -> None:
        self.path, self.check = path, check
        self._token = token or uuid.uuid4().hex[:8]

    @contextlib.contextmanager
    def atomic_write(self, name: str) -> Iterator[Path]:
        """Write a file under a temporary name, and rename it once it is on the disk.

        Args:
            name: The file to create or replace, relative to the folder.

        Yields:
            The temporary path, with the same suffix, for the caller to write and close.

        Raises:
            UserError: If the file cannot be written; an earlier one stays unchanged.
        """
        path = self.path / name
        temporary = path.with_name(f".{path.stem}.{self._token}{_PARTIAL}{path.suffix}")
        with self._changing("write", path):
            try:
                yield temporary
                with temporary.open("rb+") as file:
                    flush(file.fileno())
                self.check()
                temporary.replace(path)
                _flush_folder(path.parent)
            finally:
                # If the volume is gone, nothing is left to remove, and the first error counts.
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)

    def write_bytes(self, name: str, content: bytes) -> None:
        """Replace a file."""
        with self.atomic_write(name) as temporary:
            temporary.write_bytes(content)

    def write_text(self, name: str, text: str) -> None:
        """Replace a text file."""
        self.write_bytes(name, text.encode())

    def append_bytes(self, name: str, content: bytes) -> None:
        """Append to a file whose readers stop at the last complete record."""
        # Never created here: another attempt may have removed it to write its own.
        with self._changing("write", self.path / name) as path, path.open("rb+") as file:
            file.seek(0, os.SEEK_END)
            file.write(content)
            file.flush()
            flush(file.fileno())

    def make_folder(self, name: str) -> None:
        """Create a subfolder if it does not exist."""
        with self._changing("create the folder", self.path / name) as path:
            path.mkdir(exist_ok=True)
            _flush_folder(self.path)

    def remove(self, paths: list[Path]) -> None:
        """Remove files of this folder."""
        for path in paths:
            with self._changing("remove", path):
                path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove checkpoints and artifacts of an earlier run, and nothing else.

        All checkpoints disappear in one step: after a kill in between, none is left to resume from.
        """
        with self._changing("remove", self.path / CHECKPOINTS) as checkpoints:
            if checkpoints.exists():
                checkpoints.rename(self.path / f"{_DISCARDED}.{self._token}")
                _flush_folder(self.path)
        self.remove([self.path / name for name in (*ARTIFACTS, RUN)])
        self.remove([*self.path.glob(EVENT_FILES)])
        for folder in (PICTURES, TENSORBOARD):
            with contextlib.suppress(OSError):
                (self.path / folder).rmdir()  # fails if it contains files of the user
        self.tidy()

    def tidy(self) -> None:
        """Remove the partial files of killed processes, as far as possible."""
        with contextlib.suppress(OSError):
            for name in (".", CHECKPOINTS, PICTURES, TENSORBOARD):
                for path in self.path.glob(f"{name}/.*{_PARTIAL}*"):
                    path.unlink(missing_ok=True)
        for path in self.path.glob(f"{_DISCARDED}.*"):
            shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def _changing(self, action: str, path: Path) -> Iterator[Path]:
        self.check()
        try:
            yield path
        except OSError as error:
            self.check()  # an attempt that takes the folder over removes temporary files
            raise refused(action, path, error) from error


def is_file(path: Path) -> bool:
    """Whether a path is an existing file.

    Raises:
        UserError: If the system refuses access, which does not mean that the file is missing.
    """
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            return False
        raise refused("read", path, error) from error


def read_file(path: Path) -> bytes | None:
    """A file's content; None if the file does not exist.

    Raises:
        UserError: If it exists and cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise refused("read", path, error) from error


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal.

    Raises:
        UserError: If it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise refused("read", path, error) from error


def refused(action: str, path: Path, error: OSError) -> UserError:
    """The error for an operation on a file that the system refuses; ``action`` names it."""
    return UserError(
        f"cannot {action} {path}: {error.strerror or error}; {remedy(error)}, then run again"
    )


def flush(descriptor: int) -> None:
    """Write an open file's content to the disk, as far as its volume supports that."""
    with _as_far_as_possible():
        os.fsync(descriptor)


def _flush_folder(folder: Path) -> None:
    """Write a folder's entries to the disk, as far as its volume supports that."""
    with _as_far_as_possible():
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# With these errors the call itself is refused, for example by shared folders, by FUSE and for
# folders without read permission. Any other error can mean that content was lost.
_CANNOT_FLUSH = (
    *(errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EISDIR),
    *(errno.EACCES, errno.EPERM),
)


@contextlib.contextmanager
def _as_far_as_possible() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _CANNOT_FLUSH:
            raise
        _warn_not_flushed()


@functools.cache  # once
def _warn_not_flushed() -> None:
    log.event(
        "not_flushed",
        logging.WARNING,
        message="the volume of --output-dir does not support fsync: if its machine crashes, the "
        "last checkpoint can be lost or damaged; the run then resumes from an earlier one",
    )
