"""The processes that train one run together: how they connect, exchange data and detect a loss.

All data is exchanged by TensorFlow's own runtime; this module only calls its collectives. In
addition to the gradients, which the strategy reduces, workers exchange a few documents, always all
workers at once.
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
    """The other workers that do not answer, with the reasons."""
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
    deadline = running_seconds() + 2 * _PROBE_SECONDS  # resolving a name has no timeout
    for thread in threads:
        thread.join(max(deadline - running_seconds(), 0.0))
    return dict(sorted(reasons.copy().items()))


def host_and_port(address: str) -> tuple[str, int]:
    """The parts of a worker's address."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


@contextlib.contextmanager
def naming_lost_workers(spec: ClusterSpec) -> Iterator[None]:
    """Turn TensorFlow's error about a lost worker into an error that names the worker.

    Raises:
        LostWorkerError: If another worker is lost.
    """
    try:
        yield
    except JobError:
        raise
    except Exception as error:
        losses = (one for one in _chain(error) if _is_loss(spec, one))
        loss = next(losses, None) if spec.count > 1 else None
        if loss is None:
            raise
        raise LostWorkerError(_lost(spec, str(loss))) from error


def _chain(error: BaseException | None) -> Iterator[tf.errors.OpError]:
    """TensorFlow's errors among this one and its causes: Keras raises some as its own errors."""
    while error:
        if isinstance(error, tf.errors.OpError):
            yield error
        error = error.__cause__ or error.__context__


def _is_loss(spec: ClusterSpec, error: tf.errors.OpError) -> bool:
    text = str(error)
    if _ABORTED in text:
        return True
    return isinstance(error, _LOSSES) and ("/job:worker" in text or bool(unreachable(spec)))


def _lost(spec: ClusterSpec, text: str) -> str:
    """Name the lost workers: those that do not answer, otherwise those in TensorFlow's message."""
    ranks = list(unreachable(spec))
    if not ranks:
        named = re.findall(r"/job:worker/(?:replica:0/)?task:(\d+)", text)
        ranks = sorted({int(rank) for rank in named} - {spec.index})
    names = ", ".join(map(spec.name, ranks)) or "one of the other workers"
    # The lines after the first one are the remote end's details about the connection.
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
    """Connect to the other workers.

    Args:
        spec: All workers.
        create: Creates the strategy over all of them, and returns once all are connected.
        timeout_seconds: Longest time to wait for them.

    Raises:
        LostWorkerError: If one of them is missing.
    """
    start = running_seconds()
    log.event(
        "waiting_for_workers",
        workers=list(spec.workers),
        index=spec.index,
        timeout_seconds=timeout_seconds,
        message=f"waiting at {spec.workers[spec.index]} for the other workers ({spec.count} in "
        f"total), at most {timeout_seconds:g} s",
    )
    deadline = start + timeout_seconds
    _bypass_proxies(spec)
    # While TensorFlow waits, this process handles no signal and runs no other thread. So it is
    # called only once all workers have started and are about to connect.
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
        message=f"all {spec.count} workers are connected after {seconds:.1f} s",
    )
    return strategy


def _bypass_proxies(spec: ClusterSpec) -> None:
    """Prevent TensorFlow from connecting to the workers through a proxy of the site."""
    hosts = [host_and_port(address)[0] for address in spec.workers]
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), *dict.fromkeys(hosts)]))


@contextlib.contextmanager
def _listen(spec: ClusterSpec, deadline: float) -> Iterator[None]:
    """Listen on this worker's port once it is free, to show the others that it has started.

    TensorFlow itself shares a port that is in use, for example by an earlier attempt of the run.
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
                    f"{problem}; end the process that listens on it, then run again"
                ) from error
            if not announced:
                log.event("port_in_use", logging.WARNING, port=port, message=f"{problem}; waiting")
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
    """Wait until all other workers answer in the same check."""
    seen: set[int] = set()
    while missing := unreachable(spec):
        seen |= set(range(spec.count)) - set(missing)
        if running_seconds() > deadline:
            # Other workers may have given up waiting and ended by now.
            ranks = [rank for rank in missing if rank not in seen] or list(missing)
            names = "; ".join(f"{spec.name(rank)} ({missing[rank]})" for rank in ranks)
            raise LostWorkerError(
                f"missing {names}; expected all {spec.count} workers within --join-timeout "
                f"{timeout_seconds:g} s; check the logs of the missing ones, and that names "
                f"resolve and ports are open between the nodes, then run again"
            )
        time.sleep(_POLL_SECONDS)


# Higher than the keys of all strategies, which count from 1.
_GROUP_KEY = 1_000_000
_WORD_BYTES = 8
_SHUTDOWN_SECONDS = 5.0
_SHUTDOWN_POLL_SECONDS = 0.02


class Workers:
    """The workers of a run, as used by one of them.

    Args:
        spec: The workers. If there are several, `rendezvous` must have connected them.
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
        """Whether this worker writes the files."""
        return self.spec.is_chief

    def gather(self, document: T) -> list[T]:
        """Give every worker the documents of all, in the order of their ranks.

        Waits until all workers have called this.

        Args:
            document: This worker's document, of any type that msgspec writes as JSON.

        Raises:
            LostWorkerError: If one of them is lost.
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
        """Refuse workers that differ from the chief in values that must be equal on all workers.

        Args:
            own: This worker's values, by their names for the user.

        Raises:
            UserError: On every worker, if one of them differs.
            LostWorkerError: If one of them is lost.
        """
        first, *others = self.gather(dict(own))
        differences = [
            f"{self.spec.name(rank)} has {name.replace('_', ' ')} {other.get(name)}, "
            f"{self.spec.name(0)} has {first.get(name)}"
            for rank, other in enumerate(others, start=1)
            for name in first | other
            if first.get(name) != other.get(name)
        ]
        if differences:
            self.end(
                UserError(
                    f"the workers differ, expected equal values: {'; '.join(differences)}; "
                    f"start all of them with the same options, data and image"
                )
            )

    def end(self, error: JobError) -> NoReturn:
        """Raise an error that every worker has detected, once all of them have called this.

        If a worker ended earlier, another one that is still checking could report it as lost.
        """
        with contextlib.suppress(LostWorkerError):
            self.shutdown()
        raise error

    def broadcast(self, content: bytes) -> bytes:
        """Give every worker the chief's content.

        Args:
            content: The chief's content; the content of other workers is ignored.

        Raises:
            LostWorkerError: If one of them is lost.
        """
        size = self.gather(len(content))[0]
        # The other workers add zeros.
        words = _as_words(content if self.is_chief else b"", size)
        words = self._call(tf.raw_ops.CollectiveReduceV2, words, merge_op="Add", final_op="Id")
        return words.tobytes()[:size]

    def barrier(self) -> None:
        """Wait until all workers have called this.

        Raises:
            LostWorkerError: If one of them is lost.
        """
        self.gather(None)

    def shutdown(self) -> None:
        """Disconnect from the other workers, once all of them have called this.

        Raises:
            LostWorkerError: If one of them is lost before that.
        """
        self.barrier()
        # The first worker to pass the barrier must not end yet: others may still read from it.
        with contextlib.suppress(LostWorkerError):
            self.barrier()
        # The chief serves the others, so it ends last.
        deadline = running_seconds() + _SHUTDOWN_SECONDS if self.is_chief else 0.0
        while running_seconds() < deadline and len(unreachable(self.spec)) < self.count - 1:
            time.sleep(_SHUTDOWN_POLL_SECONDS)

    def _call(
        self, collective: Callable[..., tf.Tensor], words: npt.NDArray[np.int64], **options: str
    ) -> npt.NDArray[np.int64]:
        """Call one of TensorFlow's collectives on all workers, each with as many words."""
        if self.count == 1:
            return words
        self._calls += 1
        # In host memory, because the devices may have no kernel for integers.
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
    """Content as [words] int64, which collectives accept, padded with zeros to at least a size."""
    padded = content.ljust(-(-size // _WORD_BYTES) * _WORD_BYTES, b"\0")
    return np.frombuffer(padded, np.int64)
