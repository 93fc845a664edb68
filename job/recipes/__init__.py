"""What the engine asks of a recipe, so that it need not know any."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import keras
import tensorflow as tf

# What other packages take from the private module.
from job.recipes._augment import Resample as Resample
from job.recipes._augment import resample_by_gather as resample_by_gather
from job.recipes._augment import resample_by_op as resample_by_op
from job.registry import load_member, require_parameters


def unchanged(images: tf.Tensor) -> tf.Tensor:
    """The evaluation view of a recipe that looks at each test image once, as it is."""
    return images


@dataclass(frozen=True)
class Recipe:
    """A network and how it is trained.

    Attributes:
        name: Its name on the command line.
        build_model: From (seed, number of classes) to a float32 network of stock Keras layers that
            ends in a softmax. It is what the model file holds.
        build_optimizer: From (learning rate, total steps) to a Keras optimizer; a schedule goes in
            as the optimizer's learning rate.
        loss: Keras name of the loss of one-hot labels and probabilities.
        draw_augmentation: From (seed, epoch, steps, batch size) to what augments one epoch,
            [steps, batch size, ...] float32; nothing else may decide it. The epoch is a scalar
            int32 from 0.
        augment: From (images, draws, resample) to augmented images, both
            [batch, height, width, channels] float32, 0 to 1. The draws are the images' rows of
            what `draw_augmentation` gave.
        tta_views: Test images are evaluated as the mean probability over these views,
            each a function of [batch, height, width, channels] float32 images, 0 to 1.

    The last three become graphs without AutoGraph: on tensors they use TensorFlow's control flow.
    """

    name: str
    build_model: Callable[[int, int], keras.Model]
    build_optimizer: Callable[[float, int], keras.optimizers.Optimizer]
    loss: str
    draw_augmentation: Callable[[int, tf.Tensor, int, int], tf.Tensor]
    augment: Callable[[tf.Tensor, tf.Tensor, Resample], tf.Tensor]
    tta_views: tuple[Callable[[tf.Tensor], tf.Tensor], ...] = (unchanged,)

    def __post_init__(self) -> None:
        """Refuse functions with other parameters, and no view at all.

        Raises:
            TypeError: If there is such a function.
            ValueError: If there is no view.
        """
        require_parameters(self.build_model, "build_model", "seed", "classes")
        require_parameters(self.build_optimizer, "build_optimizer", "learning_rate", "total_steps")
        require_parameters(
            self.draw_augmentation, "draw_augmentation", "seed", "epoch", "steps", "batch_size"
        )
        require_parameters(self.augment, "augment", "images", "draws", "resample")
        if not self.tta_views:
            raise ValueError("tta_views has no view, expected at least (unchanged,)")
        for view in self.tta_views:
            require_parameters(view, "view", "images")

    def compile(self, model: keras.Model, learning_rate: float, total_steps: int) -> None:
        """Compile a network with this recipe's optimizer, its variables made, loss and accuracy."""
        optimizer = self.build_optimizer(learning_rate, total_steps)
        optimizer.build(model.trainable_variables)
        model.compile(optimizer=optimizer, loss=self.loss, metrics=["accuracy"])


def get_recipe(name: str) -> Recipe:
    """Import the recipe of this name: the ``RECIPE`` of ``job.recipes.<name>``."""
    # A copy of another recipe may still have that one's name.
    return replace(load_member("recipes", name, "RECIPE", Recipe), name=name)
