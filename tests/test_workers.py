import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
import tensorflow as tf

from job import workers
from job.cluster import ALONE, ClusterSpec
from job.config import ExitCode, LostWorkerError, UserError
from job.workers import Workers, join, naming_lost_workers


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A socket that accepts connections on loopback."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        yield one


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture
def spec(listener: socket.socket) -> ClusterSpec:
    """Three workers: this one, one that answers, and one that does not."""
    ports = (free_port(), listener.getsockname()[1], free_port())
    return ClusterSpec(tuple(f"127.0.0.1:{port}" for port in ports), 0)


def test_one_that_is_alone_gets_back_what_it_gives() -> None:
    alone = Workers(ALONE)
    assert (alone.count, alone.is_chief) == (1, True)
    assert alone.gather({"a": "é"}) == [{"a": "é"}]
    assert alone.broadcast(b"content") == b"content"
    alone.require_equal({"a": 1})


def test_workers_that_differ_are_named(spec: ClusterSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Workers(spec)
    told: list[dict[str, Any]] = [
        {"seed": 1, "data_dir": "a"},
        {"seed": 1, "data_dir": "a"},
        {"seed": 2},
    ]
    monkeypatch.setattr(one, "gather", lambda document: told)
    monkeypatch.setattr(one, "leave", lambda: None)
    with pytest.raises(UserError) as caught:
        one.require_equal(told[0])
    name = spec.name(2)
    assert f"{name} has seed 2, {spec.name(0)} 1; {name} has data dir None" in str(caught.value)
    assert spec.name(1) not in str(caught.value)


def test_missing_workers_are_named_after_the_time_to_wait(spec: ClusterSpec) -> None:
    start = time.monotonic()
    with pytest.raises(LostWorkerError) as caught:
        join(spec, lambda: time.sleep(60), timeout_seconds=0.5)
    assert time.monotonic() - start < 10
    assert caught.value.exit_code == ExitCode.RUN_AGAIN
    assert str(caught.value).startswith(f"missing {spec.name(2)} (Connection refused); expected")
    assert spec.name(1) not in str(caught.value)


def test_a_name_that_does_not_resolve_is_a_missing_worker() -> None:
    own = f"127.0.0.1:{free_port()}"
    spec = ClusterSpec((own, "no-such-host.invalid:2222"), 0)
    with pytest.raises(LostWorkerError, match=r"missing worker 1 \(no-such-host.invalid:2222\) \("):
        join(spec, lambda: time.sleep(60), timeout_seconds=0.5)


def test_a_port_that_is_taken_is_not_shared(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    spec = ClusterSpec((f"127.0.0.1:{port}", "127.0.0.1:1"), 0)
    with pytest.raises(LostWorkerError, match=f"port {port} of worker 0 .* cannot be used"):
        join(spec, lambda: pytest.fail("it must not begin"), timeout_seconds=0.5)


def test_what_goes_wrong_while_joining_is_raised(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "listen_again", lambda: None)
    ports = (free_port(), listener.getsockname()[1])
    spec = ClusterSpec(tuple(f"127.0.0.1:{port}" for port in ports), 0)

    def fail() -> tf.distribute.Strategy:
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        join(spec, fail, timeout_seconds=5)


LOSSES = [
    tf.errors.UnavailableError(None, None, "Socket closed"),
    tf.errors.InternalError(None, None, "Collective ops is aborted by: something"),
]


@pytest.mark.parametrize("error", LOSSES)
def test_a_lost_worker_is_named_by_who_does_not_answer(
    spec: ClusterSpec, error: tf.errors.OpError
) -> None:
    with pytest.raises(LostWorkerError) as caught, naming_lost_workers(spec):
        raise error
    assert str(caught.value).startswith(f"lost {spec.name(2)}, which has ended")
    assert spec.name(1) not in str(caught.value)


def test_a_lost_worker_that_still_answers_is_named_by_what_tensorflow_says(
    listener: socket.socket,
) -> None:
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    spec = ClusterSpec((f"127.0.0.1:{free_port()}", address), 0)
    told = "Collective ops is aborted by: Error reported from /job:worker/task:1: unhealthy"
    with (
        pytest.raises(LostWorkerError, match=r"^lost worker 1 .*\(Error reported from"),
        naming_lost_workers(spec),
    ):
        raise tf.errors.UnavailableError(None, None, told)


@pytest.mark.parametrize(
    ("spec_of", "error"),
    [
        (ALONE, tf.errors.UnavailableError(None, None, "a device")),
        (ClusterSpec(("a:1", "b:1"), 0), tf.errors.InternalError(None, None, "a kernel failed")),
    ],
)
def test_other_errors_stay_what_they_are(spec_of: ClusterSpec, error: tf.errors.OpError) -> None:
    with pytest.raises(type(error)), naming_lost_workers(spec_of):
        raise error
