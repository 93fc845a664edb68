"""Run the job with a recipe whose result does not depend on how a batch is split: ``plain``.

The network is that of ``classic`` without BatchNormalization and Dropout, and without kinks: tanh
in place of ReLU, means in place of maxima. At a kink rounding alone decides which way a gradient
goes, and within 60 steps that grows to 4e-4 between one replica and two, also in one process.
"""

# ruff: noqa: E402 (TensorFlow is loaded first, its messages held back)

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
    smooth = [_without_kinks(layer) for layer in kept]
    return keras.Sequential([keras.Input(model.input_shape[1:]), *smooth], name="plain")


def _without_kinks(layer: keras.layers.Layer) -> keras.layers.Layer:
    if isinstance(layer, keras.layers.MaxPooling2D):
        return keras.layers.AveragePooling2D(layer.pool_size)
    config = layer.get_config()
    if config.get("activation") == "relu":
        config["activation"] = "tanh"
    return type(layer).from_config(config)


def build_optimizer(learning_rate: float, total_steps: int) -> keras.optimizers.Optimizer:
    # Adam would divide gradients by their own size, down to those that are nothing but rounding.
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
