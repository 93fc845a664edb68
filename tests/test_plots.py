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
