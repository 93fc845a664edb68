"""Which other workers of a run are gone: by who does not answer, and by what TensorFlow says."""

import contextlib
import re
import socket
import threading
import time
from collections.abc import Iterator

import tensorflow as tf

from job.cluster import ClusterSpec
from job.config import LostWorkerError

_PROBE_SECONDS = 2.0
_ABORTED = "Collective ops is aborted"
_LOSSES = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.FailedPreconditionError,
)


def unreachable(spec: ClusterSpec) -> dict[int, str]:
    """Which other workers do not answer, and why."""
    reasons = dict.fromkeys(range(spec.count), "no answer")
    del reasons[spec.index]

    def probe(rank: int) -> None:
        try:
            socket.create_connection(host_and_port(spec.workers[rank]), _PROBE_SECONDS).close()
            del reasons[rank]
        except OSError as error:
            reasons[rank] = error.strerror or str(error)

    threads = [threading.Thread(target=probe, args=(rank,), daemon=True) for rank in reasons]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 2 * _PROBE_SECONDS  # a resolver has no bound of its own
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0.0))
    return dict(sorted(reasons.copy().items()))


def host_and_port(address: str) -> tuple[str, int]:
    """The parts of a worker's address."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


@contextlib.contextmanager
def naming_lost_workers(spec: ClusterSpec) -> Iterator[None]:
    """Turn what TensorFlow raises if another worker is gone into an error that names it.

    Raises:
        LostWorkerError: If one is gone.
    """
    try:
        yield
    except tf.errors.OpError as error:
        if spec.count == 1 or not _tells_of_a_loss(spec, error):
            raise
        raise LostWorkerError(_lost(spec, str(error))) from error


def _tells_of_a_loss(spec: ClusterSpec, error: tf.errors.OpError) -> bool:
    text = str(error)
    if _ABORTED in text:
        return True
    return isinstance(error, _LOSSES) and ("/job:worker" in text or bool(unreachable(spec)))


def _lost(spec: ClusterSpec, text: str) -> str:
    """Who is gone: by who does not answer, else by what TensorFlow says."""
    ranks = list(unreachable(spec))
    if not ranks:
        told = re.findall(r"/job:worker/(?:replica:0/)?task:(\d+)", text)
        ranks = sorted({int(rank) for rank in told} - {spec.index})
    names = ", ".join(map(spec.name, ranks)) or "worker: one of the others"
    # Behind the first line come the remote end's own words on the connection.
    first = (text.partition(_ABORTED)[2] or text).partition("\nAdditional GRPC")[0]
    reason = re.sub(r"\s+", " ", first).strip(" :by")
    return (
        f"lost {names}, which has ended or does not answer ({reason[:160]}); run the same command "
        f"again on all workers to go on from the last checkpoint"
    )
