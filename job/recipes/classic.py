"""The recipe ``classic``: the CNN, optimizer and augmentation of the conventional Keras script.

    cifar10-job train --recipe classic

Batch 256, Adam at 1e-4, 50 epochs. See BENCHMARKS.md for measured times and accuracies.
"""

import keras
import tensorflow as tf

from job.recipes import Recipe
from job.recipes._augment import AffineRanges, Resample, affine_transforms, draw_parameters

IMAGE_SIZE = 32
RANGES = AffineRanges(
    rotation_range=20,
    width_shift_range=0.2,
    height_shift_range=0.2,
    shear_range=0.2,
    zoom_range=0.2,
    horizontal_flip=True,
)


def build_model(seed: int, classes: int) -> keras.Model:
    """Build the network: three convolution blocks and three dense layers, 423,754 parameters.

    Args:
        seed: Seed of the initial weights and of Dropout.
        classes: Units of the softmax.

    Returns:
        From images [batch, 32, 32, 3] float32, 0 to 1, to probabilities [batch, classes].
    """
    layers = keras.layers
    # The initializers draw from Keras's global seed.
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((IMAGE_SIZE, IMAGE_SIZE, 3), name="images"),
            layers.Conv2D(32, (3, 3), activation="relu", name="conv1"),
            layers.MaxPooling2D((2, 2), name="pool1"),
            layers.BatchNormalization(name="norm1"),
            layers.Conv2D(64, (3, 3), activation="relu", name="conv2"),
            layers.MaxPooling2D((2, 2), name="pool2"),
            layers.BatchNormalization(name="norm2"),
            layers.Conv2D(128, (3, 3), activation="relu", name="conv3"),
            layers.MaxPooling2D((2, 2), name="pool3"),
            layers.BatchNormalization(name="norm3"),
            layers.Flatten(name="flatten"),
            layers.Dense(512, activation="relu", name="dense1"),
            layers.Dropout(0.5, seed=seed, name="dropout"),
            layers.Dense(128, activation="relu", name="dense2"),
            layers.Dense(classes, activation="softmax", name="probabilities"),
        ],
        name="classic",
    )


def build_optimizer(learning_rate: float, total_steps: int) -> keras.optimizers.Optimizer:
    """Adam at a constant learning rate, for any length of the run."""
    del total_steps
    return keras.optimizers.Adam(learning_rate=learning_rate)


def draw_augmentation(seed: int, epoch: tf.Tensor, steps: int, batch_size: int) -> tf.Tensor:
    """Draw one epoch's affine maps, [steps, batch_size, 6] float32."""
    parameters = draw_parameters(RANGES, seed, epoch, steps, batch_size, IMAGE_SIZE)
    return affine_transforms(parameters, IMAGE_SIZE)


def augment(images: tf.Tensor, draws: tf.Tensor, resample: Resample) -> tf.Tensor:
    """Apply the affine maps."""
    return resample(images, draws)


RECIPE = Recipe(
    name="classic",
    build_model=build_model,
    build_optimizer=build_optimizer,
    loss="categorical_crossentropy",
    draw_augmentation=draw_augmentation,
    augment=augment,
)
