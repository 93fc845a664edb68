"""Run the job with several CPU replicas per worker, in place of several GPUs.

TensorFlow's own strategy uses only one CPU replica per worker.
"""

# ruff: noqa: E402 (TensorFlow is loaded first, with its messages suppressed)

from job.commands.cli import load_tensorflow

load_tensorflow()

import tensorflow as tf
from tensorflow.python.distribute.collective_all_reduce_strategy import CollectiveAllReduceExtended

from job.__main__ import run


class _CpuReplicas(CollectiveAllReduceExtended):  # type: ignore[misc]
    def _initialize_local_devices(
        self, cluster_resolver: object, worker_device: str
    ) -> tuple[tuple[str, ...], str]:
        del cluster_resolver
        (cpu,) = tf.config.list_physical_devices("CPU")
        count = len(tf.config.get_logical_device_configuration(cpu))
        return tuple(f"{worker_device}/device:CPU:{index}" for index in range(count)), "CPU"


class _CpuReplicasStrategy(tf.distribute.MultiWorkerMirroredStrategy):  # type: ignore[misc]
    def __init__(
        self,
        resolver: tf.distribute.cluster_resolver.ClusterResolver,
        options: tf.distribute.experimental.CommunicationOptions,
    ) -> None:
        extended = _CpuReplicas(self, cluster_resolver=resolver, communication_options=options)
        tf.distribute.Strategy.__init__(self, extended)


def allow_cpu_replicas() -> None:
    """Make TensorFlow use every CPU device of each worker."""
    tf.distribute.MultiWorkerMirroredStrategy = _CpuReplicasStrategy


if __name__ == "__main__":
    allow_cpu_replicas()
    run()
