"""What the pictures have in common: colours, the axis of epochs, and how they are saved."""

import io
import warnings
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's, which colour-blind people can tell apart, less the pale yellow.
BLUE, VERMILION = "#0072b2", "#d55e00"
PALETTE = (BLUE, VERMILION, "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


def lay_out_epochs(axes: Axes, epochs: int) -> None:
    """Let the horizontal axis be that of so many epochs, from 1; there is none between two."""
    axes.set_xlabel("Epoch")
    axes.set_xlim(0.5, epochs + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def save_png(figure: Figure, target: Path | io.BytesIO, dpi: int) -> None:
    """Save a figure whatever letters it has.

    The font that comes with matplotlib has no Chinese ones, for one: boxes stand in for them, and
    a warning for each in the middle of a training's log would help nobody.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(target, format="png", dpi=dpi)
