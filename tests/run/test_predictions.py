from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from job.config import UserError
from job.run.folder import OutputDir
from job.run.predictions import (
    Predictions,
    confusion_matrix,
    most_confident_mistakes,
    reliability,
)

LABELS = np.array([0, 1, 2, 2, 0], np.int32)
PROBABILITIES = np.array(
    [
        [0.8, 0.1, 0.1],  # right
        [0.6, 0.3, 0.1],
        [0.1, 0.9, 0.0],
        [0.2, 0.2, 0.6],  # right
        [0.1, 0.3, 0.6],
    ],
    np.float32,
)


def make_predictions() -> Predictions:
    rng = np.random.default_rng(0)

    def images(*shape: int) -> np.ndarray:
        return rng.integers(0, 256, (*shape, 32, 32, 3), np.uint8)

    mistakes = most_confident_mistakes(LABELS, PROBABILITIES, 16)
    return Predictions(
        *(LABELS, PROBABILITIES, mistakes, images(len(mistakes))),
        *(images(2), np.array([0, 2], np.int32), images(2, 3)),
    )


def test_confusion_matrix_counts_true_by_predicted_class() -> None:
    assert confusion_matrix(LABELS, PROBABILITIES).tolist() == [[1, 0, 1], [1, 0, 0], [0, 1, 1]]


def test_most_confident_mistakes_come_first_and_equals_in_order() -> None:
    assert most_confident_mistakes(LABELS, PROBABILITIES, 16).tolist() == [2, 1, 4]
    assert most_confident_mistakes(LABELS, PROBABILITIES, 2).tolist() == [2, 1]
    right = PROBABILITIES.argmax(axis=1)
    assert most_confident_mistakes(right, PROBABILITIES, 16).tolist() == []


def test_the_file_returns_what_was_saved_and_always_has_the_same_bytes(tmp_path: Path) -> None:
    predictions, output = make_predictions(), OutputDir(tmp_path)
    contents = []
    for _ in range(2):
        predictions.save(output)
        contents.append((tmp_path / "predictions.npz").read_bytes())
    assert contents[0] == contents[1]
    loaded = Predictions.load(tmp_path)
    assert loaded is not None
    for name, array in vars(predictions).items():
        np.testing.assert_array_equal(vars(loaded)[name], array)
        assert vars(loaded)[name].dtype == array.dtype


REFUSED = r"predictions\.npz is damaged or from another version.*cifar10-job evaluate --output-dir"


def test_a_missing_file_is_not_an_error_but_a_damaged_one_is(tmp_path: Path) -> None:
    assert Predictions.load(tmp_path) is None
    path = tmp_path / "predictions.npz"
    make_predictions().save(OutputDir(tmp_path))
    content = path.read_bytes()
    np.savez(tmp_path / "other.npz", labels=LABELS)
    others = [(tmp_path / "other.npz").read_bytes()]
    changed: list[dict[str, Any]] = [
        {"labels": LABELS[:-1]},
        {"labels": LABELS + 9},
        {"probabilities": LABELS},
    ]
    for changes in changed:
        replace(make_predictions(), **changes).save(OutputDir(tmp_path))
        others.append(path.read_bytes())
    for damaged in (b"", b"no zip", content[:-500], content[:200] + content[300:], *others):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=REFUSED) as error:
            Predictions.load(tmp_path)
        assert "pickle" not in str(error.value)


def rows(*confidences: float) -> np.ndarray:
    """Probabilities of two classes, the first of which is predicted."""
    return np.array([[p, 1 - p] for p in confidences], np.float32)


def test_expected_calibration_error_of_a_case_calculated_by_hand() -> None:
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


def test_a_model_that_is_right_as_often_as_its_confidence_has_no_error() -> None:
    labels = np.array([0, 0, 0, 1])
    assert reliability(labels, rows(*[0.75] * 4)).expected_error == pytest.approx(0.0)
