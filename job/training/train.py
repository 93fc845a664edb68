"""A whole training run: from a configuration to the artifacts in the output folder."""

import contextlib
import importlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import keras
import msgspec
import tensorflow as tf

from job import log
from job.cluster import Environment
from job.cluster.devices import Devices, open_devices_of_all
from job.cluster.scheduler import NO_RUN, ClusterSpec
from job.cluster.workers import Workers, naming_lost_workers
from job.config import (
    ExitCode,
    LostWorkerError,
    TrainConfig,
    UserError,
    describe_config,
    run_options,
)
from job.data import Dataset
from job.recipes import Recipe, get_recipe
from job.report import tolerate_drawing_errors
from job.run.attempt import Attempt, open_attempt
from job.run.checkpoint import Checkpoint, CheckpointStore, History
from job.run.fingerprint import Fingerprint, require_same_run, take_fingerprint
from job.run.folder import ARTIFACTS, MODEL, REPORT, OutputDir
from job.run.manifest import RunManifest, versions
from job.run.record import DataRecord, EpochRecord, TrainingRecord, decode, encode
from job.run.stop import NATIVE_MARGIN_SECONDS, StopRequest, Watchdog
from job.training.compile_cache import open_compile_cache
from job.training.engine import Engine, Plan
from job.training.evaluate import Evaluator
from job.training.observer import Observer, Start, Status
from job.training.prometheus import open_textfile, write_finished
from job.training.saved_model import (
    EVALUATING,
    evaluate_saved,
    prepare_evaluation,
    require_savable,
    save_model,
)
from job.training.tensorboard import EventFile
from job.training.trainer import Trainer

OpenDevices = Callable[[TrainConfig, Environment | None], Devices]
LoadDataset = Callable[[TrainConfig], Dataset]

# In addition to the options that identify the run. Folders can differ between workers.
_EQUAL_OPTIONS = ("epochs", "precision", "jit", "deterministic", "fresh")
# For TensorFlow to connect the workers once all are present; less if --stall-timeout is shorter.
_CONNECT_SECONDS = 60.0


def train_as_worker(
    config: TrainConfig,
    spec: ClusterSpec,
    stop: StopRequest,
    load: LoadDataset,
    observers: Sequence[Observer] = (),
) -> None:
    """Train as one of several workers. The chief decides and writes, the others follow it.

    A request to stop one of them stops all after the same step.

    Raises:
        UserError: If the user must change the configuration, the data or a folder first, or the
            workers differ in one of these.
        GpuMissingError: If an expected or required GPU cannot be used.
        LostWorkerError: If a worker does not arrive or is lost.
        StoppedError: If a stop of any worker was requested; the chief has saved the state.
        JobError: If the loss becomes infinite or not a number.
    """
    watchdog = Watchdog(config.stall_timeout, stop.end_hung)
    connecting_seconds = min(_CONNECT_SECONDS, config.stall_timeout)
    connecting = _announcing(
        connecting_seconds,
        watchdog.watch("connecting the workers", seconds=connecting_seconds, native=True),
    )
    seconds = config.join_timeout + connecting_seconds
    with watchdog.watch("waiting for the other workers", seconds=seconds):
        devices = open_devices_of_all(config, spec, connecting)
    workers = devices.workers
    if not workers.is_chief:
        log.event(
            "following",
            message=f"follows {spec.name(0)}; its log reports the run's progress",
        )
        log.only_warnings()
    options = {**run_options(config), **{n: describe_config(config)[n] for n in _EQUAL_OPTIONS}}
    with watchdog.watch("comparing the options of the workers"):
        workers.require_equal({**options, "versions": versions()})
    with _open_attempt_of_all(config, stop, workers, watchdog) as attempt:
        if not attempt.is_finished:
            with naming_lost_workers(spec):
                run_attempt(config, attempt, devices.resolve, load, watchdog, observers)
        elif workers.is_chief:
            write_finished(config, attempt)
    try:
        # The others wait here while the chief compiles and evaluates the saved model. If they ended
        # earlier, a restarted chief would have no workers.
        with watchdog.watch("waiting for the other workers to end", compiling=True):
            workers.shutdown()
    except LostWorkerError:
        if not workers.is_chief:
            raise


@contextlib.contextmanager
def _announcing(
    seconds: float, connecting: contextlib.AbstractContextManager[None]
) -> Iterator[None]:
    """Log how the process ends if a worker dies while connecting: then it cannot log anything."""
    log.event(
        "connecting",
        timeout_seconds=seconds,
        message=f"all workers are present; connecting them. If a worker dies while connecting, the "
        f"others end with exit code {int(ExitCode.DEFECT)} about "
        f"{seconds + NATIVE_MARGIN_SECONDS:g} s later",
    )
    with connecting:
        yield


class _Beginning(msgspec.Struct):
    """How the chief's attempt begins. The other workers begin in the same way.

    Attributes:
        fresh: Whether it starts over.
        is_finished: Whether the run is already finished.
        step: Step of the checkpoint that it resumes from; None without a checkpoint.
    """

    fresh: bool
    is_finished: bool
    step: int | None


@contextlib.contextmanager
def _open_attempt_of_all(
    config: TrainConfig, stop: StopRequest, workers: Workers, watchdog: Watchdog
) -> Iterator[Attempt]:
    """Open an attempt on the chief, and on the others one that resumes from the same checkpoint.

    Only the chief needs the output folder.
    """
    waiting = watchdog.watch("exchanging the checkpoint", compiling=True)
    if not workers.is_chief:
        with waiting:
            attempt = _follow(config, stop, workers)
        with watchdog.watch("a pause between two calls"):
            yield attempt
        return
    with open_attempt(config, stop, watchdog) as attempt:
        checkpoint = attempt.checkpoint
        step = checkpoint.step if checkpoint else None
        with waiting:
            workers.broadcast(encode(_Beginning(attempt.fresh, attempt.is_finished, step)))
            if checkpoint:
                workers.broadcast(checkpoint.to_bytes())
        yield attempt


def _follow(config: TrainConfig, stop: StopRequest, workers: Workers) -> Attempt:
    beginning = decode(workers.broadcast(b""), _Beginning)
    checkpoint = None
    if beginning.step is not None:
        checkpoint = Checkpoint.from_bytes(beginning.step, workers.broadcast(b""))
    output = UnwrittenDir(config.output_dir)
    return Attempt(
        output,
        RunManifest(output, NO_RUN),
        CheckpointStore(output),
        checkpoint,
        stop,
        beginning.fresh,
        beginning.is_finished,
        is_chief=False,
    )


class UnwrittenDir(OutputDir):
    """The output folder of a worker that is not the chief: it writes and removes nothing."""

    def _do_nothing(self, *_arguments: Any, **_keywords: Any) -> None: ...

    write_bytes = append_bytes = make_folder = remove = discard = _do_nothing


def run_attempt(
    config: TrainConfig,
    attempt: Attempt,
    open_devices: OpenDevices,
    load: LoadDataset,
    watchdog: Watchdog,
    observers: Sequence[Observer] = (),
) -> None:
    """Train from the step at which the attempt resumes to the end, and write every artifact.

    Args:
        config: The run's configuration.
        attempt: The folder for the artifacts, and the state that an earlier attempt saved.
        open_devices: Sets up the devices. It receives the environment of the previous attempt,
            which contains what "auto" was resolved to.
        load: Loads the data set.
        watchdog: Ends the process if a call hangs.
        observers: Observers of the training.

    Raises:
        UserError: If the user must change the configuration, the data or a folder first.
        GpuMissingError: If an expected or required GPU cannot be used.
        StoppedError: If a stop was requested; the state is in a checkpoint.
        JobError: If the loss becomes infinite or not a number.
    """
    with _open_observers(config, attempt) as own_observers:
        checkpoint = attempt.checkpoint
        previous = checkpoint.fingerprint.environment if checkpoint else None
        with watchdog.watch("setting up the devices", compiling=True, native=True):
            devices = open_devices(config, previous)
        devices.rows_per_replica(config.batch_size)
        # No time limit: a download takes as long as the network needs, and has its own timeouts.
        with watchdog.watch("the data", seconds=math.inf):
            dataset = load(config)
        with open_compile_cache(config, devices) as cache:
            observers = [*observers, *own_observers, *cache]
            _train_and_evaluate(config, attempt, devices, dataset, watchdog, observers)
        # Before the report, because the report contains how the run ended.
        attempt.manifest.finish("done")
    # Here the state in the textfile and in run.json is "done", even if drawing the report fails.
    if attempt.is_chief:
        with watchdog.watch("the report"), tolerate_drawing_errors("the report"):
            from job.report.page import write_report

            write_report(attempt.output)


@contextlib.contextmanager
def _open_observers(config: TrainConfig, attempt: Attempt) -> Iterator[list[Observer]]:
    """Open the observers that the configuration requests; all of them write files."""
    with contextlib.ExitStack() as stack:
        observers: list[Observer] = []
        if config.metrics_textfile and attempt.is_chief:
            textfile = open_textfile(config.metrics_textfile, config, attempt)
            observers.append(stack.enter_context(textfile))
        if config.tensorboard and attempt.is_chief:
            observers.append(EventFile(attempt.output))
        yield observers


def _train_and_evaluate(
    config: TrainConfig,
    attempt: Attempt,
    devices: Devices,
    dataset: Dataset,
    watchdog: Watchdog,
    observers: Sequence[Observer],
) -> None:
    """Train from the step at which the attempt resumes. The chief then saves and evaluates."""
    recipe = get_recipe(config.recipe)
    with _naming_batch_size(config.batch_size, devices.replicas):
        with watchdog.watch("setting up the training", compiling=True):
            engine, trainer, preparation = _set_up(
                config, attempt, recipe, devices, dataset, watchdog, observers
            )
        trainer.train(config.checkpoint_every)
    if not attempt.is_chief:
        return
    for observer in observers:
        observer.evaluate()
    with watchdog.watch("saving the model"):
        save_model(engine.export(), attempt.output, MODEL)
    own_devices = devices.without_other_workers()
    with watchdog.watch(EVALUATING, compiling=True):
        prepared = preparation.result()
        evaluate_saved(attempt.output, recipe, own_devices, dataset, config.seed, prepared)
    # A run counts as finished only with a report. An existing one describes an earlier end.
    attempt.output.remove([attempt.output.path / REPORT])


def _set_up(
    config: TrainConfig,
    attempt: Attempt,
    recipe: Recipe,
    devices: Devices,
    dataset: Dataset,
    watchdog: Watchdog,
    observers: Sequence[Observer],
) -> tuple[Engine, Trainer, "_Preparation"]:
    """Restore the state from which the attempt resumes, and record the start of the training."""
    plan = make_plan(config, len(dataset.train_images))
    engine = Engine(recipe, devices, dataset, plan, config.learning_rate)
    require_savable(engine.original, recipe)
    fingerprint = take_fingerprint(
        config, devices, dataset, engine.original, recipe, engine.fixed_weights
    )
    # These must be equal for all workers to compute the same bits.
    devices.workers.require_equal(
        {**fingerprint.run, "variables": fingerprint.environment.variables}
    )
    history = _resume(engine, fingerprint, attempt)
    _record_start(config, attempt, history, fingerprint, devices, dataset, plan)
    # Without test-time augmentation: several views per image would take as long as half an epoch.
    evaluator = Evaluator(
        engine.model, recipe, devices, dataset.test_images, dataset.test_labels, with_tta=False
    )
    preparation = _Preparation(lambda: _prepare_end(engine.original, recipe, devices, dataset))
    if attempt.is_chief:
        observers = [*observers, preparation]
    name = f"{devices.replicas} x {devices.descriptions[0].model}"
    for observer in observers:
        observer.begin(Start(devices.precision, name, plan.steps_per_epoch, history))
    trainer = Trainer(engine, evaluator, attempt, history, fingerprint, watchdog, observers)
    return engine, trainer, preparation


class _Preparation(Observer):
    """Prepares the end of a training in a thread, after the first epoch trained from its start.

    By then the training itself has nothing left to compile. This matters because XLA can fail when
    two compilations use a cache at the same time. If the preparation fails in the thread, the same
    work is done at the end. The thread needs the memory of an evaluation in addition to that of a
    training step.

    Args:
        prepare: The function to call in the thread.
    """

    def __init__(self, prepare: Callable[[], Evaluator | None]) -> None:
        self._prepare = prepare
        self._future: Future[Evaluator | None] | None = None
        self._is_whole = False

    def show(self, status: Status) -> None:
        if status.steps == 0:
            self._is_whole = True

    def finish_epoch(self, line: EpochRecord) -> None:
        if self._future or not self._is_whole:
            return
        thread = ThreadPoolExecutor(1)
        self._future = thread.submit(self._prepare)
        thread.shutdown(wait=False)

    def result(self) -> Evaluator | None:
        """Return the result of `prepare`; None if it was not called or failed."""
        if self._future is None or self._future.exception():
            return None
        return self._future.result()


def _prepare_end(
    original: keras.Model, recipe: Recipe, devices: Devices, dataset: Dataset
) -> Evaluator | None:
    """Import and compile in advance what a run needs after its last step.

    Returns:
        The evaluator for the saved model. None for several replicas, because all of them must
        exchange tensors in the same order, and None where the training computes less exactly than
        the evaluation.
    """
    importlib.import_module("job.report.page")
    if devices.replicas > 1 or tf.config.experimental.tensor_float_32_execution_enabled():
        return None
    return prepare_evaluation(original, recipe, devices, dataset)


def make_plan(config: TrainConfig, examples: int) -> Plan:
    """Compute the arithmetic of a run.

    Raises:
        UserError: If a batch is larger than the training set.
    """
    steps_per_epoch = examples // config.batch_size
    if not steps_per_epoch:
        limited = config.limit is not None
        raise UserError(
            f"--batch-size received {config.batch_size}, expected at most the {examples} "
            f"training images; lower --batch-size{' or raise --limit' if limited else ''}"
        )
    return Plan(config.batch_size, steps_per_epoch, config.epochs, config.seed)


@contextlib.contextmanager
def _naming_batch_size(global_batch_size: int, replicas: int) -> Iterator[None]:
    """If the body runs out of device memory, advise a smaller batch size."""
    try:
        yield
    except tf.errors.OpError as error:
        # cuDNN, NCCL and XLA raise other error types for the same problem.
        signs = ("out of memory", "RESOURCE_EXHAUSTED", "OOM when allocating")
        exhausted = isinstance(error, tf.errors.ResourceExhaustedError)
        if not exhausted and not any(sign in str(error) for sign in signs):
            raise
        raise UserError(
            f"out of memory on the devices with --batch-size {global_batch_size} "
            f"({log.plural(global_batch_size // replicas, 'image')} per replica); "
            f"lower --batch-size"
        ) from error


def _resume(engine: Engine, fingerprint: Fingerprint, attempt: Attempt) -> History:
    """Restore the engine and the files of the run to the state from which the attempt resumes."""
    checkpoint = attempt.checkpoint
    history = History()
    if attempt.fresh:
        log.event(
            "fresh",
            message=f"--fresh: starting over; discarding the run in {attempt.output.path}/",
        )
        attempt.output.discard()
    elif checkpoint is None:
        # Artifacts of a model that no longer exists.
        attempt.output.remove([attempt.output.path / name for name in ARTIFACTS])
    else:
        require_same_run(checkpoint.fingerprint.run, fingerprint.run, attempt.output.path)
        engine.restore(checkpoint.arrays)
        history = checkpoint.history
    # Epochs that were reported after the checkpoint are trained again.
    history.write_metrics(attempt.output)
    return history


def _record_start(
    config: TrainConfig,
    attempt: Attempt,
    history: History,
    fingerprint: Fingerprint,
    devices: Devices,
    dataset: Dataset,
    plan: Plan,
) -> None:
    checkpoint = attempt.checkpoint
    changes: list[str] = []
    if checkpoint:
        changes = fingerprint.changes_since(checkpoint.fingerprint.environment)
    step = checkpoint.step if checkpoint else 0
    training = TrainingRecord(
        devices=list(devices.descriptions),
        workers=devices.workers.count,
        replicas=devices.replicas,
        threads=devices.threads,
        precision=devices.precision,
        xla=devices.compilation.network,
        deterministic=devices.deterministic,
        data=DataRecord(
            dataset.name,
            dataset.fingerprint,
            dataset.test_fingerprint,
            len(dataset.train_images),
            len(dataset.test_images),
        ),
        recipe_fingerprint=fingerprint.recipe,
    )
    attempt.manifest.start_training(config, training, step, changes)
    attempt.manifest.progress(step, history.best, history.elapsed_seconds)
    _log_start(plan, devices, dataset, step)
    if changes and attempt.is_chief:
        log.event(
            "changed",
            logging.WARNING,
            changes=changes,
            message=f"resumes, but is no longer bit-identical to an uninterrupted run; changed: "
            f"{'; '.join(changes)}",
        )


def _log_start(plan: Plan, devices: Devices, dataset: Dataset, step: int) -> None:
    rows = devices.rows_per_replica(plan.global_batch_size)
    log.event(
        "start",
        dataset=dataset.name,
        train_examples=len(dataset.train_images),
        test_examples=len(dataset.test_images),
        workers=devices.workers.count,
        replicas=devices.replicas,
        device_kind=devices.kind,
        precision=devices.precision,
        xla=devices.compilation.network,
        deterministic=devices.deterministic,
        batch_size=plan.global_batch_size,
        rows_per_replica=rows,
        steps_per_epoch=plan.steps_per_epoch,
        epochs=plan.epochs,
        step=step,
        message=f"{dataset.name}: {len(dataset.train_images):,} training and "
        f"{log.plural(len(dataset.test_images), 'test image')}; "
        f"{log.plural(devices.replicas, f'{devices.kind.upper()} replica')} in "
        f"{devices.precision}; batch {plan.global_batch_size} = {devices.replicas} x {rows}; "
        f"{log.plural(plan.epochs, 'epoch')} of {log.plural(plan.steps_per_epoch, 'step')}"
        + (f"; resuming at step {step}" if step else ""),
    )
