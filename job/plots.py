"""Pictures. The only module that imports matplotlib."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt

mpl.use("Agg")

from matplotlib import pyplot as plt

_PREDICTED, _TRUE, _OTHER = "#c4501b", "#1b6fc4", "#b8bec6"


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
    figure.savefig(path, dpi=110)
    plt.close(figure)
