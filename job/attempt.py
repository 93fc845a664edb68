"""One attempt at a run: the folder that it holds, what it goes on from, and how it ends."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from job import log
from job.checkpoint import Checkpoint, CheckpointStore
from job.cluster import NO_RUN, RunIdentity, run_identity
from job.config import ExitCode, JobError, LostWorkerError, StoppedError, TrainConfig, UserError
from job.fingerprint import require_same_run, run_options
from job.folders import prepare_output_dir
from job.lease import LeaseLostError
from job.manifest import RunManifest, earlier_manifest, was_started_fresh_by
from job.output import (
    EVALUATION,
    MODEL,
    PREDICTION,
    PREDICTIONS,
    REPORT,
    OutputDir,
    read_json,
    sha256_of,
)
from job.preemption import StopRequest, end_process
from job.takeover import acquire


@dataclass(frozen=True)
class Attempt:
    """What a training works with besides its configuration.

    Attributes:
        output: The folder of the run, held by this process.
        manifest: Its ``run.json``.
        checkpoints: Its checkpoints.
        checkpoint: The one to go on from; None at the start of a run.
        stop: Tells when to end early.
        fresh: Whether to discard what the folder holds once the training can begin.
        is_finished: Whether nothing is left to do.
        is_chief: Whether this process writes what there is to write, not another worker.
    """

    output: OutputDir
    manifest: RunManifest
    checkpoints: CheckpointStore
    checkpoint: Checkpoint | None
    stop: StopRequest
    fresh: bool
    is_finished: bool
    is_chief: bool = True

    def end_hung_process(self, *last_words: Callable[[], None]) -> None:
        """End the process after a call that did not return.

        Args:
            last_words: What to do before, besides recording it.
        """
        reason = "a call did not return within --stall-timeout"
        record = partial(self.manifest.finish, "failed", reason)
        end_process(ExitCode.DEFECT, [*last_words, record])


@contextlib.contextmanager
def hold_output_dir(
    path: Path,
    stop: StopRequest,
    identity: RunIdentity = NO_RUN,
    before_asking: Callable[[], None] = lambda: None,
    *,
    brief: bool = False,
) -> Iterator[OutputDir]:
    """Hold an output folder for the time of the body.

    Args:
        path: The folder; it is made if it is not there.
        stop: Is asked if the folder is.
        identity: The run whose older attempts are to make room; none by default.
        before_asking: Raises if they should not, because this attempt could not go on.
        brief: Whether a training should wait until the folder is given back.

    Raises:
        UserError: If it cannot be used or another run holds it.
        LeaseLostError: If a newer attempt of this run holds it.
    """
    prepare_output_dir(path)
    lease = acquire(path, identity, stop, before_asking, brief=brief)
    with stop.last_words(lambda _reason: lease.release()):
        try:
            output = OutputDir(path, lease)
            output.tidy()
            yield output
        finally:
            lease.release()


@contextlib.contextmanager
def open_attempt(config: TrainConfig, stop: StopRequest) -> Iterator[Attempt]:
    """Open an attempt at a run for the time of the body, and record how it ends.

    Args:
        config: The run's configuration.
        stop: Ends it early.

    Raises:
        UserError: If the folder cannot be used, or holds another run.
        LeaseLostError: If a newer attempt of this run holds the folder.
    """
    if config.stop_after_seconds is not None:
        stop.stop_after(config.stop_after_seconds)
    identity = run_identity(os.environ, config.run_id)

    def require_same_options() -> None:
        running = earlier_manifest(config.output_dir)
        if running and not config.fresh:
            require_same_run(running["config"], run_options(config), config.output_dir)

    with hold_output_dir(config.output_dir, stop, identity, require_same_options) as output:
        attempt = look_at(config, identity, output, stop)
        if attempt.is_finished:
            yield attempt
            return
        attempt.manifest.begin(config)
        with stop.last_words(lambda reason: attempt.manifest.finish("stopped", reason)):
            with _recording_failure(attempt):
                yield attempt
            attempt.manifest.finish("done")


@contextlib.contextmanager
def _recording_failure(attempt: Attempt) -> Iterator[None]:
    manifest = attempt.manifest
    try:
        yield
    except LostWorkerError as error:
        manifest.finish("stopped", str(error))
        raise
    except StoppedError as error:
        manifest.finish("stopped", attempt.stop.reason or str(error))
        raise
    except LeaseLostError:
        raise  # the folder is somebody else's now
    except BaseException as error:
        # What went wrong first is what the user must hear of.
        explained = isinstance(error, JobError)
        with contextlib.suppress(UserError, LeaseLostError):
            manifest.finish(
                "failed", str(error) if explained else f"{type(error).__name__}: {error}"
            )
        raise


def look_at(
    config: TrainConfig, identity: RunIdentity, output: OutputDir, stop: StopRequest
) -> Attempt:
    """Look at what the folder holds: a run to go on with, a finished one, or nothing.

    Args:
        config: The run's configuration.
        identity: Which run this process is an attempt of.
        output: The folder, in which nothing is changed; it need not exist.
        stop: Is told what to advise once the process has stopped.

    Raises:
        UserError: If the folder holds another run, or one that cannot go on.
    """
    document = earlier_manifest(output.path)
    is_complete = _is_complete(output.path, document)
    checkpoints = CheckpointStore(output)
    if config.fresh and not _has_started_over(config, identity, document, is_complete):
        manifest = RunManifest(output, identity, fresh=True)
        if identity.name is None:
            # Nothing would tell that the same command goes on with what this one has begun.
            stop.advice = "run the same command without --fresh to go on"
        return Attempt(output, manifest, checkpoints, None, stop, fresh=True, is_finished=False)
    checkpoint = checkpoints.load_latest()
    options = run_options(config)
    if is_complete:
        require_same_run(document["config"], options, output.path)
    if checkpoint:
        require_same_run(checkpoint.metadata["fingerprint"]["run"], options, output.path)
        _require_epochs(config, checkpoint.metadata["history"])
    is_finished = is_complete and document["config"]["epochs"] == config.epochs
    if not (checkpoint or is_finished) and (output.path / MODEL).exists():
        raise UserError(
            f"--output-dir {output.path} holds a model and no checkpoint to go on from; name "
            f"another folder, or replace the model with --fresh"
        )
    manifest = RunManifest(output, identity)
    return Attempt(output, manifest, checkpoints, checkpoint, stop, False, is_finished)


def _has_started_over(
    config: TrainConfig, identity: RunIdentity, document: dict[str, Any], is_complete: bool
) -> bool:
    """Whether --fresh was done by an earlier attempt: a scheduler repeats the whole command.

    A person who repeats it means another run, or to do a finished one over.
    """
    if not was_started_fresh_by(identity, document) or (is_complete and not identity.attempt):
        return False
    options = run_options(config)
    if {name: document["config"].get(name) for name in options} != options:
        return False
    log.event(
        "fresh",
        message=f"--fresh was done by an earlier attempt of {identity.name}; going on from there",
    )
    return True


def _is_complete(folder: Path, manifest: dict[str, Any]) -> bool:
    """Whether a folder has all the artifacts of a finished run, and they belong together."""
    if manifest.get("outcome") != "done":
        return False
    if not all((folder / name).exists() for name in (PREDICTION, PREDICTIONS, REPORT)):
        return False
    digest = read_json(folder / EVALUATION).get("model_sha256")
    return (folder / MODEL).exists() and sha256_of(folder / MODEL) == digest


def _require_epochs(config: TrainConfig, history: dict[str, Any]) -> None:
    begun = len(history["epochs"]) + (history["progress"]["steps"] > 0)
    if config.epochs < begun:
        raise UserError(
            f"--epochs received {config.epochs}, expected at least {begun}, which the run in "
            f"{config.output_dir} has begun; ask for more, or start over with --fresh"
        )
