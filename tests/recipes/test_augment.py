import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.src.legacy.preprocessing.image import ImageDataGenerator
from scipy.stats import ks_2samp

from job.data import Dataset
from job.recipes import _augment, classic

GENERATOR_ARGUMENTS = {
    "rotation_range": 20,
    "width_shift_range": 0.2,
    "height_shift_range": 0.2,
    "shear_range": 0.2,
    "zoom_range": 0.2,
    "horizontal_flip": True,
    "fill_mode": "nearest",
}


def draw(epoch: int = 0, steps: int = 4, batch: int = 128, seed: int = 42) -> np.ndarray:
    parameters = _augment.draw_parameters(
        classic.RANGES, seed, tf.constant(epoch), steps, batch, image_size=32
    )
    return np.asarray(parameters)


@pytest.mark.parametrize("compiled", [True, False], ids=["gather", "op"])
def test_equals_image_data_generator(small_dataset: Dataset, compiled: bool) -> None:
    parameters = draw().reshape(-1, 7)
    images = small_dataset.train_images.astype(np.float32) / 255
    generator = ImageDataGenerator(**GENERATOR_ARGUMENTS)
    expected = np.stack(
        [
            generator.apply_transform(
                image,
                {
                    "theta": row[_augment.THETA],
                    "tx": row[_augment.SHIFT_X],
                    "ty": row[_augment.SHIFT_Y],
                    "shear": row[_augment.SHEAR],
                    "zx": row[_augment.ZOOM_X],
                    "zy": row[_augment.ZOOM_Y],
                    "flip_horizontal": bool(row[_augment.FLIP]),
                },
            )
            for image, row in zip(images, parameters, strict=True)
        ]
    )
    resample = (
        tf.function(_augment.resample_by_gather, jit_compile=True)
        if compiled
        else _augment.resample_by_op
    )
    transforms = _augment.affine_transforms(tf.constant(parameters), image_size=32)
    received = resample(tf.constant(images), transforms).numpy()
    np.testing.assert_allclose(received, expected, rtol=0, atol=1e-4)
    # Make sure that the images were moved at all.
    assert np.abs(received - images).mean() > 0.05


def test_parameters_have_the_generators_distributions() -> None:
    ours = draw(steps=100, batch=100).reshape(-1, 7)
    generator = ImageDataGenerator(**GENERATOR_ARGUMENTS)
    np.random.seed(0)
    drawn = [generator.get_random_transform((32, 32, 3)) for _ in range(10_000)]
    theirs = np.array(
        [
            [t["theta"], t["tx"], t["ty"], t["shear"], t["zx"], t["zy"], t["flip_horizontal"]]
            for t in drawn
        ],
        float,
    )
    for column in range(6):
        assert ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-4
    assert ours[:, _augment.FLIP].mean() == pytest.approx(0.5, abs=0.02)
    assert set(np.unique(ours[:, _augment.FLIP])) == {0.0, 1.0}
    # The seven parameters are independent of each other.
    correlations = np.corrcoef(ours, rowvar=False) - np.eye(7)
    assert np.abs(correlations).max() < 0.05


def test_parameters_depend_only_on_seed_and_epoch() -> None:
    np.testing.assert_array_equal(draw(), draw())
    assert not np.array_equal(draw(), draw(epoch=1))
    assert not np.array_equal(draw(), draw(seed=43))


def test_empty_ranges_result_in_the_identity() -> None:
    parameters = _augment.draw_parameters(
        _augment.AffineRanges(), 42, tf.constant(0), 2, 8, image_size=32
    )
    transforms = _augment.affine_transforms(parameters, image_size=32)
    identity = np.broadcast_to(np.array([1, 0, 0, 0, 1, 0], np.float32), (2, 8, 6))
    np.testing.assert_array_equal(transforms, identity)


def test_classic_uses_the_original_scripts_ranges() -> None:
    ranges = {key: GENERATOR_ARGUMENTS[key] for key in vars(classic.RANGES)}
    assert ranges == vars(classic.RANGES)
    assert isinstance(classic.RECIPE.build_optimizer(1e-4, 1), keras.optimizers.Adam)
