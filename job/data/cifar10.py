"""CIFAR-10 from the official Python archive: found, or downloaded, and checked before use.

The data set and its format are described at https://www.cs.toronto.edu/~kriz/cifar.html.
"""

import contextlib
import gzip
import io
import logging
import os
import pickle
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from numpy._core.multiarray import _reconstruct

from job import log
from job.config import TrainConfig, UserError, redact_url
from job.data import Dataset, Location, ProgressBar, Source

ARCHIVE_NAME = "cifar-10-python.tar.gz"
ARCHIVE_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
FOLDER_NAME = "cifar-10-batches-py"
CLASS_NAMES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
TRAIN_FILES = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST_FILE = "test_batch"

TRAIN_EXAMPLES = 50_000
TEST_EXAMPLES = 10_000

_ROWS = 10_000
_ROW_BYTES = 3 * 32 * 32

ReadFile = Callable[[str], tuple[str, bytes]]


def load(config: TrainConfig) -> Dataset:
    """Load the 50,000 training and 10,000 test images in the official order.

    Raises:
        UserError: If the data cannot be found, or is damaged.
    """
    try:
        path = _locate(config.data_dir)
        return _assemble(_folder_reader(path) if path.is_dir() else _archive_reader(path))
    except OSError as error:
        raise _unreadable(config.data_dir, error) from error


def find(config: TrainConfig) -> Location:
    """Say where `load` would take CIFAR-10 from.

    Raises:
        UserError: If the folder cannot be looked into.
    """
    try:
        path = _locate(config.data_dir)
        if path.exists():
            return Location(f"in {path}")
    except OSError as error:
        raise _unreadable(config.data_dir, error) from error
    address = redact_url(config.cifar10_url)
    description = f"not in {config.data_dir}/; would be downloaded from {address}"
    return Location(description, (TRAIN_EXAMPLES, TEST_EXAMPLES))


def _locate(data_dir: Path) -> Path:
    """The folder with the data where it is there, else the archive, which may not be there yet."""
    folder = data_dir / FOLDER_NAME
    return folder if folder.is_dir() else data_dir / ARCHIVE_NAME


def _unreadable(data_dir: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot read {error.filename or data_dir}: {error.strerror or error}; "
        f"expected {FOLDER_NAME}/ or {ARCHIVE_NAME} readable in --data-dir {data_dir}"
    )


def download(config: TrainConfig, bar: ProgressBar | None) -> None:
    """Download the official archive; it appears under its name only whole and verified.

    Args:
        config: Names the address, and the folder, which is made if it is not there.
        bar: Shows the progress.

    Raises:
        UserError: If the folder cannot be written, the address does not answer, or the file that
            it gave is not the official archive.
    """
    import pooch
    import requests

    data_dir, address = config.data_dir, redact_url(config.cifar10_url)
    log.event("download", url=address, message=f"downloading {address} to {data_dir}")
    pooch.get_logger().setLevel(logging.ERROR)
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        pooch.retrieve(
            config.cifar10_url,
            known_hash=f"sha256:{ARCHIVE_SHA256}",
            fname=ARCHIVE_NAME,
            path=data_dir,
            downloader=pooch.HTTPDownloader(progressbar=bar or False, timeout=30),
        )
        # pooch's temporary file is for its owner alone; a data folder may be shared. On volumes
        # without modes of their own the mount decides.
        with contextlib.suppress(OSError):
            (data_dir / ARCHIVE_NAME).chmod(0o644)
    except requests.RequestException as error:
        response = error.response
        reason = type(error).__name__ if response is None else f"HTTP {response.status_code}"
        raise UserError(
            f"no CIFAR-10 in --data-dir {data_dir} and {address} does not give it ({reason}); put "
            f"{ARCHIVE_NAME} there, or train with --dataset synthetic"
        ) from error
    except ValueError as error:
        raise UserError(
            f"the file downloaded from {address} is not the official archive: expected SHA-256 "
            f"{ARCHIVE_SHA256}; nothing was kept, check the address or put {ARCHIVE_NAME} into "
            f"--data-dir {data_dir} yourself"
        ) from error
    except OSError as error:
        # pooch puts its own words into the error's.
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise UserError(
            f"--data-dir {data_dir} has neither {FOLDER_NAME}/ nor {ARCHIVE_NAME}, and the "
            f"download cannot be written there: {reason}; name the folder that holds the data, or "
            f"one that user {os.getuid()} can write with 200 MB free"
        ) from error


def _folder_reader(folder: Path) -> ReadFile:
    return lambda name: (str(folder / name), (folder / name).read_bytes())


def _archive_reader(archive: Path) -> ReadFile:
    try:
        # All of it at once: the checksum is at the end, behind the last file.
        with gzip.open(archive) as stream:
            content = io.BytesIO(stream.read())
        tar = tarfile.open(fileobj=content)  # noqa: SIM115 (`read` reads it)
        names = tar.getnames()
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{archive} is truncated or damaged ({error}); delete it and run again to download it"
        ) from error

    def read(name: str) -> tuple[str, bytes]:
        path = f"{FOLDER_NAME}/{name}"
        file = tar.extractfile(path) if path in names else None
        if file is None:
            raise UserError(
                f"{archive} holds no {path}; expected the official CIFAR-10 archive, "
                f"delete the file and run again to download it"
            )
        return f"{archive}:{name}", file.read()

    return read


def _assemble(read: ReadFile) -> Dataset:
    images, labels = zip(*(_parse_batch(*read(name)) for name in TRAIN_FILES), strict=True)
    test_images, test_labels = _parse_batch(*read(TEST_FILE))
    return Dataset(
        name="cifar10",
        class_names=CLASS_NAMES,
        train_images=np.concatenate(images),
        train_labels=np.concatenate(labels),
        test_images=test_images,
        test_labels=test_labels,
    )


def _parse_batch(
    source: str, content: bytes
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
    """Check one batch file and return its images, channels last, and labels."""

    def fail(received: str, expected: str) -> UserError:
        return UserError(
            f"{source}: received {received}, expected {expected}; "
            f"replace it with the file of the official CIFAR-10 archive"
        )

    try:
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
        data, labels = np.asarray(batch["data"]), np.asarray(batch["labels"])
    except Exception as error:  # a damaged pickle raises nearly anything
        received = f"what cannot be read ({type(error).__name__}: {error})"
        raise fail(received, "a pickled dictionary with 'data' and 'labels'") from error
    if data.dtype != np.uint8 or data.shape != (_ROWS, _ROW_BYTES):
        raise fail(f"data {data.dtype} {data.shape}", f"uint8 {(_ROWS, _ROW_BYTES)}")
    if labels.dtype.kind != "i" or labels.shape != (_ROWS,):
        raise fail(f"labels {labels.dtype} {labels.shape}", f"{_ROWS} integers")
    if not 0 <= labels.min() <= labels.max() < len(CLASS_NAMES):
        raise fail(f"labels from {labels.min()} to {labels.max()}", "labels from 0 to 9")
    images = np.ascontiguousarray(data.reshape(_ROWS, 3, 32, 32).transpose(0, 2, 3, 1))
    return images, labels.astype(np.int32)


def _dtype(code: str, _align: object, _copy: object) -> "np.dtype[Any]":
    # The archive's flags are the integers of Python 2, which NumPy warns about.
    return np.dtype(code)


class _ArrayUnpickler(pickle.Unpickler):
    """Builds NumPy arrays and plain containers; a pickle that names anything else is refused."""

    _ALLOWED: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy", "dtype"): _dtype,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, and only NumPy arrays are allowed"
            ) from None


SOURCE = Source(load, find, download)
