from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from matplotlib import image as mpl_image
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from job.commands import compare
from job.commands.compare import Group, Run
from job.report import pictures


def test_prediction_picture_shows_the_image_and_a_bar_a_class(tmp_path: Path) -> None:
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


def near(picture: npt.NDArray[np.float32], colour: tuple[int, int, int]) -> npt.NDArray[np.bool_]:
    distance = np.abs(picture - np.array(colour, np.float32) / 255)
    return np.asarray(distance.max(axis=-1) < 0.02)


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
    area = near(picture, (255, 0, 0)).sum()
    assert 120**2 < area / images < 187**2


def test_the_grid_tells_that_images_are_left_out(tmp_path: Path) -> None:
    shown = [pictures.Captioned(np.zeros((32, 32, 3), np.uint8), "a.png", "cat", 0.5)] * 9
    heads = []
    for images in (9, 10):
        pictures.save_predictions(tmp_path / "grid.png", shown, images)
        heads.append(mpl_image.imread(tmp_path / "grid.png")[:25, :, :3])
    assert (heads[0] < 0.5).mean() < (heads[1] < 0.5).mean()


def group(label: str, accuracies: list[float]) -> Group:
    runs = [
        Run("a", 1, {}, (accuracy - 0.1, accuracy), accuracy, 1.0, 1.0, "done", None)
        for accuracy in accuracies
    ]
    return Group(label, tuple(runs))


def test_the_comparison_draws_each_group_in_its_colour(tmp_path: Path) -> None:
    blue, orange = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)
    counts = []
    for groups in ([group("a", [0.6, 0.62])], [group("a", [0.6, 0.62]), group("b", [0.4])]):
        compare.save_comparison(tmp_path / "runs.png", groups)
        picture = mpl_image.imread(tmp_path / "runs.png")[..., :3]
        counts.append([int(near(picture, colour).sum()) for colour in (blue, orange)])
    assert counts[0][0] > 500
    assert counts[0][1] == 0
    assert min(counts[1]) > 500


def saved_figure(monkeypatch: pytest.MonkeyPatch, path: Path, groups: list[Group]) -> Figure:
    """Draw a comparison and keep its figure."""
    figures: list[Figure] = []
    monkeypatch.setattr(plt, "close", figures.append)
    compare.save_comparison(path, groups)
    monkeypatch.undo()
    (figure,) = figures
    plt.close(figure)
    # The places are those at the resolution at which it was saved.
    figure.set_dpi(110)
    return figure


def visible_texts(axis: Axes) -> list[Text]:
    """All texts of a plot, less the labels of ticks beyond its ends."""
    (left, right), (low, high) = sorted(axis.get_xlim()), sorted(axis.get_ylim())
    return [
        *(axis.title, axis.xaxis.label, axis.yaxis.label, *axis.texts),
        *(label for label in axis.get_xticklabels() if left <= label.get_position()[0] <= right),
        *(label for label in axis.get_yticklabels() if low <= label.get_position()[1] <= high),
    ]


@pytest.mark.parametrize("groups", [1, 3, 8, 30])
@pytest.mark.parametrize("settings", [1, 14])
def test_no_text_of_the_comparison_lies_on_another_or_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: int, settings: int
) -> None:
    label = r"classic, $\no$" + ", learning rate 0.0001" * settings
    accuracies = [[0.6 + 0.001 * n, 0.601 + 0.001 * n, 0.9] for n in range(groups)]
    named = [group(f"{label} {n}", values) for n, values in enumerate(accuracies)]
    figure = saved_figure(monkeypatch, tmp_path / "runs.png", named)
    left, right = figure.axes
    (legend,) = figure.legends
    assert left.get_legend() is right.get_legend() is None
    texts = [text.get_text() for text in legend.get_texts()]
    assert [" ".join(text.split()) for text in texts] == [
        f"{letter}{label} {n} (3 runs)"
        for n, letter in enumerate(
            [""] if groups == 1 else [f"{compare._letters(n)}: " for n in range(groups)]
        )
    ]
    texts_drawn = [*legend.get_texts(), *visible_texts(left), *visible_texts(right)]
    boxes = [text.get_window_extent() for text in texts_drawn if text.get_text()]
    for box in boxes:
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1
        assert [other for other in boxes if box.overlaps(other)] == [box]
    frame = legend.get_window_extent()
    for axis in (left, right):
        occupied = axis.get_tightbbox()
        assert occupied is not None
        assert not frame.overlaps(occupied)
    assert left.get_window_extent().height > 300


def test_groups_have_letters() -> None:
    assert [compare._letters(n) for n in (0, 25, 26, 51, 52, 702)] == [
        *("A", "Z", "AA", "AZ", "BA", "AAA")
    ]


def test_many_groups_and_a_single_epoch_are_drawn(tmp_path: Path) -> None:
    run = Run("a", 1, {}, (0.5,), 0.5, 1.0, 1.0, "done", None)
    groups = [Group(f"classic, batch size {number}", (run,)) for number in range(20)]
    compare.save_comparison(tmp_path / "runs.png", groups)
    assert mpl_image.imread(tmp_path / "runs.png").shape[0] > 900


def test_a_grey_image_is_drawn_grey(tmp_path: Path) -> None:
    image = np.full((24, 20, 1), 200, np.uint8)
    image[4:8, 4:8] = 100
    pictures.save_prediction(
        tmp_path / "grey.png", image, np.array([0.9, 0.1], np.float32), ("a", "b"), 0
    )
    left = mpl_image.imread(tmp_path / "grey.png")[60:400, 50:400, :3]
    assert np.ptp(left, axis=-1).max() == 0
    # Its values are the image's, not stretched to black and white.
    assert set(np.rint(left[..., 0] * 255).astype(int).flat) >= {100, 200}
    assert left.min() * 255 > 90
