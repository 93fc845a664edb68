"""How far a network's confidence can be believed."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

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
    """Compare the confidence of predictions with how often they are right.

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
