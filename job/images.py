"""Image files as they are named on the command line and found in folders."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from job.config import UserError
from job.terminal import printable

STDIN = "-"
"""In place of a path: standard input."""

UNREAD_FORMATS = {"BUFR", "GRIB", "HDF5", "MPEG", "PALM", "PDF", "WMF"}
"""Formats whose pixels Pillow cannot read, or only on Windows."""


@dataclass(frozen=True)
class Source:
    """Something that was named on the command line, or found in a folder that was.

    Attributes:
        name: Its path, as `os.fsdecode` gives it, or `STDIN`.
        problem: Why there is no image to read; None where it is to be read.
    """

    name: str
    problem: str | None = None


def find_images(names: Sequence[str]) -> list[Source]:
    """List files as given, and in place of each folder the images in it and in its subfolders.

    In folders an image is what has the suffix of a format that Pillow reads. Hidden files and
    folders are passed over, links to folders are not followed, and names go up.

    Args:
        names: Paths of files and folders, and `STDIN`.
    """
    return [source for name in names for source in _find(name)]


def require_no_source(target: Path, sources: Sequence[Source]) -> None:
    """Make sure that writing a file replaces none of the images, however the paths are spelt.

    Raises:
        UserError: If it is one of them.
    """
    wanted = _identity(str(target))
    for source in sources if wanted else ():
        if _identity(0 if source.name == STDIN else source.name) == wanted:
            raise UserError(
                f"received --png {printable(str(target))}, which is the image "
                f"{printable(source.name)} to be predicted and would be overwritten; name the "
                f"picture to be drawn otherwise"
            )


def _identity(file: str | int) -> tuple[int, int] | None:
    try:
        status = os.stat(file)  # noqa: PTH116 (it may be a descriptor)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def _find(name: str) -> Iterator[Source]:
    if name == STDIN or not os.path.isdir(name):  # noqa: PTH112 (a `Path` drops a leading ./)
        yield Source(name)
        return
    found = False
    for source in _walk(name, _image_suffixes()):
        found = True
        yield source
    if not found:
        yield Source(name, "no file in this folder has the suffix of an image format")


def _image_suffixes() -> frozenset[str]:
    suffixes = Image.registered_extensions()
    return frozenset(name for name, kind in suffixes.items() if kind not in UNREAD_FORMATS)


def _walk(folder: str, suffixes: frozenset[str]) -> Iterator[Source]:
    try:
        with os.scandir(folder) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
    except OSError as error:
        yield Source(folder, error.strerror)
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path, suffixes)
        # A pipe in a folder would be waited for; a broken link is a broken image.
        elif (entry.is_file() or entry.is_symlink()) and _suffix(entry.name) in suffixes:
            yield Source(entry.path)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 (`Path.suffix` makes a path first)
