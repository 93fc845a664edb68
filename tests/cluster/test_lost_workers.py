import socket

import pytest
import tensorflow as tf

from job.cluster.scheduler import ALONE, ClusterSpec
from job.cluster.workers import naming_lost_workers
from job.config import LostWorkerError
from tests.conftest import free_ports

LOSSES = [
    tf.errors.UnavailableError(None, None, "Socket closed"),
    tf.errors.InternalError(None, None, "Collective ops is aborted by: something"),
]


@pytest.mark.parametrize("error", LOSSES)
def test_a_lost_worker_is_named_by_who_does_not_answer(
    three_workers: ClusterSpec, error: tf.errors.OpError
) -> None:
    with pytest.raises(LostWorkerError) as caught, naming_lost_workers(three_workers):
        raise error
    assert str(caught.value).startswith(f"lost {three_workers.name(2)}, which has ended")
    assert three_workers.name(1) not in str(caught.value)


def test_a_lost_worker_that_still_answers_is_named_by_what_tensorflow_says(
    listener: socket.socket,
) -> None:
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    spec = ClusterSpec((f"127.0.0.1:{free_ports(1)[0]}", address), 0)
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
