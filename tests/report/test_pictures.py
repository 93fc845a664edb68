import io
import warnings
from collections.abc import Iterator
from typing import Any

import matplotlib.image as mpl_image
import numpy as np
import numpy.typing as npt
import pytest
from matplotlib.axes import Axes

from job.report import pictures
from job.report.figures import reliability

CLASSES = ["飛行機", "<b>$\\frac$", "a very long name of a class of images"]


@pytest.fixture(autouse=True)
def warnings_are_errors() -> Iterator[None]:
    """They would stand in the log of a training."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def drawn(png: bytes) -> npt.NDArray[np.float32]:
    pixels = np.asarray(mpl_image.imread(io.BytesIO(png)), np.float32)[..., :3]
    assert pixels.shape[1] == 1000
    return pixels


def near(pixels: npt.NDArray[np.float32], colour: tuple[int, int, int]) -> int:
    distance = np.abs(pixels - np.array(colour, np.float32) / 255).max(axis=-1)
    return int((distance < 0.02).sum())


@pytest.mark.parametrize("epochs", [1, 3, 50])
def test_both_curves_are_drawn_however_many_epochs(epochs: int) -> None:
    numbers = range(1, epochs + 1)
    training = [1 / number for number in numbers]
    validation = [value + 0.5 for value in training]
    pixels = drawn(pictures.curves("Loss", "nats", numbers, training, validation))
    assert near(pixels, (0x00, 0x72, 0xB2)) > 100
    assert near(pixels, (0xD5, 0x5E, 0x00)) > 100


def test_restarts_are_lines_at_their_times(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[float] = []
    original = Axes.axvline

    def axvline(axes: Axes, time: float, **style: Any) -> Any:
        lines.append(time)
        return original(axes, time, **style)

    monkeypatch.setattr(Axes, "axvline", axvline)
    plain = drawn(pictures.throughput([5, 10], [100, 120], "s", []))
    marked = drawn(pictures.throughput([5, 10], [100, 120], "s", [7.5, 14.0]))
    assert lines == [7.5, 14.0]
    assert near(marked, (0xD5, 0x5E, 0x00)) > near(plain, (0xD5, 0x5E, 0x00)) + 500


def test_any_class_name_is_drawn_as_it_is() -> None:
    matrix = np.array([[5, 0, 1], [0, 0, 0], [2, 0, 9]])
    drawn(pictures.confusion(matrix, CLASSES))
    drawn(pictures.classes([0.5, None, 1.0], [0.5, None, 0.0], CLASSES))


def test_images_are_drawn_in_colour_and_in_grey() -> None:
    red = np.zeros((3, 8, 8, 3), np.uint8)
    red[..., 0] = 255
    pixels = drawn(pictures.mistakes(red, CLASSES, CLASSES[::-1], [0.9, 0.8, 0.7]))
    assert near(pixels, (255, 0, 0)) > 3 * 100**2
    grey = np.full((3, 8, 8, 1), 7, np.uint8)
    augmented = np.repeat(grey[:, None], 5, axis=1)
    drawn(pictures.augmentation(grey, augmented, CLASSES))


def test_a_reliability_curve_with_empty_bins_is_drawn() -> None:
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.95, 0.05]], np.float32)
    labels = np.array([0, 1, 1])
    pixels = drawn(pictures.calibration(reliability(labels, probabilities)))
    assert near(pixels, (0xD5, 0x5E, 0x00)) > 50
