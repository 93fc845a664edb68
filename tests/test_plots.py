from pathlib import Path

import numpy as np
from matplotlib import image as mpl_image

from job import plots


def test_prediction_picture_shows_the_image_and_a_bar_a_class(tmp_path: Path) -> None:
    image = np.zeros((32, 32, 3), np.uint8)
    image[..., 0] = 255
    names = tuple(f"class {index}" for index in range(10))
    pictures = {}
    for predicted in (2, 7):
        probabilities = np.full(10, 0.02, np.float32)
        probabilities[predicted] = 0.82
        path = tmp_path / f"{predicted}.png"
        plots.save_prediction(path, image, probabilities, names, true_label=2)
        pictures[predicted] = mpl_image.imread(path)[..., :3]
    right, wrong = pictures[2], pictures[7]
    assert right.shape == (440, 990, 3)
    # The pure red of the image fills a good part of the picture's left half.
    red = (right == (1.0, 0.0, 0.0)).all(axis=-1)
    assert red[:, :495].mean() > 0.3
    assert not red[:, 600:].any()
    # Only a wrong prediction has a bar in the colour of wrong predictions.
    colour = np.array([0xC4, 0x50, 0x1B]) / np.float32(255)
    assert (np.abs(wrong - colour).max(axis=-1) < 0.01).sum() > 500
    assert (np.abs(right - colour).max(axis=-1) < 0.01).sum() == 0


def test_a_grey_image_is_drawn_grey(tmp_path: Path) -> None:
    image = np.full((24, 20, 1), 200, np.uint8)
    image[4:8, 4:8] = 100
    plots.save_prediction(
        tmp_path / "grey.png", image, np.array([0.9, 0.1], np.float32), ("a", "b"), 0
    )
    left = mpl_image.imread(tmp_path / "grey.png")[60:400, 50:400, :3]
    assert np.ptp(left, axis=-1).max() == 0
    # Its values are the image's, not stretched to black and white.
    assert set(np.rint(left[..., 0] * 255).astype(int).flat) >= {100, 200}
    assert left.min() * 255 > 90
