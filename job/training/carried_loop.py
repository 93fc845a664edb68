"""A loop over steps that carries variables as tensors: read before it, assigned after it.

XLA updates a variable in a kernel of its own. Of tensors it joins what it can: those of few values
travel as one vector, which a single kernel computes. The engine's step is the same in either loop.
"""

import math
from collections.abc import Callable

import keras
import tensorflow as tf

_FEW_VALUES = 4096
"""Values of a float32 variable, at most, that travels with others. The vector is copied once a
step, as larger variables need not be."""


def can_carry(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether `run_steps` can carry what an optimizer assigns.

    Keras's own assign through Keras alone. Within `tf.cond`, whose tensors end with it, they assign
    only with options that no loop of the engine can run. Another class declares the same by a true
    attribute ``assigns_through_keras``.
    """
    is_stock = type(optimizer).__module__.startswith("keras.")
    return is_stock or getattr(optimizer, "assigns_through_keras", False)


def run_steps(
    variables: list[keras.Variable], steps: int, run_step: Callable[[tf.Tensor], object]
) -> None:
    """Run steps one after the other, with variables as tensors of the loop.

    Args:
        variables: What a step reads and assigns, one of few float32 values at least among them.
            Another variable that it assigns through Keras has that value until the end of the step,
            and its own one again afterwards.
        steps: How many.
        run_step: Runs the step of this number from 0, a scalar int32.
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
