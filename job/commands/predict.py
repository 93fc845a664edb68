"""Predictions of a saved model for images: one line per image, and a picture."""

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

from job.cluster.devices import Devices, graph_function
from job.commands.terminal import padded, print_message, printable, write_lines
from job.config import UserError, list_recipes
from job.data.image_files import MODES, ImageFile, ImageShape, decode_batches
from job.log import plural
from job.recipes import Views, get_recipe, unchanged
from job.run.folder import EVALUATION, OutputDir, sha256_of
from job.run.predictions import require_probabilities
from job.run.record import read_evaluation, read_manifest, unless_damaged
from job.training.evaluate import ROWS_PER_REPLICA, mean_over_views
from job.training.saved_model import load_classifier


class Predictor:
    """Computes the predictions of a saved model, in batches of one size that compile once.

    Args:
        model: Maps images [batch, height, width, channels] float32, 0 to 1, to probabilities;
            loaded in the scope of the devices' strategy.
        class_names: Name of each class.
        views: The test-time augmentation of its recipe.
        devices: The devices to compute on.
        rows: Images per replica and batch.
        weights: The weight of each view; they sum to 1. Empty means equal weights.

    Attributes:
        class_names: As given.
        views: As given.
        image_shape: Height, width and channels of the images that the model accepts.
        batch_size: Images per batch.
    """

    def __init__(
        self,
        model: keras.Model,
        class_names: tuple[str, ...],
        views: Views,
        devices: Devices,
        rows: int = ROWS_PER_REPLICA,
        weights: tuple[float, ...] = (),
    ) -> None:
        self.class_names, self.views, self._weights = class_names, views, weights
        self.image_shape: ImageShape = model.input_shape[1:]
        self.batch_size = devices.replicas * rows
        self._model, self._strategy = model, devices.strategy
        self._shape = (devices.replicas, rows, *self.image_shape)
        self._network = graph_function(self._probabilities, jit_compile=devices.compilation.network)

    def __call__(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Compute probabilities.

        Args:
            images: [images, height, width, channels] uint8, at most `batch_size` of them.

        Returns:
            [images, classes] float32.

        Raises:
            UserError: If the outputs of the model are not probabilities.
        """
        batch = np.zeros((self.batch_size, *self._shape[2:]), np.uint8)
        batch[: len(images)] = images
        parts = batch.reshape(self._shape)
        pixels = self._strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(parts[context.replica_id_in_sync_group])
        )
        results = self._strategy.experimental_local_results(self._run(pixels))
        rows = np.concatenate([result.numpy() for result in results])[: len(images)]
        require_probabilities(rows, "the model")
        return rows

    @graph_function
    def _run(self, pixels: tf.Tensor) -> tf.Tensor:
        return self._strategy.run(self._network, (pixels,))

    def _probabilities(self, pixels: tf.Tensor) -> tf.Tensor:
        images = tf.cast(pixels, tf.float32) * (1.0 / 255.0)
        mean, _ = mean_over_views(self._model, self.views, self._weights, images)
        return mean


def load_predictor(path: Path, devices: Devices, rows: int = ROWS_PER_REPLICA) -> Predictor:
    """Load a model of this job, with the class names and views from the files next to it.

    Those files are used only if the evaluation belongs to exactly this model file.

    Args:
        path: The model file.
        devices: The devices to compute on, in float32.
        rows: Images per replica and batch.

    Raises:
        UserError: If the file is not a model of grey or RGB images of a fixed size.
    """
    # float32 as in the evaluation, also on GPUs that round it to TF32 by default.
    tf.config.experimental.enable_tensor_float_32_execution(False)
    with devices.strategy.scope():
        model = load_classifier(path)
    channels = model.input_shape[-1]
    if channels not in MODES:
        raise UserError(
            f"{path} requires images with {channels} channels, expected 1 (grey) or 3 (RGB); use "
            f"another model"
        )
    evaluation = unless_damaged(read_evaluation, path.parent)
    classes = model.output_shape[-1]
    names = tuple(evaluation.classes) if evaluation else ()
    views: Views = (unchanged,)
    weights: tuple[float, ...] = ()
    if evaluation is None or evaluation.model_sha256 != sha256_of(path) or len(names) != classes:
        print_message(
            f"no {EVALUATION} for this model next to {path}; its classes are shown as numbers"
        )
        names = tuple(f"class {label}" for label in range(classes))
    else:
        run = unless_damaged(read_manifest, path.parent)
        if run and run.config.recipe in list_recipes():
            recipe = get_recipe(run.config.recipe)
            views, weights = recipe.tta_views, recipe.tta_weights
    return Predictor(model, names, views, devices, rows, weights)


PICTURES = 100
"""Maximum number of images in the picture."""

# Maximum width of the column of paths; a longer path is not aligned.
_NAME_COLUMNS = 60


@dataclass(frozen=True)
class Prediction:
    """A file and its prediction.

    Attributes:
        file: The file with its pixels, or the reason why it has none.
        classes: Name and probability (0 to 1) of the most probable classes, in descending order;
            empty if the file has no pixels.
    """

    file: ImageFile
    classes: tuple[tuple[str, float], ...]


def predict_images(
    devices: Devices,
    path: Path,
    files: Sequence[ImageFile],
    top: int,
    *,
    as_json: bool = False,
    png: Path | None = None,
) -> None:
    """Predict images: write one line per image to stdout and a summary to stderr.

    Args:
        devices: The devices to compute on.
        path: The model file.
        files: The images.
        top: Number of classes to report per image.
        as_json: Whether to write JSON lines, including one with the error of each broken image.
        png: Picture of the first `PICTURES` images to write; its folder must exist.

    Raises:
        UserError: If the model cannot be used, or if an image could not be read; all other images
            are predicted first.
    """
    rows = min(ROWS_PER_REPLICA, -(-len(files) // devices.replicas))
    predictor = load_predictor(path, devices, rows)
    describe = json_line if as_json else _text_lines(files, predictor.class_names)
    broken, shown = list[ImageFile](), list[Prediction]()
    start = time.perf_counter()
    for predictions in predict_batches(predictor, files, top):
        write_lines(line for line in map(describe, predictions) if line)
        readable = [prediction for prediction in predictions if prediction.classes]
        broken += [prediction.file for prediction in predictions if not prediction.classes]
        shown += readable[: PICTURES - len(shown)] if png else []
    seconds = time.perf_counter() - start
    done = len(files) - len(broken)
    if done:
        print_message(
            f"{plural(done, 'image')} in {seconds:.1f} s ({done / seconds:,.0f} images/s)"
        )
    if png and shown:
        _save_picture(png, shown, done, predictor.image_shape)
    if broken:
        raise _unreadable(broken, len(files), as_json=as_json)


def _unreadable(broken: Sequence[ImageFile], files: int, *, as_json: bool) -> UserError:
    """Create the final error for images that could not be read."""
    if files == 1:
        (file,) = broken
        return UserError(
            f"cannot read {printable(file.name)}: {file.problem}; pass an image, or a folder "
            f"with images"
        )
    where = "each has an error line on stdout" if as_json else "each is named above"
    return UserError(
        f"{len(broken):,} of {plural(files, 'image')} could not be read; {where}; fix them or "
        f"leave them out"
    )


def predict_batches(
    predictor: Predictor, files: Sequence[ImageFile], top: int
) -> Iterator[list[Prediction]]:
    """Decode and predict images, in the order of the files.

    Args:
        predictor: The model.
        files: The images.
        top: Number of classes to report per image.

    Yields:
        The predictions of up to `Predictor.batch_size` files.
    """
    for batch in decode_batches(files, predictor.batch_size, predictor.image_shape):
        images = [file.pixels for file in batch if file.pixels is not None]
        rows = iter(predictor(np.stack(images)) if images else ())
        names = predictor.class_names
        yield [
            Prediction(file, () if file.pixels is None else _most_probable(names, next(rows), top))
            for file in batch
        ]


def _most_probable(
    class_names: Sequence[str], probabilities: npt.NDArray[np.float32], top: int
) -> tuple[tuple[str, float], ...]:
    labels = np.argsort(-probabilities, kind="stable")[:top]
    return tuple((class_names[label], float(probabilities[label])) for label in labels)


def json_line(prediction: Prediction) -> str:
    """Format a prediction as a JSON object in one line, as docs/predict.md documents it."""
    file = prediction.file
    if file.problem:
        return json.dumps({"path": file.name, "error": file.problem})
    classes = [{"class": name, "probability": value} for name, value in prediction.classes]
    return json.dumps({"path": file.name, "predictions": classes})


def _text_lines(
    files: Sequence[ImageFile], class_names: Sequence[str]
) -> Callable[[Prediction], str]:
    """Return a function that formats a prediction as text; it reports broken images on stderr."""
    widest = max(cell_len(printable(file.name)) for file in files)
    name_width = min(widest, _NAME_COLUMNS)
    class_width = max(cell_len(printable(name)) for name in class_names)

    def describe(prediction: Prediction) -> str:
        file = prediction.file
        if file.problem:
            if len(files) > 1:  # a single broken image is reported at the end of the command
                print_message(f"{printable(file.name)}: {file.problem}")
            return ""
        (first, value), *others = [(printable(name), value) for name, value in prediction.classes]
        line = (
            f"{padded(printable(file.name), name_width)}  {padded(first, class_width)}  "
            f"{value:>6.1%}"
        )
        rest = ", ".join(f"{name} {value:.1%}" for name, value in others)
        return f"{line}  ({rest})" if rest else line

    return describe


def _save_picture(png: Path, shown: Sequence[Prediction], images: int, shape: ImageShape) -> None:
    from job.report import pictures

    height, width, _ = shape

    shown_images = [
        pictures.Captioned(
            np.broadcast_to(prediction.file.pixels, (height, width, 3)),
            printable(PurePath(prediction.file.name).name),
            *prediction.classes[0],
        )
        for prediction in shown
        if prediction.file.pixels is not None
    ]
    with OutputDir(png.parent).atomic_write(png.name) as temporary:
        pictures.save_predictions(temporary, shown_images, images)
    rest = images - len(shown_images)
    omitted = f" with the first {len(shown_images)} images; {rest:,} left out" if rest else ""
    print_message(f"wrote {png}{omitted}")
