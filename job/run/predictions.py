"""``predictions.npz``: the saved model's output for every test image, and some images to show."""

import io
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from job.config import UserError
from job.environment import program
from job.run.folder import PREDICTIONS, OutputDir, read_file


@dataclass(frozen=True)
class Predictions:
    """What the report of a run shows of the model and the data set, without loading either.

    Attributes:
        labels: [examples] int32, the test images' labels.
        probabilities: [examples, classes] float32, the saved model's output for each test image.
        mistakes: [mistakes] int64, rows of the most confident mistakes, worst first.
        mistake_images: [mistakes, height, width, channels] uint8, these test images.
        originals: [samples, height, width, channels] uint8, some training images.
        original_labels: [samples] int32, their labels.
        augmented: [samples, epochs, height, width, channels] uint8, the same images as augmented
            in the first epochs.
    """

    labels: npt.NDArray[np.int32]
    probabilities: npt.NDArray[np.float32]
    mistakes: npt.NDArray[np.int64]
    mistake_images: npt.NDArray[np.uint8]
    originals: npt.NDArray[np.uint8]
    original_labels: npt.NDArray[np.int32]
    augmented: npt.NDArray[np.uint8]

    def save(self, output: OutputDir) -> None:
        """Write the file.

        Raises:
            UserError: If it cannot be written.
        """
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **asdict(self))
        output.write_bytes(PREDICTIONS, buffer.getvalue())

    @classmethod
    def load(cls, folder: Path) -> "Predictions | None":
        """Read the file of an output folder; None if it does not exist.

        Raises:
            UserError: If it exists and cannot be used.
        """
        path = folder / PREDICTIONS
        content = read_file(path)
        if content is None:
            return None
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as file:
                predictions = cls(**{field.name: file[field.name] for field in fields(cls)})
            predictions._require_consistent()
            return predictions
        except (
            OSError,
            EOFError,
            KeyError,
            TypeError,
            ValueError,
            BadZipFile,
            zlib.error,
        ) as error:
            raise UserError(
                f"{path} is damaged or from another version of the job; write it again with "
                f"{program()} evaluate --output-dir {folder}"
            ) from error

    def _require_consistent(self) -> None:
        """Verify that the arrays belong together.

        Raises:
            ValueError: If they do not.
        """
        examples, classes = self.probabilities.shape
        one_each = (
            (self.labels, examples, classes),
            (self.mistakes, len(self.mistake_images), examples),
            (self.original_labels, len(self.originals), classes),
        )
        for indices, length, end in one_each:
            if indices.shape != (length,) or not ((indices >= 0) & (indices < end)).all():
                raise ValueError("arrays of different sizes")
        if self.augmented.shape[:1] != self.originals.shape[:1]:
            raise ValueError("arrays of different sizes")


def require_probabilities(
    rows: npt.NDArray[np.float32], what: str, tolerance: float = 0.01
) -> None:
    """Refuse outputs of a network that are not probabilities.

    Args:
        rows: [examples, classes] float32.
        what: The network, for the message.
        tolerance: How much a row's sum may differ from 1; bfloat16 rounds each value by up to 0.4%.

    Raises:
        UserError: If a value is below 0 or NaN, or a row does not sum to 1.
    """
    sums = rows.sum(axis=1)
    # NaN fails both comparisons.
    if not ((rows >= 0).all() and (abs(sums - 1) <= tolerance).all()):
        raise UserError(
            f"{what} returns values from {rows.min():.3g} to {rows.max():.3g} in rows that sum to "
            f"{sums.min():.3g} to {sums.max():.3g}, expected probabilities: none below 0, and rows "
            f"that sum to 1; end the network with a softmax over the classes, or use another one"
        )


def confusion_matrix(
    labels: npt.NDArray[Any], probabilities: npt.NDArray[np.float32]
) -> npt.NDArray[np.int64]:
    """Count examples by true and predicted class.

    Args:
        labels: [examples] integers.
        probabilities: [examples, classes] float32; the first of the largest is the prediction.

    Returns:
        [classes, classes] int64: entry (true, predicted) counts examples.
    """
    classes = probabilities.shape[1]
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (labels, probabilities.argmax(axis=1)), 1)
    return counts


def most_confident_mistakes(
    labels: npt.NDArray[Any], probabilities: npt.NDArray[np.float32], count: int
) -> npt.NDArray[np.int64]:
    """Find the wrong predictions with the highest probability.

    Args:
        labels: [examples] integers.
        probabilities: [examples, classes] float32.
        count: Maximum number.

    Returns:
        [mistakes] int64 rows, the most confident first; ties are in the order of the examples.
    """
    wrong = np.flatnonzero(probabilities.argmax(axis=1) != labels)
    confidence = probabilities[wrong].max(axis=1)
    return wrong[np.argsort(-confidence, kind="stable")][:count]


BINS = 15


@dataclass(frozen=True)
class Reliability:
    """Examples by the confidence of their prediction, in bins of equal width.

    Bin m of M holds the confidences in ((m - 1) / M, m / M].

    Attributes:
        counts: [bins] int64, examples in each bin.
        confidence: [bins] float64, mean confidence, NaN where a bin is empty.
        accuracy: [bins] float64, fraction predicted correctly, NaN where a bin is empty.
    """

    counts: npt.NDArray[np.int64]
    confidence: npt.NDArray[np.float64]
    accuracy: npt.NDArray[np.float64]

    @property
    def expected_error(self) -> float:
        """Expected calibration error, 0 to 1.

        The mean of |accuracy - confidence| over the bins, weighted with their examples: equation 3
        of Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
        """
        gaps = np.nan_to_num(np.abs(self.accuracy - self.confidence))
        return float((self.counts * gaps).sum() / self.counts.sum())


def reliability(
    labels: npt.NDArray[Any], probabilities: npt.NDArray[np.float32], bins: int = BINS
) -> Reliability:
    """Compare the confidence of predictions with their accuracy.

    Args:
        labels: [examples] integers.
        probabilities: [examples, classes] float32; the largest of a row is its confidence.
        bins: Number of bins; 15 in the tables of Guo et al.
    """
    confidence = probabilities.max(axis=1).astype(np.float64)
    right = probabilities.argmax(axis=1) == labels
    numbers = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(numbers, minlength=bins)
    with np.errstate(invalid="ignore"):
        return Reliability(
            counts,
            np.bincount(numbers, confidence, bins) / counts,
            np.bincount(numbers, right, bins) / counts,
        )
