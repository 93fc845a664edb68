import socket
import time

import pytest
import tensorflow as tf

from job.cluster import workers
from job.cluster.scheduler import ClusterSpec
from job.cluster.workers import rendezvous
from job.config import ExitCode, LostWorkerError
from tests.conftest import free_ports


def test_missing_workers_are_named_after_the_time_to_wait(three_workers: ClusterSpec) -> None:
    start = time.monotonic()
    with pytest.raises(LostWorkerError) as caught:
        rendezvous(three_workers, lambda: time.sleep(60), timeout_seconds=0.5)
    assert time.monotonic() - start < 10
    assert caught.value.exit_code == ExitCode.RUN_AGAIN
    assert str(caught.value).startswith(
        f"missing {three_workers.name(2)} (Connection refused); expected"
    )
    assert three_workers.name(1) not in str(caught.value)


def test_a_name_that_does_not_resolve_is_a_missing_worker() -> None:
    own = f"127.0.0.1:{free_ports(1)[0]}"
    spec = ClusterSpec((own, "no-such-host.invalid:2222"), 0)
    with pytest.raises(LostWorkerError, match=r"missing worker 1 \(no-such-host.invalid:2222\) \("):
        rendezvous(spec, lambda: time.sleep(60), timeout_seconds=0.5)


def test_a_port_that_is_taken_is_not_shared(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    spec = ClusterSpec((f"127.0.0.1:{port}", "127.0.0.1:1"), 0)
    with pytest.raises(LostWorkerError, match=f"port {port} of worker 0 .* cannot be used"):
        rendezvous(spec, lambda: pytest.fail("it must not begin"), timeout_seconds=0.5)


def test_what_goes_wrong_while_joining_is_raised(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "listen_again", lambda: None)
    ports = (free_ports(1)[0], listener.getsockname()[1])
    spec = ClusterSpec(tuple(f"127.0.0.1:{port}" for port in ports), 0)

    def fail() -> tf.distribute.Strategy:
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        rendezvous(spec, fail, timeout_seconds=5)


def test_who_was_there_and_has_ended_is_not_blamed_for_who_never_came(
    three_workers: ClusterSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = {2: "Connection refused"}
    looks = [never, {1: "Connection refused", **never}]
    monkeypatch.setattr(
        workers, "unreachable", lambda spec: looks.pop(0) if looks[1:] else looks[0]
    )
    with pytest.raises(LostWorkerError) as caught:
        rendezvous(three_workers, lambda: pytest.fail("it must not begin"), timeout_seconds=0.1)
    assert str(caught.value).startswith(f"missing {three_workers.name(2)} (Connection refused);")
    assert three_workers.name(1) not in str(caught.value)
