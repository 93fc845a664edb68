"""Building a recipe's network, trying out the recipe, and rebuilding the network for training."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from job.cluster.devices import graph_function
from job.config import UserError
from job.data import Dataset
from job.recipes import Recipe, Weights, resample_by_op
from job.registry import explaining_user_code, is_user_module, module_path
from job.run.predictions import require_probabilities
from job.training.layers import (
    FusedBatchNormalization,
    FusedGelu,
    MatrixDense,
    PatchConvolution,
    TrainingMaxPooling,
)

_TRIED_IMAGES = 4


def build_network(
    recipe: Recipe,
    seed: int,
    classes: int,
    learning_rate: float,
    total_steps: int,
    dataset: Dataset | None = None,
) -> tuple[keras.Model, Weights]:
    """Build and compile a recipe's network.

    A recipe of the user's own is tried out here, so that it does not fail in the middle or at the
    end of a training. For the recipes of this program, the tests do that.

    Args:
        recipe: The recipe.
        seed: Seed of the initial weights.
        classes: Units of the output.
        learning_rate: The optimizer's learning rate.
        total_steps: Steps of the run.
        dataset: The data set with the training images; None if they are not available.

    Returns:
        The network, and the weights that the recipe computed from the training images.

    Raises:
        UserError: If a user's recipe returns something that cannot be trained, or the network does
            not accept the images.
    """
    path = module_path("recipes", recipe.name)
    with explaining_user_code(path):
        model = recipe.build_model(seed, classes)
        if is_user_module(path):
            _require_kind("build_model", model, keras.Model)
            require_classifier(model, _part(recipe, "the network"))
            optimizer = recipe.build_optimizer(learning_rate, total_steps)
            _require_kind("build_optimizer", optimizer, keras.optimizers.Optimizer)
        fixed_weights: Weights = {}
        if dataset:
            _require_fitting(model, dataset, recipe)
            if recipe.fixed_weights:
                fixed_weights = recipe.fixed_weights(dataset.train_images)
                _require_weights(model, fixed_weights)
        _require_names(model, "early_variables", recipe.early_variables.keys() - fixed_weights)
        # Frozen only while the optimizer is built: a file lists frozen variables last, and Keras
        # could not load it, because the freezing is not part of the file.
        with _frozen(model, fixed_weights):
            recipe.compile(model, learning_rate, total_steps)
        if is_user_module(path):
            _try_recipe(recipe, model, seed, classes)
    return model, fixed_weights


def _require_fitting(model: keras.Model, dataset: Dataset, recipe: Recipe) -> None:
    """Refuse to train a network on images that it does not accept.

    Raises:
        UserError: If the shapes differ.
    """
    received, expected = dataset.train_images.shape[1:], tuple(model.input_shape[1:])
    if received != expected:
        raise UserError(
            f"--dataset {dataset.name} has images of shape {received}, expected {expected} for "
            f"--recipe {recipe.name}; use another --dataset or --recipe"
        )


def _require_weights(model: keras.Model, weights: object) -> None:
    if not isinstance(weights, dict):
        kind = type(weights).__name__
        raise TypeError(f"fixed_weights returns {kind}, expected a dictionary of arrays")
    _require_names(model, "fixed_weights", weights)
    variables = named_variables(model)
    for name, values in weights.items():
        received = f"{getattr(values, 'dtype', type(values).__name__)} {list(np.shape(values))}"
        expected = f"float32 {list(variables[name].shape)}"
        if received != expected:
            raise ValueError(f"fixed_weights has {received} for {name}, expected {expected}")


def _require_names(model: keras.Model, what: str, names: Iterable[str]) -> None:
    trained = [name for name, one in named_variables(model).items() if one.trainable]
    for name in names:
        if name not in trained:
            raise ValueError(f"{what} has {name!r}, expected some of {', '.join(trained)}")


@contextlib.contextmanager
def _frozen(model: keras.Model, weights: Weights) -> Iterator[None]:
    """Set trainable variables to these values and freeze them during the body."""
    variables = named_variables(model)
    for name, values in weights.items():
        variables[name].assign(values)
        variables[name].trainable = False
    yield
    for name in weights:
        variables[name].trainable = True


def named_variables(model: keras.Model) -> dict[str, keras.Variable]:
    """A network's variables by the names of layer and variable, such as "conv1/kernel"."""
    return {
        f"{layer.name}/{variable.name}": variable
        for layer in model.layers
        for variable in layer.weights
    }


def frozen_variables(model: keras.Model, fixed_weights: Iterable[str]) -> set[int]:
    """Identities of variables that are never assigned: fixed ones and those of frozen layers."""
    named = named_variables(model)
    layers = [layer for layer in model.layers if not layer.trainable]
    variables = [named[name] for name in fixed_weights]
    variables += [variable for layer in layers for variable in layer.variables]
    return set(map(id, variables))


def _require_kind(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} returns {value!r}, expected a keras {kind.__name__}")


def _try_recipe(recipe: Recipe, model: keras.Model, seed: int, classes: int) -> None:
    """Use every part of a recipe once, on a few images."""
    for compiled in (False, True):
        training_network(model, "bfloat16", compiled)
    images = _try_augmentation(recipe, seed, (_TRIED_IMAGES, *model.input_shape[1:]))
    probabilities = model(images, training=False)
    _require_shape(recipe, "the network", probabilities, (_TRIED_IMAGES, classes))
    # As close as float32 allows: two untrained sigmoids almost sum to 1.
    require_probabilities(probabilities.numpy(), _part(recipe, "the network"), tolerance=1e-4)
    truth = tf.one_hot(np.arange(_TRIED_IMAGES) % classes, classes)
    losses = keras.losses.get(recipe.loss)(truth, probabilities)
    _require_shape(recipe, "loss", losses, (_TRIED_IMAGES,))


def _try_augmentation(recipe: Recipe, seed: int, shape: tuple[int, ...]) -> tf.Tensor:
    """Augment noise of this shape as a training does, and compute the views of an evaluation."""
    noise = tf.constant(np.random.default_rng(seed).random(shape, np.float32))
    draw, augment = graph_function(recipe.draw), graph_function(recipe.augment)
    draws = draw(seed, tf.constant(0), tf.range(_TRIED_IMAGES, dtype=tf.int64)[None])
    _require_shape(recipe, "draw_augmentation", draws, (1, _TRIED_IMAGES, *np.shape(draws)[2:]))
    images = augment(noise, draws[0], resample_by_op)
    _require_shape(recipe, "augment", images, shape)
    for view in recipe.tta_views:
        _require_shape(recipe, "a function of tta_views", graph_function(view)(noise), shape)
    return images


def _require_shape(recipe: Recipe, what: str, values: Any, shape: tuple[int, ...]) -> None:
    received = type(values).__name__
    if tf.is_tensor(values):
        received = f"{values.dtype.name} {list(values.shape)}"
    if received != f"float32 {list(shape)}":
        raise UserError(
            f"{_part(recipe, what)} returns {received} for {_TRIED_IMAGES} images, expected "
            f"float32 {list(shape)}; fix that file"
        )


def _part(recipe: Recipe, what: str) -> str:
    return f"{what} of job/recipes/{recipe.name}.py"


def require_classifier(model: keras.Model, what: str) -> None:
    """Refuse a model that is not a network from images to one value per class.

    Args:
        model: The model.
        what: Its name in the message.

    Raises:
        UserError: If it is not such a network.
    """
    received = getattr(model, "input_shape", None)
    match received:
        case None, int(), int(), int():
            pass
        case _:
            raise UserError(
                f"{what} has inputs of shape {received}, expected (None, height, width, "
                f"channels); begin it with keras.Input((height, width, channels)), or use another "
                f"network"
            )
    kind = model.inputs[0].dtype
    if not kind.startswith(("float", "bfloat")):
        raise UserError(
            f"{what} has inputs of type {kind}, expected floating-point pixels from 0 to 1; change "
            f"it to scale such pixels, or use another network"
        )
    received = getattr(model, "output_shape", None)
    match received:
        case None, int(classes) if classes > 1:
            pass
        case _:
            raise UserError(
                f"{what} has outputs of shape {received}, expected (None, classes) with at least "
                f"2 classes; end it with a softmax over the classes, or use another network"
            )


def training_network(
    model: keras.Model,
    precision: str,
    compiled: bool = False,
    *,
    elementwise: bool = False,
    fixed_weights: Iterable[str] = (),
) -> keras.Model:
    """Rebuild a network for training.

    Args:
        model: A Sequential or Functional network of float32 layers.
        precision: "float32", or "bfloat16" to compute all layers except the last in bfloat16; the
            variables are float32 in both cases.
        compiled: Whether XLA compiles the network.
        elementwise: Whether XLA compiles chains of small operations if it does not compile the
            network.
        fixed_weights: Names of the variables that are not trained.

    Returns:
        A network with its own copy of each of the model's variables.
    """
    last = model.layers[-1].name
    poolings = _pooled_relu_convolutions(model)

    def rebuild(layer: keras.Layer) -> keras.Layer:
        config = layer.get_config()
        if precision == "bfloat16" and layer.name != last:
            config["dtype"] = "mixed_bfloat16"
        kind = type(layer)
        if layer.name in poolings:
            config["activation"] = None
        if kind is keras.layers.MaxPooling2D:
            config |= {"relu": layer.name in poolings.values(), "elementwise": compiled}
            kind = TrainingMaxPooling
        elif kind is keras.layers.BatchNormalization and FusedBatchNormalization.can_replace(layer):
            config["elementwise"] = compiled
            kind = FusedBatchNormalization
        elif kind is keras.layers.Conv2D and compiled:
            kind = PatchConvolution
        elif kind is keras.layers.Dense and compiled:
            kind = MatrixDense
        elif kind is keras.layers.Activation and layer.activation is keras.activations.gelu:
            kind = FusedGelu if elementwise and not compiled else kind
        return kind.from_config(config)

    network = clone_network(model, rebuild)
    network.set_weights(model.get_weights())
    variables = named_variables(network)
    for name in fixed_weights:
        variables[name].trainable = False
    return network


def clone_network(
    model: keras.Model, rebuild: Callable[[keras.Layer], keras.Layer] | None = None
) -> keras.Model:
    """Build new layers for a network, without an optimizer.

    Args:
        model: A Sequential or Functional network.
        rebuild: From a layer to the new one; by default one of the same class and settings.
    """
    # Keras also compiles the clone of a compiled network, and can do so only with Keras's own
    # optimizer classes.
    if isinstance(model, keras.Sequential):
        images = model.inputs[0]
        first = keras.Input(batch_shape=images.shape, dtype=images.dtype, name=images.name)
        bare = keras.Sequential([first, *model.layers], name=model.name)
    else:
        bare = keras.Model(model.input, model.output, name=model.name)
    return keras.models.clone_model(bare, clone_function=rebuild)


def _pooled_relu_convolutions(model: keras.Model) -> dict[str, str]:
    """Map each ReLU convolution that only a max pooling reads to the name of that pooling.

    Only in a Sequential network is the next layer always the only reader.
    """
    layers = model.layers if isinstance(model, keras.Sequential) else []
    return {
        layer.name: following.name
        for layer, following in itertools.pairwise(layers)
        if type(layer) is keras.layers.Conv2D
        and layer.activation is keras.activations.relu
        and type(following) is keras.layers.MaxPooling2D
    }
