"""Keras's layers in the forms that train fastest: same variables, same results up to rounding."""

import functools
import itertools
import math
from typing import Any

import keras
import tensorflow as tf

from job.cluster.devices import graph_function

_PATCH_VALUES = 2**16
"""Largest number of values in the patches of one image; 256 images then take 64 MiB in float32.
For larger patches, Keras's convolution is used, which needs no copies."""


class PatchConvolution(keras.layers.Conv2D):  # type: ignore[misc]
    """Convolution as a matrix product, with the input patch of each output as a row.

    XLA puts all kernels except convolutions into CUDA graphs. So each convolution splits a step
    into two graphs, and the host launches them one after the other.
    """

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        _, rows, columns, filters = self.compute_output_shape(inputs.shape)
        kernel = tf.convert_to_tensor(self.kernel)
        seen = math.prod(kernel.shape[:-1])
        if (
            self.groups > 1
            or self.data_format != "channels_last"
            or rows * columns * seen > _PATCH_VALUES
        ):
            return super().call(inputs)
        patches = extract_patches(
            inputs, (rows, columns), self.kernel_size, self.strides, self.dilation_rate
        )
        products = product_with_bias(
            tf.reshape(patches, [-1, seen]), tf.reshape(kernel, [seen, filters]), self.bias
        )
        outputs = tf.reshape(products, [-1, rows, columns, filters])
        return outputs if self.activation is None else self.activation(outputs)


class MatrixDense(keras.layers.Dense):  # type: ignore[misc]
    """A dense layer that adds its bias with `product_with_bias`."""

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        if len(inputs.shape) != 2:
            return super().call(inputs, training=training)
        outputs = product_with_bias(inputs, tf.convert_to_tensor(self.kernel), self.bias)
        return outputs if self.activation is None else self.activation(outputs)


def product_with_bias(rows: tf.Tensor, kernel: tf.Tensor, bias: keras.Variable | None) -> tf.Tensor:
    """Multiply two matrices and add the bias, as a single product.

    The bias becomes a row of the kernel, multiplied by a column of ones. So its gradient is part of
    the kernel's gradient, and no separate GPU kernels are needed to add up rows.

    Args:
        rows: [rows, values].
        kernel: [values, filters].
        bias: [filters], or None.

    Returns:
        [rows, filters].
    """
    if bias is None:
        return tf.matmul(rows, kernel)
    # Padded with zeros to a multiple of 16, which a GPU's tensor cores read at once.
    zeros = -(rows.shape[1] + 1) % 16
    ones = tf.pad(tf.ones_like(rows[:, :1]), [[0, 0], [0, zeros]])
    biases = tf.pad(tf.convert_to_tensor(bias)[None], [[0, zeros], [0, 0]])
    return tf.matmul(tf.concat([rows, ones], axis=1), tf.concat([kernel, biases], axis=0))


def extract_patches(
    images: tf.Tensor,
    outputs: tuple[int, int],
    window: tuple[int, int],
    strides: tuple[int, int],
    dilation: tuple[int, int],
) -> tf.Tensor:
    """`tf.image.extract_patches` built from slices, because XLA compiles that op as a convolution.

    Args:
        images: [batch, height, width, channels].
        outputs: Rows and columns of windows. Beyond the edges of the image there are zeros, equally
            many on both sides, or one more below and on the right.
        window: Pixels in a window, down and across.
        strides: Pixels from one window to the next.
        dilation: Pixels from one pixel of a window to the next.

    Returns:
        [batch, *outputs, window height * window width * channels].
    """
    padding, axes = [[0, 0]], []
    for size, count, length, stride, step in zip(
        images.shape[1:3], outputs, window, strides, dilation, strict=True
    ):
        last = (count - 1) * stride
        missing = max(last + (length - 1) * step + 1 - size, 0)
        padding.append([missing // 2, missing - missing // 2])
        axes.append([slice(n * step, n * step + last + 1, stride) for n in range(length)])
    padded = tf.pad(images, [*padding, [0, 0]])
    return tf.concat([padded[:, *pixels] for pixels in itertools.product(*axes)], axis=-1)


class TrainingMaxPooling(keras.layers.MaxPooling2D):  # type: ignore[misc]
    """Max pooling, followed by the preceding convolution's ReLU if that is moved behind it.

    ReLU is monotonic, so the largest of the rectified values is the rectified largest value. Where
    that is zero, no gradient passes in either order. Behind the pooling, ReLU and its gradient
    process a quarter of the values.

    Args:
        relu: Whether to rectify the pooled values.
        elementwise: Whether to pool with `max_pool_2x2` if the layer's settings allow it.
        options: Options of Keras's layer.
    """

    def __init__(self, relu: bool, elementwise: bool, **options: Any) -> None:
        super().__init__(**options)
        self._relu = relu
        self._elementwise = (
            elementwise
            and self.pool_size == self.strides == (2, 2)
            and (self.padding, self.data_format) == ("valid", "channels_last")
        )

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        pooled = max_pool_2x2(inputs) if self._elementwise else super().call(inputs)
        return tf.nn.relu(pooled) if self._relu else pooled


@tf.custom_gradient
def max_pool_2x2(inputs: tf.Tensor) -> Any:
    """`tf.nn.max_pool2d` with windows and strides of 2, in elementwise ops that XLA fuses.

    XLA has no dedicated kernel for the gradient of max pooling. It scatters with atomic additions,
    which is slow, and which GPUs refuse when determinism is requested. Windows that do not overlap
    do not need this. The gradient goes to the first of equal largest values, as in TensorFlow.

    Args:
        inputs: [batch, height, width, channels]; an odd last row or column is left out.

    Returns:
        [batch, height // 2, width // 2, channels].
    """
    _, height, width, channels = inputs.shape
    rows, columns = height // 2, width // 2
    windows = tf.reshape(inputs[:, : 2 * rows, : 2 * columns], [-1, rows, 2, columns, 2, channels])
    corners = [windows[:, :, i, :, j] for i in range(2) for j in range(2)]
    pooled = tf.maximum(tf.maximum(corners[0], corners[1]), tf.maximum(corners[2], corners[3]))

    def gradient(upstream: tf.Tensor) -> tf.Tensor:
        first = tf.fill(tf.shape(pooled), 3)
        for corner in (2, 1, 0):
            first = tf.where(tf.equal(corners[corner], pooled), corner, first)
        numbers = tf.reshape(tf.range(4), [1, 1, 2, 1, 2, 1])
        is_first = tf.equal(first[:, :, None, :, None], numbers)
        spread = tf.where(is_first, upstream[:, :, None, :, None], tf.zeros([], upstream.dtype))
        spread = tf.reshape(spread, [-1, 2 * rows, 2 * columns, channels])
        return tf.pad(spread, [[0, 0], [0, height - 2 * rows], [0, width - 2 * columns], [0, 0]])

    return pooled, gradient


class FusedGelu(keras.layers.Activation):  # type: ignore[misc]
    """GELU in two kernels that XLA compiles: one forward, one backward.

    TensorFlow computes it with a chain of operations that each read and write all values. On CPUs
    that takes eight times as long.
    """

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        return gelu(inputs)


@tf.custom_gradient
def gelu(inputs: tf.Tensor) -> Any:
    """`keras.activations.gelu`: x P(X <= x) for a standard normal X.

    Source: Hendrycks and Gimpel, "Gaussian error linear units", 2016.

    Args:
        inputs: A tensor of any shape and floating-point dtype.

    Returns:
        A tensor of the same shape and dtype; computed in float32.
    """

    def gradient(upstream: tf.Tensor) -> tf.Tensor:
        return _gelu_gradient(inputs, upstream)

    return _gelu(inputs), gradient


def _normal_distribution(values: tf.Tensor) -> tf.Tensor:
    return 0.5 * (1.0 + tf.math.erf(values * math.sqrt(0.5)))


@functools.partial(graph_function, jit_compile=True)
def _gelu(inputs: tf.Tensor) -> tf.Tensor:
    values = tf.cast(inputs, tf.float32)
    return tf.cast(values * _normal_distribution(values), inputs.dtype)


@functools.partial(graph_function, jit_compile=True)
def _gelu_gradient(inputs: tf.Tensor, upstream: tf.Tensor) -> tf.Tensor:
    values = tf.cast(inputs, tf.float32)
    density = tf.exp(-0.5 * values * values) * (1.0 / math.sqrt(2.0 * math.pi))
    slope = _normal_distribution(values) + values * density
    return tf.cast(slope * tf.cast(upstream, tf.float32), inputs.dtype)


class FusedBatchNormalization(keras.layers.BatchNormalization):  # type: ignore[misc]
    """Keras's BatchNormalization, trained with a function of few kernels.

    Keras 3 builds the layer from about thirty elementwise ops, which take a quarter of the whole
    training step on a CPU. TensorFlow's fused op computes the same, with statistics in float32 for
    every input dtype.

    Args:
        elementwise: Whether to normalize with `normalize_batch` instead of the fused op.
        options: Options of Keras's layer.
    """

    def __init__(self, elementwise: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self._normalize = normalize_batch if elementwise else _normalize_by_op

    @staticmethod
    def can_replace(layer: keras.layers.BatchNormalization) -> bool:
        """Whether the fused kernel supports the settings of this layer."""
        return (
            layer.axis in (-1, 3)
            and layer.center
            and layer.trainable
            and not layer.renorm
            and not layer.synchronized
        )

    def call(self, inputs: tf.Tensor, training: bool | None = None, mask: Any = None) -> tf.Tensor:
        if not training or mask is not None or len(inputs.shape) != 4:
            return super().call(inputs, training=training, mask=mask)
        scale = self.gamma.value if self.scale else tf.ones_like(self.beta.value)
        outputs, mean, variance = self._normalize(inputs, scale, self.beta.value, self.epsilon)
        keep = self.momentum
        self.moving_mean.assign(self.moving_mean * keep + mean * (1.0 - keep))
        self.moving_variance.assign(self.moving_variance * keep + variance * (1.0 - keep))
        return outputs


def _normalize_by_op(
    inputs: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor, epsilon: float
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    # `tf.nn` raises the epsilon to 1e-5, which only cuDNN before 7.5 needed.
    outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
        x=inputs, scale=scale, offset=offset, mean=[], variance=[], epsilon=epsilon
    )
    # The kernel returns the unbiased variance; Keras keeps the biased one.
    rows = tf.cast(tf.size(inputs) // inputs.shape[-1], tf.float32)
    return outputs, mean, variance * ((rows - 1.0) / rows)


def normalize_batch(
    inputs: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor, epsilon: float
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """`fused_batch_norm`, in ops that XLA fuses with the ops before and after.

    XLA compiles each sum over the batch to one or two kernels. Here two sums are the real and
    imaginary parts of one complex sum, both forward and backward.

    Args:
        inputs: [batch, height, width, channels].
        scale: [channels] float32.
        offset: [channels] float32.
        epsilon: Added to the variance.

    Returns:
        Outputs with the shape and dtype of the inputs; mean and biased variance, both [channels]
        float32 without a gradient.
    """
    rows = tf.cast(tf.size(inputs) // inputs.shape[-1], tf.float32)

    def means(one: tf.Tensor, other: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        sums = tf.reduce_sum(tf.complex(one, other), axis=[0, 1, 2])
        return tf.math.real(sums) / rows, tf.math.imag(sums) / rows

    @tf.custom_gradient
    def normalize(inputs: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor) -> Any:
        values = tf.cast(inputs, tf.float32)
        mean, mean_square = means(values, values * values)
        # Rounding can make a variance of zero negative.
        variance = tf.maximum(mean_square - mean * mean, 0.0)
        inverse = tf.math.rsqrt(variance + epsilon)
        outputs = tf.cast((values - mean) * (inverse * scale) + offset, inputs.dtype)

        def gradient(upstream: tf.Tensor, *_: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            slope = tf.cast(upstream, tf.float32)
            normal = (tf.cast(inputs, tf.float32) - mean) * inverse
            slope_mean, slope_normal_mean = means(slope, slope * normal)
            downstream = (slope - slope_mean - normal * slope_normal_mean) * (scale * inverse)
            return (
                tf.cast(downstream, inputs.dtype),
                slope_normal_mean * rows,
                slope_mean * rows,
            )

        return (outputs, mean, variance), gradient

    outputs, mean, variance = normalize(inputs, scale, offset)
    return outputs, mean, variance
