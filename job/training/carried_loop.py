"""A loop over steps that carries variables as tensors: read before the loop, assigned after it.

XLA updates each variable in a separate kernel, but it can fuse tensors: small variables are packed
into one vector, which a single kernel computes. The engine's step is the same in either loop.
"""

import math
from collections.abc import Callable

import keras
import tensorflow as tf

_FEW_VALUES = 4096
"""Largest float32 variable, in values, that is packed into the vector. The vector is copied once
per step, which larger variables do not need."""


def can_carry(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether `run_steps` can carry the variables that an optimizer assigns.

    Keras's own optimizers assign only through Keras. They assign inside `tf.cond`, whose tensors
    are not valid outside it, only with options that no loop of the engine can run. Any other class
    declares the same with a true attribute ``assigns_through_keras``.
    """
    is_stock = type(optimizer).__module__.startswith("keras.")
    return is_stock or getattr(optimizer, "assigns_through_keras", False)


def run_steps(
    variables: list[keras.Variable], steps: int, run_step: Callable[[tf.Tensor], object]
) -> None:
    """Run steps one after the other, with variables as tensors of the loop.

    Args:
        variables: The variables that a step reads and assigns. At least one must be small enough
            for the vector. Any other variable that a step assigns through Keras keeps that value
            until the end of the step, and then has its previous value again.
        steps: Number of steps.
        run_step: Runs the step with this number, a scalar int32 from 0.
    """
    joined = [
        variable
        for variable in variables
        if variable.dtype == "float32" and math.prod(variable.shape) <= _FEW_VALUES
    ]
    small = {id(variable) for variable in joined}
    single = [variable for variable in variables if id(variable) not in small]
    sizes = [math.prod(variable.shape) for variable in joined]

    def pack(read: Callable[[keras.Variable], tf.Tensor]) -> list[tf.Tensor]:
        vector = tf.concat([tf.reshape(read(variable), [-1]) for variable in joined], axis=0)
        return [vector, *map(read, single)]

    def unpack(tensors: list[tf.Tensor]) -> list[tuple[keras.Variable, tf.Tensor]]:
        vector, *others = tensors
        parts = [
            tf.reshape(part, variable.shape)
            for part, variable in zip(tf.split(vector, sizes), joined, strict=True)
        ]
        return list(zip([*joined, *single], [*parts, *others], strict=True))

    def run(step: tf.Tensor, tensors: list[tf.Tensor]) -> tuple[tf.Tensor, list[tf.Tensor]]:
        with keras.StatelessScope(unpack(tensors), collect_losses=True) as scope:
            run_step(step)
        return step + 1, pack(scope.get_current_value)

    initial = [tf.constant(0), pack(tf.convert_to_tensor)]
    _, final = tf.while_loop(lambda step, _: step < steps, run, initial)
    for variable, tensor in unpack(final):
        variable.assign(tensor)
