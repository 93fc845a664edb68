from pathlib import Path

import numpy as np
from PIL import Image

from job.own_picture import is_own, mark_as_own


def test_a_marked_picture_is_known_and_keeps_its_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    pixels = np.random.default_rng(1).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    assert not is_own(path)
    mark_as_own(path)
    assert is_own(path)
    with Image.open(path) as picture:
        np.testing.assert_array_equal(np.asarray(picture), pixels)
        assert picture.info["Comment"] == "cifar10-job --png"


def test_what_is_no_file_is_not_known(tmp_path: Path) -> None:
    assert not is_own(tmp_path)
    assert not is_own(tmp_path / "nowhere.png")
