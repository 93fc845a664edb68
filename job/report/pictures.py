"""Pictures of a run and of predictions, drawn with matplotlib.

The report's pictures are five inches wide with a font size of 11 points, so they are readable on a
phone. Line styles, markers and hatches repeat the meaning of the colours, so they are also readable
in greyscale.

No other module of the program imports matplotlib directly; others use it through this module.
"""

# ruff: noqa: E402

import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from job.report import isolate_matplotlib
from job.run.predictions import Reliability

isolate_matplotlib()

import matplotlib as mpl
from matplotlib.axes import Axes as Axes
from matplotlib.figure import Figure as Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

mpl.rcParams["text.parse_math"] = False  # names of classes and files are not formulas

# Okabe and Ito's colours, which colour-blind people can distinguish, without the pale yellow.
BLUE, VERMILION = "#0072b2", "#d55e00"
GREY = "#5f6770"
PALETTE = (BLUE, VERMILION, "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


def lay_out_epochs(axes: Axes, epochs: int) -> None:
    """Set up the horizontal axis for this many epochs, from 1, with whole numbers only."""
    axes.set_xlabel("Epoch")
    axes.set_xlim(0.5, epochs + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def save_png(figure: Figure, target: Path | io.BytesIO, dpi: int) -> None:
    """Save a figure, without warnings about characters that the font does not contain.

    The font that comes with matplotlib has no Chinese characters, for example, and draws boxes
    instead. A warning for each of them in the log of a training would not help.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(target, format="png", dpi=dpi)


_WIDTH = 5.0  # inches
_DPI = 200
_STYLE: Any = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#d8dce1",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "hatch.linewidth": 0.8,
    "legend.fontsize": 10,
    "legend.framealpha": 0.9,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.08,
}
_in_style = mpl.rc_context(_STYLE)


def _figure(height: float, **options: Any) -> tuple[Figure, Any]:
    """Create a figure of the report's width and its axes; `height` in inches."""
    figure = Figure(figsize=(_WIDTH, height))
    return figure, figure.subplots(**options)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    save_png(figure, buffer, _DPI)
    return buffer.getvalue()


@_in_style
def curves(title: str, unit: str, training: Sequence[float], validation: Sequence[float]) -> bytes:
    """Draw a quantity of training and validation over the epochs, one value per epoch.

    Args:
        title: Name of the quantity.
        unit: Label of the axis, with the unit.
        training: [epochs].
        validation: [epochs].
    """
    figure, axes = _figure(3.8)
    epochs = range(1, len(training) + 1)
    every = max(1, len(epochs) // 12)
    for values, name, line, colour in (
        (training, "training", "--s", VERMILION),
        (validation, "validation", "-o", BLUE),
    ):
        axes.plot(epochs, values, line, color=colour, markevery=every, label=name, ms=5)
    axes.set(title=title, ylabel=unit)
    lay_out_epochs(axes, len(epochs))
    figure.legend(loc="outside lower center", ncols=2)
    return _png(figure)


@_in_style
def throughput(
    elapsed: Sequence[float], rates: Sequence[float], unit: str, restarts: Sequence[float]
) -> bytes:
    """Draw the training images per second over time.

    Args:
        elapsed: Time at the end of each epoch since the start of the run.
        rates: Images per second in each epoch.
        unit: Unit of the times: "s", "min" or "h".
        restarts: Times at which the run resumed after an interruption.
    """
    figure, axes = _figure(3.8)
    axes.plot(elapsed, rates, "-", color=BLUE, marker="o", ms=4, label="mean over an epoch")
    for number, time in enumerate(restarts):
        label = f"restart ({len(restarts)} in total)" if number == 0 else None
        axes.axvline(time, color=VERMILION, linestyle="--", linewidth=1.4, label=label)
    axes.set(
        title="Throughput over time",
        xlabel=f"Time in training and validation ({unit})",
        ylabel="Training images per second",
        xlim=(0, None),
        ylim=(0, 1.08 * max(rates)),
    )
    axes.yaxis.set_major_formatter("{x:,.0f}")
    figure.legend(loc="outside lower center", ncols=2)
    return _png(figure)


@_in_style
def confusion(matrix: npt.NDArray[np.int64], class_names: Sequence[str]) -> bytes:
    """Draw a confusion matrix, each entry as a number on a shaded square.

    Args:
        matrix: [classes, classes]: entry (true, predicted) counts images.
        class_names: Name of each class.
    """
    figure, axes = _figure(5.2)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    size = min(9.0, 90 / len(class_names))
    for (true, predicted), count in np.ndenumerate(matrix):
        colour = "white" if share[true, predicted] > 0.65 else "black"
        axes.text(predicted, true, count, ha="center", va="center", size=size, color=colour)
    ticks = range(len(class_names))
    axes.set_xticks(ticks, class_names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(ticks, class_names)
    axes.tick_params(length=0, labelsize=10)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set(title="Confusion matrix (test images)", xlabel="Predicted class", ylabel="True class")
    return _png(figure)


@_in_style
def classes(
    precision: Sequence[float | None], recall: Sequence[float | None], class_names: Sequence[str]
) -> bytes:
    """Draw precision and recall of each class as bars.

    Args:
        precision: 0 to 1, or None where a class is never predicted.
        recall: 0 to 1, or None where a class has no example.
        class_names: Name of each class.
    """
    figure, axes = _figure(5.4)
    rows = np.arange(len(class_names))
    for values, name, offset, colour, hatch in (
        (precision, "precision", -0.2, BLUE, ""),
        (recall, "recall", 0.2, "#f3c9a8", "////"),
    ):
        widths = [100 * (value or 0.0) for value in values]
        bars = axes.barh(
            rows + offset, widths, 0.38, color=colour, hatch=hatch, edgecolor="black", label=name
        )
        texts = ["undefined" if value is None else f"{value:.0%}" for value in values]
        axes.bar_label(bars, texts, padding=3, size=9)
    axes.set_yticks(rows, class_names)
    axes.invert_yaxis()
    axes.set(title="Precision and recall of each class", xlabel="Share (%)", xlim=(0, 112))
    axes.set_xticks(range(0, 101, 20))
    axes.grid(visible=False, axis="y")
    axes.set_ylabel("Class")
    figure.legend(loc="outside lower center", ncols=2)
    return _png(figure)


@_in_style
def calibration(result: Reliability) -> bytes:
    """Draw the accuracy of predictions against their confidence, and their number."""
    figure, (top, bottom) = _figure(5.0, nrows=2, sharex=True, height_ratios=(2.6, 1))
    used = result.counts > 0
    confidence, accuracy = 100 * result.confidence[used], 100 * result.accuracy[used]
    top.plot([0, 100], [0, 100], "--", color=GREY, label="perfectly calibrated")
    top.vlines(confidence, confidence, accuracy, color=VERMILION, linewidth=3, label="gap")
    top.plot(confidence, accuracy, "-", color=BLUE, marker="o", label="this model")
    top.set(title="Reliability", ylabel="Accuracy (%)", ylim=(0, 102), xlim=(0, 100))
    top.legend(loc="upper left")
    edges = np.linspace(0, 100, len(result.counts) + 1)
    share = 100 * result.counts / result.counts.sum()
    bottom.bar(
        *(edges[:-1], share, np.diff(edges)), align="edge", color="#9cc4de", edgecolor="black"
    )
    bottom.set(xlabel="Confidence (%)", ylabel="Images (%)")
    return _png(figure)


@_in_style
def mistakes(images: npt.NDArray[np.uint8], captions: Sequence[str]) -> bytes:
    """Draw test images, each below its caption.

    Args:
        images: [mistakes, height, width, channels] uint8.
        captions: True class, predicted class and confidence of each image.
    """
    columns, pitch = 4, (1.12, 1.6)  # in widths of an image; the rest is for captions
    rows = -(-len(images) // columns)
    figure, axes = _figure(0.5 + 1.75 * rows)
    _lay_out_images(axes, columns * pitch[0], rows * pitch[1])
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(number, columns)
        x, y = (column + 0.5) * pitch[0], (row + 1) * pitch[1] - 0.5
        _show(axes, image, x, y)
        axes.text(x, y - 0.53, caption, size=9.5, ha="center", va="bottom")
    axes.set_axis_off()
    figure.suptitle("Most confident mistakes", size=12, weight="bold")
    return _png(figure)


@_in_style
def augmentation(
    originals: npt.NDArray[np.uint8], augmented: npt.NDArray[np.uint8], class_names: Sequence[str]
) -> bytes:
    """Draw training images, each in a row with its augmented versions.

    Args:
        originals: [images, height, width, channels] uint8.
        augmented: [images, epochs, height, width, channels] uint8.
        class_names: Class of each image.
    """
    images, epochs = augmented.shape[:2]
    pitch = 1.08  # in widths of an image
    figure, axes = _figure(0.75 + 0.66 * images)
    # With fewer epochs, the free space is on the right, not between the images.
    _lay_out_images(axes, (1 + max(epochs, 5)) * pitch, images * pitch)
    for row, forms in enumerate(augmented):
        for column, image in enumerate([originals[row], *forms]):
            _show(axes, image, (column + 0.5) * pitch, (row + 0.5) * pitch)
    heads = ["original", *(f"epoch {epoch}" for epoch in range(1, epochs + 1))]
    axes.xaxis.tick_top()
    axes.set_xticks((np.arange(1 + epochs) + 0.5) * pitch, heads, size=9)
    axes.set_yticks((np.arange(images) + 0.5) * pitch, class_names, size=9)
    figure.suptitle("Augmented training images", size=12, weight="bold")
    return _png(figure)


def _lay_out_images(axes: Axes, width: float, height: float) -> None:
    """Prepare one pair of axes for many images; one pair per image takes twenty times as long."""
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="equal")
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


def _show(axes: Axes, image: npt.NDArray[np.uint8], x: float, y: float) -> None:
    """Show an image [height, width, channels] around a point, its longer side of length 1."""
    height, width, channels = image.shape
    right, down = width / max(image.shape[:2]) / 2, height / max(image.shape[:2]) / 2
    axes.imshow(
        image[..., 0] if channels == 1 else image,
        cmap="gray" if channels == 1 else None,
        extent=(x - right, x + right, y + down, y - down),
    )


_PREDICTED, _TRUE, _OTHER = "#c4501b", "#1b6fc4", "#b8bec6"
SCREEN_DPI = 110


def save_prediction(
    target: Path | io.BytesIO,
    image: npt.NDArray[np.uint8],
    probabilities: npt.NDArray[np.float32],
    class_names: tuple[str, ...],
    true_label: int,
) -> None:
    """Draw an image next to the probabilities that a model predicts for it.

    Args:
        target: PNG file to write.
        image: [height, width, channels] uint8, grey or RGB.
        probabilities: [classes] float32, summing to 1.
        class_names: Name of each class.
        true_label: The image's label.
    """
    predicted = int(np.argmax(probabilities))
    colours = [_OTHER] * len(class_names)
    colours[predicted] = _PREDICTED
    colours[true_label] = _TRUE
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, bars = figure.subplots(1, 2, width_ratios=(1, 1.15))
    verdict = "right" if predicted == true_label else "wrong"
    figure.suptitle(
        f"Predicted: {class_names[predicted]}   True: {class_names[true_label]}   ({verdict})",
        fontsize=14,
    )
    # The last three options apply only to grey images.
    left.imshow(image.squeeze(), interpolation="nearest", cmap="gray", vmin=0, vmax=255)
    left.set_axis_off()
    rows = bars.barh(class_names, probabilities, color=colours)
    bars.bar_label(rows, [f"{value:.1%}" for value in probabilities], padding=3)
    bars.invert_yaxis()
    bars.set_xlim(0, 1.15)
    bars.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    bars.set_xlabel("Probability")
    bars.spines[["top", "right"]].set_visible(False)
    save_png(figure, target, SCREEN_DPI)


@dataclass(frozen=True)
class Captioned:
    """An image in the grid that `save_predictions` draws.

    Attributes:
        pixels: [height, width, 3] uint8.
        name: Name of its file.
        predicted: Name of its most probable class.
        probability: Probability of this class, 0 to 1.
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
        images: Total number of images, including those that are not drawn.
    """
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = -(-len(pictures) // columns)
    # Each name must be nearer to its image than to the class of the image below.
    layout = ConstrainedLayoutEngine(h_pad=0.12)
    figure = Figure(figsize=(1.7 * columns, 2.3 * rows), layout=layout)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, picture in zip(axes.flat, pictures, strict=False):
        axis.imshow(picture.pixels, interpolation="nearest")
        text = f"{_shortened(picture.predicted)}\n{picture.probability:.1%}"
        axis.set_title(text, fontsize=10)
        caption = {"fontsize": 7, "color": "#555555", "ha": "center", "va": "top"}
        name = _shortened(picture.name)
        axis.text(0.5, -0.03, name, caption, transform=axis.transAxes)
    if len(pictures) < images:
        figure.suptitle(f"The first {len(pictures)} of {images:,} images", fontsize=14)
    save_png(figure, path, SCREEN_DPI)


def _shortened(text: str) -> str:
    return text if len(text) <= 24 else f"{text[:12]}…{text[-11:]}"
