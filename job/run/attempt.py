"""One attempt at a run: its output folder, the checkpoint it resumes from, and how it ends."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from job import log
from job.cluster.scheduler import NO_RUN, RunIdentity, run_identity
from job.config import (
    ExitCode,
    JobError,
    StoppedError,
    TrainConfig,
    UserError,
    run_options,
)
from job.run.checkpoint import Checkpoint, CheckpointStore
from job.run.fingerprint import require_same_run
from job.run.folder import (
    MODEL,
    PREDICTION,
    PREDICTIONS,
    REPORT,
    OutputDir,
    is_file,
    prepare_output_dir,
    sha256_of,
)
from job.run.lease import LeaseLostError, acquire
from job.run.manifest import RunManifest
from job.run.record import Manifest, Outcome, read_evaluation, read_manifest, unless_damaged
from job.run.stop import StopRequest, Watchdog


@dataclass(frozen=True)
class Attempt:
    """What a training needs in addition to its configuration.

    Attributes:
        output: The run's folder, held by this process.
        manifest: Its ``run.json``.
        checkpoints: Its checkpoints.
        checkpoint: The one to resume from; None at the start of a run.
        stop: Requests to end early.
        fresh: Whether to discard the folder's contents once the training can begin.
        is_finished: Whether nothing is left to do.
        is_chief: Whether this process, and not another worker, writes the files.
    """

    output: OutputDir
    manifest: RunManifest
    checkpoints: CheckpointStore
    checkpoint: Checkpoint | None
    stop: StopRequest
    fresh: bool
    is_finished: bool
    is_chief: bool = True


@contextlib.contextmanager
def hold_output_dir(
    path: Path,
    stop: StopRequest,
    identity: RunIdentity = NO_RUN,
    before_takeover: Callable[[], None] = lambda: None,
    watchdog: Watchdog | None = None,
) -> Iterator[OutputDir]:
    """Hold an output folder for the duration of the body.

    Args:
        path: The folder; it is created if it does not exist.
        stop: Receives a request when a newer attempt takes the folder over.
        identity: The run whose older attempts this one replaces; none by default.
        before_takeover: Called before an older attempt is requested to stop; raises if this
            attempt could not resume the run.
        watchdog: Ends the process if the body hangs, or the release of the folder.

    Raises:
        UserError: If the folder cannot be used or another run holds it.
        LeaseLostError: If a newer attempt of this run holds it.
    """
    prepare_output_dir(path)
    lease = acquire(path, identity, stop, before_takeover)
    # Long calls in the body have their own watch. This one covers the rest: on a volume that
    # hangs, writing even a small file never returns.
    rest = watchdog.watch("a pause between two calls") if watchdog else contextlib.nullcontext()
    with stop.on_exit(lambda _code, _reason: lease.release()), rest:
        try:
            output = OutputDir(path, lease.check, lease.token)
            output.tidy()
            yield output
        finally:
            lease.release()


@contextlib.contextmanager
def open_attempt(
    config: TrainConfig, stop: StopRequest, watchdog: Watchdog | None = None
) -> Iterator[Attempt]:
    """Open an attempt at a run for the duration of the body, and record how it ends.

    Args:
        config: The run's configuration.
        stop: Ends the attempt early.
        watchdog: Ends the process if the attempt hangs.

    Raises:
        UserError: If the folder cannot be used, or contains another run.
        LeaseLostError: If a newer attempt of this run holds the folder.
    """
    if config.stop_after is not None:
        stop.stop_after(config.stop_after)
    identity = run_identity(os.environ, config.run_id)

    def require_same_options() -> None:
        running = unless_damaged(read_manifest, config.output_dir)
        if running and not config.fresh:
            require_same_run(run_options(running.config), run_options(config), config.output_dir)

    with hold_output_dir(
        config.output_dir, stop, identity, require_same_options, watchdog
    ) as output:
        attempt = inspect_output_dir(config, identity, output, stop)
        if attempt.is_finished:
            log.event(
                "finished",
                output_dir=str(config.output_dir),
                message=f"the run in {config.output_dir}/ is finished; raise --epochs to "
                f"resume it, start over with --fresh, or use another --output-dir",
            )
            yield attempt
            return
        attempt.manifest.begin(config)
        with recording_end(stop, attempt.manifest.finish):
            yield attempt


@contextlib.contextmanager
def recording_end(
    stop: StopRequest, record: Callable[[Outcome, str | None], None]
) -> Iterator[None]:
    """Record how the body ends, even if the process is ended immediately.

    Args:
        stop: Ends the process, or has requested the body to stop.
        record: Called with the outcome and, unless it is "done", the reason. Not called if another
            attempt has taken the folder over.
    """

    def record_exit(exit_code: ExitCode, reason: str) -> None:
        record("stopped" if exit_code == ExitCode.RUN_AGAIN else "failed", reason)

    with stop.on_exit(record_exit):
        try:
            yield
        except LeaseLostError:
            raise
        except BaseException as error:
            outcome: Outcome = "stopped" if isinstance(error, StoppedError) else "failed"
            reason = str(error)
            if not isinstance(error, JobError):
                reason = f"{type(error).__name__}: {error}"
            if type(error) is StoppedError:  # subclasses have their own reason
                reason = stop.reason or reason
            # An error while recording must not hide the original one.
            with contextlib.suppress(UserError, LeaseLostError):
                record(outcome, reason)
            raise
        record("done", None)


def inspect_output_dir(
    config: TrainConfig, identity: RunIdentity, output: OutputDir, stop: StopRequest
) -> Attempt:
    """Inspect the contents of the folder: a run to resume, a finished one, or nothing.

    Args:
        config: The run's configuration.
        identity: Which run this process is an attempt of.
        output: The folder, which is not changed and need not exist.
        stop: Its `advice` is set to what to do once the process has stopped.

    Raises:
        UserError: If the folder contains another run, or one that cannot be resumed.
    """
    earlier = unless_damaged(read_manifest, output.path)
    is_complete = earlier is not None and _is_complete(output.path, earlier)
    fresh = config.fresh and not _fresh_already_applied(config, identity, earlier, is_complete)
    checkpoints, manifest = CheckpointStore(output), RunManifest(output, identity, fresh=fresh)
    if fresh:
        if identity.name is None or identity.attempt == 0:
            # The same command starts over each time, unless a scheduler repeats it.
            stop.advice = "run the same command without --fresh to resume"
        return Attempt(output, manifest, checkpoints, None, stop, fresh, is_finished=False)
    checkpoint, is_finished = checkpoints.load_latest(), False
    options = run_options(config)
    if earlier and is_complete:
        require_same_run(run_options(earlier.config), options, output.path)
        is_finished = earlier.config.epochs == config.epochs
    if checkpoint:
        require_same_run(checkpoint.fingerprint.run, options, output.path)
        if earlier and earlier.config.epochs != config.epochs:
            log.event(
                "epochs_changed",
                logging.WARNING,
                received=config.epochs,
                earlier=earlier.config.epochs,
                message=f"resuming with --epochs {config.epochs}; the run in {output.path} used "
                f"{earlier.config.epochs} before",
            )
        begun = checkpoint.history.epochs_begun
        if config.epochs < begun:
            raise UserError(
                f"--epochs received {config.epochs}, expected at least {begun}, because the run in "
                f"{output.path} has already begun epoch {begun}; use a higher value, or start over "
                f"with --fresh"
            )
    if not (checkpoint or is_finished) and is_file(output.path / MODEL):
        raise UserError(
            f"--output-dir {output.path} contains a model but no checkpoint to resume from; use "
            f"another folder, or replace the model with --fresh"
        )
    return Attempt(output, manifest, checkpoints, checkpoint, stop, fresh, is_finished)


def _fresh_already_applied(
    config: TrainConfig, identity: RunIdentity, earlier: Manifest | None, is_complete: bool
) -> bool:
    """Whether an earlier attempt already applied --fresh: a scheduler repeats the whole command.

    A person who repeats the command wants to start over, even if the run is finished. If the
    attempt is the first of a scheduler's job, a person has repeated the command, in a Slurm
    allocation.
    """
    if earlier is None or identity.name is None or identity.attempt == 0:
        return False
    if is_complete and identity.attempt is None:
        return False
    started = any(
        attempt.fresh and attempt.run_id == identity.name and attempt.first_step is not None
        for attempt in earlier.attempts
    )
    if not started or run_options(earlier.config) != run_options(config):
        return False
    log.event(
        "fresh",
        message=f"an earlier attempt of {identity.name} already applied --fresh; not starting over "
        f"again",
    )
    return True


def _is_complete(folder: Path, manifest: Manifest) -> bool:
    """Whether a folder contains all artifacts of a finished run, and they belong together."""
    artifacts = (MODEL, PREDICTION, PREDICTIONS, REPORT)
    if manifest.outcome != "done" or not all(is_file(folder / name) for name in artifacts):
        return False
    evaluation = unless_damaged(read_evaluation, folder)
    return evaluation is not None and evaluation.model_sha256 == sha256_of(folder / MODEL)
