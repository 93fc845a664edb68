"""Exact evaluation: every example counts exactly once, for any number of replicas."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from job.cluster.devices import Devices, graph_function
from job.recipes import Recipe, Views, unchanged
from job.run.predictions import confusion_matrix
from job.run.record import ClassRecord, EvaluationRecord
from job.training.engine import ResidentImages

ROWS_PER_REPLICA = 500


@dataclass(frozen=True)
class Evaluation:
    """The results of a network on a set of examples.

    Attributes:
        loss: Mean loss over the examples.
        confusion: [classes, classes] int64: entry (true, predicted) counts examples.
        accuracy_without_tta: Fraction of examples predicted correctly from the unchanged image
            alone, 0 to 1; None if the other figures are already those of the unchanged images.
    """

    loss: float
    confusion: npt.NDArray[np.int64]
    accuracy_without_tta: float | None = None

    @property
    def examples(self) -> int:
        """Number of examples evaluated."""
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """Fraction of examples predicted correctly, 0 to 1."""
        return float(np.trace(self.confusion)) / self.examples

    def record(self, class_names: tuple[str, ...], model: str, sha256: str) -> EvaluationRecord:
        """Return the contents of ``evaluation.json`` for a model file with this checksum.

        A class that is never predicted has no precision. A class without examples has no recall.
        """
        hits = np.diag(self.confusion).tolist()
        predicted, support = (self.confusion.sum(axis=axis).tolist() for axis in (0, 1))
        classes = {
            name: ClassRecord(
                precision=hits[label] / predicted[label] if predicted[label] else None,
                recall=hits[label] / support[label] if support[label] else None,
                support=support[label],
            )
            for label, name in enumerate(class_names)
        }
        return EvaluationRecord(
            loss=self.loss,
            accuracy=self.accuracy,
            accuracy_without_tta=self.accuracy_without_tta,
            examples=self.examples,
            classes=classes,
            confusion_matrix=self.confusion.tolist(),
            model=model,
            model_sha256=sha256,
        )


def mean_over_views(
    model: keras.Model, views: Views, weights: Sequence[float], images: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Compute a network's probabilities for images, averaged over several views of each image.

    Args:
        model: The network.
        views: Views of a recipe, at least one.
        weights: The weight of each view; they sum to 1. Empty means equal weights.
        images: [rows, height, width, channels] float32, 0 to 1.

    Returns:
        The mean probabilities, [rows, classes] float32, and those of the unchanged images alone.
    """
    if views == (unchanged,):
        probabilities = _probabilities(model, images)
        return probabilities, probabilities
    outputs = [_probabilities(model, view(images)) for view in views]
    weights = weights or (1.0 / len(views),) * len(views)
    mean = tf.add_n([output * weight for output, weight in zip(outputs, weights, strict=True)])
    plain = outputs[views.index(unchanged)] if unchanged in views else _probabilities(model, images)
    return mean, plain


def _probabilities(model: keras.Model, images: tf.Tensor) -> tf.Tensor:
    # A model file can compute in another type.
    return tf.cast(model(images, training=False), tf.float32)


class Evaluator:
    """Evaluates one network on one set of examples, any number of times.

    Args:
        model: From images to probabilities; each call uses its current variables.
        recipe: Provides the loss and the views.
        devices: The devices to evaluate on.
        images: [examples, height, width, channels] uint8.
        labels: [examples] integers.
        with_tta: Whether to average over the recipe's views. If not, only the unchanged images are
            evaluated.

    Attributes:
        model: The network.
    """

    def __init__(
        self,
        model: keras.Model,
        recipe: Recipe,
        devices: Devices,
        images: npt.NDArray[np.uint8],
        labels: npt.NDArray[np.int32],
        *,
        with_tta: bool = True,
    ) -> None:
        self.model, self._recipe = model, recipe
        self._views = recipe.tta_views if with_tta else (unchanged,)
        self._weights = recipe.tta_weights if with_tta else ()
        self._strategy, self._replicas = devices.strategy, devices.replicas
        self._data = ResidentImages(devices, images, labels)
        self._labels = labels
        self._rows = min(ROWS_PER_REPLICA, -(-len(images) // self._replicas))
        compilation = devices.compilation
        self._is_compiled = compilation.network
        self._score = graph_function(self._score_rows, jit_compile=compilation.network)
        self._loop: Any = self._replica_loop
        if compilation.loops:
            self._loop = graph_function(self._loop, jit_compile=True)

    def compile(self) -> None:
        """Trace and compile now, so that the first evaluation is as fast as later ones."""
        if self._is_compiled:
            self._evaluate()  # XLA compiles at the first call; an evaluation on a GPU is short
        else:
            self._evaluate.get_concrete_function()

    def __call__(self) -> Evaluation:
        """Evaluate all examples."""
        return self.predict()[0]

    def predict(self) -> tuple[Evaluation, npt.NDArray[np.float32]]:
        """Evaluate all examples, and return the probabilities too.

        Returns:
            The evaluation, and the probabilities that it is based on, [examples, classes] float32.
        """
        sums, probabilities = (tensor.numpy() for tensor in self._evaluate())
        loss, plain = (float(one) / self._data.examples for one in sums)
        confusion = confusion_matrix(self._labels, probabilities)
        has_tta = self._views != (unchanged,)
        return Evaluation(loss, confusion, plain if has_tta else None), probabilities

    @graph_function
    def _evaluate(self) -> tuple[tf.Tensor, tf.Tensor]:
        """Evaluate all examples on all replicas.

        Returns:
            The sums of `_score_rows` over all examples, and the probabilities [examples, classes];
            complete on every worker.
        """
        sums, rows = self._strategy.run(self._replica_share)
        if self._replicas > 1:
            sums, rows = self._strategy.experimental_local_results((sums, rows))[0]
        classes = self.model.output_shape[-1]
        rows = tf.reshape(rows, [self._replicas, -1, self._rows, classes])
        # The rows of each part are in the order of the replicas.
        rows = tf.reshape(tf.transpose(rows, [1, 0, 2, 3]), [-1, classes])
        return sums, rows[: self._data.examples]

    def _replica_share(self) -> tuple[tf.Tensor, tf.Tensor]:
        """Evaluate this replica's share, and exchange the results with the other replicas.

        Returns:
            The sums, and probabilities [replicas * parts, rows, classes], of all replicas.
        """
        sums, rows = self._loop()
        if self._replicas > 1:
            context = tf.distribute.get_replica_context()
            sums = context.all_reduce("SUM", sums)
            rows = context.all_gather(rows, axis=0)
        return sums, rows

    def _replica_loop(self) -> tuple[tf.Tensor, tf.Tensor]:
        """Return the sums and the probabilities [parts, rows, classes] of this replica's share."""
        together = self._rows * self._replicas
        shape = [self._rows, self.model.output_shape[-1]]
        parts = tf.TensorArray(tf.float32, -(-self._data.examples // together), element_shape=shape)

        def score_part(
            part: tf.Tensor, sums: tf.Tensor, parts: tf.TensorArray
        ) -> tuple[tf.Tensor, tf.Tensor, tf.TensorArray]:
            part_sums, rows = self._replica_part(tf.cast(part, tf.int64) * together)
            return part + 1, sums + part_sums, parts.write(part, rows)

        _, sums, parts = tf.while_loop(
            lambda part, *_: part < parts.size(), score_part, [0, tf.zeros(2), parts]
        )
        return sums, parts.stack()

    def _replica_part(self, start: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        rows = start + tf.range(self._rows, dtype=tf.int64)
        rows += tf.cast(replica * self._rows, tf.int64)
        # Rows beyond the last example repeat it, and do not count.
        counts = tf.cast(rows < self._data.examples, tf.float32)
        rows = tf.minimum(rows, self._data.examples - 1)
        pixels, labels = self._data.gather(rows)
        sums, probabilities = self._score(pixels, labels, counts)
        return sums, probabilities

    def _score_rows(
        self, pixels: tf.Tensor, labels: tf.Tensor, counts: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Evaluate rows.

        Returns:
            The sum of the losses and the number of images that the network classifies correctly
            without views, [2] float32; the probabilities, [rows, classes] float32.
        """
        images = self._data.decode(pixels)
        probabilities, plain = mean_over_views(self.model, self._views, self._weights, images)
        truth = tf.one_hot(labels, probabilities.shape[-1])
        losses = keras.losses.get(self._recipe.loss)(truth, probabilities)
        hits = tf.cast(tf.equal(tf.argmax(plain, axis=-1), labels), tf.float32)
        return tf.stack(
            [tf.reduce_sum(losses * counts), tf.reduce_sum(hits * counts)]
        ), probabilities
