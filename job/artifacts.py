"""The files a run leaves behind, each written whole or not at all."""

import contextlib
import hashlib
import json
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import h5py
import keras

from job import __version__, log
from job.config import DeviceRequest, TrainConfig, UserError

MODEL = "cifar10_model.h5"
EVALUATION = "evaluation.json"
PREDICTION = "prediction.png"
METRICS = "metrics.jsonl"
RUN = "run.json"

_FREE_BYTES = 64 * 2**20
_VERSIONED = ("tensorflow", "keras", "numpy", "h5py")


def prepare_output_dir(output_dir: Path) -> None:
    """Make the output folder and prove that it can take the artifacts, changing none there.

    Raises:
        UserError: If it is a file, cannot be written, or its volume is full.
    """
    try:
        if output_dir.exists() and not output_dir.is_dir():
            raise UserError(
                f"--output-dir {output_dir} is a file, expected a folder; name another path"
            )
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir) as probe:
            probe.write(b"probe")
            probe.flush()
        free = shutil.disk_usage(output_dir).free
    except OSError as error:
        raise UserError(
            f"cannot write to --output-dir {output_dir}: {error.strerror or error}; name a folder "
            f"that user {os.getuid()} can write, or change its owner"
        ) from error
    if free < _FREE_BYTES:
        raise UserError(
            f"--output-dir {output_dir} has {free // 2**20} MiB free, expected at least "
            f"{_FREE_BYTES // 2**20} MiB; free some space or name another folder"
        )


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file under a temporary name beside it, to take its name once it is on the disk.

    Args:
        path: The file to create or replace.

    Yields:
        The temporary path, with the same suffix, for the caller to write and close.

    Raises:
        UserError: If the file cannot be written; an earlier one is still there, unchanged.
    """
    # One name: what a killed run left under it is overwritten, not added to.
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free some space or mend the volume, "
            f"then run again"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a text file.

    Raises:
        UserError: If it cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Replace a JSON file, indented for people.

    Raises:
        UserError: If it cannot be written.
    """
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_model(model: keras.Model, path: Path) -> None:
    """Save architecture, weights, loss, metrics and optimizer state as HDF5.

    Raises:
        UserError: If the file cannot be written.
    """
    with replacing(path) as temporary:
        model.save(temporary)


def load_model(path: Path) -> keras.Model:
    """Load a model that `save_model` wrote, ready to go on training.

    Keras's own `load_model` restores the weights and drops the optimizer's moments.

    Raises:
        UserError: If the file is missing or is no such model.
    """
    require_model(path)
    try:
        model = keras.models.load_model(path)
        # The optimizer that Keras loads was built before the network had variables.
        model.compile_from_config(model.get_compile_config())
        with h5py.File(path) as file:
            group = file["optimizer_weights"]
            names = [str(name) for name in group.attrs["weight_names"]]
            saved = [group[name][()] for name in names]
        for variable, value in zip(model.optimizer.variables, saved, strict=True):
            variable.assign(value)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} is no model of this job ({error}); train again, or name another --output-dir"
        ) from error
    return model


def require_model(path: Path) -> None:
    """Refuse to go on without a model file.

    Raises:
        UserError: If there is none.
    """
    # Unlike `Path.is_file`, this also says no where the folder may not be looked into.
    if not os.path.isfile(path):  # noqa: PTH113
        raise UserError(f"there is no model {path}; train one first, or name its --output-dir")


def read_run(path: Path) -> dict[str, Any]:
    """Read a run's manifest; empty where there is none that can be read."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


class MetricsFile:
    """The line-an-epoch history of a run; the whole file is replaced at each epoch."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: list[str] = []

    def append(self, record: dict[str, Any]) -> None:
        """Add an epoch.

        Raises:
            UserError: If the file cannot be written.
        """
        self._lines.append(json.dumps(record, allow_nan=False) + "\n")
        write_text(self._path, "".join(self._lines))


class RunManifest:
    """``run.json``: what ran, on what, and how it ended; on disk from the start.

    Args:
        path: Where it goes.
        config: The run's configuration.
        details: Further fields, such as devices and data.
    """

    def __init__(self, path: Path, config: TrainConfig, details: dict[str, Any]) -> None:
        self._path = path
        self._document: dict[str, Any] = {
            "config": describe_config(config),
            "versions": versions(),
            **details,
            "git_commit": git_commit(),
            "start": log.utc_now(),
            "end": None,
            "outcome": "running",
            "error": None,
        }
        write_json(path, self._document)

    def finish(self, outcome: str, error: str | None = None) -> None:
        """Record the end: "done", "failed" or "interrupted", and why.

        Raises:
            UserError: If the file cannot be written.
        """
        self._document |= {"end": log.utc_now(), "outcome": outcome, "error": error}
        write_json(self._path, self._document)


def describe_config(config: TrainConfig) -> dict[str, Any]:
    """The configuration as a flat JSON object, under the names of the command line's options."""
    fields = asdict(config)
    fields |= fields.pop("data")
    devices: DeviceRequest = config.devices
    fields["devices"] = f"{devices.kind}:{devices.count}" if devices.count else devices.kind
    fields["batch_size"] = fields.pop("global_batch_size")
    fields["stall_timeout"] = fields.pop("stall_timeout_seconds")
    return {key: str(value) if isinstance(value, Path) else value for key, value in fields.items()}


def versions() -> dict[str, str]:
    """Versions of this job, Python and the libraries that decide a run's numbers."""
    libraries = {name: metadata.version(name) for name in _VERSIONED}
    return {"job": __version__, "python": platform.python_version(), **libraries}


def git_commit() -> str | None:
    """The commit of the checkout that this program runs from; None outside of one."""
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
