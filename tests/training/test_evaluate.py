from dataclasses import replace

import keras
import numpy as np
import pytest
import tensorflow as tf

from job.cluster.devices import Compilation
from job.data import Dataset
from job.recipes import classic, unchanged
from job.run.predictions import confusion_matrix
from job.run.record import ClassRecord, EvaluationRecord, encode
from job.training.evaluate import Evaluation, Evaluator
from tests.conftest import MakeDevices

COMPILED = Compilation(True, True, loops=True)


@pytest.mark.parametrize(
    ("replicas", "compilation", "examples"),
    [
        *((1, None, 256), (1, None, 299), (1, COMPILED, 299), (2, None, 299)),
        *((4, None, 256), (4, None, 299), (4, None, 3)),
    ],
    ids=lambda value: "compiled" if value is COMPILED else str(value),
)
def test_counts_each_example_once_for_any_split(
    model: keras.Model,
    small_dataset: Dataset,
    make_devices: MakeDevices,
    monkeypatch: pytest.MonkeyPatch,
    replicas: int,
    compilation: Compilation | None,
    examples: int,
) -> None:
    monkeypatch.setattr("job.training.evaluate.ROWS_PER_REPLICA", 64)
    images, labels = small_dataset.test_images[:examples], small_dataset.test_labels[:examples]
    devices = make_devices(replicas, compilation=compilation)
    evaluator = Evaluator(model, classic.RECIPE, devices, images, labels)
    evaluation, predicted = evaluator.predict()

    probabilities = model.predict(images / np.float32(255), verbose=0)
    expected = np.zeros((10, 10), int)
    np.add.at(expected, (labels, probabilities.argmax(axis=1)), 1)
    np.testing.assert_array_equal(evaluation.confusion, expected)
    assert evaluation.examples == examples
    assert predicted.dtype == np.float32
    # The probabilities are in the order of the examples, and are the ones that were counted.
    np.testing.assert_allclose(predicted, probabilities, atol=1e-5)
    np.testing.assert_array_equal(confusion_matrix(labels, predicted), evaluation.confusion)
    assert evaluator().loss == evaluation.loss
    one_hot = keras.utils.to_categorical(labels, 10)
    loss, accuracy = model.evaluate(images / np.float32(255), one_hot, verbose=0)
    assert evaluation.loss == pytest.approx(loss, abs=1e-5)
    assert evaluation.accuracy == pytest.approx(accuracy, abs=1e-6)


def test_views_are_averaged(
    model: keras.Model, small_dataset: Dataset, make_devices: MakeDevices
) -> None:
    recipe = replace(
        classic.RECIPE, tta_views=(lambda images: images, lambda images: images[:, :, ::-1])
    )
    images, labels = small_dataset.test_images, small_dataset.test_labels
    evaluation = Evaluator(model, recipe, make_devices(2), images, labels)()
    views = [images / np.float32(255), images[:, :, ::-1] / np.float32(255)]
    mean = np.mean([model.predict(view, verbose=0) for view in views], axis=0)
    expected = -np.log(mean[np.arange(len(labels)), labels]).mean()
    assert evaluation.loss == pytest.approx(expected, abs=1e-5)
    assert evaluation.accuracy == pytest.approx((mean.argmax(axis=1) == labels).mean())


@pytest.mark.parametrize("compilation", [None, COMPILED], ids=["plain", "compiled"])
def test_weighted_views_and_the_accuracy_without_them_equal_a_reference(
    model: keras.Model,
    small_dataset: Dataset,
    make_devices: MakeDevices,
    compilation: Compilation | None,
) -> None:
    def mirrored(images: tf.Tensor) -> tf.Tensor:
        return images[:, :, ::-1]

    def black(images: tf.Tensor) -> tf.Tensor:
        return images * 0.0

    last = model.layers[-1].kernel
    # Otherwise the network predicts nearly the same for every image.
    last.assign(np.random.default_rng(1).normal(size=last.shape))
    images, labels = small_dataset.test_images[:299], small_dataset.test_labels[:299]
    scaled = images / np.float32(255)
    plain, flipped, dark = (
        model.predict(view, verbose=0) for view in (scaled, scaled[:, :, ::-1], scaled * 0)
    )
    # Labels that are the predictions for unchanged images, so that the two accuracies differ.
    labels = np.where(np.arange(299) % 4, plain.argmax(axis=1), labels).astype(np.int32)
    for views, expected in (
        ((unchanged, mirrored, black), 0.5 * plain + 0.2 * flipped + 0.3 * dark),
        ((mirrored, black, black), 0.5 * flipped + 0.2 * dark + 0.3 * dark),
    ):
        recipe = replace(classic.RECIPE, tta_views=views, tta_weights=(0.5, 0.2, 0.3))
        devices = make_devices(1 if compilation else 2, compilation=compilation)
        evaluator = Evaluator(model, recipe, devices, images, labels)
        evaluation, probabilities = evaluator.predict()
        np.testing.assert_allclose(probabilities, expected, atol=1e-6)
        assert evaluation.accuracy == pytest.approx((expected.argmax(axis=1) == labels).mean())
        accuracy = (plain.argmax(axis=1) == labels).mean()
        assert evaluation.accuracy_without_tta == pytest.approx(accuracy)
        assert evaluation.accuracy < accuracy
        record = evaluation.record(("a",) * 10, "model.h5", "")
        assert record.accuracy_without_tta == evaluation.accuracy_without_tta
        # As in the validation of a training.
        evaluator = Evaluator(model, recipe, devices, images, labels, with_tta=False)
        evaluation, probabilities = evaluator.predict()
        np.testing.assert_allclose(probabilities, plain, atol=1e-6)
        assert evaluation.accuracy == pytest.approx(accuracy)
        assert evaluation.accuracy_without_tta is None
        record = evaluation.record(("a",) * 10, "model.h5", "")
        assert b'"accuracy_without_tta":null' in encode(record)


def test_the_record_has_precision_recall_and_support_of_each_class() -> None:
    confusion = np.array([[8, 2, 0], [1, 3, 0], [0, 0, 0]], np.int64)
    record = Evaluation(0.5, confusion).record(("cat", "dog", "eel"), "model.h5", "ab" * 32)
    assert record == EvaluationRecord(
        loss=0.5,
        accuracy=11 / 14,
        examples=14,
        classes={
            "cat": ClassRecord(precision=8 / 9, recall=0.8, support=10),
            "dog": ClassRecord(precision=0.6, recall=0.75, support=4),
            "eel": ClassRecord(precision=None, recall=None, support=0),
        },
        confusion_matrix=[[8, 2, 0], [1, 3, 0], [0, 0, 0]],
        model="model.h5",
        model_sha256="ab" * 32,
    )
