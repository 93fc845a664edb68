from pathlib import Path

import numpy as np
import pytest

from job.config import UserError
from job.run.folder import OutputDir
from job.run.predictions import Predictions, confusion_matrix, most_confident_mistakes

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


def test_the_file_gives_back_what_was_saved_and_has_always_the_same_bytes(tmp_path: Path) -> None:
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


def test_no_file_is_no_error_and_a_damaged_one_is(tmp_path: Path) -> None:
    assert Predictions.load(tmp_path) is None
    path = tmp_path / "predictions.npz"
    make_predictions().save(OutputDir(tmp_path))
    content = path.read_bytes()
    np.savez(tmp_path / "other.npz", labels=LABELS)
    other = (tmp_path / "other.npz").read_bytes()
    for damaged in (b"", b"no zip", content[:-500], content[:200] + content[300:], other):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"is no file of this version.* job evaluate"):
            Predictions.load(tmp_path)
