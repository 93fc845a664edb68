"""The report's figures: the pictures of a run, with alternative texts and captions."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from job.log import plural
from job.report import pictures
from job.run.predictions import BINS, Predictions, Reliability, reliability
from job.run.record import EvaluationRecord, RunRecord


@dataclass(frozen=True)
class Figure:
    """A picture and its texts.

    Attributes:
        name: Name of its file, without the suffix.
        png: Its content.
        alt: Alternative text, for readers who cannot see it.
        caption: What every reader needs to understand it.
        is_chart: Whether it can be inverted on a dark page; photographs cannot.
    """

    name: str
    png: bytes
    alt: str
    caption: str
    is_chart: bool = True


def draw_figures(record: RunRecord) -> dict[str, Figure]:
    """Draw every figure for which the run has data, by name."""
    figures: list[Figure] = []
    if record.epochs:
        figures += [*_curves(record), _throughput(record)]
    if record.evaluation:
        figures += [_confusion(record.evaluation), _classes(record.evaluation)]
    if record.predictions:
        figures += _predictions(record.predictions, record.class_names)
    return {figure.name: figure for figure in figures}


def _curves(record: RunRecord) -> Iterator[Figure]:
    for name, factor, unit, form, caption in (
        (
            *("accuracy", 100, "Accuracy (%)", "{:.1f}%"),
            "Training: augmented images, with Dropout, and label smoothing if the recipe uses it. "
            "Validation: all test images as they are.",
        ),
        ("loss", 1, "Cross-entropy (nats)", "{:.3f}", "Lower is better."),
    ):
        training = [factor * getattr(line, name) for line in record.epochs]
        validation = [factor * getattr(line, f"val_{name}") for line in record.epochs]
        trained, validated = (
            f"from {form.format(values[0])} to {form.format(values[-1])}"
            for values in (training, validation)
        )
        yield Figure(
            name,
            pictures.curves(name.capitalize(), unit, training, validation),
            f"Line chart of {name} over {plural(len(training), 'epoch')}: training goes {trained}, "
            f"validation {validated}.",
            caption,
        )


def _throughput(record: RunRecord) -> Figure:
    seconds = [line.elapsed_seconds for line in record.epochs]
    rates = [line.images_per_second for line in record.epochs]
    restarts = record.restarts
    unit, length = "s", 1
    for longer, size in (("min", 60), ("h", 3600)):
        if seconds[-1] > 3 * size:
            unit, length = longer, size
    times = [second / length for second in seconds]
    where = ", ".join(f"{at / length:.1f} {unit} (step {step:,})" for step, at in restarts)
    interruptions = f"restarts at {where}" if restarts else "no restart"
    return Figure(
        "throughput",
        pictures.throughput(times, rates, unit, [at / length for _, at in restarts]),
        f"Line chart of training images per second over {times[-1]:.1f} {unit}: median "
        f"{np.median(rates):,.0f}, lowest {min(rates):,.0f}, highest {max(rates):,.0f}; "
        f"{interruptions}.",
        "Without validation and checkpoints. The first epoch after a start includes compilation.",
    )


def _confusion(evaluation: EvaluationRecord) -> Figure:
    matrix, names = np.array(evaluation.confusion_matrix, np.int64), list(evaluation.classes)
    wrong = matrix - np.diag(np.diag(matrix))
    true, predicted = np.unravel_index(wrong.argmax(), wrong.shape)
    most = (
        f"the most frequent mistake is {names[true]} classified as {names[predicted]}, "
        f"{plural(int(wrong[true, predicted]), 'time')}"
        if wrong.any()
        else "there are no mistakes"
    )
    return Figure(
        "confusion",
        pictures.confusion(matrix, names),
        f"Confusion matrix of {len(names)} classes: {np.trace(matrix):,} of {matrix.sum():,} test "
        f"images are on its diagonal; {most}.",
        "Test images by true and predicted class. The shade shows the share of the images of the "
        "true class.",
    )


def _classes(evaluation: EvaluationRecord) -> Figure:
    classes = evaluation.classes
    precision = [one.precision for one in classes.values()]
    recall = [one.recall for one in classes.values()]

    def extremes(values: list[float | None]) -> str:
        known = sorted((v, name) for v, name in zip(values, classes, strict=True) if v is not None)
        if not known:
            return "undefined"
        (low, worst), (high, best) = known[0], known[-1]
        return f"from {low:.0%} ({worst}) to {high:.0%} ({best})"

    return Figure(
        "classes",
        pictures.classes(precision, recall, list(classes)),
        f"Bar chart of precision and recall of each class: precision {extremes(precision)}, recall "
        f"{extremes(recall)}.",
        "Precision: the share of the images predicted as a class that belong to it. Recall: the "
        "share of the images of a class that are predicted as this class.",
    )


def _predictions(predictions: Predictions, names: list[str]) -> Iterator[Figure]:
    labels, probabilities = predictions.labels, predictions.probabilities
    yield _calibration(reliability(labels, probabilities))
    listed = list_mistakes(predictions, names)
    if listed:
        _, worst, predicted, confidence = listed[0]
        captions = [f"{true}\nas {wrong}\n{value:.1%}" for _, true, wrong, value in listed]
        yield Figure(
            "mistakes",
            pictures.mistakes(predictions.mistake_images, captions),
            f"The {len(listed)} wrongly classified test images with the highest probabilities, "
            f"listed below. The first is an image of class {worst}, predicted as {predicted} with "
            f"{confidence:.1%}.",
            "Each image with its true class, the predicted class, and the probability of the "
            "prediction.",
            is_chart=False,
        )
    classes = [names[label] for label in predictions.original_labels]
    yield Figure(
        "augmentation",
        pictures.augmentation(predictions.originals, predictions.augmented, classes),
        f"{plural(len(classes), 'training image')} ({', '.join(classes)}), each next to "
        f"{predictions.augmented.shape[1]} augmented versions of it.",
        "Augmented by the recipe with the run's seed, as in the first epochs.",
        is_chart=False,
    )


def _calibration(result: Reliability) -> Figure:
    shares = result.counts / result.counts.sum()
    confidence, accuracy = (
        np.nansum(shares * values) for values in (result.confidence, result.accuracy)
    )
    return Figure(
        "reliability",
        pictures.calibration(result),
        f"Reliability curve, accuracy against confidence, above a histogram of the confidences. "
        f"The mean confidence is {confidence:.1%}, the accuracy {accuracy:.1%}, the expected "
        f"calibration error {result.expected_error:.2%}.",
        f"Test images by the probability of their predicted class, in {BINS} bins of equal width. "
        f"Below the diagonal the model is too confident, above it not confident enough.",
    )


def list_mistakes(predictions: Predictions, names: list[str]) -> list[tuple[int, str, str, float]]:
    """List the recorded mistakes, the most confident first.

    Returns:
        For each mistake the number of the test image, from 0, its true class, the predicted class,
        and the probability of the prediction, 0 to 1.
    """
    rows = predictions.probabilities[predictions.mistakes]
    return [
        (int(row), names[predictions.labels[row]], names[values.argmax()], float(values.max()))
        for row, values in zip(predictions.mistakes, rows, strict=True)
    ]
