import keras
import numpy as np
import tensorflow as tf

from job.training.carried_loop import run_steps


def test_each_step_reads_the_values_that_the_previous_step_assigned() -> None:
    few = [keras.Variable(np.full(shape, 1.0, np.float32)) for shape in ((), (3,), (2, 2))]
    many = keras.Variable(np.ones(5000, np.float32))
    count = keras.Variable(np.int64(0), dtype="int64")
    other = keras.Variable(np.float32(7))
    variables = [few[0], many, few[1], count, few[2]]

    def step(number: tf.Tensor) -> None:
        few[0].assign(few[0] + tf.cast(number, tf.float32))
        few[1].assign(few[0] * few[1])
        few[2].assign_add(tf.fill([2, 2], few[1][0]))
        many.assign(2 * many)
        count.assign_add(1)
        other.assign(other + 1)

    @tf.function
    def run() -> None:
        run_steps(variables, 4, step)

    graph = run.get_concrete_function().graph
    (loop,) = (operation for operation in graph.get_operations() if "While" in operation.type)
    # All small float32 variables are one vector.
    shapes = [tuple(output.shape) for output in loop.outputs]
    assert [shape for shape in shapes if shape] == [(8,), (5000,)]
    run()
    # 1, 1 + 1, 2 + 2, 4 + 3
    assert float(few[0]) == 7
    np.testing.assert_array_equal(few[1], [1 * 1 * 2 * 4 * 7] * 3)
    np.testing.assert_array_equal(few[2], np.full((2, 2), 1 + 1 + 2 + 8 + 56))
    np.testing.assert_array_equal(many, np.full(5000, 16))
    assert (int(count), float(other)) == (4, 7)
