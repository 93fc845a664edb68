"""TensorFlow's strategy over several workers, also where each has several replicas on its CPU."""

import tensorflow as tf
from tensorflow.python.distribute.collective_all_reduce_strategy import CollectiveAllReduceExtended

from job.cluster import ClusterSpec

_Implementation = tf.distribute.experimental.CommunicationImplementation


def create_strategy(spec: ClusterSpec, kind: str, replicas: int) -> tf.distribute.Strategy:
    """Create the strategy; returns once all workers have come.

    Args:
        spec: The workers.
        kind: "gpu" reduces by NCCL, "cpu" by TensorFlow's own ring.
        replicas: Of each worker.
    """
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": list(spec.workers)}),
        task_type="worker",
        task_id=spec.index,
        num_accelerators={"GPU": replicas if kind == "gpu" else 0},
        rpc_layer="grpc",
    )
    implementation = _Implementation.NCCL if kind == "gpu" else _Implementation.RING
    options = tf.distribute.experimental.CommunicationOptions(implementation=implementation)
    if kind == "cpu" and replicas > 1:
        return _CpuReplicasStrategy(resolver, options, replicas)
    return tf.distribute.MultiWorkerMirroredStrategy(resolver, options)


class _CpuReplicas(CollectiveAllReduceExtended):  # type: ignore[misc]
    """TensorFlow's own takes one CPU replica a worker, which is what nodes without GPUs want.

    Several stand in for GPUs where there are none, as in tests.
    """

    replicas = 1

    def _initialize_local_devices(
        self, cluster_resolver: object, worker_device: str
    ) -> tuple[tuple[str, ...], str]:
        del cluster_resolver
        names = (f"{worker_device}/device:CPU:{index}" for index in range(self.replicas))
        return tuple(names), "CPU"


class _CpuReplicasStrategy(tf.distribute.MultiWorkerMirroredStrategy):  # type: ignore[misc]
    def __init__(
        self,
        resolver: tf.distribute.cluster_resolver.ClusterResolver,
        options: tf.distribute.experimental.CommunicationOptions,
        replicas: int,
    ) -> None:
        extended = type("_CpuReplicas", (_CpuReplicas,), {"replicas": replicas})
        tf.distribute.Strategy.__init__(
            self, extended(self, cluster_resolver=resolver, communication_options=options)
        )
