"""What a saved model makes of images: a line for each, and a picture of them."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
import numpy.typing as npt
from rich.cells import cell_len

from job.classifier import Classifier, Predictor, load_classifier
from job.config import TrainConfig, UserError
from job.decode import Decoded, decode_batches
from job.devices import open_promised_devices
from job.evaluate import ROWS_PER_REPLICA
from job.images import Source
from job.output import OutputDir
from job.own_picture import mark_as_own
from job.terminal import count, padded, printable, say, write_lines

PICTURES = 100
"""Images in the picture, at most."""

# Columns that lines are aligned over; longer paths stand out.
_NAME_COLUMNS = 60


@dataclass(frozen=True)
class Prediction:
    """A source and what the model makes of it.

    Attributes:
        decoded: The source's image, or why there is none.
        classes: The most probable classes, from the first: name and probability, 0 to 1.
    """

    decoded: Decoded
    classes: tuple[tuple[str, float], ...]


def predict_images(
    config: TrainConfig,
    path: Path,
    sources: Sequence[Source],
    top: int,
    *,
    as_json: bool = False,
    png: Path | None = None,
) -> None:
    """Predict images, each in a line on stdout, and say on stderr how it went.

    Args:
        config: Says which devices.
        path: The model file.
        sources: The images.
        top: How many classes to report of each.
        as_json: Whether to write JSON lines, in which broken images have theirs.
        png: Picture of the first `PICTURES` images to write, in a folder that there is.

    Raises:
        UserError: If the model cannot be used, or an image could not be read; the others are done.
        GpuMissingError: If a promised or required GPU cannot be used.
    """
    devices = open_promised_devices(config)
    classifier = load_classifier(path, devices)
    rows = min(ROWS_PER_REPLICA, -(-len(sources) // devices.replicas))
    predictor = Predictor(classifier, devices, rows)
    describe = json_line if as_json else _text_lines(sources, classifier.class_names)
    broken, shown = list[Source](), list[Prediction]()
    start = time.perf_counter()
    for predictions in predict_batches(classifier, predictor, sources, top):
        write_lines(line for line in map(describe, predictions) if line)
        readable = [prediction for prediction in predictions if prediction.classes]
        broken += [one.decoded.source for one in predictions if not one.classes]
        shown += readable[: PICTURES - len(shown)] if png else []
    seconds = time.perf_counter() - start
    done = len(sources) - len(broken)
    if done:
        say(f"{count(done, 'image')} in {seconds:.1f} s ({done / seconds:,.0f} images/s)")
    if png and shown:
        _save_picture(png, shown, done)
    if broken:
        raise _unreadable(broken, len(sources), as_json=as_json)


def _unreadable(broken: Sequence[Source], sources: int, *, as_json: bool) -> UserError:
    """What to say in the end of images that could not be read."""
    if sources == 1:
        (source,) = broken
        return UserError(
            f"cannot read {printable(source.name)}: {source.problem}; name an image, or a folder "
            f"that has some"
        )
    where = "each has its line with an error on stdout" if as_json else "each is named above"
    return UserError(
        f"{len(broken):,} of {count(sources, 'image')} could not be read; {where}; mend them or "
        f"leave them out"
    )


def predict_batches(
    classifier: Classifier, predictor: Predictor, sources: Sequence[Source], top: int
) -> Iterator[list[Prediction]]:
    """Decode and predict images, in the order of the sources.

    Args:
        classifier: The model.
        predictor: Computes it.
        sources: The images.
        top: How many classes to report of each.

    Yields:
        The predictions of `Predictor.batch_size` sources.
    """
    for batch in decode_batches(sources, predictor.batch_size, classifier.image_shape):
        images = [decoded.pixels for decoded in batch if decoded.pixels is not None]
        classes = iter(
            _most_probable(classifier, predictor(np.stack(images)), top) if images else ()
        )
        yield [
            Prediction(decoded, () if decoded.pixels is None else next(classes))
            for decoded in batch
        ]


def _most_probable(
    classifier: Classifier, probabilities: npt.NDArray[np.float32], top: int
) -> list[tuple[tuple[str, float], ...]]:
    best = np.argsort(-probabilities, axis=-1, kind="stable")[:, :top]
    values = np.take_along_axis(probabilities, best, axis=-1)
    names = np.array(classifier.class_names, object)[best]
    return [
        tuple(zip(*row, strict=True)) for row in zip(names.tolist(), values.tolist(), strict=True)
    ]


def json_line(prediction: Prediction) -> str:
    """A prediction as a JSON object in one line; the README documents it."""
    source = prediction.decoded.source
    if source.problem:
        return json.dumps({"path": source.name, "error": source.problem})
    classes = [{"class": name, "probability": value} for name, value in prediction.classes]
    return json.dumps({"path": source.name, "predictions": classes})


def _text_lines(
    sources: Sequence[Source], class_names: Sequence[str]
) -> Callable[[Prediction], str]:
    """Lay out the lines for people; what is broken is said on stderr instead."""
    widest = max(cell_len(printable(source.name)) for source in sources)
    name_width = min(widest, _NAME_COLUMNS)
    class_width = max(cell_len(printable(name)) for name in class_names)

    def describe(prediction: Prediction) -> str:
        source = prediction.decoded.source
        if source.problem:
            if len(sources) > 1:  # of a single one the end of the command says it
                say(f"{printable(source.name)}: {source.problem}")
            return ""
        (first, value), *others = [(printable(name), value) for name, value in prediction.classes]
        line = (
            f"{padded(printable(source.name), name_width)}  {padded(first, class_width)}  "
            f"{value:>6.1%}"
        )
        rest = ", ".join(f"{name} {value:.1%}" for name, value in others)
        return f"{line}  ({rest})" if rest else line

    return describe


def _save_picture(png: Path, shown: Sequence[Prediction], images: int) -> None:
    from job import plots  # matplotlib takes a second

    pictures = [
        plots.Captioned(
            _as_rgb(prediction.decoded.pixels),
            printable(PurePath(prediction.decoded.source.name).name),
            *prediction.classes[0],
        )
        for prediction in shown
        if prediction.decoded.pixels is not None
    ]
    with OutputDir(png.parent).replacing(png.name) as temporary:
        plots.save_predictions(temporary, pictures, images)
        mark_as_own(temporary)
    rest = images - len(pictures)
    say(f"picture {png}" + (f" of the first {len(pictures)}; {rest:,} left out" if rest else ""))


def _as_rgb(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3))
