"""Whether folders and files that a command is given will do, told before any work is done."""

import logging
import os
import re
import shutil
import tempfile
from pathlib import Path

from job import log
from job.config import UserError

_FREE_BYTES = 64 * 2**20


def prepare_output_dir(output_dir: Path, *, make: bool = True) -> None:
    """Make the output folder and prove that it can take the artifacts, changing none there.

    Args:
        output_dir: The folder.
        make: Whether to make it. Otherwise the nearest folder above it is tried in its place.

    Raises:
        UserError: If it is a file, cannot be written, or its volume is full.
    """
    try:
        if output_dir.exists() and not output_dir.is_dir():
            raise UserError(
                f"--output-dir {output_dir} is a file, expected a folder; name another path"
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
        free = shutil.disk_usage(folder).free
    except OSError as error:
        advice = "name another folder, or mend the volume"
        if isinstance(error, PermissionError):
            advice = (
                f"name a folder that user {os.getuid()} can write, change its owner, or run as its "
                f"owner (docker run --user, in Kubernetes securityContext.fsGroup)"
            )
        raise UserError(
            f"cannot write to --output-dir {output_dir}: {error.strerror or error}; {advice}"
        ) from error
    if free < _FREE_BYTES:
        raise UserError(
            f"--output-dir {output_dir} has {free // 2**20} MiB free, expected at least "
            f"{_FREE_BYTES // 2**20} MiB; free some space or name another folder"
        )


def warn_unless_mounted(output_dir: Path, mounts: Path = Path("/proc/self/mountinfo")) -> None:
    """Warn if the output folder is on no volume of its own, for it will go with its container.

    Args:
        output_dir: The folder, which need not exist.
        mounts: The kernel's table of this process's mounts, see proc(5).
    """
    escaped = [line.split()[4] for line in mounts.read_text().splitlines()]
    points = [
        Path(re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), name)) for name in escaped
    ]
    folder = output_dir.resolve()
    if not any(folder.is_relative_to(point) for point in points if point != Path("/")):
        log.event(
            "not_mounted",
            logging.WARNING,
            output_dir=str(output_dir),
            message=f"--output-dir {output_dir} is no mounted volume: everything in it is lost "
            f'with the container; mount one there, as in docker run -v "$PWD/output:{folder}"',
        )


def require_model(path: Path) -> None:
    """Refuse to go on without a model file.

    Raises:
        UserError: If there is none.
    """
    # Unlike `Path.is_file`, this also says no where the folder may not be looked into.
    if not os.path.isfile(path):  # noqa: PTH113
        raise UserError(f"there is no model {path}; train one first, or name its --output-dir")


def require_folder_for(png: Path) -> None:
    """Refuse to go on if a picture could not be written in the end.

    Raises:
        UserError: If its name is no PNG file's, or there is no folder for it.
    """
    if png.suffix.lower() != ".png":
        raise UserError(f"--png received {png}, expected a name that ends in .png")
    if not os.access(png.parent, os.W_OK):
        raise UserError(
            f"--png received {png}, expected a file in a folder that user {os.getuid()} can write; "
            f"make {png.parent}, or name another"
        )
