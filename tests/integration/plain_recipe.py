"""Run the job with a recipe whose result does not depend on how a batch is split: ``plain``.

The network is that of ``classic`` without BatchNormalization and Dropout, and with smooth functions
only: tanh instead of ReLU, average instead of max pooling. At a kink, rounding alone can change the
gradient. Within 60 steps this grows to a difference of 4e-4 between one and two replicas, even in
one process.
"""

# ruff: noqa: E402 (TensorFlow is loaded first, with its messages suppressed)

import dataclasses

from job.commands.cli import load_tensorflow

load_tensorflow()

import keras

from job.__main__ import run
from job.recipes import classic
from job.training import saved_model, train
from tests.integration.cpu_replicas import allow_cpu_replicas


def build_model(seed: int, classes: int) -> keras.Model:
    model = classic.build_model(seed, classes)
    layers = keras.layers
    kept = [
        layer
        for layer in model.layers
        if not isinstance(layer, layers.BatchNormalization | layers.Dropout)
    ]
    keras.utils.set_random_seed(seed)
    smooth = [_smooth(layer) for layer in kept]
    return keras.Sequential([keras.Input(model.input_shape[1:]), *smooth], name="plain")


def _smooth(layer: keras.layers.Layer) -> keras.layers.Layer:
    if isinstance(layer, keras.layers.MaxPooling2D):
        return keras.layers.AveragePooling2D(layer.pool_size)
    config = layer.get_config()
    if config.get("activation") == "relu":
        config["activation"] = "tanh"
    return type(layer).from_config(config)


def build_optimizer(learning_rate: float, total_steps: int) -> keras.optimizers.Optimizer:
    # Not Adam: it divides gradients by their own size, even those that are only rounding errors.
    del total_steps
    return keras.optimizers.SGD(learning_rate)


PLAIN = dataclasses.replace(
    classic.RECIPE, build_model=build_model, build_optimizer=build_optimizer
)

if __name__ == "__main__":
    for module in (train, saved_model):
        module.get_recipe = lambda name: PLAIN  # type: ignore[attr-defined]
    allow_cpu_replicas()
    run()
