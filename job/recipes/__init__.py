"""The interface between the engine and the recipes."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

# Names of the private module that other packages use.
from job.recipes._augment import Resample as Resample
from job.recipes._augment import resample_by_gather as resample_by_gather
from job.recipes._augment import resample_by_op as resample_by_op
from job.registry import accepts, load_member, require_parameters

Weights = Mapping[str, npt.NDArray[np.float32]]
"""Values of a network's variables by the names of layer and variable, such as "conv1/kernel"."""

Views = tuple[Callable[[tf.Tensor], tf.Tensor], ...]
"""Functions of images [batch, height, width, channels] float32, 0 to 1, that return such images."""


def unchanged(images: tf.Tensor) -> tf.Tensor:
    """The only view of a recipe that evaluates each test image once, as it is."""
    return images


@dataclass(frozen=True)
class Recipe:
    """A network and how it is trained.

    Attributes:
        name: Its name on the command line.
        build_model: From (seed, number of classes) to a float32 network of stock Keras layers that
            ends in a softmax. The model file contains this network.
        build_optimizer: From (learning rate, total steps) to a Keras optimizer; a schedule is
            passed as the optimizer's learning rate.
        loss: Keras name of a loss of one-hot labels and probabilities.
        draw_augmentation: From (seed, epoch, steps, batch size) to the random draws that augment
            one epoch, [steps, batch size, ...] float32. They must depend on nothing else. The epoch
            is a scalar int32 from 0. A function with a fifth parameter also receives the rows of
            the training set, [steps, batch size] int64.
        augment: From (images, draws, resample) to augmented images, both
            [batch, height, width, channels] float32, 0 to 1. The draws are the images' rows of
            the result of `draw_augmentation`.
        tta_views: The views of each image. Evaluation and predictions of the saved model use the
            mean probability over them.
        tta_weights: The weight of each view in that mean; they sum to 1. Empty means equal weights.
        label_smoothing: The share of each one-hot label, 0 to 1, that a training spreads evenly
            over the classes. Evaluations use the labels as they are.
        loss_reduction: Whether a training minimizes the mean of the losses over the global batch
            or their sum.
        fixed_weights: From training images [examples, height, width, channels] uint8 to values
            of variables. They replace the initial values from `build_model` and are not trained.
            They identify the run: other values are another run. None if no weights depend on the
            images.
        early_variables: Variables, by names as in `Weights`, that have a gradient only in the first
            part of a run: in this share of its epochs, rounded up. After that the gradient is zero,
            and CPUs do not compute it.
        steps_per_execution: Steps of a compiled call, during which a run cannot stop. It should
            divide the number of steps of an epoch. None means the engine's number, 15.

    Augmentation and views become graphs without AutoGraph, so on tensors they must use TensorFlow's
    control flow.
    """

    name: str
    build_model: Callable[[int, int], keras.Model]
    build_optimizer: Callable[[float, int], keras.optimizers.Optimizer]
    loss: str
    draw_augmentation: Callable[..., tf.Tensor]
    augment: Callable[[tf.Tensor, tf.Tensor, Resample], tf.Tensor]
    tta_views: Views = (unchanged,)
    tta_weights: tuple[float, ...] = ()
    label_smoothing: float = 0.0
    loss_reduction: Literal["mean", "sum"] = "mean"
    fixed_weights: Callable[[npt.NDArray[np.uint8]], Weights] | None = None
    early_variables: Mapping[str, float] = field(default_factory=dict)
    steps_per_execution: int | None = None

    def __post_init__(self) -> None:
        """Refuse functions with other parameters, and values outside their range.

        Raises:
            TypeError: If a function has other parameters.
            ValueError: If a value is outside its range.
        """
        require_parameters(self.build_model, "build_model", "seed", "classes")
        require_parameters(self.build_optimizer, "build_optimizer", "learning_rate", "total_steps")
        if not self._draws_by_rows:
            require_parameters(self.draw_augmentation, "draw_augmentation", *_DRAW_PARAMETERS)
        require_parameters(self.augment, "augment", "images", "draws", "resample")
        if not self.tta_views:
            raise ValueError("tta_views is empty, expected at least (unchanged,)")
        for view in self.tta_views:
            require_parameters(view, "view", "images")
        weights = self.tta_weights
        if weights and not (
            len(weights) == len(self.tta_views)
            and min(weights) >= 0.0
            and math.isclose(sum(weights), 1.0)
        ):
            raise ValueError(
                f"tta_weights received {weights}, expected one number for each of the "
                f"{len(self.tta_views)} views, none below 0, with a sum of 1"
            )
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(
                f"label_smoothing received {self.label_smoothing}, expected at least 0 and less "
                f"than 1"
            )
        if self.loss_reduction not in ("mean", "sum"):
            raise ValueError(
                f"loss_reduction received {self.loss_reduction!r}, expected 'mean' or 'sum'"
            )
        if self.steps_per_execution is not None and self.steps_per_execution < 1:
            raise ValueError(
                f"steps_per_execution received {self.steps_per_execution}, expected at least 1"
            )
        for name, share in self.early_variables.items():
            if not 0.0 <= share <= 1.0:
                raise ValueError(f"early_variables has {share} for {name!r}, expected 0 to 1")
        if self.fixed_weights:
            require_parameters(self.fixed_weights, "fixed_weights", "images")

    @property
    def _draws_by_rows(self) -> bool:
        draw = self.draw_augmentation
        return not accepts(draw, *_DRAW_PARAMETERS) and accepts(draw, *_DRAW_PARAMETERS, "rows")

    def early_epochs(self, epochs: int) -> dict[str, int]:
        """Map each early variable to its number of epochs with a gradient."""
        return {name: math.ceil(share * epochs) for name, share in self.early_variables.items()}

    def draw(self, seed: int, epoch: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
        """Call `draw_augmentation` for the images of an epoch.

        Args:
            seed: The run's seed.
            epoch: Scalar int32, from 0.
            rows: [steps, batch size] int64 rows of the training set.

        Returns:
            [steps, batch size, ...] float32.
        """
        extra = (rows,) if self._draws_by_rows else ()
        return self.draw_augmentation(seed, epoch, *rows.shape, *extra)

    def compile(self, model: keras.Model, learning_rate: float, total_steps: int) -> None:
        """Compile a network with accuracy and this recipe's loss and optimizer.

        The variables of the optimizer are created too.
        """
        optimizer = self.build_optimizer(learning_rate, total_steps)
        optimizer.build(model.trainable_variables)
        model.compile(optimizer=optimizer, loss=self.loss, metrics=["accuracy"])


_DRAW_PARAMETERS = ("seed", "epoch", "steps", "batch_size")


def get_recipe(name: str) -> Recipe:
    """Import the recipe of this name: the ``RECIPE`` of ``job.recipes.<name>``."""
    # A recipe that was copied from another one can still contain the other's name.
    return replace(load_member("recipes", name, "RECIPE", Recipe), name=name)
