"""The writer of ``run.json``: what ran, on which devices, in which attempts, and how each ended."""

import copy
import logging
import os
import platform
import socket
import subprocess
import threading
from importlib import metadata
from pathlib import Path

import msgspec

from job import __version__, log
from job.cluster.scheduler import RunIdentity
from job.config import TrainConfig, redacted
from job.run.folder import RUN, OutputDir
from job.run.record import (
    AttemptRecord,
    BestEpoch,
    DamagedError,
    Manifest,
    Outcome,
    TrainingRecord,
    encode,
    read_manifest,
)

_VERSIONED = ("tensorflow", "keras", "numpy", "h5py")


class RunManifest:
    """The manifest of one run over all of its attempts; this process is the last one.

    Safe to use from several threads.

    Args:
        output: The folder of the file.
        identity: The run of this attempt.
        fresh: Whether this attempt starts over as soon as it trains.

    Raises:
        UserError: By all methods, if the file cannot be written.
    """

    def __init__(self, output: OutputDir, identity: RunIdentity, *, fresh: bool = False) -> None:
        self._output = output
        self._lock = threading.Lock()
        self._fresh = fresh
        self._attempt = AttemptRecord(
            start=log.utc_now(),
            end=None,
            outcome="running",
            reason=None,
            run_id=identity.name,
            fresh=fresh,
            host=socket.gethostname(),
        )
        self._manifest = self._read()
        for attempt in self._manifest.attempts if self._manifest else ():
            if attempt.end is None:
                attempt.outcome = "lost"
                attempt.reason = "no end recorded: killed, or its machine failed"

    @property
    def run_id(self) -> str | None:
        """The run's name; None if it has no name."""
        return self._attempt.run_id

    @property
    def document(self) -> Manifest | None:
        """The content of ``run.json``; None before the first attempt begins."""
        with self._lock:
            return copy.deepcopy(self._manifest)

    def begin(self, config: TrainConfig) -> None:
        """Add this attempt.

        Args:
            config: Its configuration; also the run's, if the run has none yet.
        """
        with self._lock:
            if self._manifest is None:
                self._manifest = self._describe(config, TrainingRecord())
            else:
                self._manifest.attempts.append(self._attempt)
            if self._manifest.outcome != "done":
                self._manifest.end, self._manifest.outcome = None, "running"
                self._manifest.error = None
            self._write(self._manifest)

    def start_training(
        self, config: TrainConfig, training: TrainingRecord, step: int, changes: list[str]
    ) -> None:
        """Record that this attempt trains.

        Args:
            config: The run's configuration.
            training: Data, devices and settings that it trains with.
            step: The step that it resumes from.
            changes: Differences from the previous attempt that change the computed bits.
        """
        with self._lock:
            attempt = self._attempt
            attempt.first_step = attempt.last_step = step
            attempt.changes = changes
            attempt.devices = [device.model for device in training.devices or ()]
            if self._fresh:
                self._manifest = None
            self._manifest = self._describe(config, training)
            self._write(self._manifest)

    def progress(self, step: int, best: BestEpoch | None, elapsed_seconds: float) -> None:
        """Record the progress of the run while it trains.

        Args:
            step: Number of steps saved in a checkpoint.
            best: Epoch and accuracy of the best validation.
            elapsed_seconds: Time spent since the start of the run.
        """
        with self._lock:
            self._attempt.last_step = step
            if self._manifest:
                self._manifest.best = best
                self._manifest.elapsed_seconds = round(elapsed_seconds, 3)
                self._write(self._manifest)

    def finish(self, outcome: Outcome, reason: str | None = None) -> None:
        """Record the end of this attempt and its reason."""
        with self._lock:
            attempt, manifest = self._attempt, self._manifest
            if attempt.end or manifest is None:
                return  # the first end counts
            attempt.end, attempt.outcome, attempt.reason = log.utc_now(), outcome, reason
            if attempt.first_step is not None or manifest.outcome != "done":
                manifest.end, manifest.outcome = attempt.end, outcome
                manifest.error = reason if outcome == "failed" else None
            self._write(manifest)

    def _read(self) -> Manifest | None:
        try:
            return read_manifest(self._output.path)
        except DamagedError:
            path = self._output.path / RUN
            log.event(
                "manifest_damaged",
                logging.WARNING,
                path=str(path),
                message=f"{path} is damaged; its record of earlier attempts is lost, and this "
                f"attempt writes a new file",
            )
            return None

    def _describe(self, config: TrainConfig, training: TrainingRecord) -> Manifest:
        """Build a new manifest from this attempt and the record of earlier ones."""
        earlier = self._manifest
        return Manifest(
            **msgspec.structs.asdict(training),
            config=redacted(config),
            versions=versions(),
            git_commit=git_commit(),
            start=earlier.start if earlier else self._attempt.start,
            end=None,
            outcome="running",
            error=None,
            best=earlier.best if earlier else None,
            elapsed_seconds=earlier.elapsed_seconds if earlier else 0.0,
            attempts=earlier.attempts if earlier else [self._attempt],
        )

    def _write(self, manifest: Manifest) -> None:
        self._output.write_bytes(RUN, encode(manifest, indent=True))


def versions() -> dict[str, str]:
    """Versions of this job, Python and the libraries that determine a run's numbers."""
    libraries = {name: metadata.version(name) for name in _VERSIONED}
    return {"job": __version__, "python": platform.python_version(), **libraries}


def git_commit() -> str | None:
    """The commit of the image or checkout that this program runs from; None if unknown.

    An image contains no checkout; its build sets ``JOB_GIT_COMMIT``. For a checkout it is the
    commit that contains this file, not one of a repository in a parent folder or one that a
    variable names.
    """
    if "JOB_GIT_COMMIT" in os.environ:
        return os.environ["JOB_GIT_COMMIT"] or None
    file = Path(__file__).resolve()
    top = file.parents[2]
    command = ["git", f"--git-dir={top / '.git'}", "rev-parse", "HEAD"]
    try:
        result = subprocess.run(
            [*command, f"HEAD:{file.relative_to(top)}"],
            cwd=top,
            env={name: value for name, value in os.environ.items() if name[:4] != "GIT_"},
            capture_output=True,
            text=True,
            errors="replace",  # its message can contain a path
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.split()[0]
