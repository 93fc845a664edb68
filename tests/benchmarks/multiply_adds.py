"""Count the multiply-adds of a run on CIFAR-10, from the graphs that it computes.

    python -m tests.benchmarks.multiply_adds fast

Convolutions and matrix products count, in the forward and backward pass, according to their shapes:
multiplications with a padded border count too. PyTorch's own counter (`peer_pytorch_fast --count`)
counts in the same way.
"""

# ruff: noqa: E402 (TensorFlow is loaded first, with its messages suppressed)

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import click

from job.commands.cli import load_tensorflow

load_tensorflow()

import tensorflow as tf

from job.cluster.devices import Devices, open_visible_devices
from job.config import TrainConfig, list_recipes
from job.data import Dataset, synthetic
from job.recipes import get_recipe
from job.registry import recipe_defaults
from job.training.engine import Engine, Plan
from job.training.evaluate import mean_over_views


def count(function: Callable[..., Any], *arguments: Any) -> int:
    """Count the multiply-adds of one call of a function of tensors."""
    graph = tf.function(function, autograph=False).get_concrete_function(*arguments).graph
    return sum(map(_count_operation, _operations(graph)))


def _operations(graph: Any) -> list[Any]:
    """List the operations that TensorFlow runs for a graph without loops.

    This includes the functions that the graph calls. TensorFlow skips operations that no output and
    no assignment depends on.
    """
    found, pending, seen = [], [one.op for one in graph.outputs] + graph.control_outputs, set()
    while pending:
        operation = pending.pop()
        if operation in seen:
            continue
        seen.add(operation)
        pending += [tensor.op for tensor in operation.inputs] + operation.control_inputs
        if operation.type.endswith("PartitionedCall"):
            found += _operations(graph._get_function(operation.get_attr("f").name).graph)
        else:
            found.append(operation)
    return found


def _count_operation(operation: Any) -> int:
    match operation.type:
        case "Conv2D":
            return _size(operation.outputs[0].shape) * _size(operation.inputs[1].shape[:-1])
        case "Conv2DBackpropInput":
            return _size(operation.inputs[2].shape) * _size(operation.inputs[1].shape[:-1])
        case "Conv2DBackpropFilter":
            return _size(operation.inputs[2].shape) * _size(operation.outputs[0].shape[:-1])
        case "MatMul":
            rows, columns = operation.inputs[0].shape
            inner = rows if operation.get_attr("transpose_a") else columns
            return _size(operation.outputs[0].shape) * int(inner)
    if any(part in operation.type for part in ("Conv", "MatMul", "Einsum")):
        raise ValueError(f"received {operation.type}, expected an operation that can be counted")
    return 0


def _size(shape: tf.TensorShape) -> int:
    return math.prod(shape.as_list())


def count_run(
    recipe_name: str, dataset: Dataset, devices: Devices, plan: Plan, examples: int
) -> dict[str, int]:
    """Count the multiply-adds of a training, its validations and its evaluation.

    Args:
        recipe_name: Name of the recipe.
        dataset: Provides the number of classes, and the images that a recipe computes weights from.
        devices: One replica without XLA, whose compiled operations are not visible in the graph.
        plan: Plan of the run.
        examples: Number of test images.

    Returns:
        The counts by part of the run.
    """
    recipe = get_recipe(recipe_name)
    engine = Engine(recipe, devices, dataset, plan, 0.24)
    images = tf.zeros([plan.global_batch_size, *dataset.train_images.shape[1:]])
    labels = tf.zeros([plan.global_batch_size], tf.int64)

    def step(late: tuple[int, ...]) -> int:
        def run() -> None:
            arguments = (images, labels, tf.constant(0), late)
            devices.strategy.run(engine._replica_step, arguments)

        return count(run)

    training = sum(
        step(tuple(one for one, epochs in engine._early.items() if epoch >= epochs))
        for epoch in range(plan.epochs)
    )
    network = engine.original
    one = images[:1]
    plain = count(lambda: network(one, training=False))
    views = count(lambda: mean_over_views(network, recipe.tta_views, recipe.tta_weights, one))
    return {
        "training": training * plan.steps_per_epoch,
        "validations": plain * examples * plan.epochs,
        "evaluation": views * examples,
    }


@click.command()
@click.argument("recipe", type=click.Choice(list_recipes()))
def main(recipe: str) -> None:
    """Print the counts of a run with the recipe's defaults as JSON."""
    config = replace(TrainConfig(jit="off"), **recipe_defaults(recipe))  # type: ignore[arg-type]
    images, labels = synthetic.draw(2000, seed=1, stream=0)
    names = synthetic.CLASS_NAMES
    dataset = Dataset("synthetic", names, images, labels, images[:10], labels[:10])
    plan = Plan(config.batch_size, 50_000 // config.batch_size, config.epochs, config.seed)
    counts = count_run(recipe, dataset, open_visible_devices(config), plan, 10_000)
    print(json.dumps({**counts, "total": sum(counts.values())}))


if __name__ == "__main__":
    main()
