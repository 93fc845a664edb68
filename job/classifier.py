"""A saved model with what is known of it, and how it computes probabilities of images."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from job.config import RECIPES, UserError
from job.decode import MODES, Shape
from job.devices import Devices, graph_function
from job.model_file import load_model
from job.output import EVALUATION, RUN, read_json, sha256_of
from job.recipe import get_recipe, unchanged
from job.terminal import say

View = Callable[[tf.Tensor], tf.Tensor]


@dataclass(frozen=True)
class Classifier:
    """A saved model and what is known of it.

    Attributes:
        model: From images [batch, height, width, channels] float32, 0 to 1, to probabilities.
        class_names: Name of each class.
        views: The evaluation views of its recipe.
    """

    model: keras.Model
    class_names: tuple[str, ...]
    views: tuple[View, ...]

    @property
    def image_shape(self) -> Shape:
        """Shape of the images that it takes."""
        _, height, width, channels = self.model.input_shape
        return height, width, channels


class Predictor:
    """Computes the probabilities of a classifier, in batches of one size that compile once.

    Args:
        classifier: Its model is in the scope of the devices' strategy.
        devices: Where to compute.
        rows: Images a replica and batch.
    """

    def __init__(self, classifier: Classifier, devices: Devices, rows: int) -> None:
        self._classifier, self._strategy = classifier, devices.strategy
        self._shape = (devices.replicas, rows, *classifier.image_shape)
        self.batch_size = devices.replicas * rows
        self._network = graph_function(self._probabilities, jit_compile=devices.compilation.network)

    def __call__(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Compute probabilities.

        Args:
            images: [images, height, width, channels] uint8, at most `batch_size` of them.

        Returns:
            [images, classes] float32.
        """
        batch = np.zeros((self.batch_size, *self._shape[2:]), np.uint8)
        batch[: len(images)] = images
        parts = batch.reshape(self._shape)
        pixels = self._strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(parts[context.replica_id_in_sync_group])
        )
        results = self._strategy.experimental_local_results(self._run(pixels))
        return np.concatenate([result.numpy() for result in results])[: len(images)]

    @graph_function
    def _run(self, pixels: tf.Tensor) -> tf.Tensor:
        return self._strategy.run(self._network, (pixels,))

    def _probabilities(self, pixels: tf.Tensor) -> tf.Tensor:
        images = tf.cast(pixels, tf.float32) * (1.0 / 255.0)
        model, views = self._classifier.model, self._classifier.views
        return tf.add_n([model(view(images), training=False) for view in views]) / len(views)


def load_classifier(path: Path, devices: Devices) -> Classifier:
    """Load a model of this job, with the class names and views that the files beside it tell.

    They are believed only where the evaluation is of this very file.

    Args:
        path: The model file.
        devices: Where it is to compute, in float32.

    Raises:
        UserError: If there is no model of grey or RGB images of one size.
    """
    # As the evaluation computes: float32, also where GPUs round it to TF32 by default.
    tf.config.experimental.enable_tensor_float_32_execution(False)
    with devices.strategy.scope():
        model = load_model(path)
    _require_images(model, path)
    evaluation = read_json(path.parent / EVALUATION)
    classes = model.output_shape[-1]
    names = tuple(evaluation.get("classes", ()))
    if evaluation.get("model_sha256") != sha256_of(path) or len(names) != classes:
        say(f"no {EVALUATION} of this model is beside {path}, so its classes go by numbers")
        return Classifier(model, tuple(f"class {label}" for label in range(classes)), (unchanged,))
    recipe = read_json(path.parent / RUN).get("config", {}).get("recipe")
    views = get_recipe(recipe).evaluation_views if recipe in RECIPES else (unchanged,)
    return Classifier(model, names, views)


def _require_images(model: keras.Model, path: Path) -> None:
    """Refuse a model that takes something else than grey or RGB images of one size."""
    shape = model.input_shape
    if not isinstance(shape, tuple) or len(shape) != 4 or None in shape[1:]:
        raise UserError(
            f"{path} takes inputs of shape {shape}, expected (None, height, width, channels); name "
            f"a model of images"
        )
    if shape[-1] not in MODES:
        raise UserError(
            f"{path} takes images of {shape[-1]} channels, expected 1 (grey) or 3 (RGB); name a "
            f"model of such images"
        )
