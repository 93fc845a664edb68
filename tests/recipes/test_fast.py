import os
import subprocess
import sys
from functools import partial
from itertools import pairwise
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import pytest
import tensorflow as tf

from job.data import Dataset
from job.recipes import fast, get_recipe, resample_by_gather
from tests.conftest import REPOSITORY

Array = npt.NDArray[Any]
RECIPE = get_recipe("fast")


def normalized(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    return (images / 255 - fast.MEAN) / fast.DEVIATION


def patches_of(images: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """All 2x2 patches, one by one: [patches, 12] with the channels last."""
    places = [(y, x) for y in range(31) for x in range(31)]
    parts = [images[:, y : y + 2, x : x + 2].reshape(len(images), 12) for y, x in places]
    return np.concatenate(parts)


def test_whitening_filters_equal_a_reference(small_dataset: Dataset) -> None:
    images = small_dataset.train_images[:200]
    patches = patches_of(normalized(images))
    eigenvalues, eigenvectors = np.linalg.eigh(patches.T @ patches / len(patches))
    expected = eigenvectors / np.sqrt(eigenvalues + 5e-4)

    weights = fast.whitening_weights(images)
    assert list(weights) == ["whitening/kernel"]
    kernel = weights["whitening/kernel"]
    assert kernel.shape == (2, 2, 3, 24)
    assert kernel.dtype == np.float32
    filters, opposite = np.split(kernel.reshape(12, 24), 2, axis=1)
    # Eigenvectors have no particular order or sign.
    similarity = np.abs(filters.T @ expected) / np.linalg.norm(expected, axis=0) ** 2
    expected = expected[:, (similarity > 0.99).argmax(axis=1)]
    eigenvalues = eigenvalues[(similarity > 0.99).argmax(axis=1)]
    signs = np.sign((filters * expected).sum(axis=0))
    np.testing.assert_allclose(filters, expected * signs, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(opposite, -filters)
    # Their purpose: uncorrelated values with a mean square of 1, except for small eigenvalues.
    values = patches @ filters
    products = values.T @ values / len(values)
    strong = eigenvalues > 0.1
    np.testing.assert_allclose(products[strong][:, strong], np.eye(strong.sum()), atol=1e-2)


def test_only_the_first_5000_images_are_whitened(monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(1).integers(0, 256, (60, 32, 32, 3), np.uint8)
    monkeypatch.setattr(fast, "WHITENED_IMAGES", 40)
    some = fast.whitening_weights(images)["whitening/kernel"]
    np.testing.assert_array_equal(fast.whitening_weights(images[:40])["whitening/kernel"], some)
    assert (fast.whitening_weights(images[:39])["whitening/kernel"] != some).any()


def test_a_symmetric_matrix_is_decomposed_even_if_eigenvalues_coincide() -> None:
    rng = np.random.default_rng(8)
    square = rng.normal(size=(12, 12))
    grey = np.repeat(np.repeat(square[:4, :4] @ square[:4, :4].T, 3, axis=0), 3, axis=1)
    for matrix in (square @ square.T, grey, np.eye(12), np.zeros((12, 12))):
        eigenvalues, eigenvectors = fast.decompose(matrix)
        np.testing.assert_allclose(eigenvectors.T @ eigenvectors, np.eye(12), atol=1e-12)
        np.testing.assert_allclose(
            (eigenvectors * eigenvalues) @ eigenvectors.T, matrix, atol=1e-11
        )
        np.testing.assert_allclose(np.sort(eigenvalues), np.linalg.eigvalsh(matrix), atol=1e-11)


def test_whitening_has_the_same_bits_with_every_kernel_of_the_math_library() -> None:
    code = (
        "from job.recipes import fast; import numpy as np, hashlib\n"
        "images = np.random.default_rng(1).integers(0, 256, (20, 32, 32, 1), np.uint8)\n"
        "for one in (images, images // 255):\n"
        "    weights = fast.whitening_weights(np.repeat(one, 3, axis=3))\n"
        "    print(hashlib.sha256(weights['whitening/kernel'].tobytes()).hexdigest())\n"
    )
    printed = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "OPENBLAS_CORETYPE": kind},
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for kind in ("Prescott", "Haswell")
    ]
    assert printed[0] == printed[1]
    assert len(printed[0].split()) == 2


def test_the_whitening_layer_returns_whitened_patches(small_dataset: Dataset) -> None:
    images = small_dataset.train_images[:8]
    model = fast.build_model(1, 10)
    kernel = fast.whitening_weights(small_dataset.train_images)["whitening/kernel"]
    model.get_layer("whitening").kernel.assign(kernel)
    part = keras.Sequential(model.layers[:2])
    received = part(images / np.float32(255)).numpy()
    assert received.shape == (8, 31, 31, 24)
    corner = patches_of(normalized(images))[:8]  # the upper left patch of each image
    np.testing.assert_allclose(received[:, 0, 0], corner @ kernel.reshape(12, 24), atol=1e-3)


def test_convolutions_begin_as_partial_identities() -> None:
    model = fast.build_model(1, 10)
    images = np.random.default_rng(1).random((2, 6, 6, 24), np.float32)
    outputs = model.get_layer("conv1a")(images).numpy()
    np.testing.assert_allclose(outputs[..., :24], images, atol=1e-6)
    assert outputs[..., 24:].std() > 0.1
    bound = 1 / np.sqrt(9 * 24)
    assert bound * 0.99 < np.abs(model.get_layer("conv1a").kernel[..., 24:]).max() <= bound
    assert model.get_layer("probabilities").kernel.numpy().std() == pytest.approx(1, abs=0.05)
    assert model.count_params() == 1_973_944


def orthogonalized(matrix: Array) -> Array:
    x: Array = (matrix / np.linalg.norm(matrix)).astype(np.float32)
    if len(x) > len(x.T):
        return orthogonalized(matrix.T).T
    for _ in range(3):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.parametrize("shape", [(3, 3, 8, 16), (3, 3, 4, 64)], ids=["tall", "wide"])
def test_muons_update_equals_a_reference(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(2)
    kernel = keras.Variable(rng.normal(size=shape).astype(np.float32))
    optimizer = fast.Muon(0.24, 10, dtype="float32")
    optimizer.build([kernel])
    value, momentum = kernel.numpy(), np.zeros(shape, np.float32)
    for step in range(3):
        gradient = rng.normal(size=shape).astype(np.float32)
        optimizer.apply([tf.constant(gradient)])
        momentum = 0.6 * momentum + gradient
        # A matrix with one row per filter, as in PyTorch.
        filters = np.moveaxis(gradient + 0.6 * momentum, -1, 0)
        direction = orthogonalized(filters.reshape(shape[-1], -1)).reshape(filters.shape)
        value = value * np.sqrt(shape[-1]) / np.linalg.norm(value)
        value = value - 0.24 * (1 - step / 10) * np.moveaxis(direction, 0, -1)
        np.testing.assert_allclose(kernel.numpy(), value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_orthogonalized_singular_values_are_close_to_one(dtype: str) -> None:
    rng = np.random.default_rng(3)
    left, _ = np.linalg.qr(rng.normal(size=(40, 16)))
    right, _ = np.linalg.qr(rng.normal(size=(16, 16)))
    matrix = (left * np.geomspace(1, 0.2, 16)) @ right
    values = np.linalg.svd(fast.orthogonalize(tf.constant(matrix, tf.float32), dtype).numpy())[1]
    assert ((values > 0.5) & (values < 1.5)).all()


def named(name: str, values: Array) -> keras.Variable:
    with keras.name_scope(name.split("/")[0]):
        return keras.Variable(values, name=name.split("/")[1])


def test_biases_and_head_are_updated_by_nesterov_sgd_with_decay() -> None:
    rng = np.random.default_rng(4)
    total, rates = 16, {"whitening/bias": 0.053, "norm1a/beta": 0.053, "head/kernel": 0.67}
    shapes = {"whitening/bias": (24,), "norm1a/beta": (64,), "head/kernel": (256, 10)}
    values: dict[str, Array] = {
        name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()
    }
    variables = [named(name, value) for name, value in values.items()]
    optimizer = fast.Muon(0.24, total)
    optimizer.build(variables)
    momentums: dict[str, Array] = {
        name: np.zeros(shape, np.float32) for name, shape in shapes.items()
    }
    for step in range(total):
        gradients = {name: rng.normal(size=one).astype(np.float32) for name, one in shapes.items()}
        optimizer.apply([tf.constant(gradient) for gradient in gradients.values()])
        for name, gradient in gradients.items():
            # As in PyTorch's SGD; at 200 steps of 2,000 images the decay is 2e-6 * 2,000.
            decay = 0.8 / total / rates[name]
            slope = gradient + decay * values[name]
            momentums[name] = 0.85 * momentums[name] + slope
            last = 6 if name == "whitening/bias" else total
            rate = rates[name] * max(1 - step / last, 0)
            values[name] = values[name] - rate * (slope + 0.85 * momentums[name])
        for variable, expected in zip(variables, values.values(), strict=True):
            np.testing.assert_allclose(variable.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_an_optimizer_can_be_created_from_its_configuration() -> None:
    config = fast.Muon(0.3, 50, dtype="float32").get_config()
    assert fast.Muon.from_config(config).get_config() == config
    assert float(fast.build_optimizer(0.3, 50).learning_rate) == pytest.approx(0.3)


def flips(seed: int, epoch: int, rows: npt.NDArray[np.int64]) -> Array:
    draws = RECIPE.draw(seed, tf.constant(epoch), tf.constant(rows))
    assert draws.shape == (*rows.shape, 3)
    values: Array = draws.numpy()
    return values[..., 2]


def test_each_image_is_mirrored_in_exactly_every_second_epoch() -> None:
    rng = np.random.default_rng(5)
    seen = []
    for epoch in range(4):
        order = rng.permutation(50_000)
        mirrored = np.empty(50_000, np.float32)
        mirrored[order] = flips(7, epoch, order.reshape(25, 2_000)).ravel()
        seen.append(mirrored)
    assert set(np.unique(seen[0])) == {0.0, 1.0}
    assert seen[0].mean() == pytest.approx(0.5, abs=0.01)
    for before, after in pairwise(seen):
        np.testing.assert_array_equal(after, 1 - before)
    rows = np.arange(50_000).reshape(25, 2_000)
    assert (flips(8, 0, rows) != flips(7, 0, rows)).mean() == pytest.approx(0.5, abs=0.02)


def test_shifts_from_minus_two_to_two_are_equally_frequent() -> None:
    rows = tf.reshape(tf.range(50_000, dtype=tf.int64), [25, 2_000])
    shifts = [RECIPE.draw(7, tf.constant(epoch), rows).numpy()[..., :2] for epoch in range(2)]
    assert (shifts[0] != shifts[1]).any(axis=-1).mean() == pytest.approx(1 - 1 / 25, abs=0.01)
    for axis in range(2):
        values, counts = np.unique(shifts[0][..., axis], return_counts=True)
        assert values.tolist() == [-2, -1, 0, 1, 2]
        np.testing.assert_allclose(counts / 50_000, 0.2, atol=0.01)


@pytest.mark.parametrize("compiled", [False, True])
def test_shifts_reflections_and_flips_equal_a_reference(compiled: bool) -> None:
    grid = [(x, y, flip) for x in range(-2, 3) for y in range(-2, 3) for flip in (0, 1)]
    images = np.random.default_rng(6).random((len(grid), 32, 32, 3), np.float32)
    augment = tf.function(partial(fast.augment, resample=resample_by_gather), jit_compile=compiled)
    received = augment(tf.constant(images), tf.constant(grid, tf.float32)).numpy()
    padded = np.pad(images, [(0, 0), (2, 2), (2, 2), (0, 0)], "reflect")
    for image, one, (x, y, flip) in zip(padded, received, grid, strict=True):
        expected = image[2 + y : 34 + y, 2 + x : 34 + x]
        np.testing.assert_array_equal(one, expected[:, ::-1] if flip else expected)


def test_views_and_weights_equal_a_reference() -> None:
    images = np.random.default_rng(7).random((2, 32, 32, 3), np.float32)
    padded = np.pad(images, [(0, 0), (1, 1), (1, 1), (0, 0)], "reflect")
    expected: dict[float, list[Array]] = {1 / 4: [images], 1 / 8: []}
    expected[1 / 8] = [padded[:, 2:, 2:], padded[:, :-2, :-2]]
    pairs = [
        (weight, view)
        for weight, views in expected.items()
        for one in views
        for view in (one, one[:, :, ::-1])
    ]
    assert len(RECIPE.tta_views) == len(pairs) == 6
    received = zip(RECIPE.tta_weights, RECIPE.tta_views, strict=True)
    for (weight, view), (own_weight, own_view) in zip(pairs, received, strict=True):
        assert weight == own_weight
        np.testing.assert_array_equal(own_view(tf.constant(images)).numpy(), view)
