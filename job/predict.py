"""What a saved model makes of images: probabilities in batches, lines and a picture of them."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf
from rich.cells import cell_len

from job.config import RECIPES, TrainConfig, UserError
from job.devices import Devices, open_promised_devices
from job.evaluate import ROWS_PER_REPLICA
from job.images import Decoded, Source, decode_batches
from job.model_file import load_model
from job.output import EVALUATION, RUN, OutputDir, read_json, sha256_of
from job.recipe import get_recipe, unchanged
from job.terminal import count, padded, printable, say, write_lines

PICTURES = 100
"""Images in the picture, at most."""

# Columns that lines are aligned over; longer paths stand out.
_NAME_COLUMNS = 60

View = Callable[[tf.Tensor], tf.Tensor]


@dataclass(frozen=True)
class Classifier:
    """A saved model and what is known of it.

    Attributes:
        model: From images [batch, height, width, 3] float32, 0 to 1, to probabilities.
        class_names: Name of each class.
        views: The evaluation views of its recipe.
    """

    model: keras.Model
    class_names: tuple[str, ...]
    views: tuple[View, ...]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images that it takes."""
        _, height, width, _ = self.model.input_shape
        return height, width


class Predictor:
    """Computes the probabilities of a classifier, in batches of one size that compile once.

    Args:
        classifier: Its model is in the scope of the devices' strategy.
        devices: Where to compute.
        rows: Images a replica and batch.
    """

    def __init__(self, classifier: Classifier, devices: Devices, rows: int) -> None:
        self._classifier, self._strategy = classifier, devices.strategy
        self._shape = (devices.replicas, rows, *classifier.image_size, 3)
        self.batch_size = devices.replicas * rows
        self._network = tf.function(
            self._probabilities, jit_compile=devices.compilation.network, autograph=False
        )

    def __call__(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Compute probabilities.

        Args:
            images: [images, height, width, 3] uint8, at most `batch_size` of them.

        Returns:
            [images, classes] float32.
        """
        batch = np.zeros((self.batch_size, *self._shape[2:]), np.uint8)
        batch[: len(images)] = images
        parts = batch.reshape(self._shape)
        pixels = self._strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(parts[context.replica_id_in_sync_group])
        )
        results = self._strategy.experimental_local_results(self._run(pixels))
        return np.concatenate([result.numpy() for result in results])[: len(images)]

    @tf.function
    def _run(self, pixels: tf.Tensor) -> tf.Tensor:
        return self._strategy.run(self._network, (pixels,))

    def _probabilities(self, pixels: tf.Tensor) -> tf.Tensor:
        images = tf.cast(pixels, tf.float32) * (1.0 / 255.0)
        model, views = self._classifier.model, self._classifier.views
        return tf.add_n([model(view(images), training=False) for view in views]) / len(views)


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
        top: How many classes to tell of each.
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
    broken, shown = 0, list[Prediction]()
    start = time.perf_counter()
    for predictions in predict_batches(classifier, predictor, sources, top):
        write_lines(line for line in map(describe, predictions) if line)
        readable = [prediction for prediction in predictions if prediction.classes]
        broken += len(predictions) - len(readable)
        shown += readable[: PICTURES - len(shown)] if png else []
    seconds = time.perf_counter() - start
    done = len(sources) - broken
    say(f"{count(done, 'image')} in {seconds:.1f} s ({done / seconds:,.0f} images/s)")
    if png and shown:
        _save_picture(png, shown, done)
    if broken:
        raise UserError(
            f"{broken:,} of {count(len(sources), 'image')} could not be read, as told above; mend "
            f"them or leave them out"
        )


def load_classifier(path: Path, devices: Devices) -> Classifier:
    """Load a model of this job, with the class names and views that the files beside it tell.

    They are believed only where the evaluation is of this very file.

    Args:
        path: The model file.
        devices: Where it is to compute, in float32.

    Raises:
        UserError: If there is no model of RGB images.
    """
    # As the evaluation computes: float32, also where GPUs round it to TF32 by default.
    tf.config.experimental.enable_tensor_float_32_execution(False)
    with devices.strategy.scope():
        model = load_model(path)
    if len(model.input_shape) != 4 or model.input_shape[-1] != 3:
        raise UserError(
            f"{path} takes inputs of shape {model.input_shape}, expected (None, height, width, 3); "
            f"name a model of RGB images"
        )
    evaluation = read_json(path.parent / EVALUATION)
    classes = model.output_shape[-1]
    names = tuple(evaluation.get("classes", ()))
    if evaluation.get("model_sha256") != sha256_of(path) or len(names) != classes:
        say(f"no {EVALUATION} of this model is beside {path}, so its classes go by numbers")
        return Classifier(model, tuple(f"class {label}" for label in range(classes)), (unchanged,))
    recipe = read_json(path.parent / RUN).get("config", {}).get("recipe")
    views = get_recipe(recipe).evaluation_views if recipe in RECIPES else (unchanged,)
    return Classifier(model, names, views)


def predict_batches(
    classifier: Classifier, predictor: Predictor, sources: Sequence[Source], top: int
) -> Iterator[list[Prediction]]:
    """Decode and predict images, in the order of the sources.

    Args:
        classifier: The model.
        predictor: Computes it.
        sources: The images.
        top: How many classes to tell of each.

    Yields:
        The predictions of `Predictor.batch_size` sources.
    """
    for batch in decode_batches(sources, predictor.batch_size, classifier.image_size):
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
            prediction.decoded.pixels,
            printable(PurePath(prediction.decoded.source.name).name),
            *prediction.classes[0],
        )
        for prediction in shown
        if prediction.decoded.pixels is not None
    ]
    with OutputDir(png.parent).replacing(png.name) as temporary:
        plots.save_predictions(temporary, pictures, images)
    rest = images - len(pictures)
    say(f"picture {png}" + (f" of the first {len(pictures)}; {rest:,} left out" if rest else ""))
