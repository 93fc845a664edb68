"""The recipe ``fast``: the methods of the speed record for 94% on CIFAR-10.

    cifar10-job train --recipe fast

Batch 2,000, 8 epochs: 90.4% on JPEG images of CIFAR-10, in 15 minutes on two CPU cores with
bfloat16. It has not been measured on the original pixels, which the record is for.

The methods are those of Keller Jordan's ``airbench94_muon``: whitened patches, the optimizer Muon,
alternating flips, fast batch statistics, and the mean over shifted and mirrored test images. Here
it is the mean of probabilities, there the mean of logits.

Source: github.com/KellerJordan/cifar10-airbench
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from job.recipes import Recipe, Resample, unchanged

DEFAULTS = {"epochs": 8, "batch_size": 2000, "learning_rate": 0.24}

IMAGE_SIZE = 32
# Mean and standard deviation of CIFAR-10's training images, 0 to 1, per channel.
MEAN = (0.4914, 0.4822, 0.4465)
DEVIATION = (0.2470, 0.2435, 0.2616)

WIDTHS = (64, 256, 256)
PATCH_SIZE = 2
WHITENED_IMAGES = 5_000
WHITENING_EPSILON = 5e-4

# Relative to Muon's learning rate, which is the default one. --learning-rate scales all three.
BIAS_RATE = 0.053 / 0.24
HEAD_RATE = 0.67 / 0.24
# The whitening layer's bias is trained in the first three of eight epochs.
WHITENING_BIAS_SHARE = 3 / 8
# The record decays biases and head by 2e-6 of their values per image, over 400,000 images.
DECAY = 2e-6 * 400_000

MAX_SHIFT = 2

# Sweeps of rotations. A matrix of 12 rows is diagonal to all digits after seven or eight.
_SWEEPS = 12


def build_model(seed: int, classes: int, widths: Sequence[int] = WIDTHS) -> keras.Model:
    """Build the network: a whitening convolution and three groups of two convolutions.

    Args:
        seed: Seed of the initial weights.
        classes: Units of the softmax.
        widths: Filters of each group's convolutions.

    Returns:
        From images [batch, 32, 32, 3] float32, 0 to 1, to probabilities [batch, classes]. The
        whitening filters are zeros; their values come from `whitening_weights`.
    """
    layers = keras.layers
    # The initializers draw from Keras's global seed.
    keras.utils.set_random_seed(seed)
    filters = 2 * 3 * PATCH_SIZE**2
    variance = [deviation**2 for deviation in DEVIATION]
    stack = [
        keras.Input((IMAGE_SIZE, IMAGE_SIZE, 3), name="images"),
        layers.Normalization(mean=list(MEAN), variance=variance, name="normalization"),
        layers.Conv2D(filters, PATCH_SIZE, kernel_initializer="zeros", name="whitening"),
        layers.Activation("gelu", name="gelu0"),
    ]
    for group, width in enumerate(widths, 1):
        for part in "ab":
            stack.append(_convolution(filters, width, f"conv{group}{part}"))
            if part == "a":
                stack.append(layers.MaxPooling2D(2, name=f"pool{group}"))
            stack.append(
                layers.BatchNormalization(
                    momentum=0.6, epsilon=1e-12, scale=False, name=f"norm{group}{part}"
                )
            )
            stack.append(layers.Activation("gelu", name=f"gelu{group}{part}"))
            filters = width
    stack += [
        layers.MaxPooling2D(3, name="pool4"),
        layers.Flatten(name="flatten"),
        layers.Rescaling(1.0 / filters, name="scaling"),
        layers.Dense(
            classes,
            activation="softmax",
            use_bias=False,
            # A standard deviation of 1.
            kernel_initializer=keras.initializers.RandomUniform(-math.sqrt(3), math.sqrt(3)),
            name="probabilities",
        ),
    ]
    model = keras.Sequential(stack, name="fast")
    for layer in model.layers:
        if layer.name.startswith("conv"):
            layer.kernel.assign(_partial_identity(layer.kernel.numpy()))
    return model


def _convolution(inputs: int, filters: int, name: str) -> keras.layers.Conv2D:
    # Uniform up to 1 / sqrt(fan in), as in PyTorch.
    initializer = keras.initializers.VarianceScaling(1 / 3, "fan_in", "uniform")
    return keras.layers.Conv2D(
        filters, 3, padding="same", use_bias=False, kernel_initializer=initializer, name=name
    )


def _partial_identity(kernel: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Make each of the first filters of a kernel [3, 3, inputs, filters] copy one input."""
    count = min(kernel.shape[2:])
    kernel = kernel.copy()
    kernel[..., :count] = 0.0
    kernel[1, 1, range(count), range(count)] = 1.0
    return kernel


def whitening_weights(images: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[np.float32]]:
    """Compute filters that decorrelate the values of a patch, from the first training images.

    The filters are the eigenvectors of the second moments of normalized patches, each divided by
    the square root of its eigenvalue, with both signs. They have the same bits on every processor:
    the moments are sums of integers, which are exact in float64, and the computation after that
    uses no matrix function of a library.

    Args:
        images: [examples, 32, 32, 3] uint8.

    Returns:
        "whitening/kernel": [2, 2, 3, 24] float32.
    """
    sums, products, count = np.zeros(12), np.zeros((12, 12)), 0
    last = IMAGE_SIZE - PATCH_SIZE + 1
    corners = [(y, x) for y in range(PATCH_SIZE) for x in range(PATCH_SIZE)]
    for start in range(0, min(len(images), WHITENED_IMAGES), 500):
        part = images[start : min(start + 500, WHITENED_IMAGES)].astype(np.float64)
        patches = np.concatenate([part[:, y : y + last, x : x + last] for y, x in corners], axis=-1)
        patches = patches.reshape(-1, len(sums))
        sums += patches.sum(axis=0)
        products += patches.T @ patches
        count += len(patches)
    mean, deviation = (np.tile(np.multiply(one, 255.0), len(corners)) for one in (MEAN, DEVIATION))
    moments = products / count - np.outer(sums / count, mean) - np.outer(mean, sums / count)
    moments = (moments + np.outer(mean, mean)) / np.outer(deviation, deviation)
    eigenvalues, eigenvectors = decompose(moments)
    filters = eigenvectors / np.sqrt(eigenvalues + WHITENING_EPSILON)
    kernel = np.concatenate([filters, -filters], axis=1).astype(np.float32)
    return {"whitening/kernel": kernel.reshape(PATCH_SIZE, PATCH_SIZE, 3, -1)}


def decompose(
    matrix: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Compute eigenvalues and eigenvectors of a symmetric matrix by cyclic Jacobi rotations.

    NumPy uses a library whose last digits differ between processors.

    Source: Golub and Van Loan, "Matrix computations", section 8.5.

    Args:
        matrix: [size, size], with about a dozen rows.

    Returns:
        Eigenvalues [size] and eigenvectors [size, size], one per column, in no particular order.
    """
    values, vectors = matrix.copy(), np.eye(len(matrix))
    pairs = list(itertools.combinations(range(len(matrix)), 2))
    for p, q in pairs * _SWEEPS:
        if values[p, q] == 0.0:
            continue
        # The angle that makes this entry zero.
        ratio = float(values[q, q] - values[p, p]) / (2.0 * float(values[p, q]))
        tangent = math.copysign(1.0, ratio) / (abs(ratio) + math.sqrt(ratio * ratio + 1.0))
        cos = 1.0 / math.sqrt(tangent * tangent + 1.0)
        sin = tangent * cos
        for rotated in (values.T, values, vectors):
            one, two = rotated[:, p].copy(), rotated[:, q].copy()
            rotated[:, p], rotated[:, q] = cos * one - sin * two, sin * one + cos * two
    return values.diagonal(), vectors


class Muon(keras.optimizers.Optimizer):  # type: ignore[misc]
    """Muon for convolution filters, and SGD with Nesterov momentum for biases and the head.

    For each kernel, Muon steps along the semi-orthogonal matrix that is nearest to the momentum of
    the gradient, and it normalizes the filters before each step. All rates fall to zero linearly.

    Source: Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024
    (kellerjordan.github.io/posts/muon), as `airbench94_muon` applies it. Gradients are those of the
    *sum* of the losses over the batch.

    Args:
        initial_learning_rate: Learning rate of the filters in the first step.
        total_steps: Steps of the run, after which the learning rate is zero.
        dtype: Type in which the Newton-Schulz iteration computes.
        name: Name of the optimizer.
    """

    MOMENTUM, SGD_MOMENTUM = 0.6, 0.85
    assigns_through_keras = True

    def __init__(
        self,
        initial_learning_rate: float,
        total_steps: int,
        dtype: str = "bfloat16",
        name: str = "muon",
    ) -> None:
        schedule = keras.optimizers.schedules.PolynomialDecay(
            initial_learning_rate, total_steps, end_learning_rate=0.0
        )
        super().__init__(learning_rate=schedule, name=name)
        self._initial_learning_rate, self._total_steps = initial_learning_rate, total_steps
        self._dtype = dtype

    def build(self, variables: list[keras.Variable]) -> None:
        """Create a momentum for each variable."""
        if not self.built:
            super().build(variables)
            self._momentums = self.add_optimizer_variables(variables, "momentum")
            self._are_whitening = [one.path.endswith("whitening/bias") for one in variables]

    def update_step(
        self, gradient: tf.Tensor, variable: keras.Variable, learning_rate: tf.Tensor
    ) -> None:
        """Update a variable by the gradient of the loss summed over the batch."""
        index = self._get_variable_index(variable)
        momentum = self._momentums[index]
        value = tf.convert_to_tensor(variable)
        is_filter = len(variable.shape) == 4
        decay = self.MOMENTUM if is_filter else self.SGD_MOMENTUM
        if not is_filter:
            rate = HEAD_RATE if len(variable.shape) == 2 else BIAS_RATE
            gradient += DECAY / (self._total_steps * rate * self._initial_learning_rate) * value
            if self._are_whitening[index]:
                learning_rate = self._whitening_rate()
            learning_rate *= rate
        average = momentum * decay + gradient
        self.assign(momentum, average)
        step = gradient + decay * average
        if is_filter:
            filters = value.shape[-1]
            value *= math.sqrt(filters) / tf.norm(value)
            matrix = tf.reshape(step, [-1, filters])
            step = tf.reshape(orthogonalize(matrix, self._dtype), value.shape)
        self.assign(variable, value - learning_rate * step)

    def _whitening_rate(self) -> tf.Tensor:
        """The learning rate of the whitening bias, which falls to zero within the first epochs."""
        steps = math.ceil(WHITENING_BIAS_SHARE * self._total_steps)
        done = tf.cast(tf.convert_to_tensor(self.iterations), tf.float32)
        return self._initial_learning_rate * tf.maximum(1.0 - done / steps, 0.0)

    def get_config(self) -> dict[str, Any]:
        """The arguments, in types that JSON supports."""
        return {
            "initial_learning_rate": self._initial_learning_rate,
            "total_steps": self._total_steps,
            "dtype": self._dtype,
            "name": self.name,
        }


def orthogonalize(matrix: tf.Tensor, dtype: str) -> tf.Tensor:
    """Bring the singular values of a matrix close to 1 by three Newton-Schulz iterations.

    The coefficients are Muon's: they raise small singular values fast, and the final values are
    between about 0.5 and 1.5.

    Args:
        matrix: [rows, columns] float32.
        dtype: Type in which to compute.

    Returns:
        [rows, columns] float32.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x = tf.cast(matrix / (tf.norm(matrix) + 1e-7), dtype)
    for _ in range(3):
        gram = tf.matmul(x, x, transpose_a=tall, transpose_b=not tall)
        polynomial = b * gram + c * tf.matmul(gram, gram)
        x = a * x + (tf.matmul(x, polynomial) if tall else tf.matmul(polynomial, x))
    return tf.cast(x, tf.float32)


def build_optimizer(learning_rate: float, total_steps: int) -> keras.optimizers.Optimizer:
    """Muon and SGD, with learning rates that fall to zero linearly."""
    return Muon(learning_rate, total_steps)


def draw_augmentation(
    seed: int, epoch: tf.Tensor, steps: int, batch_size: int, rows: tf.Tensor
) -> tf.Tensor:
    """Draw one epoch's shifts, and mirror each image in every second epoch.

    Returns:
        [steps, batch_size, 3] float32: pixels to shift across and down, from -2 to 2, and 1 to
        mirror or 0. The epochs in which an image is mirrored depend on seed and row.
    """
    shape = [steps, batch_size, 2]
    # Not "auto", which selects different algorithms on different devices and under XLA.
    shifts = tf.random.stateless_uniform(
        shape, [seed, epoch], -MAX_SHIFT, MAX_SHIFT + 1, tf.int32, alg="philox"
    )
    mirrored = (_first_flips(seed, rows) + epoch) % 2
    return tf.cast(tf.concat([shifts, mirrored[..., None]], axis=-1), tf.float32)


def _first_flips(seed: int, rows: tf.Tensor) -> tf.Tensor:
    """Whether the first epoch mirrors each row of the training set: 0 or 1, int32."""
    # Rows that are this far apart share a coin.
    coins = tf.random.stateless_uniform([2**16], [seed, -1], 0, 2, tf.int32, alg="philox")
    return tf.gather(coins, rows % 2**16)


def augment(images: tf.Tensor, draws: tf.Tensor, resample: Resample) -> tf.Tensor:
    """Shift images, with reflected pixels beyond the edges, and mirror some of them."""
    del resample
    shift_x, shift_y, mirrored = (column[:, None] for column in tf.unstack(draws, axis=-1))
    pixels = tf.range(IMAGE_SIZE, dtype=tf.float32)[None]
    columns = pixels + mirrored * (IMAGE_SIZE - 1.0 - 2.0 * pixels)
    columns, rows = _reflect(columns + shift_x), _reflect(pixels + shift_y)
    positions = rows[:, :, None] * IMAGE_SIZE + columns[:, None, :]
    flat = tf.reshape(images, [-1, IMAGE_SIZE**2, images.shape[-1]])
    return tf.gather(flat, positions, batch_dims=1)


def _reflect(positions: tf.Tensor) -> tf.Tensor:
    """Reflect positions beyond the edges into the image, int32: -1 becomes 1."""
    last = IMAGE_SIZE - 1.0
    return tf.cast(last - tf.abs(last - tf.abs(positions)), tf.int32)


def mirror(images: tf.Tensor) -> tf.Tensor:
    """Mirror images."""
    return tf.reverse(images, axis=[2])


def shift_up_left(images: tf.Tensor) -> tf.Tensor:
    """Shift images by a pixel up and left, reflecting the edges."""
    return tf.pad(images, [[0, 0], [0, 1], [0, 1], [0, 0]], "REFLECT")[:, 1:, 1:]


def shift_down_right(images: tf.Tensor) -> tf.Tensor:
    """Shift images by a pixel down and right, reflecting the edges."""
    return tf.pad(images, [[0, 0], [1, 0], [1, 0], [0, 0]], "REFLECT")[:, :-1, :-1]


def mirror_shift_up_left(images: tf.Tensor) -> tf.Tensor:
    """Shift images by a pixel up and left, and then mirror them."""
    return mirror(shift_up_left(images))


def mirror_shift_down_right(images: tf.Tensor) -> tf.Tensor:
    """Shift images by a pixel down and right, and then mirror them."""
    return mirror(shift_down_right(images))


RECIPE = Recipe(
    name="fast",
    build_model=build_model,
    build_optimizer=build_optimizer,
    loss="categorical_crossentropy",
    draw_augmentation=draw_augmentation,
    augment=augment,
    tta_views=(
        *(unchanged, mirror),
        *(shift_up_left, mirror_shift_up_left, shift_down_right, mirror_shift_down_right),
    ),
    tta_weights=(1 / 4, 1 / 4, 1 / 8, 1 / 8, 1 / 8, 1 / 8),
    label_smoothing=0.2,
    loss_reduction="sum",
    fixed_weights=whitening_weights,
    early_variables={"whitening/bias": WHITENING_BIAS_SHARE},
    # On two CPU cores a step takes four seconds, and a scheduler can give a run only thirty to
    # stop.
    steps_per_execution=5,
)
