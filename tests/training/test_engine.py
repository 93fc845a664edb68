from dataclasses import replace
from itertools import pairwise
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.framework import kernels

from job.cluster.devices import Compilation
from job.config import UserError
from job.data import Dataset
from job.recipes import Recipe, _augment, classic, fast, get_recipe
from job.training.engine import STEPS_PER_EXECUTION, Engine, Plan, epoch_order, random_keys
from tests.conftest import MakeDevices

BATCH = 64


def make_engine(
    dataset: Dataset,
    make_devices: MakeDevices,
    recipe: Recipe = classic.RECIPE,
    steps: int = 1,
    learning_rate: float = 1e-4,
    **devices: Any,
) -> Engine:
    plan = Plan(BATCH, steps_per_epoch=steps, epochs=2, seed=42)
    return Engine(recipe, make_devices(**devices), dataset, plan, learning_rate)


def plain_model(seed: int, classes: int) -> keras.Model:
    """A network without Dropout and BatchNormalization, which depend on the split of a batch."""
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            layers.Conv2D(8, 3, activation="relu", name="conv"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(classes, activation="softmax"),
        ]
    )


PLAIN = replace(
    classic.RECIPE,
    build_model=plain_model,
    build_optimizer=lambda learning_rate, steps: keras.optimizers.SGD(learning_rate),
)


def replica_values(engine: Engine) -> list[list[np.ndarray]]:
    """Return the value of each replica for each model and optimizer variable."""
    variables = [*engine.model.variables, *engine._optimizer.variables]
    return [[component.numpy() for component in variable.value.values] for variable in variables]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_one_step_equals_keras(
    small_dataset: Dataset, make_devices: MakeDevices, optimizer: str
) -> None:
    recipe = classic.RECIPE
    if optimizer == "sgd":
        recipe = replace(recipe, build_optimizer=lambda rate, steps: keras.optimizers.SGD(rate))
    learning_rate = 0.1 if optimizer == "sgd" else 1e-4
    # Few images, because rounding changes the gradient of max pooling (see test_network.py).
    batch = 16
    plan = Plan(batch, steps_per_epoch=1, epochs=2, seed=42)
    engine = Engine(recipe, make_devices(), small_dataset, plan, learning_rate)
    reference = recipe.build_model(42, 10)
    recipe.compile(reference, learning_rate, plan.total_steps)
    before = reference.get_weights()

    rows = epoch_order(42, 0, 512)[:batch]
    draws = recipe.draw_augmentation(42, tf.constant(0), 1, batch)[0]
    images = small_dataset.train_images[rows].astype(np.float32) / 255
    images = _augment.resample_by_op(tf.constant(images), draws)
    labels = keras.utils.to_categorical(small_dataset.train_labels[rows], 10)
    reference.get_layer("dropout").seed_generator.state.assign([random_keys(42, 1, 1)[0][0], 0])
    loss, accuracy = reference.train_on_batch(images, labels)

    (progress,) = engine.train_epoch(0)
    assert progress.loss / batch == pytest.approx(float(loss), abs=1e-5)
    assert progress.correct / batch == pytest.approx(float(accuracy))
    exported = engine.export()
    for variable, expected in zip(
        exported.optimizer.variables, reference.optimizer.variables, strict=True
    ):
        np.testing.assert_allclose(variable.numpy(), expected.numpy(), rtol=0, atol=1e-5)
    decided = [np.ones_like(weight, bool) for weight in before]
    if optimizer == "adam":
        # Adam divides a gradient by its own size, even if the gradient is only a rounding error.
        momentums = {
            id(variable): momentum.numpy()
            for variable, momentum in zip(
                reference.trainable_variables, reference.optimizer.variables[2::2], strict=True
            )
        }
        for index, variable in enumerate(reference.weights):
            if id(variable) in momentums:
                decided[index] = np.abs(momentums[id(variable)]) > 1e-5
    shares = [where.mean() for where in decided]
    assert min(shares) > 0.2
    assert np.concatenate([where.ravel() for where in decided]).mean() > 0.5
    moved = 0.0
    for weight, expected, old, where in zip(
        exported.get_weights(), reference.get_weights(), before, decided, strict=True
    ):
        np.testing.assert_allclose(weight[where], expected[where], rtol=0, atol=1e-5)
        moved = max(moved, float(np.abs(expected - old).max()))
    assert moved > 5e-5


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_with_label_smoothing_and_both_loss_reductions_equal_keras(
    small_dataset: Dataset, make_devices: MakeDevices, reduction: Any
) -> None:
    # With plain SGD at rate 1 a step moves each weight by its gradient.
    recipe = replace(PLAIN, label_smoothing=0.2, loss_reduction=reduction)
    engine = make_engine(small_dataset, make_devices, recipe, learning_rate=1.0, replicas=2)
    rows = epoch_order(42, 0, 512)[:BATCH]
    draws = recipe.draw_augmentation(42, tf.constant(0), 1, BATCH)[0]
    images = tf.constant(small_dataset.train_images[rows].astype(np.float32) / 255)
    images = _augment.resample_by_op(images, draws)
    reference = plain_model(42, 10)
    labels = tf.one_hot(small_dataset.train_labels[rows], 10)
    with tf.GradientTape() as tape:
        loss = keras.losses.CategoricalCrossentropy(
            label_smoothing=0.2,
            reduction="sum" if reduction == "sum" else "sum_over_batch_size",
        )(labels, reference(images))
    gradients = tape.gradient(loss, [one.value for one in reference.trainable_variables])
    (progress,) = engine.train_epoch(0)
    expected = float(loss) if reduction == "sum" else float(loss) * BATCH
    assert progress.loss == pytest.approx(expected, rel=1e-5)
    for weight, old, gradient in zip(
        engine.export().get_weights(), reference.get_weights(), gradients, strict=True
    ):
        np.testing.assert_allclose(old - weight, gradient, rtol=1e-3, atol=1e-5)


def test_weights_computed_from_the_images_are_not_trained(
    small_dataset: Dataset, make_devices: MakeDevices
) -> None:
    kernel = np.random.default_rng(1).normal(size=(3, 3, 3, 8)).astype(np.float32)

    def look(images: np.ndarray) -> dict[str, np.ndarray]:
        assert images is small_dataset.train_images
        return {"conv/kernel": kernel}

    plan = Plan(63, steps_per_epoch=2, epochs=1, seed=42)
    recipe = replace(PLAIN, fixed_weights=look)
    # With three replicas, averaging these weights would round them.
    engine = Engine(recipe, make_devices(3), small_dataset, plan, 0.1)
    before = engine.original.get_weights()
    list(engine.train_epoch(0))
    after = engine.export().get_weights()
    np.testing.assert_array_equal(after[0], kernel)
    assert all((one != other).any() for one, other in zip(before[1:], after[1:], strict=True))
    wrong = replace(recipe, fixed_weights=lambda images: {"conv9/kernel": kernel})
    with pytest.raises(ValueError, match="fixed_weights has 'conv9/kernel', expected some of conv"):
        Engine(wrong, make_devices(1), small_dataset, plan, 0.1)


def test_muon_computes_the_same_in_the_compiled_loop(
    small_dataset: Dataset, make_devices: MakeDevices
) -> None:
    recipe = replace(
        PLAIN, build_optimizer=lambda rate, steps: fast.Muon(rate, steps, dtype="float32")
    )
    states = []
    for compilation in (None, Compilation(True, True, loops=True)):
        engine = make_engine(
            small_dataset,
            make_devices,
            recipe,
            steps=2,
            learning_rate=0.01,
            compilation=compilation,
        )
        assert engine._carries == bool(compilation)
        list(engine.train_epoch(0))
        states.append(engine.state())
    for one, other in zip(*(state.values() for state in states), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "compilation", [None, Compilation(True, True, loops=True)], ids=["plain", "compiled"]
)
def test_early_variables_have_no_gradient_in_later_epochs(
    small_dataset: Dataset, make_devices: MakeDevices, compilation: Compilation | None
) -> None:
    recipe = replace(PLAIN, early_variables={"conv/bias": 0.5})
    engine = make_engine(
        small_dataset, make_devices, recipe, learning_rate=0.1, steps=2, compilation=compilation
    )
    states = [engine.export().get_weights()]
    for epoch in range(2):
        list(engine.train_epoch(epoch))
        states.append(engine.export().get_weights())
    moved = [
        [bool((one != other).any()) for one, other in zip(*pair, strict=True)]
        for pair in pairwise(states)
    ]
    assert moved == [[True, True, True, True], [True, False, True, True]]
    # Without XLA for the network, there is a second form of the step without this gradient.
    assert engine._execute.experimental_get_tracing_count() == (1 if compilation else 2)


def test_an_augmented_batch_has_the_same_bits_on_any_number_of_replicas(
    small_dataset: Dataset, make_devices: MakeDevices
) -> None:
    batch = tf.constant(epoch_order(42, 0, 512)[:BATCH])
    draws = classic.draw_augmentation(42, tf.constant(0), 1, BATCH)[0]
    batches = []
    for replicas in (1, 2, 4):
        engine = make_engine(small_dataset, make_devices, replicas=replicas)
        strategy = make_devices(replicas).strategy
        parts = tf.function(strategy.run)(engine._replica_batch, (batch, draws))
        images, labels = (strategy.experimental_local_results(part) for part in parts)
        assert [len(part) for part in images] == [BATCH // replicas] * replicas
        batches.append(np.concatenate(images))
        np.testing.assert_array_equal(
            np.concatenate(labels), small_dataset.train_labels[batch.numpy()]
        )
    np.testing.assert_array_equal(batches[0], batches[1])
    np.testing.assert_array_equal(batches[0], batches[2])


def test_summed_gradients_agree_for_any_number_of_replicas(
    small_dataset: Dataset, make_devices: MakeDevices
) -> None:
    # With plain SGD at rate 1 a step moves each weight by its gradient.
    weights = []
    for replicas in (1, 2, 4):
        engine = make_engine(
            small_dataset, make_devices, PLAIN, learning_rate=1.0, replicas=replicas
        )
        list(engine.train_epoch(0))
        weights.append(engine.export().get_weights())
    for one, two, four in zip(*weights, strict=True):
        np.testing.assert_allclose(two, one, rtol=0, atol=1e-5)
        np.testing.assert_allclose(four, one, rtol=0, atol=1e-5)


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_replicas_end_an_execution_in_the_same_state_except_for_random_streams(
    small_dataset: Dataset, make_devices: MakeDevices, replicas: int
) -> None:
    engine = make_engine(
        small_dataset, make_devices, steps=4, learning_rate=1e-3, replicas=replicas
    )
    losses = []
    for epoch in range(2):
        *_, last = engine.train_epoch(epoch)
        losses.append(last.loss)
    assert losses[1] < losses[0]
    differing = 0
    for values in replica_values(engine):
        assert len(values) == replicas
        for value in values[1:]:
            differing += not np.array_equal(value, values[0])
    # The Dropout layer's random state is the only variable that differs.
    assert differing == replicas - 1


def test_replicas_drop_different_units(small_dataset: Dataset, make_devices: MakeDevices) -> None:
    keys = random_keys(42, states=2, replicas=4)
    assert len({int(key) for row in keys for key in row}) == 8
    engine = make_engine(small_dataset, make_devices, replicas=2)
    list(engine.train_epoch(0))
    states = [
        values
        for variable, values in zip(engine.model.variables, replica_values(engine), strict=False)
        if variable.path.endswith("seed_generator_state")
    ]
    masks = [
        tf.nn.experimental.stateless_dropout(tf.ones([32, 512]), 0.5, seed=state).numpy() > 0
        for state in states[0]
    ]
    assert 0.4 < (masks[0] != masks[1]).mean() < 0.6


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_same_run_ends_with_the_same_bits(
    small_dataset: Dataset, make_devices: MakeDevices, precision: str
) -> None:
    weights = []
    for _ in range(2):
        engine = make_engine(small_dataset, make_devices, steps=5, precision=precision)
        list(engine.train_epoch(0))
        weights.append(engine.export().get_weights())
    for one, two in zip(*weights, strict=True):
        np.testing.assert_array_equal(one, two)


def test_an_epoch_yields_executions_that_cover_all_its_steps(
    small_dataset: Dataset, make_devices: MakeDevices
) -> None:
    dataset = small_dataset
    plan = Plan(global_batch_size=16, steps_per_epoch=32, epochs=1, seed=42)
    engine = Engine(PLAIN, make_devices(), dataset, plan, 1e-3)
    progress = list(engine.train_epoch(0))
    assert [part.steps for part in progress] == [STEPS_PER_EXECUTION, 2 * STEPS_PER_EXECUTION, 32]
    assert int(engine.export().optimizer.iterations.numpy()) == 32
    assert 0 < progress[-1].correct <= 512


@pytest.mark.parametrize("loops", [False, True])
def test_xla_compiles_the_network_to_the_same_steps(
    small_dataset: Dataset, make_devices: MakeDevices, loops: bool
) -> None:
    weights, sums = [], []
    for compiled in (False, True):
        engine = make_engine(
            small_dataset,
            make_devices,
            PLAIN,
            steps=3,
            learning_rate=0.1,
            compilation=Compilation(compiled, compiled, loops=compiled and loops),
        )
        sums.append(list(engine.train_epoch(0))[-1])
        weights.append(engine.export().get_weights())
    assert sums[0].loss == pytest.approx(sums[1].loss, abs=1e-3)
    for one, two in zip(*weights, strict=True):
        np.testing.assert_allclose(two, one, rtol=0, atol=1e-5)


def penalized_model(seed: int, classes: int) -> keras.Model:
    """A network with everything besides weights that a step assigns or adds to the loss.

    It has no max pooling, whose gradient goes to another value if two differ only by rounding.
    """
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    penalty = keras.regularizers.L2(0.01)
    return keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            layers.Conv2D(
                8, 3, strides=4, padding="same", use_bias=False, kernel_regularizer=penalty
            ),
            layers.BatchNormalization(momentum=0.9),
            layers.Flatten(),
            layers.Dense(16, activation="gelu", activity_regularizer=penalty),
            layers.Dropout(0.5, seed=seed),
            layers.Dense(classes, activation="softmax", kernel_constraint="non_neg"),
        ]
    )


def test_carried_variables_equal_those_updated_in_place_and_resume_to_the_same_bits(
    small_dataset: Dataset, make_devices: MakeDevices
) -> None:
    recipe = replace(
        classic.RECIPE,
        build_model=penalized_model,
        build_optimizer=lambda learning_rate, steps: keras.optimizers.AdamW(
            keras.optimizers.schedules.CosineDecay(learning_rate, steps), clipnorm=1.0
        ),
    )
    plan = Plan(global_batch_size=16, steps_per_epoch=20, epochs=1, seed=42)

    def make(loops: bool) -> Engine:
        devices = make_devices(compilation=Compilation(True, True, loops))
        return Engine(recipe, devices, small_dataset, plan, 1e-2)

    in_place, carried, resumed = make(False), make(True), make(True)
    *_, expected = in_place.train_epoch(0)
    epoch = carried.train_epoch(0)
    part = next(epoch)
    saved = carried.state()
    *_, last = epoch
    assert last.loss / 320 == pytest.approx(expected.loss / 320, abs=1e-5)
    assert last.correct == expected.correct
    ends, expected_ends = carried.state(), in_place.state()
    assert ends.keys() == expected_ends.keys()
    assert int(ends["optimizer/0000"]) == plan.total_steps
    # Dropout's random state is not carried, because each step sets it.
    (random,) = (
        name for name, variable in carried._variables() if "seed_generator" in variable.path
    )
    for name in ends.keys() - {random}:
        np.testing.assert_allclose(ends[name], expected_ends[name], rtol=0, atol=1e-5)

    resumed.restore(saved)
    *_, again = resumed.train_epoch(0, part)
    assert again == last
    for name, value in resumed.state().items():
        np.testing.assert_array_equal(value, ends[name])


@keras.saving.register_keras_serializable()
class BranchingSgd(keras.optimizers.SGD):  # type: ignore[misc]
    """An optimizer that assigns in a branch, whose tensors are not valid outside it."""

    def update_step(self, gradient: Any, variable: keras.Variable, learning_rate: Any) -> None:
        tf.cond(
            tf.equal(self.iterations.value % 2, 0),
            lambda: variable.assign(variable - learning_rate * gradient),
            lambda: tf.convert_to_tensor(variable),
        )


def test_a_custom_optimizer_updates_variables_in_place(
    small_dataset: Dataset, make_devices: MakeDevices
) -> None:
    recipe = replace(PLAIN, build_optimizer=lambda rate, steps: BranchingSgd(rate))
    weights = []
    for loops in (False, True):
        compilation = Compilation(True, True, loops)
        engine = make_engine(
            small_dataset, make_devices, recipe, 3, learning_rate=0.1, compilation=compilation
        )
        list(engine.train_epoch(0))
        weights.append(engine.export().get_weights())
    for one, two in zip(*weights, strict=True):
        np.testing.assert_allclose(two, one, rtol=0, atol=1e-5)


def test_a_schedule_in_the_optimizer_is_applied(
    small_dataset: Dataset, make_devices: MakeDevices
) -> None:
    recipe = replace(
        PLAIN,
        build_optimizer=lambda learning_rate, steps: keras.optimizers.AdamW(
            keras.optimizers.schedules.PolynomialDecay(learning_rate, steps, 0.0),
            weight_decay=0.1,
            clipnorm=1.0,
        ),
    )
    engine = make_engine(small_dataset, make_devices, recipe, steps=4, learning_rate=0.01)
    list(engine.train_epoch(0))
    assert engine.learning_rate == pytest.approx(0.005)
    list(engine.train_epoch(1))
    assert engine.learning_rate == pytest.approx(0.0, abs=1e-9)


def test_the_batch_size_must_be_divisible_by_the_replicas(
    small_dataset: Dataset, make_devices: MakeDevices
) -> None:
    plan = Plan(global_batch_size=66, steps_per_epoch=1, epochs=1, seed=1)
    with pytest.raises(UserError, match="--batch-size received 66, expected a multiple of 4,"):
        Engine(PLAIN, make_devices(4), small_dataset, plan, 1e-3)


def test_epoch_order_is_a_different_permutation_for_each_epoch_and_seed() -> None:
    orders = [epoch_order(seed, epoch, 1_000) for seed, epoch in ((1, 0), (1, 1), (2, 0))]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(1_000))
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], orders[2])


# The arguments and results of functions do not have kernels.
NO_KERNEL_NEEDED = {"Placeholder", "_Arg", "_Retval"}


@pytest.mark.parametrize(
    ("name", "precision"), [("classic", "float32"), ("classic", "bfloat16"), ("fast", "bfloat16")]
)
@pytest.mark.parametrize(
    ("replicas", "compilation"),
    [
        (1, Compilation(True, True, loops=True)),
        (2, Compilation(True, True)),
        (2, Compilation(False, False)),
    ],
    ids=["loops", "xla", "plain"],
)
def test_every_op_of_the_training_step_has_a_gpu_kernel(
    small_dataset: Dataset,
    make_devices: MakeDevices,
    name: str,
    precision: str,
    replicas: int,
    compilation: Compilation,
) -> None:
    if not tf.test.is_built_with_cuda():
        pytest.skip("this TensorFlow is built without CUDA")
    engine = make_engine(
        small_dataset,
        make_devices,
        get_recipe(name),
        precision=precision,
        compilation=compilation,
        replicas=replicas,
    )
    scalar, batches = tf.constant(0), tf.zeros([1, BATCH], tf.int64)
    draws = engine._draw(scalar, batches)
    checked = {"GPU": 0, "XLA_GPU_JIT": 0}
    missing, jit_ops, body_ops = set(), set(), set()
    for function in (
        engine._execute.get_concrete_function(batches, draws, scalar, tf.constant(0.0)),
        engine._draw.get_concrete_function(scalar, batches),
    ):
        graph = function.graph.as_graph_def()
        jitted = functions_under_xla(graph)
        nodes = [("GPU", node) for node in graph.node]
        for definition in graph.library.function:
            device = "XLA_GPU_JIT" if definition.signature.name in jitted else "GPU"
            operations = {node.op for node in definition.node_def}
            if device == "XLA_GPU_JIT":
                jit_ops |= operations
                body_ops |= operations if "while_body" in definition.signature.name else set()
            nodes += [(device, node) for node in definition.node_def]
        for device, node in nodes:
            checked[device] += 1
            if node.op not in NO_KERNEL_NEEDED and not has_kernel(device, node):
                missing.add((device, node.op, str(sorted(node.attr))))
    assert sum(checked.values()) > 500
    assert (checked["XLA_GPU_JIT"] > 200) == compilation.network
    assert not missing
    # A convolution or a variable op would split a step's CUDA graph in two. The recipe fast has
    # convolutions, because its patches would fill a GPU's memory.
    assert any(op.startswith("Conv") for op in jit_ops) == (name == "fast" and bool(jit_ops))
    assert not {op for op in body_ops if op.endswith("VariableOp")}
    assert ("MatMul" in body_ops) == compilation.loops


def called_by(node: Any) -> set[str]:
    """Names of the functions that a node's attributes refer to."""
    return {value.func.name for value in node.attr.values() if value.HasField("func")} | {
        function.name for value in node.attr.values() for function in value.list.func
    }


def functions_under_xla(graph: Any) -> set[str]:
    """Names of the functions that XLA compiles, including all functions that they call."""
    functions = {definition.signature.name: definition for definition in graph.library.function}
    pending = {
        name
        for definition in functions.values()
        for node in definition.node_def
        if node.attr["_XlaMustCompile"].b
        for name in called_by(node)
    } | {name for name, definition in functions.items() if definition.attr["_XlaMustCompile"].b}
    found: set[str] = set()
    while pending:
        name = pending.pop()
        found.add(name)
        if name in functions:
            called = [called_by(node) for node in functions[name].node_def]
            pending |= set().union(*called) - found
    return found


def has_kernel(device: str, node: Any) -> bool:
    for kernel in kernels.get_registered_kernels_for_op(node.op).kernel:
        if kernel.device_type not in (device, "DEFAULT"):
            continue
        if all(
            node.attr[constraint.name].type in constraint.allowed_values.list.type
            for constraint in kernel.constraint
            if node.attr[constraint.name].type
        ):
            return True
    return False
