"""The compiled training loop: many steps per call, on every replica, with all data on the device.

Keras builds the network and the optimizer; this module provides the loop. Each replica owns its
variables and updates them itself from the summed gradients. So replicas exchange only gradients,
on one worker or across several, and one compiled function does a whole update.
"""

import hashlib
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf
from keras.src.optimizers.base_optimizer import BaseOptimizer

from job.cluster.devices import Devices, graph_function
from job.data import Dataset
from job.recipes import Recipe, resample_by_gather, resample_by_op
from job.run.checkpoint import Arrays, Progress
from job.training.carried_loop import can_carry, run_steps
from job.training.network import (
    build_network,
    frozen_variables,
    named_variables,
    training_network,
)


class ResidentImages:
    """Images and labels, one copy on each of this process's devices.

    They are variables because a captured constant is copied to the device at every call. They are
    created outside the strategy, which would create one variable with all copies and let the first
    worker send the contents to the others.

    Args:
        devices: The devices of the replicas.
        images: [examples, height, width, channels] uint8.
        labels: [examples] integers.
    """

    def __init__(
        self,
        devices: Devices,
        images: npt.NDArray[np.uint8],
        labels: npt.NDArray[np.int32],
    ) -> None:
        self.examples = len(images)
        self._image_shape = images.shape[1:]
        self._first_replica = devices.workers.spec.index * len(devices.local_names)
        self._copies = []
        for device in devices.strategy.extended.worker_devices:
            with tf.device(device):
                pixels = tf.Variable(images.reshape(self.examples, -1), trainable=False)
                self._copies.append((pixels, tf.Variable(labels.astype(np.int64), trainable=False)))

    def gather(self, rows: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Gather rows of this replica's copy; only inside `strategy.run`.

        Args:
            rows: [batch] int64, 0 to examples - 1.

        Returns:
            Pixels [batch, height * width * channels] uint8, which `decode` turns into images, and
            labels [batch] int64.
        """
        context = tf.distribute.get_replica_context()
        replica = int(tf.get_static_value(context.replica_id_in_sync_group))
        pixels, labels = self._copies[replica - self._first_replica]
        return _gather(pixels, rows), _gather(labels, rows)

    def decode(self, pixels: tf.Tensor) -> tf.Tensor:
        """Turn gathered pixels into images [batch, height, width, channels] float32, 0 to 1."""
        images = tf.reshape(pixels, [pixels.shape[0], *self._image_shape])
        return tf.cast(images, tf.float32) * (1.0 / 255.0)


def _gather(variable: tf.Variable, rows: tf.Tensor) -> tf.Tensor:
    # `tf.gather` of a variable first reads the whole variable, and then has no GPU kernel for
    # uint8. The op on the variable has one.
    gathered = tf.raw_ops.ResourceGather(
        resource=variable.handle, indices=rows, dtype=variable.dtype
    )
    return tf.ensure_shape(gathered, [rows.shape[0], *variable.shape[1:]])


STEPS_PER_EXECUTION = 15
"""Steps of an execution, which is one compiled call, unless the recipe sets its own number. It is
fixed because the work between two calls is part of a run's result."""


@dataclass(frozen=True)
class Plan:
    """The arithmetic of one run.

    Attributes:
        global_batch_size: Images per step over all replicas.
        steps_per_epoch: Whole batches in the training set. The remaining images of an epoch are
            left out; they are different images in each epoch.
        epochs: Passes over the training set.
        seed: The run's seed.
    """

    global_batch_size: int
    steps_per_epoch: int
    epochs: int
    seed: int

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.steps_per_epoch * self.epochs


class Engine:
    """A recipe's training on a set of devices.

    Args:
        recipe: The recipe to train.
        devices: The devices to train on.
        dataset: The data set; its training images are copied to every device.
        plan: Epochs, batches and seed of the run.
        learning_rate: The optimizer's learning rate.

    Attributes:
        original: The recipe's stock network in float32, for files; `export` updates it.
        fixed_weights: The weights that the recipe computed from the training images.
        model: The network in training, with one set of variables per replica.
        workers: The processes that train it.
        stopping_ranks: Ranks of the workers at which a stop was requested before the last
            execution. They are the same on all workers, so all can end after the same step.
    """

    def __init__(
        self,
        recipe: Recipe,
        devices: Devices,
        dataset: Dataset,
        plan: Plan,
        learning_rate: float,
    ) -> None:
        self.recipe, self.plan = recipe, plan
        self._strategy = devices.strategy
        self._replicas = devices.replicas
        self.workers = devices.workers
        self.stopping_ranks: tuple[int, ...] = ()
        self._rows = devices.rows_per_replica(plan.global_batch_size)
        self._classes = len(dataset.class_names)
        self._data = ResidentImages(devices, dataset.train_images, dataset.train_labels)
        compilation = devices.compilation
        self._resample = resample_by_gather if compilation.elementwise else resample_by_op
        self._prepare = graph_function(self._prepare_rows, jit_compile=compilation.elementwise)
        self._gradients, self._update = self._compute_gradients, self._apply_gradients
        self._compiled_steps = None
        if compilation.loops:
            # One function for everything: a nested one would keep the tensors that it assigns to
            # variables.
            self._compiled_steps = graph_function(self._replica_steps, jit_compile=True)
        else:
            self._gradients = graph_function(self._gradients, jit_compile=compilation.network)
            self._update = graph_function(self._update, jit_compile=compilation.elementwise)

        self.original, self.fixed_weights = build_network(
            recipe, plan.seed, self._classes, learning_rate, plan.total_steps, dataset
        )
        with self._strategy.scope(), tf.variable_creator_scope(_replica_local):
            self.model = training_network(
                self.original,
                devices.precision,
                compilation.network,
                elementwise=compilation.elementwise,
                fixed_weights=self.fixed_weights,
            )
            self._optimizer = recipe.build_optimizer(learning_rate, plan.total_steps)
            self._carries = compilation.loops and can_carry(self._optimizer)
            _use_plain_methods(self._optimizer, self._carries)
            self._optimizer.build(self.model.trainable_variables)
            # Loss and correct predictions, then one value per worker: whether a stop was requested.
            zeros = np.zeros(2 + self.workers.count, np.float32)
            self._sums = keras.Variable(zeros, trainable=False, name="sums")
        self._skips_late_gradients = not compilation.network
        self._early = self._number_early_variables()
        frozen = frozen_variables(self.model, self.fixed_weights)
        self._statistics = [
            variable
            for variable in self.model.non_trainable_variables
            if tf.as_dtype(variable.dtype).is_floating and id(variable) not in frozen
        ]
        self._random_states = [
            variable
            for variable in self.model.non_trainable_variables
            if variable.path.endswith("seed_generator_state")
        ]
        self._random_keys = random_keys(plan.seed, len(self._random_states), self._replicas)

    def _number_early_variables(self) -> dict[int, int]:
        """Map the number of each early trainable variable to its epochs with a gradient.

        Fixed variables are not trainable, so they are left out.
        """
        named = named_variables(self.model)
        early = self.recipe.early_epochs(self.plan.epochs)
        epochs = {id(named[name]): epochs for name, epochs in early.items()}
        return {
            number: epochs[id(variable)]
            for number, variable in enumerate(self.model.trainable_variables)
            if id(variable) in epochs
        }

    @property
    def learning_rate(self) -> float:
        """The optimizer's learning rate at this point of its schedule."""
        return float(keras.ops.convert_to_numpy(self._optimizer.learning_rate))

    def train_epoch(
        self,
        epoch: int,
        done: Progress | None = None,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> Iterator[Progress]:
        """Train one epoch, handing control back after each execution.

        Args:
            epoch: Number of the epoch, from 0.
            done: Progress in the epoch so far; None if it has not started.
            stop_requested: Whether a stop of this worker was requested; called before each
                execution, for `stopping_ranks`.

        Yields:
            The epoch's progress so far.
        """
        plan = self.plan
        order = epoch_order(plan.seed, epoch, self._data.examples)
        order = order[: plan.steps_per_epoch * plan.global_batch_size]
        batches = tf.constant(order.reshape(plan.steps_per_epoch, plan.global_batch_size))
        draws = self._draw(tf.constant(epoch), batches)
        first_step = epoch * plan.steps_per_epoch
        late: tuple[int, ...] = ()
        if self._skips_late_gradients:  # compiling a second form of the step would take longer
            late = tuple(one for one, epochs in self._early.items() if epoch >= epochs)
        done = done or Progress()
        steps = self.recipe.steps_per_execution or STEPS_PER_EXECUTION
        for start in range(done.steps, plan.steps_per_epoch, steps):
            end = min(start + steps, plan.steps_per_epoch)
            stop = tf.constant(float(stop_requested()))
            step = tf.constant(first_step + start)
            sums = self._execute(batches[start:end], draws[start:end], step, stop, late)
            # Reading the sums waits for the devices, so after it the execution is complete.
            loss, correct, *stops = sums.numpy()
            self.stopping_ranks = tuple(int(rank) for rank in np.flatnonzero(stops))
            done = Progress(end, done.loss + float(loss), done.correct + int(correct))
            yield done

    def state(self) -> Arrays:
        """Every variable of network and optimizer, the same on all replicas between executions."""
        return {name: keras.ops.convert_to_numpy(variable) for name, variable in self._variables()}

    def digest(self) -> str:
        """SHA-256, in hexadecimal, of all variables that are the same on all replicas.

        These are all variables except the random states of Dropout and similar layers.
        """
        own = {id(state) for state in self._random_states}
        digest = hashlib.sha256()
        for _, variable in self._variables():
            if id(variable) not in own:
                digest.update(keras.ops.convert_to_numpy(variable).tobytes())
        return digest.hexdigest()

    def restore(self, arrays: Arrays) -> None:
        """Set every variable to what `state` returned.

        Raises:
            ValueError: If they are not the variables of this network and optimizer.
        """
        variables = dict(self._variables())
        if variables.keys() != arrays.keys():
            raise ValueError(
                f"received the variables {sorted(arrays)}, expected {sorted(variables)}"
            )
        for name, variable in variables.items():
            variable.assign(arrays[name])

    def _variables(self) -> Iterator[tuple[str, keras.Variable]]:
        # Numbers only: Keras's names depend on what the process has built before.
        for owner, kind in ((self.model, "network"), (self._optimizer, "optimizer")):
            for index, variable in enumerate(owner.variables):
                yield f"{kind}/{index:04d}", variable

    def export(self) -> keras.Model:
        """Copy the weights and the optimizer state of the network in training to `original`."""
        self.original.set_weights(self.model.get_weights())
        for target, source in zip(
            self.original.optimizer.variables, self._optimizer.variables, strict=True
        ):
            target.assign(keras.ops.convert_to_numpy(source))
        return self.original

    @graph_function
    def _draw(self, epoch: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
        return self.recipe.draw(self.plan.seed, epoch, rows)

    @graph_function
    def _execute(
        self,
        batches: tf.Tensor,
        draws: tf.Tensor,
        first_step: tf.Tensor,
        stop: tf.Tensor,
        late: tuple[int, ...] = (),
    ) -> tf.Tensor:
        """Run the steps of an execution.

        Args:
            batches: [steps, global_batch_size] int64 rows of the training set.
            draws: [steps, global_batch_size, ...] random draws for the augmentation.
            first_step: Scalar int32, the first step of the execution in the run.
            stop: Scalar float32, 1 if a stop of this worker was requested, 0 otherwise.
            late: Numbers of the trainable variables whose gradients are not computed.

        Returns:
            [2 + workers] float32: the sum of the losses; the correct predictions, exact up to
            2**24; then for each worker a number above 0 if a stop of it was requested.
        """
        self._strategy.run(self._reset_sums, (stop,))
        if self._compiled_steps:
            self._strategy.run(self._compiled_steps, (batches, draws, first_step))
        else:
            self._run_steps(batches, draws, first_step, late)
        if self._replicas > 1 and self._statistics:
            self._strategy.run(self._average_statistics)
        return self._strategy.reduce(
            "SUM", self._strategy.run(self._sums.value.read_value), axis=None
        )

    def _run_steps(
        self, batches: tf.Tensor, draws: tf.Tensor, first_step: tf.Tensor, late: tuple[int, ...]
    ) -> None:
        """Run the steps of an execution one after the other on all replicas."""
        steps = batches.shape[0]

        def prepare(step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            images, labels = self._strategy.run(self._replica_batch, (batches[step], draws[step]))
            return images, labels

        def run(step: tf.Tensor, *batch: tf.Tensor) -> tuple[tf.Tensor, ...]:
            # In the meantime, processors that the network leaves idle augment the images of the
            # next step. The last step has no next one and augments its own images again, unused.
            following = prepare(tf.minimum(step + 1, steps - 1))
            self._strategy.run(self._replica_step, (*batch, first_step + step, late))
            return step + 1, *following

        tf.while_loop(lambda step, *_: step < steps, run, [0, *prepare(tf.constant(0))])

    def _replica_steps(self, batches: tf.Tensor, draws: tf.Tensor, first_step: tf.Tensor) -> None:
        """Run the steps of an execution on the only replica."""
        steps = batches.shape[0]

        def run(step: tf.Tensor) -> tf.Tensor:
            batch = self._replica_batch(batches[step], draws[step])
            self._replica_step(*batch, first_step + step)
            return step + 1

        if self._carries:
            # Without the random states, which each step sets at its start.
            own = {id(state) for state in self._random_states}
            variables = [variable for _, variable in self._variables() if id(variable) not in own]
            run_steps([*variables, self._sums], steps, run)
        else:
            tf.while_loop(lambda step: step < steps, run, [0])

    def _reset_sums(self, stop: tf.Tensor) -> None:
        self._sums.assign(tf.one_hot(2 + self.workers.spec.index, 2 + self.workers.count) * stop)

    def _replica_step(
        self, images: tf.Tensor, labels: tf.Tensor, step: tf.Tensor, late: tuple[int, ...] = ()
    ) -> None:
        """Run one replica's part of a step.

        Args:
            images: [rows, height, width, channels] float32, augmented.
            labels: [rows] int64.
            step: Scalar int32, global step of the run.
            late: Numbers of the trainable variables whose gradients are not computed.
        """
        context = tf.distribute.get_replica_context()
        replica = context.replica_id_in_sync_group
        # Each replica drops other units, determined only by seed, replica and step.
        for keys, state in zip(self._random_keys, self._random_states, strict=True):
            state.assign(tf.stack([keys[replica], tf.cast(step, keys.dtype)]))
        gradients, loss, correct = self._gradients(images, labels, late)
        for number, epochs in self._early.items():
            is_early = step < epochs * self.plan.steps_per_epoch
            if gradients[number] is not None:
                gradients[number] *= tf.cast(is_early, tf.float32)
        if self._replicas > 1:
            gradients = context.all_reduce("SUM", gradients)
        self._update(gradients)
        # The replicas are added up once per execution, not once per step.
        self._sums.assign_add(tf.pad(tf.stack([loss, correct]), [[0, self.workers.count]]))

    def _replica_batch(self, batch: tf.Tensor, draws: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Return this replica's rows of a global batch: augmented images and labels."""
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        first = replica * self._rows
        pixels, labels = self._data.gather(batch[first : first + self._rows])
        return self._prepare(pixels, draws[first : first + self._rows]), labels

    def _prepare_rows(self, pixels: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
        """Turn gathered pixels into augmented images [rows, height, width, channels] float32."""
        return self.recipe.augment(self._data.decode(pixels), draws, self._resample)

    def _compute_gradients(
        self, images: tf.Tensor, labels: tf.Tensor, late: tuple[int, ...]
    ) -> tuple[list[tf.Tensor], tf.Tensor, tf.Tensor]:
        """Compute the gradients of this replica's part of the objective.

        Their sum over the replicas is the gradient of the whole objective.
        """
        variables = [variable.value for variable in self.model.trainable_variables]
        watched = [one for number, one in enumerate(variables) if number not in late]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(watched)
            probabilities = self.model(images, training=True)
            smoothing = self.recipe.label_smoothing
            truth = tf.one_hot(labels, self._classes) * (1.0 - smoothing)
            losses = keras.losses.get(self.recipe.loss)(
                truth + smoothing / self._classes, probabilities
            )
            penalties = [tf.cast(loss, tf.float32) for loss in self.model.losses]
            objective = tf.reduce_sum(losses)
            if self.recipe.loss_reduction == "mean":
                objective /= self.plan.global_batch_size
            objective += tf.add_n([tf.constant(0.0), *penalties]) / self._replicas
        correct = tf.equal(tf.argmax(probabilities, axis=-1), labels)
        gradients = iter(tape.gradient(objective, watched))
        return (
            [
                tf.zeros(one.shape) if number in late else next(gradients)
                for number, one in enumerate(variables)
            ],
            tf.reduce_sum(losses),
            tf.reduce_sum(tf.cast(correct, tf.float32)),
        )

    def _apply_gradients(self, gradients: list[tf.Tensor]) -> None:
        self._optimizer.apply(gradients)

    def _average_statistics(self) -> None:
        """Set the BatchNormalization statistics of every replica to their mean over the replicas.

        They are exponential averages that training never reads. So the mean of the averages equals
        the average of the means, no matter how often it is computed.
        """
        values = [variable.value.read_value() for variable in self._statistics]
        means = tf.distribute.get_replica_context().all_reduce("MEAN", values)
        for variable, mean in zip(self._statistics, means, strict=True):
            variable.value.assign(mean)


def epoch_order(seed: int, epoch: int, examples: int) -> npt.NDArray[np.int64]:
    """Return the order of the training set in an epoch: a permutation [examples] int64."""
    return np.random.default_rng([seed, epoch]).permutation(examples)


def random_keys(seed: int, states: int, replicas: int) -> list[tf.Tensor]:
    """Return a random key per Dropout-like layer and replica: for each layer [replicas] int64."""
    sequences = np.random.SeedSequence(seed).spawn(states)
    # Keras casts its random states to int32, so keys stay below 2**31.
    keys = [sequence.generate_state(replicas) >> 1 for sequence in sequences]
    return [tf.constant(key.astype(np.int64)) for key in keys]


def _use_plain_methods(optimizer: keras.optimizers.Optimizer, carried: bool) -> None:
    """Replace methods of Keras's TensorFlow optimizers with those of its base optimizer.

    The TensorFlow methods reduce gradients and leave the replica's context to assign. Here the
    gradients are already summed, and each replica assigns its own variables. In addition, they can
    assign only to a `tf.Variable`, and a carried variable is a tensor.
    """
    methods = ["_backend_update_step", "_apply_weight_decay"]
    if carried:
        methods += ["assign", "assign_add", "assign_sub", "_var_key"]
    for method in methods:
        plain = types.MethodType(getattr(BaseOptimizer, method), optimizer)
        setattr(optimizer, method, plain)


def _replica_local(next_creator: Any, **options: Any) -> tf.Variable:
    """Create a variable that each replica reads and writes independently of the others."""
    options["synchronization"] = tf.VariableSynchronization.ON_READ
    options["aggregation"] = tf.VariableAggregation.ONLY_FIRST_REPLICA
    return next_creator(**options)
