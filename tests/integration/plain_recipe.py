"""Run the job with a recipe whose result does not depend on how a batch is split: ``plain``.

The network has neither BatchNormalization nor Dropout, and otherwise is that of ``classic``.
"""

import dataclasses

from job.startup import load_tensorflow

load_tensorflow()

import keras  # noqa: E402

from job import classic, saved_model, train  # noqa: E402
from job.__main__ import run  # noqa: E402


def build_model(seed: int, classes: int) -> keras.Model:
    model = classic.build_model(seed, classes)
    layers = keras.layers
    kept = [
        layer
        for layer in model.layers
        if not isinstance(layer, layers.BatchNormalization | layers.Dropout)
    ]
    keras.utils.set_random_seed(seed)
    copies = [type(layer).from_config(layer.get_config()) for layer in kept]
    return keras.Sequential([keras.Input(model.input_shape[1:]), *copies], name="plain")


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
    run()
