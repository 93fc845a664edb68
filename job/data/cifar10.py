"""CIFAR-10 from the official Python archive: found or downloaded, and checked before use.

The data set and its format are described at https://www.cs.toronto.edu/~kriz/cifar.html.
"""

import bz2
import contextlib
import gzip
import io
import logging
import lzma
import os
import pickle
import re
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar

import numpy as np
import numpy.typing as npt
from numpy._core.multiarray import _reconstruct

from job import log
from job.config import DownloadError, TrainConfig, UserError, redact_url
from job.data import Dataset, Location, ProgressBar, Source

if TYPE_CHECKING:
    import requests

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
_FILES = (*TRAIN_FILES, TEST_FILE)

TRAIN_EXAMPLES = 50_000
TEST_EXAMPLES = 10_000

_ROWS = 10_000
_ROW_BYTES = 3 * 32 * 32
_FILE_BYTES = _ROWS * (_ROW_BYTES + 1)  # minimum size: the images and their labels

# Names that a browser, a copy, wget or an unpacking program gives to the archive.
_ARCHIVE = re.compile(
    r"([^.].*)?cifar[-_]?10[-_](python|batches-py).*\.(tar|t?gz|tbz2?|bz2|txz|xz)(\.\d+)?", re.I
)
_PACKED = r"(\.(tar|t?gz|tbz2?|bz2|txz|xz|zst|zip|7z|rar))+"
# The versions for other languages, Kaggle's files, other packages, and parts of them or of the
# data, as paths in the data folder. CIFAR-100 is another data set.
_LOOK_ALIKE = re.compile(
    r"(.*[/ ])?cifar[-_]?10([-_](py|bin|mat|batches|images).*)?( ?\(\d+\))?"
    rf"{_PACKED}(\.(\w*part\w*|\w*download|tmp|aria2|\d+))?"
    r"|(.*/)?(data_batch_\d|test_batch|batches\.meta)(\.bin|\.mat|\.txt)?"
    r"|trainlabels\.csv|(train|test)\.7z|train/1\.png",
    re.I,
)

_WAITS_SECONDS = (2, 4, 8, 16, 30)  # between two tries of the download
_TIMEOUTS_SECONDS = (10, 30)  # for a connection, and for the next bytes

_PACKERS: dict[bytes, Any] = {b"\x1f\x8b": gzip, b"BZh": bz2, b"\xfd7zXZ": lzma}
_DAMAGES = (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError)  # of bytes in memory

ReadFile = Callable[[str], tuple[str, bytes]]


def load(config: TrainConfig) -> Dataset:
    """Load the 50,000 training and 10,000 test images in the official order.

    Raises:
        UserError: If the data cannot be found or is damaged.
    """
    try:
        path = locate(config.data_dir)
        return _assemble(_folder_reader(path) if path.is_dir() else _archive_reader(path))
    except OSError as error:
        raise _unreadable(config.data_dir, error) from error


def find(config: TrainConfig) -> Location:
    """Find the location from which `load` would read CIFAR-10.

    Raises:
        UserError: If the folder cannot be read, if it contains only something that looks like
            CIFAR-10, or if the download address is not an HTTP address.
    """
    try:
        path = locate(config.data_dir)
        if path.exists():
            return Location(f"in {path}")
    except OSError as error:
        raise _unreadable(config.data_dir, error) from error
    address = redact_url(config.cifar10_url)
    if not address.lower().startswith(("https://", "http://")):
        raise UserError(
            f"no CIFAR-10 in --data-dir {config.data_dir}, and --cifar10-url received {address!r}, "
            f"expected an address that begins with https:// or http://; if the file is already on "
            f"this machine, put it into --data-dir"
        )
    description = f"not in {config.data_dir}/; would be downloaded from {address}"
    return Location(description, (TRAIN_EXAMPLES, TEST_EXAMPLES))


def locate(data_dir: Path) -> Path:
    """Return the folder or archive with the data. Without data, return the path of the download.

    Raises:
        UserError: If the folder has only something that looks like the data, or the data twice.
        OSError: If the folder cannot be read.
    """
    if data_dir.is_file():
        return data_dir
    found = next(filter(None, ([*filter(_is_whole, paths)] for paths in _places(data_dir))), [])
    if len(found) == 1:
        return found[0]
    if found := sorted(found or _look_alikes(data_dir)):
        raise UserError(
            f"--data-dir {data_dir} received {', '.join(map(_describe, found[:3]))}, expected one "
            f"{FOLDER_NAME}/ with {TRAIN_FILES[0]} to {TRAIN_FILES[-1]} and {TEST_FILE}, or "
            f"{ARCHIVE_NAME}, CIFAR-10's version for Python; pass the folder that contains it, or "
            f"an empty folder to download it"
        )
    return data_dir / ARCHIVE_NAME


def _places(data_dir: Path) -> Iterator[list[Path]]:
    """The possible locations: official names first, then other names, then one folder deeper."""
    yield from ([data_dir / FOLDER_NAME], [data_dir / ARCHIVE_NAME], [data_dir])
    for entries in ("*", "*/*"):
        yield [path.parent for path in data_dir.glob(f"{entries}/{TEST_FILE}")]
        yield [path for path in data_dir.glob(entries) if _ARCHIVE.fullmatch(path.name)]


def _is_whole(path: Path) -> bool:
    """Whether this is a file that is not empty, or a folder with all batch files in full size."""
    return path.stat().st_size > 0 if path.is_file() else _incomplete(path) is None


def _incomplete(folder: Path) -> str | None:
    """The first batch file that is missing or truncated in a folder; None if there is none."""
    for name in _FILES:
        path = folder / name
        if not path.is_file() or path.stat().st_size < _FILE_BYTES:
            return name
    return None


def _look_alikes(data_dir: Path) -> set[Path]:
    """Paths that look like the data but are not: files, folders of batch files, broken links."""
    if not data_dir.exists():
        is_no_folder = data_dir.is_symlink() or re.search(f"{_PACKED}$", data_dir.name, re.I)
        return {data_dir} if is_no_folder else set()
    return {
        path.parent if path.name in _FILES else path
        for path in (*data_dir.glob("*"), *data_dir.glob("*/*"))
        if _LOOK_ALIKE.fullmatch(path.relative_to(data_dir).as_posix())
        or (FOLDER_NAME in path.name.lower() and not path.exists())
    }


def _describe(path: Path) -> str:
    if not path.exists():
        link = f"a link to {path.readlink()}, " if path.is_symlink() else ""
        return f"{path}, {link}which does not exist"
    if path.is_file():
        return str(path) if path.stat().st_size else f"{path}, an empty file"
    incomplete = _incomplete(path)
    return f"{path}/ without a complete {incomplete}" if incomplete else f"{path}/"


def _unreadable(data_dir: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot read {error.filename or data_dir}: {error.strerror or error}; "
        f"expected a readable {FOLDER_NAME}/ or {ARCHIVE_NAME} in --data-dir {data_dir}"
    )


def download(config: TrainConfig, bar: ProgressBar | None) -> None:
    """Download the official archive; it gets its name only once it is complete and verified.

    After an error that can pass, the download is tried again. The waits between the tries become
    longer and add up to a minute, or to more if the server requests it, within bounds. A signal
    also ends the process during a wait.

    Args:
        config: Contains the address and the folder, which is created if it is missing.
        bar: Shows the progress.

    Raises:
        UserError: If the folder cannot be written, the address does not provide the file, or the
            downloaded file is not the official archive.
        DownloadError: If an error that can pass has not passed after all tries.
    """
    import requests

    from job.data._http import explain, requested_wait

    data_dir, address = config.data_dir, redact_url(config.cifar10_url)
    log.event("download", url=address, message=f"downloading {address} to {data_dir}")
    for wait in (*_WAITS_SECONDS, None):
        try:
            _retrieve(config, bar)
            return
        except requests.RequestException as error:
            reason, passes = explain(error)
            problem = (
                f"no CIFAR-10 in --data-dir {data_dir}, and the download from {address} failed"
            )
            if not passes:
                raise UserError(
                    f"{problem} ({reason}); put {ARCHIVE_NAME} into that folder, or use --dataset "
                    f"synthetic"
                ) from error
            if wait is None:
                raise DownloadError(
                    f"{problem} ({reason}, {len(_WAITS_SECONDS) + 1} tries); run the same command "
                    f"again later, or put {ARCHIVE_NAME} into that folder"
                ) from error
            seconds = max(wait, requested_wait(error))
            log.event(
                "download_failed",
                logging.WARNING,
                url=address,
                reason=reason,
                wait_seconds=seconds,
                message=f"download of {address} failed ({reason}); trying again in {seconds} s",
            )
        time.sleep(seconds)


def _retrieve(config: TrainConfig, bar: ProgressBar | None) -> None:
    """Try the download once.

    Raises:
        UserError: If the folder cannot be written, or the file is not the official archive.
        requests.RequestException: If the address does not provide the file.
    """
    import pooch
    import requests

    data_dir, address, received = config.data_dir, redact_url(config.cifar10_url), ""

    def fetch(url: str, path: str, _pooch: object) -> None:
        nonlocal received
        received = _fetch(url, Path(path), bar)

    pooch.get_logger().setLevel(logging.ERROR)
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        pooch.retrieve(
            config.cifar10_url,
            known_hash=f"sha256:{ARCHIVE_SHA256}",
            fname=ARCHIVE_NAME,
            path=data_dir,
            downloader=fetch,
        )
        # Only its owner can read pooch's temporary file, but a data folder can be shared. On
        # volumes without file modes, the mount determines them.
        with contextlib.suppress(OSError):
            (data_dir / ARCHIVE_NAME).chmod(0o644)
    except requests.RequestException:
        raise
    except ValueError as error:
        raise UserError(
            f"the file downloaded from {address} is not the official archive: received {received}, "
            f"expected SHA-256 {ARCHIVE_SHA256}; the file was deleted; check the address and "
            f"whether the network requires a login, or put {ARCHIVE_NAME} into --data-dir "
            f"{data_dir} yourself"
        ) from error
    except OSError as error:
        # pooch adds its own text to the error message.
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise UserError(
            f"--data-dir {data_dir} contains neither {FOLDER_NAME}/ nor {ARCHIVE_NAME}, and the "
            f"download cannot be written there: {reason}; pass the folder that contains the data, "
            f"or one with 200 MB free that user {os.getuid()} can write"
        ) from error


def _fetch(url: str, path: Path, bar: ProgressBar | None) -> str:
    """Write the response of an address into a file, and return a description of it.

    Some servers label the archive ``Content-Encoding: gzip``, as if it were compressed only for the
    transfer, and others compress it a second time. So the received bytes are written unchanged, and
    then decompressed if they are not the archive yet.
    """
    import pooch
    import requests
    import urllib3

    try:
        response = requests.get(
            url, stream=True, timeout=_TIMEOUTS_SECONDS, headers={"Accept-Encoding": "identity"}
        )
    except requests.RequestException:
        raise
    except (OSError, ValueError, urllib3.exceptions.HTTPError) as error:
        # Raised for a certificate file that does not exist, or an address that cannot be parsed.
        raise requests.RequestException(error) from error
    with response, path.open("wb") as file:
        response.raise_for_status()
        response.raw.headers.pop("Content-Encoding", None)
        if bar:
            length = response.headers.get("Content-Length", "")
            bar.total = int(length) if length.isdecimal() else 0
            bar.reset()
        for chunk in response.iter_content(2**16):
            file.write(chunk)
            if bar:
                bar.update(len(chunk))
    if bar:
        bar.close()
    if pooch.file_hash(path) != ARCHIVE_SHA256:
        _unwrap(path, response)
    kind = response.headers.get("Content-Type", "unknown type")
    return f"{path.stat().st_size:,} bytes of {kind}"


def _unwrap(path: Path, response: "requests.Response") -> None:
    """Decompress a file that is not the archive yet.

    Raises:
        requests.ConnectionError: If the file is truncated and the server did not announce its size.
    """
    import requests

    unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)  # of the gzip format
    with contextlib.suppress(zlib.error):
        unpacked = unpacker.decompress(path.read_bytes())
        if unpacker.eof:
            path.write_bytes(unpacked)
        elif {"Content-Length", "Transfer-Encoding"}.isdisjoint(response.headers):
            raise requests.ConnectionError("the transfer ended early")


def _folder_reader(folder: Path) -> ReadFile:
    return lambda name: (str(folder / name), (folder / name).read_bytes())


def _archive_reader(archive: Path) -> ReadFile:
    content = archive.read_bytes()
    try:
        unpacked = _decompressed(content)
        tar = tarfile.open(fileobj=unpacked, mode="r:")  # noqa: SIM115 (`read` reads it)
        # If somebody packed the files again, they can be in another folder of the archive.
        members = {Path(member.name).name: member for member in tar if member.isfile()}
    except (tarfile.TarError, *_DAMAGES) as error:
        raise UserError(
            f"{archive} is truncated, damaged or not an archive ({error}); {_replacement(archive)}"
        ) from error

    def read(name: str) -> tuple[str, bytes]:
        file = tar.extractfile(members[name]) if name in members else None
        if file is None:
            first = next((member.name for member in members.values()), "none")
            raise UserError(
                f"{archive} contains no {FOLDER_NAME}/{name} (its first file: {first}), expected "
                f"the official CIFAR-10 archive for Python; {_replacement(archive)}"
            )
        return f"{archive}:{name}", file.read()

    return read


def _decompressed(content: bytes) -> BinaryIO:
    """Decompress the archive in memory. A download can have added a second compression.

    Everything is decompressed at once, because the checksum is at the end, behind the last file.
    """
    for magic, packer in _PACKERS.items():
        if content.startswith(magic):
            return _decompressed(packer.decompress(content))
    return io.BytesIO(content)


def _replacement(archive: Path) -> str:
    """The advice for a bad archive. A file of another name can have another purpose: keep it."""
    if archive.name != ARCHIVE_NAME:
        return f"pass a folder with {FOLDER_NAME}/ or the official {ARCHIVE_NAME} with --data-dir"
    return f"replace it with the official {ARCHIVE_NAME}, or delete it to download that archive"


def _assemble(read: ReadFile) -> Dataset:
    return Dataset(
        "cifar10", CLASS_NAMES, *_read_batches(read, TRAIN_FILES), *_read_batches(read, [TEST_FILE])
    )


def _read_batches(
    read: ReadFile, names: Sequence[str]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
    """Read the images, with channels last, and the labels of several batch files."""
    images = np.empty((len(names), _ROWS, 32, 32, 3), np.uint8)
    labels = np.empty((len(names), _ROWS), np.int32)
    for number, name in enumerate(names):
        data, labels[number] = _parse_batch(*read(name))
        # Copying one channel at a time takes half as long as a transposed copy.
        planes = data.reshape(_ROWS, 3, 32, 32)
        for channel in range(3):
            images[number, ..., channel] = planes[:, channel]
    return images.reshape(-1, 32, 32, 3), labels.reshape(-1)


def _parse_batch(
    source: str, content: bytes
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
    """Check one batch file; return its rows of pixels, one channel after the other, and labels."""

    def fail(received: str, expected: str) -> UserError:
        return UserError(
            f"{source}: received {received}, expected {expected}; "
            f"replace it with the file from the official CIFAR-10 archive"
        )

    try:
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
        data, labels = np.asarray(batch["data"]), np.asarray(batch["labels"])
    except Exception as error:  # a damaged pickle raises nearly anything
        received = f"unreadable content ({type(error).__name__}: {error})"
        raise fail(received, "a pickled dictionary with 'data' and 'labels'") from error
    if data.dtype != np.uint8 or data.shape != (_ROWS, _ROW_BYTES):
        raise fail(f"data {data.dtype} {data.shape}", f"uint8 {(_ROWS, _ROW_BYTES)}")
    if labels.dtype.kind != "i" or labels.shape != (_ROWS,):
        raise fail(f"labels {labels.dtype} {labels.shape}", f"{_ROWS} integers")
    if not 0 <= labels.min() <= labels.max() < len(CLASS_NAMES):
        raise fail(f"labels from {labels.min()} to {labels.max()}", "labels from 0 to 9")
    return data, labels.astype(np.int32)


def _dtype(code: str, _align: object, _copy: object) -> "np.dtype[Any]":
    # The archive's flags are the integers of Python 2, which NumPy warns about.
    return np.dtype(code)


class _ArrayUnpickler(pickle.Unpickler):
    """Builds NumPy arrays and plain containers, and refuses a pickle with anything else."""

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
                f"it contains {module}.{name}, but only NumPy arrays are allowed"
            ) from None


SOURCE = Source(load, find, download)
