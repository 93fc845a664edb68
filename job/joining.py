"""How the workers of a run meet, within a time."""

import contextlib
import faulthandler
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import tensorflow as tf

from job import log
from job.cluster import ClusterSpec
from job.config import LostWorkerError
from job.lost_workers import host_and_port, naming_lost_workers, unreachable
from job.preemption import listen_again

_POLL_SECONDS = 0.2
_LEAST_JOIN_SECONDS = 60.0


def join(
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
    start = time.monotonic()
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
    # Against one that ends just then, or is another program: exit code 1, from outside of Python.
    bound = max(deadline - time.monotonic(), _LEAST_JOIN_SECONDS)
    faulthandler.dump_traceback_later(bound, exit=True)
    try:
        with naming_lost_workers(spec):
            strategy = create()
    finally:
        faulthandler.cancel_dump_traceback_later()
        listen_again()
    seconds = time.monotonic() - start
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
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    while True:
        try:
            listener = socket.create_server(("", port), family=family, dualstack_ipv6=both)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise LostWorkerError(
                    f"port {port} of {spec.name(spec.index)} cannot be used: {error.strerror}; end "
                    f"the process that listens there, then run again"
                ) from error
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
        if time.monotonic() > deadline:
            # Others that have waited in vain may have ended by now.
            ranks = [rank for rank in missing if rank not in seen] or list(missing)
            names = "; ".join(f"{spec.name(rank)} ({missing[rank]})" for rank in ranks)
            raise LostWorkerError(
                f"missing {names}; expected all {spec.count} workers within --join-timeout "
                f"{timeout_seconds:g} s; see the logs of those, and whether names resolve and "
                f"ports are open between the nodes, then run again"
            )
        time.sleep(_POLL_SECONDS)
