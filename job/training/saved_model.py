"""The saved model: a stock Keras file with the optimizer's state, loaded back and evaluated."""

import contextlib
import copy
import inspect
import io
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import shorten
from typing import Any

import h5py
import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf
from keras.src.legacy.saving.legacy_h5_format import load_model_from_hdf5, save_model_to_hdf5

from job import log
from job.cluster.devices import Devices
from job.config import JobError, TrainConfig, UserError, list_recipes
from job.data import Dataset
from job.recipes import Recipe, get_recipe, resample_by_op
from job.registry import explaining_user_code, is_user_module, module_path
from job.report import tolerate_drawing_errors
from job.run.folder import (
    EVALUATION,
    MODEL,
    PREDICTION,
    OutputDir,
    read_file,
    require_model,
    sha256_of,
)
from job.run.predictions import Predictions, most_confident_mistakes, require_probabilities
from job.run.record import encode, read_manifest, unless_damaged
from job.run.stop import Watchdog
from job.training.evaluate import Evaluator
from job.training.network import clone_network, require_classifier


def save_model(model: keras.Model, output: OutputDir, name: str) -> None:
    """Save architecture, weights, loss, metrics and optimizer state as HDF5.

    If the optimizer is not one of Keras's own, the file contains a plain SGD without state instead.

    Raises:
        UserError: If the file cannot be written.
    """
    output.write_bytes(name, _encode(model).getvalue())


def require_savable(model: keras.Model, recipe: Recipe) -> None:
    """Refuse to train a network of the user's own that cannot be saved and loaded afterwards.

    Raises:
        UserError: If saving or loading fails.
    """
    path = module_path("recipes", recipe.name)
    if is_user_module(path):
        with explaining_user_code(path), h5py.File(_encode(model)) as file:
            load_model_from_hdf5(file, compile=False)


def _encode(model: keras.Model) -> io.BytesIO:
    """Write the model file in memory: HDF5 cannot handle a disk that fills up while it writes."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        save_model_to_hdf5(model, file)
        network = json.loads(file.attrs["model_config"], object_hook=_without_defaults)
        file.attrs["model_config"] = json.dumps(network)
        if type(model.optimizer).__module__.startswith("keras."):
            return buffer
        # Keras cannot load this optimizer, and would then not load the network either.
        training = json.loads(file.attrs["training_config"])
        training["optimizer_config"] = {"class_name": "SGD", "config": {}}
        file.attrs["training_config"] = json.dumps(training)
        return _without_optimizer_weights(file)


def _without_optimizer_weights(file: h5py.File) -> io.BytesIO:
    """Copy everything else: data removed from an HDF5 file still takes up space in it."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as copied:
        copied.attrs.update(file.attrs)
        for name in file:
            if name != "optimizer_weights":
                file.copy(name, copied)
    return buffer


def _without_defaults(entry: dict[str, Any]) -> dict[str, Any]:
    """Remove the options of a Keras object that have their default values.

    Each version of Keras adds options that earlier versions refuse. Without them, a network that
    does not use them also loads in earlier versions. The defaults themselves have not changed since
    Keras 3.3.

    Args:
        entry: An object in a network's JSON. Objects that are not Keras's own stay unchanged.
    """
    # The entries of layers do not contain their module.
    module, options = entry.get("module", "keras.layers"), entry.get("config")
    kind: Any = getattr(sys.modules.get(module), entry.get("class_name", ""), None)
    if not (
        module.startswith("keras.") and hasattr(kind, "from_config") and isinstance(options, dict)
    ):
        return entry
    defaults = {name: one.default for name, one in inspect.signature(kind).parameters.items()}
    shorter = {
        name: value
        for name, value in options.items()
        if name not in defaults or value != json.loads(json.dumps(defaults[name], default=repr))
    }
    try:
        kind.from_config(copy.deepcopy(shorter))
    except Exception:  # a few classes require some of their options
        return entry
    return {**entry, "config": shorter}


def load_model(path: Path) -> keras.Model:
    """Load a model that `save_model` wrote, ready for further training.

    Keras's own `load_model` restores the weights, but not the optimizer's moments.

    Raises:
        UserError: If the file is missing, cannot be read or is not such a model.
    """
    with _open_model(path) as file:
        model = load_model_from_hdf5(file)
        if "optimizer_weights" not in file:
            raise UserError(
                f"{path} has no optimizer state, because its optimizer is not a Keras class; "
                f"load it with keras.models.load_model"
            )
        # Keras builds the loaded optimizer before the network has variables.
        model.compile_from_config(model.get_compile_config())
        group = file["optimizer_weights"]
        names = [str(name) for name in group.attrs["weight_names"]]
        for variable, name in zip(model.optimizer.variables, names, strict=True):
            variable.assign(group[name][()])
    return model


def load_classifier(path: Path) -> keras.Model:
    """Load a network from images to one value per class, compiled or not, from any Keras program.

    Raises:
        UserError: If the file is missing, cannot be read or does not contain such a network.
    """
    with _open_model(path) as file:
        model = load_model_from_hdf5(file, compile=False)
        require_classifier(model, str(path))
        return _as_classifier(model)


def _as_classifier(model: keras.Model) -> keras.Model:
    # A single output can be inside a dictionary.
    return keras.Model(model.inputs, model.outputs)


@contextlib.contextmanager
def _open_model(path: Path) -> Iterator[h5py.File]:
    """Open a model file in memory, because HDF5 locks files, which some volumes refuse.

    Raises:
        UserError: If the file is missing or cannot be read, or the body cannot use it as a model.
    """
    require_model(path)
    content = io.BytesIO(read_file(path) or b"")
    try:
        with h5py.File(content) as file:
            yield file
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RuntimeError) as error:
        raise UserError(
            f"received {path}, which cannot be used as a model ({shorten(str(error), 150)}), "
            f"expected an HDF5 file that train wrote ({MODEL}); use such a file, or the "
            f"--output-dir that contains one; if the model file of a run is damaged, run its train "
            f"command again to rewrite it"
        ) from error


EVALUATING = "the evaluation of the saved model"
"""The name of the evaluation in the messages of a watchdog."""

# As many as fit into the report.
_MISTAKES = 16
_SAMPLES = 6
_SAMPLE_EPOCHS = 5


def evaluate_output_dir(
    config: TrainConfig,
    output: OutputDir,
    devices: Devices,
    load: Callable[[TrainConfig], Dataset],
    watchdog: Watchdog,
) -> None:
    """Evaluate the model of an output folder again.

    Raises:
        UserError: If there is no model that fits the data, or the user must change a folder first.
    """
    run = unless_damaged(read_manifest, output.path)
    trained_on = run.data if run else None
    if trained_on and trained_on.name != config.dataset:
        raise UserError(
            f"--dataset received {config.dataset}, expected {trained_on.name}, which the "
            f"run in {output.path} was trained on; pass --dataset {trained_on.name}"
        )
    if run and run.config.recipe in list_recipes() and run.config.recipe != config.recipe:
        trained_by = run.config.recipe
        raise UserError(
            f"--recipe received {config.recipe}, expected {trained_by}, which the run in "
            f"{output.path} was trained with; pass --recipe {trained_by}"
        )
    with watchdog.watch("the data", seconds=math.inf):
        dataset = load(config)
    if trained_on and trained_on.test_fingerprint != dataset.test_fingerprint:
        raise UserError(
            f"received test images of {dataset.name} that differ from those of the run in "
            f"{output.path}, expected the same; pass that run's --data-dir and --seed, or restore "
            f"the images"
        )
    with watchdog.watch(EVALUATING, compiling=True):
        evaluate_saved(output, get_recipe(config.recipe), devices, dataset, config.seed)


def prepare_evaluation(
    model: keras.Model, recipe: Recipe, devices: Devices, dataset: Dataset
) -> Evaluator:
    """Compile the evaluation of a model before the model is saved.

    Args:
        model: A model with the layers of the one that will be saved.
        recipe: The recipe that trains it.
        devices: The devices to evaluate on.
        dataset: The data set with the test images.
    """
    with devices.strategy.scope():
        network = _as_classifier(clone_network(model))
    evaluator = Evaluator(network, recipe, devices, dataset.test_images, dataset.test_labels)
    evaluator.compile()
    return evaluator


def evaluate_saved(
    output: OutputDir,
    recipe: Recipe,
    devices: Devices,
    dataset: Dataset,
    seed: int,
    prepared: Evaluator | None = None,
) -> None:
    """Load the saved model back, evaluate it, and write the results and a picture.

    Args:
        output: The folder with the model; receives evaluation, predictions and prediction picture.
        recipe: The recipe that trained the model.
        devices: The devices to evaluate on.
        dataset: The data set with the test images.
        seed: Determines the test image of the picture.
        prepared: Result of `prepare_evaluation`. It is used with the weights of the file if the
            file has the layers that it was compiled for.

    Raises:
        UserError: If there is no model that fits the data, or a file cannot be written.
        JobError: If the loss is not a finite number.
    """
    path = output.path / MODEL
    # The file is float32, so it is evaluated in float32, even on GPUs that use TF32 by default.
    tf.config.experimental.enable_tensor_float_32_execution(False)
    with devices.strategy.scope():
        model = load_classifier(path)
    _check_fits(model, dataset, path)
    if prepared and prepared.model.get_config()["layers"] == model.get_config()["layers"]:
        evaluator = prepared
        evaluator.model.set_weights(model.get_weights())
    else:
        evaluator = Evaluator(model, recipe, devices, dataset.test_images, dataset.test_labels)
    if (views := len(recipe.tta_views)) > 1:
        # This can take minutes, in which nothing else is logged.
        log.event(
            "evaluating",
            message=f"evaluating the saved model: {views} views of each of "
            f"{log.plural(len(dataset.test_images), 'test image')}",
        )
    evaluation, probabilities = evaluator.predict()
    if not math.isfinite(evaluation.loss):
        raise JobError(
            f"the loss of the saved model is {evaluation.loss}, expected a finite number; start "
            f"over with --fresh and a lower --learning-rate"
        )
    require_probabilities(probabilities, str(path))
    _save_prediction(output, dataset, probabilities, seed)
    _keep_for_report(output, recipe, dataset, probabilities, seed)
    # Last, because it names the model file that all other files belong to.
    record = evaluation.record(dataset.class_names, MODEL, sha256_of(path))
    output.write_bytes(EVALUATION, encode(record, indent=True))
    plain = evaluation.accuracy_without_tta
    without_tta = "" if plain is None else f" ({plain:.2%} without test-time augmentation)"
    log.event(
        "evaluation",
        loss=evaluation.loss,
        accuracy=evaluation.accuracy,
        accuracy_without_tta=plain,
        examples=evaluation.examples,
        output_dir=str(output.path),
        message=f"saved model: test loss {evaluation.loss:.4f}, accuracy {evaluation.accuracy:.2%}"
        f"{without_tta} of {log.plural(evaluation.examples, 'image')}; artifacts in {output.path}/",
    )


def _check_fits(model: keras.Model, dataset: Dataset, path: Path) -> None:
    received = (*model.input_shape[1:], model.output_shape[-1])
    expected = (*dataset.test_images.shape[1:], len(dataset.class_names))
    if received != expected:
        raise UserError(
            f"{path} has image shape and classes {received}, expected {expected} for "
            f"{dataset.name}; pass the --dataset that it was trained on"
        )


def _save_prediction(
    output: OutputDir, dataset: Dataset, probabilities: npt.NDArray[np.float32], seed: int
) -> None:
    """Draw the model's prediction for one test image, picked from the seed."""
    index = int(np.random.default_rng(seed).integers(len(dataset.test_images)))
    image, label = dataset.test_images[index], int(dataset.test_labels[index])
    png = b""
    with tolerate_drawing_errors("the prediction picture"):
        from job.report import pictures

        buffer = io.BytesIO()
        pictures.save_prediction(buffer, image, probabilities[index], dataset.class_names, label)
        png = buffer.getvalue()
    if png:
        output.write_bytes(PREDICTION, png)
    else:
        output.remove([output.path / PREDICTION])  # an existing one can belong to another model


def _keep_for_report(
    output: OutputDir,
    recipe: Recipe,
    dataset: Dataset,
    probabilities: npt.NDArray[np.float32],
    seed: int,
) -> None:
    """Write ``predictions.npz``."""
    run = unless_damaged(read_manifest, output.path)
    seed = run.config.seed if run else seed
    epochs = min(run.config.epochs, _SAMPLE_EPOCHS) if run else _SAMPLE_EPOCHS
    mistakes = most_confident_mistakes(dataset.test_labels, probabilities, _MISTAKES)
    # The first image of each class.
    _, rows = np.unique(dataset.train_labels, return_index=True)
    rows = rows[:_SAMPLES]
    originals = dataset.train_images[rows]
    Predictions(
        labels=dataset.test_labels,
        probabilities=probabilities,
        mistakes=mistakes,
        mistake_images=dataset.test_images[mistakes],
        originals=originals,
        original_labels=dataset.train_labels[rows],
        augmented=augmented_sample(recipe, originals, seed, epochs, rows),
    ).save(output)


def augmented_sample(
    recipe: Recipe,
    images: npt.NDArray[np.uint8],
    seed: int,
    epochs: int,
    rows: npt.NDArray[np.intp] | None = None,
) -> npt.NDArray[np.uint8]:
    """Augment images as a training from this seed does in the first step of each epoch.

    Args:
        recipe: The recipe that augments.
        images: [images, height, width, channels] uint8.
        seed: The run's seed.
        epochs: Number of epochs, from the first.
        rows: The images' rows in the training set, [images] integers; by default the first ones.

    Returns:
        [images, epochs, height, width, channels] uint8.
    """
    scaled = tf.cast(images, tf.float32) * (1.0 / 255.0)
    step = tf.constant([np.arange(len(images)) if rows is None else rows], tf.int64)
    augmented = [
        recipe.augment(scaled, recipe.draw(seed, tf.constant(epoch), step)[0], resample_by_op)
        for epoch in range(epochs)
    ]
    pixels = np.rint(np.stack([one.numpy() for one in augmented], axis=1) * 255.0)
    return np.clip(pixels, 0, 255).astype(np.uint8)
