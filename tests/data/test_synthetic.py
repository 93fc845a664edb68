from pathlib import Path
from typing import Any

import numpy as np
import pytest

from job.data import synthetic


def test_draws_the_documented_arrays() -> None:
    images, labels = synthetic.draw(1_050, seed=1, stream=0)
    assert images.shape == (1_050, 32, 32, 3)
    assert images.dtype == np.uint8
    assert labels.shape == (1_050,)
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(np.bincount(labels), [105] * 10)


def test_depends_only_on_seed_and_stream() -> None:
    images, labels = synthetic.draw(64, seed=1, stream=0)
    again, again_labels = synthetic.draw(64, seed=1, stream=0)
    np.testing.assert_array_equal(images, again)
    np.testing.assert_array_equal(labels, again_labels)
    for seed, stream in ((2, 0), (1, 1)):
        other, _ = synthetic.draw(64, seed, stream)
        assert (other != images).mean() > 0.9


def test_a_limit_draws_the_same_first_images_and_few_more(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = []
    cover = synthetic._cover

    def note(labels: Any, *rest: Any) -> Any:
        chunks.append(len(labels))
        return cover(labels, *rest)

    monkeypatch.setattr(synthetic, "_cover", note)
    images, labels = synthetic.draw(3_500, seed=1, stream=0)
    for limit, drawn in ((1_500, 2_000), (3_200, 3_500), (9_999, 3_500)):
        chunks.clear()
        first_images, first_labels = synthetic.draw(3_500, seed=1, stream=0, limit=limit)
        np.testing.assert_array_equal(first_images, images[:limit])
        np.testing.assert_array_equal(first_labels, labels[:limit])
        assert sum(chunks) == drawn


def test_whole_data_set_has_the_size_of_cifar10() -> None:
    dataset = synthetic.make_dataset(3)
    assert dataset.train_images.shape == (50_000, 32, 32, 3)
    assert dataset.test_images.shape == (10_000, 32, 32, 3)
    assert len(dataset.class_names) == 10


def test_every_shape_stands_out_from_its_background() -> None:
    images, labels = synthetic.draw(500, seed=5, stream=0)
    corners = images[:, :2, :2].reshape(500, -1, 3).mean(axis=1)
    contrast = np.abs(images.astype(float) - corners[:, None, None]).mean(axis=-1)
    strongest = np.sort(contrast.reshape(500, -1), axis=1)[:, -40:].mean(axis=1)
    for label in range(10):
        assert strongest[labels == label].min() > 20


def test_examples_are_exactly_one_image_of_each_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    draw = synthetic.draw

    def note(examples: int, *rest: Any, **stream: int) -> Any:
        drawn.append(examples)
        return draw(examples, *rest, **stream)

    monkeypatch.setattr(synthetic, "draw", note)
    folder = tmp_path / "new" / "examples"
    synthetic.save_examples(str(folder))
    names = sorted(path.stem for path in folder.iterdir())
    assert names == sorted(name.replace(" ", "-") for name in synthetic.CLASS_NAMES)
    assert drawn == [10]
