from dataclasses import replace

import numpy as np
import pytest

from job.config import UserError
from job.data import Dataset


def test_limit_keeps_the_first_training_images_and_every_test_image(small_dataset: Dataset) -> None:
    limited = small_dataset.limited_to(100)
    np.testing.assert_array_equal(limited.train_images, small_dataset.train_images[:100])
    np.testing.assert_array_equal(limited.train_labels, small_dataset.train_labels[:100])
    assert len(limited.test_images) == len(small_dataset.test_images)


def test_limit_above_the_data_is_refused(small_dataset: Dataset) -> None:
    with pytest.raises(UserError, match="--limit received 513, expected at most the 512"):
        small_dataset.limited_to(513)


def test_fingerprint_changes_with_any_byte_or_label(small_dataset: Dataset) -> None:
    images, labels = small_dataset.train_images.copy(), small_dataset.test_labels.copy()
    images[3, 2, 1, 0] ^= 1
    labels[5] = (labels[5] + 1) % 10
    prints = {
        small_dataset.fingerprint,
        replace(small_dataset, train_images=images).fingerprint,
        replace(small_dataset, test_labels=labels).fingerprint,
        small_dataset.limited_to(511).fingerprint,
    }
    assert len(prints) == 4
    assert replace(small_dataset).fingerprint == small_dataset.fingerprint
