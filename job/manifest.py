"""``run.json``: what ran, on what, in which attempts, and how each ended."""

import copy
import logging
import os
import platform
import socket
import subprocess
import threading
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from job import __version__, log
from job.addresses import without_secrets
from job.cluster import RunIdentity
from job.config import DeviceRequest, TrainConfig
from job.output import RUN, OutputDir
from job.run_record import DamagedError, read_manifest

DETAILS = (
    *("devices", "workers", "replicas", "threads", "precision", "xla", "deterministic", "data"),
    "recipe_fingerprint",
)
"""What the manifest says of devices, data and recipe, null before the first training."""

_VERSIONED = ("tensorflow", "keras", "numpy", "h5py")


class RunManifest:
    """The manifest of one run over all of its attempts, of which this process is the last.

    Safe to use from several threads.

    Args:
        output: The folder that has it or receives it.
        identity: Which run this attempt belongs to.
        fresh: Whether this attempt starts over, once it trains.
    """

    def __init__(self, output: OutputDir, identity: RunIdentity, *, fresh: bool = False) -> None:
        self._output = output
        self._lock = threading.Lock()
        self._document = self._read()
        self._fresh = fresh
        self._attempt: dict[str, Any] = {
            "start": log.utc_now(),
            "end": None,
            "outcome": "running",
            "reason": None,
            "run_id": identity.name,
            "fresh": fresh,
            "host": socket.gethostname(),
            "devices": [],
            "first_step": None,
            "last_step": None,
            "changes": [],
        }
        for attempt in self._document.get("attempts", []):
            if attempt["end"] is None:
                attempt |= {
                    "outcome": "lost",
                    "reason": "left no word: killed, or its machine failed",
                }

    @property
    def run_id(self) -> str | None:
        """The run's name; None where nothing tells."""
        run_id: str | None = self._attempt["run_id"]
        return run_id

    @property
    def document(self) -> dict[str, Any]:
        """What ``run.json`` has; empty before the first attempt begins."""
        with self._lock:
            return copy.deepcopy(self._document)

    def begin(self, config: TrainConfig) -> None:
        """Add this attempt.

        Args:
            config: What it was told; the run's, if there is no other yet.

        Raises:
            UserError: If the file cannot be written.
        """
        with self._lock:
            if not self._document:
                self._describe(config, dict.fromkeys(DETAILS))
            self._document.setdefault("attempts", []).append(self._attempt)
            if self._document["outcome"] != "done":
                self._document |= {"end": None, "outcome": "running", "error": None}
            self._write()

    def start_training(
        self, config: TrainConfig, details: dict[str, Any], step: int, changes: list[str]
    ) -> None:
        """Record that this attempt trains.

        Args:
            config: The run's configuration.
            details: The fields of `DETAILS`.
            step: The step it goes on from.
            changes: What differs from the attempt before, at the cost of identical bits.

        Raises:
            UserError: If the file cannot be written.
        """
        with self._lock:
            self._attempt |= {"first_step": step, "last_step": step, "changes": changes}
            self._attempt["devices"] = [device.get("model") for device in details["devices"]]
            if self._fresh:
                self._document = {"attempts": [self._attempt]}
            self._describe(config, details)
            self._write()

    def progress(self, step: int, best: dict[str, Any] | None, elapsed_seconds: float) -> None:
        """Record how far the run is.

        Args:
            step: Steps done that are in a checkpoint.
            best: Epoch and accuracy of the best validation.
            elapsed_seconds: Time spent since the start of the run.

        Raises:
            UserError: If the file cannot be written.
        """
        with self._lock:
            self._attempt["last_step"] = step
            self._document |= {"best": best, "elapsed_seconds": round(elapsed_seconds, 3)}
            self._write()

    def finish(self, outcome: str, reason: str | None = None) -> None:
        """Record the end of this attempt: "done", "stopped" or "failed", and why.

        Raises:
            UserError: If the file cannot be written.
        """
        with self._lock:
            if self._attempt["end"]:
                return  # the first end counts
            end = log.utc_now()
            self._attempt |= {"end": end, "outcome": outcome, "reason": reason}
            has_trained = self._attempt["first_step"] is not None
            if has_trained or self._document["outcome"] != "done":
                error = reason if outcome == "failed" else None
                self._document |= {"end": end, "outcome": outcome, "error": error}
            self._write()

    def _read(self) -> dict[str, Any]:
        try:
            return read_manifest(self._output.path)
        except DamagedError:
            path = self._output.path / RUN
            log.event(
                "manifest_damaged",
                logging.WARNING,
                path=str(path),
                message=f"{path} is damaged, and what it told of earlier attempts is lost; this "
                f"attempt writes it anew",
            )
            return {}

    def _describe(self, config: TrainConfig, details: dict[str, Any]) -> None:
        """Lay the manifest out anew, for the run as this attempt sees it."""
        earlier = self._document
        self._document = {
            "config": describe_config(config),
            "versions": versions(),
            **details,
            "git_commit": git_commit(),
            "start": earlier.get("start", self._attempt["start"]),
            "end": None,
            "outcome": "running",
            "error": None,
            "best": earlier.get("best"),
            "elapsed_seconds": earlier.get("elapsed_seconds", 0.0),
            "attempts": earlier.get("attempts", []),
        }

    def _write(self) -> None:
        self._output.write_json(RUN, self._document)


def earlier_manifest(folder: Path) -> dict[str, Any]:
    """The ``run.json`` that earlier attempts have left; empty where there is none.

    A damaged one is as none: this attempt writes it anew, and what decides how the run goes on is
    in its checkpoint.

    Raises:
        UserError: If it cannot be read.
    """
    try:
        return read_manifest(folder)
    except DamagedError:
        return {}


def was_started_fresh_by(identity: RunIdentity, document: dict[str, Any]) -> bool:
    """Whether an attempt of this run has started over, by the run's manifest."""
    return identity.name is not None and any(
        attempt["fresh"]
        and attempt["run_id"] == identity.name
        and attempt["first_step"] is not None
        for attempt in document.get("attempts", [])
    )


def describe_config(config: TrainConfig) -> dict[str, Any]:
    """The configuration as a flat JSON object, under the names of the command line's options.

    It is shown and kept, so that it has no password.
    """
    fields = asdict(config)
    fields = fields.pop("data") | fields
    fields["cifar10_url"] = without_secrets(fields["cifar10_url"])
    devices: DeviceRequest = config.devices
    fields["devices"] = f"{devices.kind}:{devices.count}" if devices.count else devices.kind
    fields["batch_size"] = fields.pop("global_batch_size")
    for name in ("stall_timeout", "join_timeout", "checkpoint_every", "stop_after"):
        fields[name] = fields.pop(f"{name}_seconds")
    return {key: str(value) if isinstance(value, Path) else value for key, value in fields.items()}


def versions() -> dict[str, str]:
    """Versions of this job, Python and the libraries that decide a run's numbers."""
    libraries = {name: metadata.version(name) for name in _VERSIONED}
    return {"job": __version__, "python": platform.python_version(), **libraries}


def git_commit() -> str | None:
    """The commit of the image or checkout that this program runs from; None where nothing tells.

    An image holds no checkout; its build sets ``JOB_GIT_COMMIT``.
    """
    if "JOB_GIT_COMMIT" in os.environ:
        return os.environ["JOB_GIT_COMMIT"] or None
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
