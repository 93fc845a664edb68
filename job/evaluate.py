"""Exact evaluation: every example counts once, whatever the number of replicas."""

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from job.devices import Devices
from job.predictions import confusion_matrix
from job.recipe import Recipe
from job.resident import ResidentImages

ROWS_PER_REPLICA = 500


@dataclass(frozen=True)
class Evaluation:
    """What a network does on a set of examples.

    Attributes:
        loss: Mean loss over the examples.
        confusion: [classes, classes] int64: entry (true, predicted) counts examples.
    """

    loss: float
    confusion: npt.NDArray[np.int64]

    @property
    def examples(self) -> int:
        """Number of examples evaluated."""
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """Fraction of examples predicted correctly, 0 to 1."""
        return float(np.trace(self.confusion)) / self.examples

    def document(self, class_names: tuple[str, ...]) -> dict[str, Any]:
        """The evaluation as a JSON object; the README documents it.

        A class that is never predicted has no precision, and one without examples no recall: null.
        """
        hits = np.diag(self.confusion)
        predicted, support = self.confusion.sum(axis=0), self.confusion.sum(axis=1)
        return {
            "loss": self.loss,
            "accuracy": self.accuracy,
            "examples": self.examples,
            "classes": {
                name: {
                    "precision": float(hits[label] / predicted[label])
                    if predicted[label]
                    else None,
                    "recall": float(hits[label] / support[label]) if support[label] else None,
                    "support": int(support[label]),
                }
                for label, name in enumerate(class_names)
            },
            "confusion_matrix": self.confusion.tolist(),
        }


class Evaluator:
    """Evaluates one network on one set of examples, as often as asked.

    Args:
        model: From images to probabilities; its current variables count at each call.
        recipe: Gives the loss and the views.
        devices: Where to evaluate.
        images: [examples, height, width, channels] uint8.
        labels: [examples] integers.
    """

    def __init__(
        self,
        model: keras.Model,
        recipe: Recipe,
        devices: Devices,
        images: npt.NDArray[np.uint8],
        labels: npt.NDArray[np.int32],
    ) -> None:
        self._model, self._recipe = model, recipe
        self._strategy, self._replicas = devices.strategy, devices.replicas
        self._data = ResidentImages(self._strategy, images, labels)
        self._labels = labels
        self._rows = min(ROWS_PER_REPLICA, -(-len(images) // self._replicas))
        compilation = devices.compilation
        self._score = tf.function(self._score_rows, jit_compile=compilation.network)
        self._compiled_loop = (
            tf.function(self._replica_loop, jit_compile=True) if compilation.loops else None
        )

    def __call__(self) -> Evaluation:
        """Evaluate all examples."""
        return self.predict()[0]

    def predict(self) -> tuple[Evaluation, npt.NDArray[np.float32]]:
        """Evaluate all examples, and tell what the network makes of each.

        Returns:
            The evaluation, and the probabilities that it counts, [examples, classes] float32.
        """
        loss, probabilities = (tensor.numpy() for tensor in self._evaluate())
        confusion = confusion_matrix(self._labels, probabilities)
        return Evaluation(float(loss) / self._data.examples, confusion), probabilities

    @tf.function
    def _evaluate(self) -> tuple[tf.Tensor, tf.Tensor]:
        """The sum of the losses, and [examples, classes] probabilities."""
        if self._compiled_loop:
            results: tuple[tf.Tensor, tf.Tensor] = self._strategy.run(self._compiled_loop)
            return results
        loss, parts = tf.constant(0.0), self._parts(self._rows * self._replicas)
        for part in tf.range(parts.size()):
            start = tf.cast(part, tf.int64) * self._rows * self._replicas
            replica_loss, rows = self._strategy.run(self._replica_part, (start,))
            loss += self._strategy.reduce("SUM", replica_loss, axis=None)
            parts = parts.write(
                part, tf.concat(self._strategy.experimental_local_results(rows), axis=0)
            )
        return loss, parts.concat()[: self._data.examples]

    def _replica_loop(self) -> tuple[tf.Tensor, tf.Tensor]:
        """Evaluate all examples on the only replica."""
        loss, parts = tf.constant(0.0), self._parts(self._rows)
        for part in tf.range(parts.size()):
            part_loss, rows = self._replica_part(tf.cast(part, tf.int64) * self._rows)
            loss += part_loss
            parts = parts.write(part, rows)
        return loss, parts.concat()[: self._data.examples]

    def _parts(self, rows: int) -> tf.TensorArray:
        """Room for the probabilities of so many rows at a time, in the order of the examples."""
        shape = [rows, self._model.output_shape[-1]]
        return tf.TensorArray(tf.float32, -(-self._data.examples // rows), element_shape=shape)

    def _replica_part(self, start: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        rows = start + tf.range(self._rows, dtype=tf.int64)
        rows += tf.cast(replica * self._rows, tf.int64)
        # Rows beyond the last example repeat it and then count for nothing.
        counts = tf.cast(rows < self._data.examples, tf.float32)
        rows = tf.minimum(rows, self._data.examples - 1)
        pixels, labels = self._data.gather(rows)
        loss, probabilities = self._score(pixels, labels, counts)
        return loss, probabilities

    def _score_rows(
        self, pixels: tf.Tensor, labels: tf.Tensor, counts: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        images = self._data.decode(pixels)
        views = [
            self._model(view(images), training=False) for view in self._recipe.evaluation_views
        ]
        probabilities = views[0] if len(views) == 1 else tf.add_n(views) / len(views)
        truth = tf.one_hot(labels, probabilities.shape[-1])
        losses = keras.losses.get(self._recipe.loss)(truth, probabilities)
        return tf.reduce_sum(losses * counts), probabilities
