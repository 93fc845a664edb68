"""A labelled set of images that stays in the memory of every device."""

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from job.devices import Devices


class ResidentImages:
    """Images and labels, one copy on each of this process's devices.

    They are variables because a captured constant would be copied to the device at every call. The
    strategy would make one of all copies and have the first worker send the others theirs.

    Args:
        devices: Where the replicas are.
        images: [examples, height, width, channels] uint8.
        labels: [examples] integers.
    """

    def __init__(
        self,
        devices: Devices,
        images: npt.NDArray[np.uint8],
        labels: npt.NDArray[np.int32],
    ) -> None:
        self.examples = len(images)
        self._image_shape = images.shape[1:]
        self._first_replica = devices.workers.spec.index * devices.local_replicas
        self._copies = []
        for device in devices.strategy.extended.worker_devices:
            with tf.device(device):
                pixels = tf.Variable(images.reshape(self.examples, -1), trainable=False)
                self._copies.append((pixels, tf.Variable(labels.astype(np.int64), trainable=False)))

    def gather(self, rows: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Gather rows of this replica's copy; only inside of `strategy.run`.

        Args:
            rows: [batch] int64, 0 to examples - 1.

        Returns:
            Pixels [batch, height * width * channels] uint8, which `decode` turns into images, and
            labels [batch] int64.
        """
        context = tf.distribute.get_replica_context()
        replica = int(tf.get_static_value(context.replica_id_in_sync_group))
        pixels, labels = self._copies[replica - self._first_replica]
        return _gather(pixels, rows), _gather(labels, rows)

    def decode(self, pixels: tf.Tensor) -> tf.Tensor:
        """From gathered pixels to images [batch, height, width, channels] float32, 0 to 1."""
        images = tf.reshape(pixels, [pixels.shape[0], *self._image_shape])
        return tf.cast(images, tf.float32) * (1.0 / 255.0)


def _gather(variable: tf.Variable, rows: tf.Tensor) -> tf.Tensor:
    # `tf.gather` of a variable reads the whole of it, and then has no GPU kernel for uint8; the op
    # on the variable has one.
    gathered = tf.raw_ops.ResourceGather(
        resource=variable.handle, indices=rows, dtype=variable.dtype
    )
    return tf.ensure_shape(gathered, [rows.shape[0], *variable.shape[1:]])
