"""The recipe `classic` in JAX, optimized for one GPU; needs no TensorFlow.

    python -m tests.benchmarks.peer_jax --data-dir data --epochs 50 --precision bfloat16

An epoch is one compiled program that draws the order and the affine maps and scans over the steps.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax import lax

from tests.benchmarks import peer
from tests.benchmarks.peer import BATCH_SIZE, IMAGE_SIZE, PIXELS

Tree = dict[str, Any]

CONVOLUTIONS = {"conv1": (3, 32), "conv2": (32, 64), "conv3": (64, 128)}
DENSES = {"dense1": (512, 512), "dense2": (512, 128), "head": (128, peer.CLASSES)}


class State(NamedTuple):
    """Everything that training changes, in float32.

    Attributes:
        parameters: By layer.
        statistics: Moving means and variances, by layer.
        first: Adam's first moments, shaped as the parameters.
        second: Adam's second moments.
        step: Number of completed steps, int32.
    """

    parameters: Tree
    statistics: Tree
    first: Tree
    second: Tree
    step: jax.Array


def initial_state(key: jax.Array) -> State:
    """Create Keras's initial values: Glorot-uniform kernels, zero biases."""
    glorot = jax.nn.initializers.glorot_uniform()
    shapes = {name: (3, 3, *channels) for name, channels in CONVOLUTIONS.items()} | DENSES
    keys = jax.random.split(key, len(shapes))
    parameters: Tree = {
        name: {"kernel": glorot(layer_key, shape), "bias": jnp.zeros(shape[-1])}
        for layer_key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    statistics: Tree = {}
    for name, (_, channels) in CONVOLUTIONS.items():
        parameters[name] |= {"gamma": jnp.ones(channels), "beta": jnp.zeros(channels)}
        statistics[name] = {"mean": jnp.zeros(channels), "variance": jnp.ones(channels)}
    zeros = partial(jax.tree.map, jnp.zeros_like)
    return State(parameters, statistics, zeros(parameters), zeros(parameters), jnp.int32(0))


@jax.custom_vjp
def max_pool(x: jax.Array) -> jax.Array:
    """Max pooling of [batch, height, width, channels] of even size, with windows and strides of 2.

    Elementwise, because XLA computes the gradient of `lax.reduce_window` with a scatter. If several
    values are the largest, the gradient goes to the first.
    """
    return _max_pool_forward(x)[0]


def _max_pool_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    batch, height, width, channels = x.shape
    windows = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
    corners = [windows[:, :, i, :, j] for i in range(2) for j in range(2)]
    pooled = jnp.maximum(jnp.maximum(*corners[:2]), jnp.maximum(*corners[2:]))
    first = jnp.full(pooled.shape, 3, jnp.int8)
    for corner in (2, 1, 0):
        first = jnp.where(corners[corner] == pooled, jnp.int8(corner), first)
    return pooled, first


def _max_pool_backward(first: jax.Array, upstream: jax.Array) -> tuple[jax.Array]:
    batch, rows, columns, channels = first.shape
    numbers = jnp.arange(4, dtype=jnp.int8).reshape(1, 1, 2, 1, 2, 1)
    is_first = first[:, :, None, :, None] == numbers
    spread = jnp.where(is_first, upstream[:, :, None, :, None], 0)
    return (spread.reshape(batch, 2 * rows, 2 * columns, channels),)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def batch_norm(x: jax.Array, layer: Tree, moving: Tree, training: bool) -> tuple[jax.Array, Tree]:
    """Normalize in float32; in training, also update the moving statistics."""
    wide = x.astype(jnp.float32)
    mean, variance = moving["mean"], moving["variance"]
    if training:
        # Computes both means in one pass over x.
        mean = wide.mean((0, 1, 2))
        variance = jnp.maximum((wide * wide).mean((0, 1, 2)) - mean * mean, 0)
        keep = peer.NORM_MOMENTUM
        moving = {
            "mean": moving["mean"] * keep + mean * (1 - keep),
            "variance": moving["variance"] * keep + variance * (1 - keep),
        }
    scale = layer["gamma"] * lax.rsqrt(variance + peer.NORM_EPSILON)
    return ((wide - mean) * scale + layer["beta"]).astype(x.dtype), moving


def forward(
    parameters: Tree, statistics: Tree, x: jax.Array, dropout_key: jax.Array | None
) -> tuple[jax.Array, Tree]:
    """Apply the network of `job/recipes/classic.py` in the dtype of its input.

    Args:
        parameters: By layer.
        statistics: By layer.
        x: Images [batch, 32, 32, 3].
        dropout_key: Random key for Dropout; None for inference.

    Returns:
        Logits [batch, 10] float32 and the new statistics.
    """

    def dense(x: jax.Array, layer: Tree) -> jax.Array:
        return x @ layer["kernel"].astype(x.dtype) + layer["bias"].astype(x.dtype)

    training, updated = dropout_key is not None, {}
    for name in CONVOLUTIONS:
        layer = parameters[name]
        x = lax.conv_general_dilated(
            x,
            layer["kernel"].astype(x.dtype),
            window_strides=(1, 1),
            padding="VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = x + layer["bias"].astype(x.dtype)
        # ReLU commutes with the pooling; after it, there are only a quarter of the values.
        _, height, width, _ = x.shape
        x = jax.nn.relu(max_pool(x[:, : height // 2 * 2, : width // 2 * 2]))
        x, updated[name] = batch_norm(x, layer, statistics[name], training)
    x = jax.nn.relu(dense(x.reshape(len(x), -1), parameters["dense1"]))
    if dropout_key is not None:
        keep = jax.random.bernoulli(dropout_key, 1 - peer.DROPOUT, x.shape)
        x = jnp.where(keep, x / (1 - peer.DROPOUT), 0)
    x = jax.nn.relu(dense(x, parameters["dense2"]))
    return dense(x.astype(jnp.float32), parameters["head"]), updated


def draw_transforms(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draw affine maps [*shape, 6]."""
    return jnp.stack(peer.affine_maps(jax.random.uniform(key, (7, *shape)), jnp), axis=-1)


def augment(pixels: jax.Array, rows: jax.Array, transforms: jax.Array) -> jax.Array:
    """Sample rows of the data set through affine maps, directly from the bytes on the device.

    Args:
        pixels: [examples * 1024, 3] uint8.
        rows: [batch] int32.
        transforms: [batch, 6] float32.

    Returns:
        [batch, 32, 32, 3] float32, 0 to 1: bilinear, with the nearest pixel beyond the edges.
    """
    a, b, c, d, e, f = (transforms[:, None, None, i] for i in range(6))
    line = jnp.arange(IMAGE_SIZE, dtype=jnp.float32)
    x, y = line[None, None, :], line[None, :, None]
    source_x = jnp.clip(a * x + b * y + c, 0, IMAGE_SIZE - 1)
    source_y = jnp.clip(d * x + e * y + f, 0, IMAGE_SIZE - 1)
    left, top = jnp.floor(source_x), jnp.floor(source_y)
    weight_x, weight_y = (source_x - left)[..., None], (source_y - top)[..., None]
    left, top = left.astype(jnp.int32), top.astype(jnp.int32)
    right, bottom = jnp.minimum(left + 1, IMAGE_SIZE - 1), jnp.minimum(top + 1, IMAGE_SIZE - 1)
    first = rows[:, None, None] * PIXELS

    def at(line: jax.Array, column: jax.Array) -> jax.Array:
        index = first + line * IMAGE_SIZE + column
        return pixels.at[index].get(mode="promise_in_bounds").astype(jnp.float32)

    above = (1 - weight_x) * at(top, left) + weight_x * at(top, right)
    below = (1 - weight_x) * at(bottom, left) + weight_x * at(bottom, right)
    return ((1 - weight_y) * above + weight_y * below) * (1 / 255)


def adam(state: State, gradients: Tree, statistics: Tree) -> State:
    """Apply Keras's Adam, which adds epsilon to the root of the uncorrected second moment."""
    step = state.step + 1
    time = step.astype(jnp.float32)
    rate = peer.LEARNING_RATE * jnp.sqrt(1 - peer.BETA_2**time) / (1 - peer.BETA_1**time)
    first = jax.tree.map(lambda m, g: m + (g - m) * (1 - peer.BETA_1), state.first, gradients)
    second = jax.tree.map(lambda v, g: v + (g * g - v) * (1 - peer.BETA_2), state.second, gradients)
    parameters = jax.tree.map(
        lambda p, m, v: p - rate * m / (jnp.sqrt(v) + peer.ADAM_EPSILON),
        state.parameters,
        first,
        second,
    )
    return State(parameters, statistics, first, second, step)


@partial(jax.jit, static_argnames=("steps", "dtype", "unroll"), donate_argnames="state")
def train_epoch(
    state: State,
    key: jax.Array,
    pixels: jax.Array,
    labels: jax.Array,
    *,
    steps: int,
    dtype: Any,
    unroll: int,
) -> tuple[State, jax.Array]:
    """Train an epoch; return the new state and the mean loss."""
    order_key, transform_key, dropout_key = jax.random.split(key, 3)
    order = jax.random.permutation(order_key, len(labels))[: steps * BATCH_SIZE]

    def train_step(state: State, step: tuple[jax.Array, ...]) -> tuple[State, jax.Array]:
        rows, transforms, step_key = step
        images = augment(pixels, rows, transforms).astype(dtype)
        targets = labels[rows]

        def loss_of(parameters: Tree) -> tuple[jax.Array, Tree]:
            logits, statistics = forward(parameters, state.statistics, images, step_key)
            log_likelihoods = jax.nn.log_softmax(logits)
            picked = jnp.take_along_axis(log_likelihoods, targets[:, None], axis=-1)
            return -picked.mean(), statistics

        (loss, statistics), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.parameters)
        return adam(state, gradients, statistics), loss

    inputs = (
        order.reshape(steps, BATCH_SIZE),
        draw_transforms(transform_key, (steps, BATCH_SIZE)),
        jax.random.split(dropout_key, steps),
    )
    state, losses = lax.scan(train_step, state, inputs, unroll=unroll)
    return state, losses.mean()


@partial(jax.jit, static_argnames="dtype")
def count_correct(state: State, images: jax.Array, labels: jax.Array, *, dtype: Any) -> jax.Array:
    """Count the correct predictions for images [batch, 32, 32, 3] uint8."""
    decoded = (images.astype(jnp.float32) * (1 / 255)).astype(dtype)
    logits, _ = forward(state.parameters, state.statistics, decoded, None)
    return (logits.argmax(-1) == labels).sum()


def main() -> None:
    """Train and print the results."""
    parser = peer.option_parser(__doc__)
    parser.add_argument("--unroll", type=int, default=5, help="steps per iteration of the scan")
    options = parser.parse_args()
    data = peer.load(options.data_dir, options.limit)
    dtype = jnp.dtype(options.precision)
    pixels, labels = jax.device_put((data.train_images.reshape(-1, 3), data.train_labels))
    test_images, test_labels = jax.device_put((data.test_images, data.test_labels))
    initial_key, training_key = jax.random.split(jax.random.key(options.seed))
    state = jax.block_until_ready(jax.jit(initial_state)(initial_key))

    def train(epoch: int) -> float:
        nonlocal state
        state, loss = train_epoch(
            state,
            jax.random.fold_in(training_key, epoch),
            pixels,
            labels,
            steps=data.steps_per_epoch,
            dtype=dtype,
            unroll=options.unroll,
        )
        jax.block_until_ready(state)
        return float(loss)

    def validate() -> float:
        return int(count_correct(state, test_images, test_labels, dtype=dtype)) / len(test_labels)

    about = {
        "versions": {
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "numpy": np.__version__,
        },
        "device": jax.devices()[0].device_kind,
        "precision": options.precision,
        "unroll": options.unroll,
    }
    peer.train(options.epochs, train, validate, about)


if __name__ == "__main__":
    main()
