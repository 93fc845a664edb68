import numpy as np
import pytest

from job.report.figures import reliability


def rows(*confidences: float) -> np.ndarray:
    """Probabilities of two classes, the first of which is predicted."""
    return np.array([[p, 1 - p] for p in confidences], np.float32)


def test_expected_calibration_error_of_a_case_worked_out_by_hand() -> None:
    # Of four bins the last two are used: (0.5, 0.75] and (0.75, 1].
    probabilities = rows(0.6, 0.7, 0.8, 0.9, 1.0)
    labels = np.array([0, 1, 0, 0, 1])
    result = reliability(labels, probabilities, bins=4)
    assert result.counts.tolist() == [0, 0, 2, 3]
    assert result.confidence[2:] == pytest.approx([0.65, 0.9])
    assert result.accuracy[2:] == pytest.approx([1 / 2, 2 / 3])
    assert np.isnan(result.accuracy[:2]).all()
    # 2/5 * |0.5 - 0.65| + 3/5 * |2/3 - 0.9|
    assert result.expected_error == pytest.approx(0.06 + 0.14)


def test_the_upper_edge_belongs_to_a_bin() -> None:
    result = reliability(np.zeros(3, int), rows(0.75, 0.7501, 1.0), bins=4)
    assert result.counts.tolist() == [0, 0, 1, 2]


def test_a_model_that_is_right_as_often_as_it_says_has_no_error() -> None:
    labels = np.array([0, 0, 0, 1])
    assert reliability(labels, rows(*[0.75] * 4)).expected_error == pytest.approx(0.0)
