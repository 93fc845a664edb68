"""Pictures that ``--png`` drew, told from other files, so that it replaces nothing else."""

import struct
import zlib
from pathlib import Path

# Signature and header, which come first in every PNG file; comments may follow.
_HEAD_BYTES = 33
_COMMENT = b"Comment\0cifar10-job --png"
_MARK = b"tEXt" + _COMMENT
_CHUNK = struct.pack(">I", len(_COMMENT)) + _MARK + struct.pack(">I", zlib.crc32(_MARK))


def mark_as_own(png: Path) -> None:
    """Add a comment to a PNG file by which `is_own` knows it."""
    content = png.read_bytes()
    png.write_bytes(content[:_HEAD_BYTES] + _CHUNK + content[_HEAD_BYTES:])


def is_own(png: Path) -> bool:
    """Whether a file is a picture that was marked.

    Raises:
        OSError: If it cannot be read.
    """
    if not png.is_file():  # reading a pipe would wait
        return False
    with png.open("rb") as file:
        return file.read(_HEAD_BYTES + len(_CHUNK))[_HEAD_BYTES:] == _CHUNK
