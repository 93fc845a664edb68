import socket
import time
from typing import Any

import pytest
import tensorflow as tf

from job.cluster import Device, workers
from job.cluster.scheduler import ALONE, ClusterSpec
from job.cluster.workers import Workers, naming_lost_workers, rendezvous
from job.config import ExitCode, LostWorkerError, UserError
from tests.conftest import free_ports


def test_missing_workers_are_named_after_the_timeout(three_workers: ClusterSpec) -> None:
    start = time.monotonic()
    with pytest.raises(LostWorkerError) as caught:
        rendezvous(three_workers, lambda: time.sleep(60), timeout_seconds=0.5)
    assert time.monotonic() - start < 10
    assert caught.value.exit_code == ExitCode.RUN_AGAIN
    assert str(caught.value).startswith(
        f"missing {three_workers.name(2)} (Connection refused); expected all 3 workers within "
        f"--join-timeout 0.5 s"
    )
    assert three_workers.name(1) not in str(caught.value)


def test_a_worker_whose_name_does_not_resolve_is_missing() -> None:
    own = f"127.0.0.1:{free_ports(1)[0]}"
    spec = ClusterSpec((own, "no-such-host.invalid:2222"), 0)
    with pytest.raises(LostWorkerError, match=r"missing worker 1 \(no-such-host.invalid:2222\) \("):
        rendezvous(spec, lambda: time.sleep(60), timeout_seconds=0.5)


def test_a_port_in_use_is_not_shared(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    spec = ClusterSpec((f"127.0.0.1:{port}", "127.0.0.1:1"), 0)
    with pytest.raises(LostWorkerError, match=f"port {port} of worker 0 .* cannot be used"):
        rendezvous(spec, lambda: pytest.fail("it must not begin"), timeout_seconds=0.5)


@pytest.fixture
def two_workers(listener: socket.socket) -> ClusterSpec:
    """Two workers: the first is this one, the second answers."""
    ports = (free_ports(1)[0], listener.getsockname()[1])
    return ClusterSpec(tuple(f"127.0.0.1:{port}" for port in ports), 0)


def test_an_error_while_connecting_is_raised(two_workers: ClusterSpec) -> None:
    def fail() -> tf.distribute.Strategy:
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        rendezvous(two_workers, fail, timeout_seconds=5)


def test_only_workers_that_never_started_are_named_as_missing(
    three_workers: ClusterSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = {2: "Connection refused"}
    checks = [never, {1: "Connection refused", **never}]
    monkeypatch.setattr(
        workers, "unreachable", lambda spec: checks.pop(0) if checks[1:] else checks[0]
    )
    with pytest.raises(LostWorkerError) as caught:
        rendezvous(three_workers, lambda: pytest.fail("it must not begin"), timeout_seconds=0.1)
    assert str(caught.value).startswith(f"missing {three_workers.name(2)} (Connection refused);")
    assert three_workers.name(1) not in str(caught.value)


LOSSES = [
    tf.errors.UnavailableError(None, None, "Socket closed"),
    tf.errors.InternalError(None, None, "Collective ops is aborted by: something"),
]


@pytest.mark.parametrize("error", LOSSES)
def test_a_worker_that_does_not_answer_is_named_as_lost(
    three_workers: ClusterSpec, error: tf.errors.OpError
) -> None:
    with pytest.raises(LostWorkerError) as caught, naming_lost_workers(three_workers):
        raise error
    assert str(caught.value).startswith(f"lost {three_workers.name(2)}, which has ended")
    assert three_workers.name(1) not in str(caught.value)


def test_a_loss_that_keras_raises_as_its_own_error_is_a_loss(
    three_workers: ClusterSpec,
) -> None:
    error = TypeError("Error when deserializing class 'Dropout'")
    error.__context__ = LOSSES[1]
    with pytest.raises(LostWorkerError), naming_lost_workers(three_workers):
        raise error


def test_a_lost_worker_that_still_answers_is_named_from_tensorflows_message(
    listener: socket.socket,
) -> None:
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    spec = ClusterSpec((f"127.0.0.1:{free_ports(1)[0]}", address), 0)
    message = "Collective ops is aborted by: Error reported from /job:worker/task:1: unhealthy"
    with (
        pytest.raises(LostWorkerError, match=r"^lost worker 1 .*\(Error reported from"),
        naming_lost_workers(spec),
    ):
        raise tf.errors.UnavailableError(None, None, message)


@pytest.mark.parametrize(
    ("spec_of", "error"),
    [
        (ALONE, tf.errors.UnavailableError(None, None, "a device")),
        (ClusterSpec(("a:1", "b:1"), 0), tf.errors.InternalError(None, None, "a kernel failed")),
    ],
)
def test_other_errors_are_not_changed(spec_of: ClusterSpec, error: tf.errors.OpError) -> None:
    with pytest.raises(type(error)), naming_lost_workers(spec_of):
        raise error


def test_a_single_worker_receives_its_own_documents() -> None:
    alone = Workers(ALONE)
    assert (alone.count, alone.is_chief) == (1, True)
    assert alone.broadcast(b"content") == b"content"
    alone.require_equal({"a": 1})


def test_a_gathered_document_keeps_its_type() -> None:
    device = Device("CPU:0", "a processor", 1.5, (8, 0))
    for document in (device, "é", 1, None, {"a": [1, "é", None]}):
        assert Workers(ALONE).gather(document) == [document]


def test_workers_that_differ_are_named(
    three_workers: ClusterSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Workers(three_workers)
    gathered: list[dict[str, Any]] = [
        {"seed": 1, "data_dir": "a"},
        {"seed": 1, "data_dir": "a"},
        {"seed": 2},
    ]
    monkeypatch.setattr(one, "gather", lambda document: gathered)
    monkeypatch.setattr(one, "shutdown", lambda: None)
    with pytest.raises(UserError) as caught:
        one.require_equal(gathered[0])
    name = three_workers.name(2)
    chief = three_workers.name(0)
    assert f"{name} has seed 2, {chief} has 1; {name} has data dir None" in str(caught.value)
    assert three_workers.name(1) not in str(caught.value)
