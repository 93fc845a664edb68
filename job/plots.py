"""Pictures of predictions and comparisons; with `job.report_plots` all that uses matplotlib."""

import math
import string
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.layout_engine import ConstrainedLayoutEngine

mpl.use("Agg")

from matplotlib import pyplot as plt

from job.compare import Group
from job.plot_style import PALETTE, lay_out_epochs, save_png
from job.terminal import count

# Names of classes and files are no formulas.
plt.rcParams["text.parse_math"] = False

_PREDICTED, _TRUE, _OTHER = "#c4501b", "#1b6fc4", "#b8bec6"
_DPI = 110
# Line and marker tell groups apart in grey. Seven colours, five lines and six markers repeat
# together only after 210 groups.
_LINES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P")
_LEGEND_COLUMNS = 130
_BELOW: dict[str, Any] = {"ha": "center", "va": "top", "fontsize": 9}


def save_prediction(
    path: Path,
    image: npt.NDArray[np.uint8],
    probabilities: npt.NDArray[np.float32],
    class_names: tuple[str, ...],
    true_label: int,
) -> None:
    """Draw an image beside the probabilities that a model gives it.

    Args:
        path: PNG file to write.
        image: [height, width, channels] uint8, grey or RGB.
        probabilities: [classes] float32, summing to 1.
        class_names: Name of each class.
        true_label: The image's label.
    """
    predicted = int(np.argmax(probabilities))
    right = predicted == true_label
    colours = [_OTHER] * len(class_names)
    colours[true_label] = _TRUE
    if not right:
        colours[predicted] = _PREDICTED
    figure, (left, bars) = plt.subplots(
        1, 2, figsize=(9, 4), width_ratios=(1, 1.15), layout="constrained"
    )
    verdict = "right" if right else "wrong"
    figure.suptitle(
        f"Predicted: {class_names[predicted]}   True: {class_names[true_label]}   ({verdict})",
        fontsize=14,
    )
    # The last two are for grey images alone.
    left.imshow(image.squeeze(), interpolation="nearest", cmap="gray", vmin=0, vmax=255)
    left.set_axis_off()
    rows = bars.barh(class_names, probabilities, color=colours)
    bars.bar_label(rows, [f"{value:.1%}" for value in probabilities], padding=3)
    bars.invert_yaxis()
    bars.set_xlim(0, 1.15)
    bars.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    bars.set_xlabel("Probability")
    bars.spines[["top", "right"]].set_visible(False)
    save_png(figure, path, _DPI)
    plt.close(figure)


@dataclass(frozen=True)
class Captioned:
    """An image of the grid that `save_predictions` draws.

    Attributes:
        pixels: [height, width, 3] uint8.
        name: Of its file.
        predicted: Name of its most probable class.
        probability: Of this class, 0 to 1.
    """

    pixels: npt.NDArray[np.uint8]
    name: str
    predicted: str
    probability: float


def save_predictions(path: Path, pictures: Sequence[Captioned], images: int) -> None:
    """Draw images in a grid, each with its most probable class.

    Args:
        path: PNG file to write.
        pictures: The images, at least one.
        images: How many there are in all.
    """
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = -(-len(pictures) // columns)
    # A name is to be nearer to its image than to the next one's class.
    layout = ConstrainedLayoutEngine(h_pad=0.12)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.7 * columns, 2.3 * rows), layout=layout, squeeze=False
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, picture in zip(axes.flat, pictures, strict=False):
        axis.imshow(picture.pixels, interpolation="nearest")
        text = f"{_shortened(picture.predicted)}\n{picture.probability:.1%}"
        axis.set_title(text, fontsize=10, parse_math=False)
        caption = {"fontsize": 7, "color": "#555555", "ha": "center", "va": "top"}
        name = _shortened(picture.name)
        axis.text(0.5, -0.03, name, caption, transform=axis.transAxes, parse_math=False)
    if len(pictures) < images:
        figure.suptitle(f"The first {len(pictures)} of {images:,} images", fontsize=14)
    save_png(figure, path, _DPI)
    plt.close(figure)


def _shortened(text: str) -> str:
    return text if len(text) <= 24 else f"{text[:12]}…{text[-11:]}"


def save_comparison(path: Path, groups: Sequence[Group]) -> None:
    """Draw the validation accuracies of runs by epoch, and those of their saved models.

    Args:
        path: PNG file to write.
        groups: At least one; the runs of each have curves of one length.
    """
    names = [_letters(number) if len(groups) > 1 else "" for number in range(len(groups))]
    legend = [_legend_text(*one) for one in zip(names, groups, strict=True)]
    lines = sum(text.count("\n") + 1 for text in legend)
    height = max(3.9, 1.6 + 0.5 * len(groups)) + 0.4 + 0.19 * lines
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, height), width_ratios=(1.5, 1), layout="constrained"
    )
    handles = []
    for number, group in enumerate(groups):
        colour = PALETTE[number % len(PALETTE)]
        line = _LINES[number % len(_LINES)]
        marker = _MARKERS[number % len(_MARKERS)]
        curves = np.array([run.curve for run in group.runs])
        mean = curves.mean(axis=0)
        epochs = np.arange(len(mean)) + 1
        for curve in curves:
            left.plot(epochs, 100 * curve, color=colour, linewidth=0.8, alpha=0.45)
        # A curve of a single epoch is nothing but its marker.
        style: dict[str, Any] = {"linestyle": line, "linewidth": 2.2, "marker": marker}
        style |= {"markevery": max(1, len(mean) // 8)}
        handles += left.plot(epochs, 100 * mean, color=colour, **style)
        _draw_accuracies(right, number, group, colour, marker)
    left.set_title("Validation accuracy of each run, and the mean")
    left.set_ylabel("Validation accuracy (%)")
    lay_out_epochs(left, max(len(group.runs[0].curve) for group in groups))
    left.grid(alpha=0.3)
    right.set_title("Saved model of each run")
    deviates = any(group.accuracy.deviation is not None for group in groups)
    below = "\nbelow the points: mean ± standard deviation" if deviates else ""
    right.set_xlabel(f"Test accuracy (%){below}")
    right.set_yticks(range(len(groups)) if len(groups) > 1 else [])
    right.set_yticklabels(names if len(groups) > 1 else [], weight="bold")
    right.margins(x=0.15)  # for the text below a mean
    right.set_ylim(len(groups) - 0.4, -0.6)
    right.grid(axis="x", alpha=0.3)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    below_both = figure.legend(
        handles, legend, loc="outside lower center", fontsize=9, handlelength=4
    )
    for text in below_both.get_texts():
        text.set_parse_math(False)
    save_png(figure, path, _DPI)
    plt.close(figure)


def _letters(number: int) -> str:
    """Name a group by capital letters: A to Z, then AA, AB and so on."""
    before, last = divmod(number, len(string.ascii_uppercase))
    return (_letters(before - 1) if before else "") + string.ascii_uppercase[last]


def _legend_text(name: str, group: Group) -> str:
    text = f"{group.label} ({count(len(group.runs), 'run')})"
    return textwrap.fill(
        f"{name}: {text}" if name else text, _LEGEND_COLUMNS, break_on_hyphens=False
    )


def _draw_accuracies(axis: Axes, row: int, group: Group, colour: str, marker: str) -> None:
    """Draw runs as points, and below them their mean with the standard deviation."""
    values = [100 * run.accuracy for run in group.runs if run.accuracy is not None]
    axis.plot(values, np.full(len(values), row - 0.12), marker, color=colour, alpha=0.6)
    if group.accuracy.deviation is not None:
        mean, deviation = 100 * group.accuracy.mean, 100 * group.accuracy.deviation
        axis.errorbar(mean, row + 0.12, xerr=deviation, fmt="|", color="black", capsize=4, ms=14)
        text = f"{mean:.2f} ± {deviation:.2f}"
        axis.annotate(text, (mean, row + 0.12), (0, -9), textcoords="offset points", **_BELOW)
