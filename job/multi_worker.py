"""One training by several workers: the chief leads and writes, the others do as it does."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from job import log
from job.attempt import Attempt, open_attempt
from job.checkpoint import Checkpoint, CheckpointStore
from job.cluster import NO_RUN, ClusterSpec
from job.config import LostWorkerError, TrainConfig
from job.devices import require_promised_gpus
from job.fingerprint import run_options
from job.finished import report_finished
from job.lost_workers import naming_lost_workers
from job.manifest import RunManifest, describe_config, versions
from job.output import OutputDir
from job.placement import place_replicas_on_all
from job.preemption import StopRequest
from job.train import train_and_evaluate
from job.workers import Workers

# Besides those that make the run. Folders may be others on every worker.
_EQUAL_OPTIONS = ("epochs", "precision", "jit", "deterministic", "fresh")


def train_together(config: TrainConfig, spec: ClusterSpec, stop: StopRequest) -> None:
    """Train as one of several workers.

    Args:
        config: What to train and how; the same for all.
        spec: The workers.
        stop: Told to one of them, it stops all after the same step.

    Raises:
        UserError: If the configuration, the data or a folder must be changed first, or the workers
            differ in one of these.
        GpuMissingError: If a promised or required GPU cannot be used.
        LostWorkerError: If a worker does not come, or goes.
        StoppedError: If one of them was told to stop; the chief has saved the state.
        JobError: If the loss is no finite number any more.
    """
    require_promised_gpus(config)
    placement = place_replicas_on_all(config.devices, spec, config.join_timeout_seconds)
    workers = placement.workers
    if not workers.is_chief:
        log.event(
            "following",
            message=f"follows {spec.name(0)}, whose log tells how the run goes on",
        )
        log.only_warnings()
    options = {**run_options(config), **{n: describe_config(config)[n] for n in _EQUAL_OPTIONS}}
    workers.require_equal({**options, "versions": versions()})
    with _open_attempt_of_all(config, stop, workers) as attempt:
        if not attempt.is_finished:
            with naming_lost_workers(spec):
                train_and_evaluate(config, attempt, placement)
        elif workers.is_chief:
            report_finished(config, attempt)
    try:
        # Were others to end earlier, nobody would be there for a chief that is started again.
        workers.leave()
    except LostWorkerError:
        if not workers.is_chief:
            raise


@contextlib.contextmanager
def _open_attempt_of_all(
    config: TrainConfig, stop: StopRequest, workers: Workers
) -> Iterator[Attempt]:
    """Open the chief's attempt, and on the others one that goes on from the same checkpoint.

    Only the chief needs the output folder.
    """
    if not workers.is_chief:
        yield _follow(config, stop, workers)
        return
    with open_attempt(config, stop) as attempt:
        checkpoint = attempt.checkpoint
        document = {
            "fresh": attempt.fresh,
            "is_finished": attempt.is_finished,
            "step": checkpoint.step if checkpoint else None,
        }
        workers.broadcast(json.dumps(document).encode())
        if checkpoint:
            workers.broadcast(checkpoint.to_bytes())
        yield attempt


def _follow(config: TrainConfig, stop: StopRequest, workers: Workers) -> Attempt:
    document = json.loads(workers.broadcast(b""))
    checkpoint = None
    if document["step"] is not None:
        checkpoint = Checkpoint.from_bytes(document["step"], workers.broadcast(b""))
    output = UnwrittenDir(config.output_dir)
    return Attempt(
        output,
        RunManifest(output, NO_RUN),
        CheckpointStore(output),
        checkpoint,
        stop,
        document["fresh"],
        document["is_finished"],
        is_chief=False,
    )


class UnwrittenDir(OutputDir):
    """The output folder of a worker that is not the chief, and so neither reads nor writes it."""

    def check(self) -> None:
        """Do nothing: nobody can take away what this worker does not hold."""

    def write_bytes(self, name: str, content: bytes) -> None:
        """Do nothing."""

    def append_bytes(self, name: str, content: bytes) -> None:
        """Do nothing."""

    def make_folder(self, name: str) -> None:
        """Do nothing."""

    def remove(self, paths: list[Path]) -> None:
        """Do nothing."""

    def discard(self) -> None:
        """Do nothing."""
