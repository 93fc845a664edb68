"""The processes that train one run together: how they meet, exchange documents and notice a loss.

TensorFlow's own runtime carries everything; this module only calls its collectives. Besides the
gradients, which the strategy reduces, workers exchange a few documents, always all of them at once.
"""

import contextlib
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NoReturn, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from job import log
from job.clock import running_seconds, suspended_seconds
from job.cluster.scheduler import ClusterSpec
from job.config import JobError, LostWorkerError, UserError

T = TypeVar("T")

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
    deadline = running_seconds() + 2 * _PROBE_SECONDS  # a resolver has no bound of its own
    for thread in threads:
        thread.join(max(deadline - running_seconds(), 0.0))
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
    except JobError:
        raise
    except Exception as error:
        losses = (one for one in _chain(error) if _tells_of_a_loss(spec, one))
        loss = next(losses, None) if spec.count > 1 else None
        if loss is None:
            raise
        raise LostWorkerError(_lost(spec, str(loss))) from error


def _chain(error: BaseException | None) -> Iterator[tf.errors.OpError]:
    """TensorFlow's errors among this one and those behind it: Keras raises some as its own."""
    while error:
        if isinstance(error, tf.errors.OpError):
            yield error
        error = error.__cause__ or error.__context__


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
    reason = re.sub(r"\s+", " ", first).strip(" :by")[:160]
    if suspended := suspended_seconds():
        reason = f"this process was suspended for {suspended:.0f} s just before; {reason}"
    return (
        f"lost {names}, which has ended or does not answer ({reason}); run the same command again "
        f"on all workers to resume from the last checkpoint"
    )


_POLL_SECONDS = 0.2


def rendezvous(
    spec: ClusterSpec, create: Callable[[], tf.distribute.Strategy], timeout_seconds: float
) -> tf.distribute.Strategy:
    """Meet the other workers.

    Args:
        spec: Who they are.
        create: Makes the strategy over all of them, and returns once all are there.
        timeout_seconds: Longest time to wait for them.

    Raises:
        LostWorkerError: If they do not come.
    """
    start = running_seconds()
    log.event(
        "waiting_for_workers",
        workers=list(spec.workers),
        index=spec.index,
        timeout_seconds=timeout_seconds,
        message=f"waits at {spec.workers[spec.index]} for the others of {spec.count} workers, at "
        f"most {timeout_seconds:g} s",
    )
    deadline = start + timeout_seconds
    _bypass_proxies(spec)
    # While TensorFlow waits, no signal and no other thread gets through to this process. So it is
    # called when all workers have begun, and each is as good as there.
    with _listen(spec, deadline):
        _wait_for_others(spec, deadline, timeout_seconds)
    with naming_lost_workers(spec):
        strategy = create()
    seconds = running_seconds() - start
    log.event(
        "joined",
        workers=spec.count,
        index=spec.index,
        seconds=round(seconds, 3),
        message=f"all {spec.count} workers are there after {seconds:.1f} s",
    )
    return strategy


def _bypass_proxies(spec: ClusterSpec) -> None:
    """Keep TensorFlow from looking for the workers behind a proxy of the site."""
    hosts = [host_and_port(address)[0] for address in spec.workers]
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), *dict.fromkeys(hosts)]))


@contextlib.contextmanager
def _listen(spec: ClusterSpec, deadline: float) -> Iterator[None]:
    """Listen on this worker's port, for others to see that it has begun, once the port is free.

    TensorFlow would share it with whoever listens there, such as an earlier attempt of the run.
    """
    _, port = host_and_port(spec.workers[spec.index])
    announced, both = False, socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    while True:
        try:
            listener = socket.create_server(("", port), family=family, dualstack_ipv6=both)
            break
        except OSError as error:
            problem = f"port {port} of {spec.name(spec.index)} cannot be used: {error.strerror}"
            if running_seconds() > deadline:
                raise LostWorkerError(
                    f"{problem}; end the process that listens there, then run again"
                ) from error
            if not announced:
                log.event("port_in_use", logging.WARNING, port=port, message=f"{problem}; waits")
                announced = True
        time.sleep(_POLL_SECONDS)

    def accept() -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                listener.accept()[0].close()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # closing alone would leave `accept` waiting
        listener.close()


def _wait_for_others(spec: ClusterSpec, deadline: float, timeout_seconds: float) -> None:
    """Wait until all other workers are seen to listen, in one look."""
    seen: set[int] = set()
    while missing := unreachable(spec):
        seen |= set(range(spec.count)) - set(missing)
        if running_seconds() > deadline:
            # Others that have waited in vain may have ended by now.
            ranks = [rank for rank in missing if rank not in seen] or list(missing)
            names = "; ".join(f"{spec.name(rank)} ({missing[rank]})" for rank in ranks)
            raise LostWorkerError(
                f"missing {names}; expected all {spec.count} workers within --join-timeout "
                f"{timeout_seconds:g} s; see the logs of those, and whether names resolve and "
                f"ports are open between the nodes, then run again"
            )
        time.sleep(_POLL_SECONDS)


# Beyond all those of strategies, which count from 1.
_GROUP_KEY = 1_000_000
_WORD_BYTES = 8
_SHUTDOWN_SECONDS = 5.0
_SHUTDOWN_POLL_SECONDS = 0.02


class Workers:
    """All workers of a run, as one of them sees them.

    Args:
        spec: Who they are. Only `rendezvous` makes several of them meet.
    """

    def __init__(self, spec: ClusterSpec) -> None:
        self.spec = spec
        self._calls = 0

    @property
    def count(self) -> int:
        """Number of workers."""
        return self.spec.count

    @property
    def is_chief(self) -> bool:
        """Whether this is the one that writes."""
        return self.spec.is_chief

    def gather(self, document: T) -> list[T]:
        """Give every worker the documents of all, in the order of their ranks.

        Waits until all workers have come here.

        Args:
            document: This worker's, of any type that msgspec writes as JSON.

        Raises:
            LostWorkerError: If one of them is gone.
        """
        content = msgspec.json.encode(document)
        sizes = self._call(tf.raw_ops.CollectiveGatherV2, np.array([len(content)]))
        words = _as_words(content, int(sizes.max()))
        words = self._call(tf.raw_ops.CollectiveGatherV2, words)
        return [
            msgspec.json.decode(row.tobytes()[:size], type=type(document))
            for row, size in zip(words.reshape(self.count, -1), sizes, strict=True)
        ]

    def require_equal(self, own: Mapping[str, object]) -> None:
        """Refuse workers that differ from the chief in what all of them must have in common.

        Args:
            own: What this worker has, by its name for the user.

        Raises:
            UserError: If one differs, on every worker.
            LostWorkerError: If one of them is gone.
        """
        first, *others = self.gather(dict(own))
        differences = [
            f"{self.spec.name(rank)} has {name.replace('_', ' ')} {other.get(name)}, "
            f"{self.spec.name(0)} {first.get(name)}"
            for rank, other in enumerate(others, start=1)
            for name in first | other
            if first.get(name) != other.get(name)
        ]
        if differences:
            self.end(
                UserError(
                    f"the workers differ, expected the same on each: {'; '.join(differences)}; "
                    f"start all of them with the same options, data and image"
                )
            )

    def end(self, error: JobError) -> NoReturn:
        """Raise an error that all workers have found alike, once all of them are here.

        A worker that went at once would be taken for lost by one that is still looking.
        """
        with contextlib.suppress(LostWorkerError):
            self.shutdown()
        raise error

    def broadcast(self, content: bytes) -> bytes:
        """Give every worker what the chief has.

        Args:
            content: The chief's; that of others does not matter.

        Raises:
            LostWorkerError: If one of them is gone.
        """
        size = self.gather(len(content))[0]
        # The others add zeros to it.
        words = _as_words(content if self.is_chief else b"", size)
        words = self._call(tf.raw_ops.CollectiveReduceV2, words, merge_op="Add", final_op="Id")
        return words.tobytes()[:size]

    def barrier(self) -> None:
        """Wait until all workers have come here.

        Raises:
            LostWorkerError: If one of them is gone.
        """
        self.gather(None)

    def shutdown(self) -> None:
        """Part from the others, once all of them have come here.

        Raises:
            LostWorkerError: If one of them is gone before.
        """
        self.barrier()
        # The first to have gathered may not end yet: others may still be reading from it.
        with contextlib.suppress(LostWorkerError):
            self.barrier()
        # The chief serves the others, and so goes last.
        deadline = running_seconds() + _SHUTDOWN_SECONDS if self.is_chief else 0.0
        while running_seconds() < deadline and len(unreachable(self.spec)) < self.count - 1:
            time.sleep(_SHUTDOWN_POLL_SECONDS)

    def _call(
        self, collective: Callable[..., tf.Tensor], words: npt.NDArray[np.int64], **options: str
    ) -> npt.NDArray[np.int64]:
        """Call one of TensorFlow's collectives on all workers, of which each has as many words."""
        if self.count == 1:
            return words
        self._calls += 1
        # Only host memory: the devices may not have a kernel for numbers.
        host = f"/job:worker/task:{self.spec.index}/device:CPU:0"
        with naming_lost_workers(self.spec), tf.device(host):
            result: npt.NDArray[np.int64] = collective(
                input=words,
                group_size=self.count,
                group_key=_GROUP_KEY,
                instance_key=self._calls,
                ordering_token=[],
                **options,
            ).numpy()
        return result


def _as_words(content: bytes, size: int) -> npt.NDArray[np.int64]:
    """Content as [words] int64, which collectives take, with zeros up to at least a size."""
    padded = content.ljust(-(-size // _WORD_BYTES) * _WORD_BYTES, b"\0")
    return np.frombuffer(padded, np.int64)
