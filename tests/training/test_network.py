import dataclasses
import re
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from job.config import UserError
from job.data import Dataset
from job.recipes import Recipe, classic
from job.training import layers as training_layers
from job.training.layers import (
    FusedBatchNormalization,
    FusedGelu,
    MatrixDense,
    PatchConvolution,
    TrainingMaxPooling,
    gelu,
    max_pool_2x2,
)
from job.training.network import build_network, training_network


@pytest.fixture
def images() -> np.ndarray:
    """Noise, because BatchNormalization would divide flat images by variances near zero."""
    return np.random.default_rng(0).random((128, 32, 32, 3), np.float32)


def small(seed: int, classes: int, end: str | None = "softmax") -> keras.Model:
    layers = keras.layers
    dense = layers.Dense(classes, end)
    return keras.Sequential([keras.Input((8, 8, 3)), layers.Flatten(), dense])


def mine(**changes: Any) -> Recipe:
    """A recipe of the user's own without augmentation."""
    return dataclasses.replace(
        classic.RECIPE,
        name="mine",
        draw_augmentation=lambda seed, epoch, steps, rows: tf.zeros([steps, rows, 1]),
        augment=lambda images, draws, resample: images,
        **changes,
    )


def with_lambda(seed: int, classes: int) -> keras.Model:
    plain = small(seed, classes)
    doubling = keras.layers.Lambda(lambda images: 2 * images)
    return keras.Sequential([keras.Input((8, 8, 3)), doubling, *plain.layers])


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"build_model": lambda seed, classes: small(seed, classes, None)},
            "the network of job/recipes/mine.py returns values from",
        ),
        (
            {"build_model": lambda seed, classes: small(seed, classes, "sigmoid")},
            "expected probabilities",
        ),
        (
            {"build_model": lambda seed, classes: small(seed, 7)},
            "the network of job/recipes/mine.py returns float32 [4, 7] for 4 images, expected",
        ),
        ({"build_model": lambda *_: None}, "build_model returns None, expected a keras Model"),
        (
            {"build_optimizer": lambda *_: "adam"},
            "job/recipes/mine.py: TypeError: build_optimizer returns",
        ),
        ({"build_model": with_lambda}, "job/recipes/mine.py: ValueError: Requested the deserial"),
        ({"loss": "CategoricalCrossentropy"}, "loss of job/recipes/mine.py returns float32 []"),
        ({"loss": "nothing"}, "job/recipes/mine.py: ValueError"),
        (
            {"draw_augmentation": lambda *_: tf.zeros([8, 1])},
            "draw_augmentation of job/recipes/mine.py returns float32 [8, 1] for 4 images, "
            "expected",
        ),
        (
            {"augment": lambda images, *_: images[:, 1:]},
            "augment of job/recipes/mine.py returns float32 [4",
        ),
        (
            {"augment": lambda images, *_: images if tf.reduce_sum(images) > 0 else -images},
            "job/recipes/mine.py: OperatorNotAllowedInGraphError",
        ),
        (
            {"tta_views": (lambda images: images.shape,)},
            "tta_views of job/recipes/mine.py returns int32 [4]",
        ),
    ],
)
def test_a_recipe_that_cannot_be_trained_is_refused(changes: dict[str, Any], problem: str) -> None:
    recipe = mine(build_model=small)
    build_network(recipe, 1, 3, 0.1, 10)
    with pytest.raises(UserError, match=re.escape(problem)):
        build_network(dataclasses.replace(recipe, **changes), 1, 3, 0.1, 10)


def named(seed: int, classes: int) -> keras.Model:
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(2, 3, name="conv"),
            layers.BatchNormalization(name="norm"),
            layers.Flatten(name="flatten"),
            layers.Dense(classes, activation="softmax", name="dense"),
        ]
    )


KERNEL = np.ones((3, 3, 3, 2), np.float32)
TRAINED = "conv/kernel, conv/bias, norm/gamma, norm/beta, dense/kernel, dense/bias"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"fixed_weights": lambda images: [KERNEL]},
            "TypeError: fixed_weights returns list, expected a dictionary of arrays; fix the file",
        ),
        (
            {"fixed_weights": lambda images: {"conv9/kernel": KERNEL}},
            f"ValueError: fixed_weights has 'conv9/kernel', expected some of {TRAINED}; "
            "fix the file",
        ),
        (
            {"fixed_weights": lambda images: {"norm/moving_mean": KERNEL}},
            f"ValueError: fixed_weights has 'norm/moving_mean', expected some of {TRAINED}; "
            "fix the file",
        ),
        (
            {"fixed_weights": lambda images: {"conv/kernel": KERNEL[0]}},
            "ValueError: fixed_weights has float32 [3, 3, 2] for conv/kernel, expected float32 "
            "[3, 3, 3, 2]; fix the file",
        ),
        (
            {"fixed_weights": lambda images: {"conv/kernel": KERNEL.astype(int)}},
            "ValueError: fixed_weights has int64 [3, 3, 3, 2] for conv/kernel, expected float32",
        ),
        (
            {"fixed_weights": lambda images: {"conv/kernel": images[99]}},
            "IndexError: index 99 is out of bounds for axis 0 with size 4; fix the file",
        ),
        (
            {"early_variables": {"conv/weights": 0.5}},
            f"ValueError: early_variables has 'conv/weights', expected some of {TRAINED}; "
            "fix the file",
        ),
    ],
)
def test_wrong_variable_names_and_values_in_a_recipe_are_refused(
    changes: dict[str, Any], problem: str
) -> None:
    recipe = mine(
        build_model=named,
        fixed_weights=lambda images: {"conv/kernel": KERNEL},
        early_variables={"conv/kernel": 0.5, "conv/bias": 0.5},
    )
    images, labels = np.zeros((4, 8, 8, 3), np.uint8), np.zeros(4, np.int32)
    dataset = Dataset("some", ("a", "b", "c"), images, labels, images, labels)
    model, weights = build_network(recipe, 1, 3, 0.1, 10, dataset)
    assert list(weights) == ["conv/kernel"]
    np.testing.assert_array_equal(model.get_layer("conv").kernel, KERNEL)
    with pytest.raises(UserError, match=re.escape(f"job/recipes/mine.py: {problem}")):
        build_network(dataclasses.replace(recipe, **changes), 1, 3, 0.1, 10, dataset)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"tta_views": ()}, "tta_views is empty, expected at least (unchanged,)"),
        ({"tta_weights": (0.5, 0.5)}, "tta_weights received (0.5, 0.5), expected one number"),
        (
            {"tta_weights": (0.9,)},
            "tta_weights received (0.9,), expected one number for each of the 1",
        ),
        (
            {"tta_views": (tf.identity, tf.identity), "tta_weights": (1.5, -0.5)},
            "tta_weights received (1.5, -0.5), expected one number for each of the 2 views, none",
        ),
        (
            {"label_smoothing": 1.0},
            "label_smoothing received 1.0, expected at least 0 and less than 1",
        ),
        ({"loss_reduction": "max"}, "loss_reduction received 'max', expected 'mean' or 'sum'"),
        ({"steps_per_execution": 0}, "steps_per_execution received 0, expected at least 1"),
        ({"early_variables": {"a/b": 3}}, "early_variables has 3 for 'a/b', expected 0 to 1"),
        (
            {"draw_augmentation": lambda a, b, c, d, e, f: None},
            "received draw_augmentation(a, b, c, d, e, f), expected draw_augmentation(seed, epoch,",
        ),
        ({"fixed_weights": lambda: {}}, "received fixed_weights(), expected fixed_weights(images)"),
    ],
)
def test_settings_outside_their_range_are_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(problem)):
        dataclasses.replace(classic.RECIPE, **changes)


def with_statistics(model: keras.Model) -> keras.Model:
    """Set non-trivial BatchNormalization statistics, scales and offsets."""
    rng = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.set_weights(
                [rng.uniform(0.5, 1.5, weight.shape) for weight in layer.get_weights()]
            )
    return model


@pytest.fixture
def original() -> keras.Model:
    return with_statistics(classic.build_model(3, 10))


def gradients(model: keras.Model, images: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    for variable in model.non_trainable_variables:
        if variable.path.endswith("seed_generator_state"):
            variable.assign([11, 5])

    @tf.function
    def compute() -> tuple[tf.Tensor, list[tf.Tensor]]:
        with tf.GradientTape() as tape:
            outputs = model(images, training=True)
            loss = -tf.reduce_mean(tf.math.log(outputs[:, 0]))
        return outputs, tape.gradient(loss, [v.value for v in model.trainable_variables])

    outputs, values = compute()
    return outputs.numpy(), [value.numpy() for value in values]


def test_the_classic_network_is_rebuilt_in_its_fast_form(
    original: keras.Model, images: np.ndarray
) -> None:
    fast = training_network(original, "float32")
    kinds = [type(layer) for layer in fast.layers[:3]]
    assert kinds == [keras.layers.Conv2D, TrainingMaxPooling, FusedBatchNormalization]
    assert [v.path.split("/", 1)[1] for v in fast.variables] == [
        v.path.split("/", 1)[1] for v in original.variables
    ]
    np.testing.assert_allclose(
        fast(images, training=False), original(images, training=False), atol=1e-5
    )


@pytest.mark.parametrize("compiled", [True, False])
def test_moved_relu_and_elementwise_pooling_compute_the_same_bits(
    original: keras.Model, images: np.ndarray, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    monkeypatch.setattr(FusedBatchNormalization, "can_replace", lambda layer: False)
    for matrix, layer in (
        (PatchConvolution, keras.layers.Conv2D),
        (MatrixDense, keras.layers.Dense),
    ):
        monkeypatch.setattr(matrix, "call", layer.call)
    fast = training_network(original, "float32", compiled)
    assert isinstance(fast.layers[1], TrainingMaxPooling)
    outputs, values = gradients(fast, images)
    expected_outputs, expected_values = gradients(original, images)
    np.testing.assert_array_equal(outputs, expected_outputs)
    for value, expected in zip(values, expected_values, strict=True):
        np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize("jit", [True, False], ids=["xla", "plain"])
@pytest.mark.parametrize("dtype", [tf.float32, tf.bfloat16], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("size", [(8, 6), (5, 7)])
def test_elementwise_pooling_equals_tensorflows_for_equal_values(
    size: tuple[int, int], dtype: tf.DType, jit: bool
) -> None:
    rng = np.random.default_rng(0)
    # Only a few different values, so that most windows have several largest ones.
    inputs = tf.cast(rng.integers(-2, 3, (16, *size, 4)), dtype)
    upstream = tf.cast(rng.normal(size=(16, size[0] // 2, size[1] // 2, 4)), dtype)

    def pool_and_gradient(pool: Any) -> tuple[tf.Tensor, tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            pooled = pool(inputs)
        return pooled, tape.gradient(pooled, inputs, upstream)

    results = tf.function(lambda: pool_and_gradient(max_pool_2x2), jit_compile=jit)()
    expected = pool_and_gradient(lambda images: tf.nn.max_pool2d(images, 2, 2, "VALID"))
    for result, right in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result.numpy(), right.numpy())


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "same": {"padding": "same"},
    "no bias": {"use_bias": False, "activation": "gelu"},
    "strides": {"strides": (2, 3), "padding": "same"},
    "strides, valid": {"kernel_size": (2, 4), "strides": 2},
    "dilation": {"dilation_rate": (2, 1), "padding": "same"},
    "pointwise": {"kernel_size": 1},
}


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_layers_as_matrix_products_equal_keras(
    options: dict[str, Any],
) -> None:
    layers = keras.layers
    keras.utils.set_random_seed(3)
    convolution = layers.Conv2D(
        **{"filters": 5, "kernel_size": 3, "bias_initializer": "normal"} | options
    )
    end = [layers.Flatten(), layers.Dense(3, bias_initializer="normal", activation="softmax")]
    original = keras.Sequential([keras.Input((9, 8, 4)), convolution, *end])
    fast = training_network(original, "float32", compiled=True)
    assert [type(layer) for layer in fast.layers[::2]] == [PatchConvolution, MatrixDense]
    images = np.random.default_rng(0).random((8, 9, 8, 4), np.float32)
    outputs, values = gradients(fast, images)
    expected_outputs, expected_values = gradients(original, images)
    np.testing.assert_allclose(outputs, expected_outputs, rtol=0, atol=1e-6)
    for value, expected in zip(values, expected_values, strict=True):
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-6)
        assert np.abs(expected).max() > 1e-3
    assert convolutions(original, images)
    assert not convolutions(fast, images)


@pytest.mark.parametrize(("groups", "values"), [(2, 288), (1, 287)], ids=["groups", "large"])
def test_grouped_and_large_convolutions_are_left_to_keras(
    monkeypatch: pytest.MonkeyPatch, groups: int, values: int
) -> None:
    monkeypatch.setattr(training_layers, "_PATCH_VALUES", values)
    original = keras.Sequential([keras.Input((9, 8, 4)), keras.layers.Conv2D(4, 1, groups=groups)])
    fast = training_network(original, "float32", compiled=True)
    images = np.random.default_rng(0).random((2, 9, 8, 4), np.float32)
    np.testing.assert_array_equal(fast(images), original(images))
    assert convolutions(fast, images)


def convolutions(model: keras.Model, images: np.ndarray) -> set[str]:
    """The convolution ops of a network, forward and backward."""

    @tf.function
    def compute() -> Any:
        with tf.GradientTape() as tape:
            outputs = model(images, training=True)
        return tape.gradient(outputs, [v.value for v in model.trainable_variables])

    graph = compute.get_concrete_function().graph.as_graph_def()
    nodes = [*graph.node, *(node for called in graph.library.function for node in called.node_def)]
    return {node.op for node in nodes if node.op.startswith("Conv")}


@pytest.mark.parametrize("compiled", [True, False])
def test_fused_batch_normalization_equals_keras(images: np.ndarray, compiled: bool) -> None:
    """The network contains no max pooling.

    Max pooling passes the gradient to the largest of four values. If the two largest differ only by
    rounding, another order of summation passes it to another value.
    """
    layers = keras.layers
    keras.utils.set_random_seed(3)
    original = with_statistics(
        keras.Sequential(
            [
                keras.Input((32, 32, 3)),
                layers.Conv2D(16, 3, activation="gelu"),
                layers.AveragePooling2D(2),
                layers.BatchNormalization(),
                layers.Conv2D(16, 3, activation="gelu"),
                layers.BatchNormalization(),
                layers.Flatten(),
                layers.Dense(10, activation="softmax"),
            ]
        )
    )
    fast = training_network(original, "float32", compiled)
    assert isinstance(fast.layers[2], FusedBatchNormalization)
    outputs, values = gradients(fast, images)
    expected_outputs, expected_values = gradients(original, images)
    np.testing.assert_allclose(outputs, expected_outputs, rtol=0, atol=1e-5)
    for value, expected in zip(values, expected_values, strict=True):
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-5)
        assert np.abs(expected).max() > 1e-3
    # The training calls above have changed the statistics.
    for weight, expected in zip(fast.get_weights(), original.get_weights(), strict=True):
        np.testing.assert_allclose(weight, expected, rtol=0, atol=1e-5)
    moved = fast.layers[2].moving_mean - with_statistics(original).layers[2].moving_mean
    assert np.abs(moved).max() > 1e-3


def test_bfloat16_network_keeps_float32_variables_and_outputs(
    original: keras.Model, images: np.ndarray
) -> None:
    fast = training_network(original, "bfloat16")
    assert {variable.dtype for variable in fast.trainable_variables} == {"float32"}
    assert {layer.compute_dtype for layer in fast.layers[:-1]} == {"bfloat16"}
    outputs = fast(images, training=False)
    assert outputs.dtype == tf.float32
    np.testing.assert_allclose(outputs, original(images, training=False), atol=0.05)


def test_other_layers_and_networks_are_left_unchanged() -> None:
    inputs = keras.Input((8, 8, 3))
    shared = keras.layers.Conv2D(4, 3, activation="relu", name="shared")(inputs)
    pooled = keras.layers.MaxPooling2D(name="pooled")(shared)
    joined = keras.layers.Concatenate()(
        [keras.layers.Flatten()(pooled), keras.layers.Flatten()(shared)]
    )
    normal = keras.layers.BatchNormalization(center=False)(joined)
    model = keras.Model(inputs, keras.layers.Dense(2)(normal))
    fast = training_network(model, "float32")
    expected = [type(layer) for layer in model.layers]
    expected[expected.index(keras.layers.MaxPooling2D)] = TrainingMaxPooling
    assert [type(layer) for layer in fast.layers] == expected
    x = np.random.default_rng(0).random((4, 8, 8, 3), np.float32)
    np.testing.assert_array_equal(fast(x), model(x))


@pytest.mark.parametrize("compiled", [True, False])
def test_fused_batch_normalization_supports_any_epsilon_and_no_scale(compiled: bool) -> None:
    layers = keras.layers
    norm = layers.BatchNormalization(scale=False, momentum=0.6, epsilon=1e-12)
    original = keras.Sequential([keras.Input((4, 4, 3)), norm])
    fast = training_network(original, "float32", compiled)
    assert isinstance(fast.layers[0], FusedBatchNormalization)
    # Compared to their variance, an epsilon of 1e-5 would be large.
    x = np.random.default_rng(0).normal(size=(8, 4, 4, 3)).astype(np.float32) * 1e-3
    outputs, values = gradients(fast, x)
    expected_outputs, expected_values = gradients(original, x)
    np.testing.assert_allclose(outputs, expected_outputs, rtol=1e-4, atol=1e-4)
    assert np.std(outputs) == pytest.approx(1.0, abs=1e-3)
    for value, expected in zip(values, expected_values, strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-4)
    for weight, expected in zip(fast.get_weights(), original.get_weights(), strict=True):
        np.testing.assert_allclose(weight, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fused_gelu_and_its_gradient_equal_keras(dtype: str) -> None:
    values = tf.cast(tf.linspace(-12.0, 12.0, 4001), dtype)
    exact = tf.cast(values, tf.float32)
    tolerances: Any = {"rtol": 1e-5, "atol": 2e-6}
    if dtype == "bfloat16":
        tolerances = {"rtol": 1e-2, "atol": 1e-2}
    with tf.GradientTape(persistent=True) as tape:
        tape.watch([values, exact])
        received = gelu(values)
        expected = keras.activations.gelu(exact, approximate=False)
    assert received.dtype == dtype
    np.testing.assert_allclose(tf.cast(received, tf.float32), expected, **tolerances)
    slope = tf.cast(tape.gradient(received, values), tf.float32)
    np.testing.assert_allclose(slope, tape.gradient(expected, exact), **tolerances)


def test_gelu_is_fused_where_xla_does_not_compile_the_network() -> None:
    layers = keras.layers
    activations = [layers.Activation("gelu"), layers.Activation("relu")]
    model = keras.Sequential([keras.Input((4,)), *activations, layers.Dense(2)])

    def kinds(**options: Any) -> list[type]:
        return [type(layer) for layer in training_network(model, "float32", **options).layers[:2]]

    assert kinds(elementwise=True) == [FusedGelu, layers.Activation]
    assert kinds() == kinds(elementwise=True, compiled=True) == [layers.Activation] * 2


@pytest.mark.parametrize("elementwise", [True, False])
def test_fused_batch_normalization_keeps_the_biased_variance(elementwise: bool) -> None:
    # With eight values per channel, the unbiased variance is a seventh larger.
    x = np.random.default_rng(0).normal(size=(2, 2, 2, 3)).astype(np.float32)
    fused, stock = FusedBatchNormalization(elementwise), keras.layers.BatchNormalization()
    fused(x, training=True)
    stock(x, training=True)
    np.testing.assert_allclose(fused.moving_variance, stock.moving_variance, rtol=0, atol=1e-6)
    np.testing.assert_allclose(fused.moving_mean, stock.moving_mean, rtol=0, atol=1e-6)
