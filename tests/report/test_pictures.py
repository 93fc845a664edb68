import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.image as mpl_image
import numpy as np
import numpy.typing as npt
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from job.report import pictures
from job.report.pictures import lay_out_epochs, save_png
from job.run.predictions import reliability

CLASSES = ["飛行機", "<b>$\\frac$", "a very long name of a class of images"]


@pytest.fixture(autouse=True)
def warnings_are_errors() -> Iterator[None]:
    """In a training, they would be in the log."""
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
def test_both_curves_are_drawn_for_any_number_of_epochs(epochs: int) -> None:
    training = [1 / number for number in range(1, epochs + 1)]
    validation = [value + 0.5 for value in training]
    pixels = drawn(pictures.curves("Loss", "nats", training, validation))
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


def test_any_class_name_can_be_drawn() -> None:
    matrix = np.array([[5, 0, 1], [0, 0, 0], [2, 0, 9]])
    drawn(pictures.confusion(matrix, CLASSES))
    drawn(pictures.classes([0.5, None, 1.0], [0.5, None, 0.0], CLASSES))


def test_images_are_drawn_in_colour_and_in_grey() -> None:
    red = np.zeros((3, 8, 8, 3), np.uint8)
    red[..., 0] = 255
    pixels = drawn(pictures.mistakes(red, CLASSES))
    assert near(pixels, (255, 0, 0)) > 3 * 100**2
    grey = np.full((3, 8, 8, 1), 7, np.uint8)
    augmented = np.repeat(grey[:, None], 5, axis=1)
    drawn(pictures.augmentation(grey, augmented, CLASSES))


def test_a_reliability_curve_with_empty_bins_is_drawn() -> None:
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.95, 0.05]], np.float32)
    labels = np.array([0, 1, 1])
    pixels = drawn(pictures.calibration(reliability(labels, probabilities)))
    assert near(pixels, (0xD5, 0x5E, 0x00)) > 50


@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 50, 1000])
def test_every_tick_is_an_epoch_of_the_run(epochs: int) -> None:
    figure = Figure()
    axes = figure.subplots()
    numbers = range(1, epochs + 1)
    axes.plot(numbers, numbers, "o")
    lay_out_epochs(axes, epochs)
    low, high = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert ticks
    assert set(ticks) <= set(numbers)
    assert axes.get_xlabel() == "Epoch"


def test_characters_missing_in_the_font_cause_no_warning() -> None:
    figure = Figure()
    figure.suptitle("飛行機 고양이")
    buffer = io.BytesIO()
    save_png(figure, buffer, 50)
    assert buffer.getvalue().startswith(b"\x89PNG")


def test_prediction_picture_shows_the_image_and_one_bar_per_class(tmp_path: Path) -> None:
    image = np.zeros((32, 32, 3), np.uint8)
    image[..., 0] = 255
    names = tuple(f"class {index}" for index in range(10))
    drawn = {}
    for predicted in (2, 7):
        probabilities = np.full(10, 0.02, np.float32)
        probabilities[predicted] = 0.82
        path = tmp_path / f"{predicted}.png"
        pictures.save_prediction(path, image, probabilities, names, true_label=2)
        drawn[predicted] = mpl_image.imread(path)[..., :3]
    right, wrong = drawn[2], drawn[7]
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
    pictures.save_prediction(
        tmp_path / "grey.png", image, np.array([0.9, 0.1], np.float32), ("a", "b"), 0
    )
    left = mpl_image.imread(tmp_path / "grey.png")[60:400, 50:400, :3]
    assert np.ptp(left, axis=-1).max() == 0
    # The values are those of the image, not stretched to black and white.
    assert set(np.rint(left[..., 0] * 255).astype(int).flat) >= {100, 200}
    assert left.min() * 255 > 90


@pytest.mark.parametrize("images", [1, 5, 100])
def test_the_grid_shows_every_image_and_any_name(tmp_path: Path, images: int) -> None:
    colour = np.full((32, 32, 3), (255, 0, 0), np.uint8)
    names = ["a.png", r"$\no$.png", "日本.png", "x" * 200]
    shown = [
        pictures.Captioned(colour, names[number % 4], r"$\no$ class", 0.97)
        for number in range(images)
    ]
    pictures.save_predictions(tmp_path / "grid.png", shown, images)
    picture = mpl_image.imread(tmp_path / "grid.png")[..., :3]
    columns = {1: 1, 5: 3, 100: 10}[images]
    assert picture.shape[1] == 187 * columns
    area = near(picture, (255, 0, 0))
    assert 120**2 < area / images < 187**2


def test_the_grid_has_a_title_if_images_are_left_out(tmp_path: Path) -> None:
    shown = [pictures.Captioned(np.zeros((32, 32, 3), np.uint8), "a.png", "cat", 0.5)] * 9
    heads = []
    for images in (9, 10):
        pictures.save_predictions(tmp_path / "grid.png", shown, images)
        heads.append(mpl_image.imread(tmp_path / "grid.png")[:25, :, :3])
    assert (heads[0] < 0.5).mean() < (heads[1] < 0.5).mean()
