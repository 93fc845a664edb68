import contextlib
import io
import itertools
import json
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from job import log
from job.cluster.devices import Devices
from job.config import DeviceRequest, JobError, StoppedError, TrainConfig, UserError
from job.data import Dataset
from job.recipes import classic
from job.run.attempt import open_attempt
from job.run.checkpoint import History
from job.run.folder import OutputDir
from job.run.predictions import Predictions, confusion_matrix
from job.run.record import (
    EpochRecord,
    EvaluationRecord,
    Manifest,
    read_epochs,
    read_evaluation,
    read_manifest,
)
from job.run.stop import StopRequest, Watchdog
from job.training import saved_model
from job.training.evaluate import Evaluator
from job.training.observer import Observer, Start, Status
from job.training.tensorboard import TAGS
from job.training.train import UnwrittenDir, _Preparation, run_attempt
from tests.conftest import MakeDevices
from tests.training.test_prometheus import samples
from tests.training.test_tensorboard import curve
from tests.training.test_trainer import LINE, RecordingWatchdog

EPOCHS = 2
METRICS_KEYS = [
    "epoch",
    "step",
    "loss",
    "accuracy",
    "val_loss",
    "val_accuracy",
    "learning_rate",
    "seconds",
    "images_per_second",
    "elapsed_seconds",
]
TIMES = ("seconds", "images_per_second", "elapsed_seconds")

Run = Callable[..., None]


class Failing(Observer):
    """An observer that fails when the training begins."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def begin(self, start: Start) -> None:
        raise self._error


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return make_config(tmp_path)


def make_config(folder: Path) -> TrainConfig:
    return TrainConfig(
        output_dir=folder / "output",
        dataset="synthetic",
        epochs=EPOCHS,
        batch_size=128,
        learning_rate=1e-3,
        devices=DeviceRequest("cpu:2"),
    )


@pytest.fixture(scope="module", autouse=True)
def two_executions_per_epoch() -> Iterator[None]:
    """Both have the same length, so an attempt compiles only one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("job.training.engine.STEPS_PER_EXECUTION", 2)
        yield


@pytest.fixture(scope="module")
def run(small_dataset: Dataset, make_devices: MakeDevices) -> Run:
    """A function that runs an attempt on two replicas and little data."""

    def run(
        config: TrainConfig,
        stop: StopRequest | None = None,
        devices: Devices | None = None,
        watchdog: Watchdog | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        watchdog = watchdog or RecordingWatchdog()
        with open_attempt(config, stop or StopRequest(), watchdog) as attempt:
            run_attempt(
                config,
                attempt,
                lambda config, previous: devices or make_devices(2),
                lambda config: small_dataset,
                watchdog,
                observers,
            )

    return run


def fail_at(phase: str, error: BaseException, check: Callable[[], None] = lambda: None) -> Watchdog:
    """Create a watchdog that ends the run when a phase begins, like a signal or a full disk."""

    def begin(what: str) -> None:
        if what == phase:
            check()
            raise error

    return RecordingWatchdog(begin)


def manifest_of(config: TrainConfig) -> Manifest:
    manifest = read_manifest(config.output_dir)
    assert manifest
    return manifest


def evaluation_of(config: TrainConfig) -> EvaluationRecord:
    evaluation = read_evaluation(config.output_dir)
    assert evaluation
    return evaluation


def metrics(config: TrainConfig) -> list[EpochRecord]:
    return read_epochs(config.output_dir)


def without_times(config: TrainConfig) -> list[dict[str, Any]]:
    lines = (config.output_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def last_state(config: TrainConfig) -> dict[str, Any]:
    path = max((config.output_dir / "checkpoints").glob("*.npz"))
    with np.load(path) as file:
        return {name: file[name] for name in file.files if name != "metadata"}


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


@dataclass(frozen=True)
class WholeRun:
    """A run with every option that adds output, and the output while it ran."""

    config: TrainConfig
    watchdog: RecordingWatchdog
    events: list[dict[str, Any]]
    textfile_phases: list[str]


@pytest.fixture(scope="module")
def whole_run(run: Run, tmp_path_factory: pytest.TempPathFactory) -> WholeRun:
    """One run for all tests; no test changes it."""
    folder = tmp_path_factory.mktemp("whole")
    config = replace(
        make_config(folder), metrics_textfile=folder / "job.prom", checkpoint_every=1e-9
    )
    phases = []

    def note_phase(what: str) -> None:
        if what == "a pause between two calls":
            return  # the attempt has not begun
        values = samples(folder / "job.prom")
        (phase,) = [name for name, value in values.items() if "_phase" in name and value == 1]
        phases.append(phase.removeprefix("cifar10_job_phase"))

    watchdog = RecordingWatchdog(note_phase)
    log.configure("json")
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        run(config, watchdog=watchdog)
    watchdog.count()
    events = [json.loads(line) for line in stdout.getvalue().splitlines()]
    return WholeRun(config, watchdog, events, phases)


@pytest.fixture
def finished(config: TrainConfig, whole_run: WholeRun) -> TrainConfig:
    """A copy of the whole run, which a test can change."""
    shutil.copytree(whole_run.config.output_dir, config.output_dir)
    return config


def test_a_whole_run_writes_every_artifact(whole_run: WholeRun, small_dataset: Dataset) -> None:
    config = whole_run.config
    assert visible(config.output_dir) == [
        "checkpoints",
        "cifar10_model.h5",
        "evaluation.json",
        "metrics.jsonl",
        "prediction.png",
        "predictions.npz",
        "report",
        "report.html",
        "run.json",
    ]
    lines = (config.output_dir / "metrics.jsonl").read_text().splitlines()
    assert [list(json.loads(line)) for line in lines] == [METRICS_KEYS] * EPOCHS
    first, last = metrics(config)
    assert [(line.epoch, line.step) for line in (first, last)] == [(1, 4), (2, 8)]
    assert last.loss < first.loss

    evaluation = evaluation_of(config)
    assert evaluation.examples == 300
    # The file contains the network of the last validation.
    assert evaluation.accuracy == pytest.approx(last.val_accuracy)
    assert evaluation.loss == pytest.approx(last.val_loss, abs=1e-5)
    assert list(evaluation.classes) == list(small_dataset.class_names)

    manifest = manifest_of(config)
    assert (manifest.outcome, manifest.error) == ("done", None)
    assert manifest.data
    assert manifest.data.fingerprint == small_dataset.fingerprint
    assert manifest.recipe_fingerprint
    assert len(manifest.recipe_fingerprint) == 64
    assert manifest.replicas == len(manifest.devices or ()) == 2

    names = [event["event"] for event in whole_run.events]
    epoch = [*["checkpoint"] * 3, "epoch"]
    assert names == ["start", *epoch, *epoch, "evaluation", "report"]
    assert {"epoch", "step", "loss", "accuracy", "images_per_second"} <= whole_run.events[4].keys()


def test_the_textfile_shows_every_phase(whole_run: WholeRun) -> None:
    assert [phase for phase, _ in itertools.groupby(whole_run.textfile_phases)] == [
        *("starting", "compiling", "training", "validating", "training", "validating"),
        "evaluating",
    ]


def test_the_saved_predictions_are_those_of_the_evaluation(
    finished: TrainConfig, small_dataset: Dataset, make_devices: MakeDevices
) -> None:
    def evaluate_again() -> None:
        saved_model.evaluate_output_dir(
            finished,
            OutputDir(finished.output_dir),
            make_devices(2),
            lambda config: small_dataset,
            RecordingWatchdog(),
        )

    evaluation = evaluation_of(finished)
    kept = Predictions.load(finished.output_dir)
    assert kept is not None
    np.testing.assert_array_equal(kept.labels, small_dataset.test_labels)
    counted = confusion_matrix(kept.labels, kept.probabilities)
    assert counted.tolist() == evaluation.confusion_matrix
    chosen = kept.probabilities[np.arange(300), kept.labels]
    assert -np.log(chosen).mean() == pytest.approx(evaluation.loss, abs=1e-5)
    np.testing.assert_array_equal(kept.mistake_images, small_dataset.test_images[kept.mistakes])
    # One image of each class, augmented as in the run.
    assert kept.original_labels.tolist() == list(range(6))
    seed_7 = saved_model.augmented_sample(classic.RECIPE, kept.originals, 7, finished.epochs)
    assert kept.augmented.shape == (6, finished.epochs, 32, 32, 3)
    assert (seed_7 != kept.augmented).mean() > 0.5

    # A second evaluation has the same figures and the same picture.
    path, picture = finished.output_dir / "evaluation.json", finished.output_dir / "prediction.png"
    pixels = picture.read_bytes()
    path.unlink()
    # The sample is augmented from the seed in run.json, not from the seed of the evaluation.
    run_json = finished.output_dir / "run.json"
    document = json.loads(run_json.read_text())
    document["config"]["seed"] = 7
    run_json.write_text(json.dumps(document))
    evaluate_again()
    assert evaluation_of(finished) == evaluation
    assert picture.read_bytes() == pixels
    again = Predictions.load(finished.output_dir)
    assert again is not None
    np.testing.assert_array_equal(again.augmented, seed_7)


def test_every_phase_runs_under_the_watchdog(whole_run: WholeRun) -> None:
    """Otherwise a call that hangs keeps the machine busy until its reservation ends."""
    watchdog = whole_run.watchdog
    # The first of each kind has extra time for compilation.
    assert list(dict.fromkeys(watchdog.watched)) == [
        ("a pause between two calls", False),
        ("setting up the devices", True),
        ("the data", False),
        ("setting up the training", True),
        ("an execution of training steps", True),
        ("a checkpoint", False),
        ("an execution of training steps", False),
        ("a validation", True),
        ("the end of an epoch", False),
        ("a validation", False),
        ("saving the model", False),
        ("the evaluation of the saved model", True),
        ("the report", False),
    ]
    seconds = watchdog.seconds
    unwatched = seconds.pop("outside") + seconds.pop("a pause between two calls")
    assert unwatched < 0.05 * sum(seconds.values())


def test_the_report_is_the_last_artifact_and_is_written_by_the_next_attempt_if_missing(
    finished: TrainConfig, run: Run, tmp_path: Path
) -> None:
    """An error in the report is raised, but run.json and the textfile show a finished training."""
    textfile = tmp_path / "job.prom"
    config = replace(finished, metrics_textfile=textfile)
    page = config.output_dir / "report.html"
    state, predictions = last_state(config), (config.output_dir / "predictions.npz").read_bytes()

    def check() -> None:
        assert not page.exists()
        assert manifest_of(config).outcome == "done"
        assert evaluation_of(config)
        assert samples(textfile)["cifar10_job_statedone"] == 1

    errors: list[JobError] = [UserError("no space for the report"), StoppedError("SIGTERM")]
    for error in errors:
        with pytest.raises(type(error)):
            run(config, watchdog=fail_at("the report", error, check))
        check()
        assert manifest_of(config).attempts[-1].outcome == "done"
        with open_attempt(config, StopRequest()) as attempt:
            assert not attempt.is_finished
    run(config)
    assert "Finished on" in page.read_text()
    for name, array in last_state(config).items():
        np.testing.assert_array_equal(state[name], array)
    assert (config.output_dir / "predictions.npz").read_bytes() == predictions
    with open_attempt(config, StopRequest()) as attempt:
        assert attempt.is_finished


def test_a_report_of_an_earlier_end_does_not_count_as_the_last_one(
    finished: TrainConfig, run: Run
) -> None:
    class KilledError(BaseException):
        pass

    longer = replace(finished, epochs=finished.epochs + 1)
    with pytest.raises(KilledError):
        run(longer, watchdog=fail_at("the report", KilledError()))
    with open_attempt(longer, StopRequest()) as attempt:
        assert not attempt.is_finished
    run(longer)
    assert visible(finished.output_dir.parent) == ["output"]  # no textfile without the option
    assert f"over {longer.epochs} epochs" in (finished.output_dir / "report.html").read_text()


def test_a_new_run_removes_the_artifacts_of_an_old_model(config: TrainConfig, run: Run) -> None:
    output = OutputDir(config.output_dir)
    config.output_dir.mkdir()
    output.make_folder("report")
    stale = ["predictions.npz", "report.html", "report/mistakes.png"]
    for name in stale:
        output.write_text(name, "old")
    with pytest.raises(StoppedError):
        run(config, observers=[Failing(StoppedError("SIGTERM"))])
    assert not any((config.output_dir / name).exists() for name in stale)


def test_a_batch_larger_than_the_data_is_refused_before_anything_is_written(
    config: TrainConfig, run: Run
) -> None:
    with pytest.raises(UserError, match="--batch-size received 1024, expected at most the 512"):
        run(replace(config, batch_size=1024))
    assert visible(config.output_dir) == ["run.json"]


def test_a_defect_is_recorded_as_the_runs_outcome(config: TrainConfig, run: Run) -> None:
    with pytest.raises(RuntimeError):
        run(config, observers=[Failing(RuntimeError("a broken GPU"))])
    manifest = manifest_of(config)
    assert (manifest.outcome, manifest.error) == ("failed", "RuntimeError: a broken GPU")


@pytest.mark.parametrize(
    "error",
    [
        tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor"),
        # Libraries raise other types.
        tf.errors.InternalError(None, None, "cuDNN: CUDA_ERROR_OUT_OF_MEMORY: out of memory"),
        tf.errors.UnknownError(None, None, "RESOURCE_EXHAUSTED: Out of memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_the_error_for_exhausted_memory_names_the_batch_size(
    config: TrainConfig, run: Run, error: Exception
) -> None:
    with pytest.raises(UserError, match=r"--batch-size 128 \(64 images per replica\); lower"):
        run(config, observers=[Failing(error)])


def test_one_replica_evaluates_the_saved_model_with_the_evaluator_compiled_in_advance(
    config: TrainConfig, run: Run, make_devices: MakeDevices, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluators = []
    prepare = saved_model.prepare_evaluation

    def note(*arguments: Any) -> Evaluator:
        evaluators.append(prepare(*arguments))
        return evaluators[0]

    monkeypatch.setattr("job.training.train.prepare_evaluation", note)
    tf.config.experimental.enable_tensor_float_32_execution(False)
    run(replace(config, devices=DeviceRequest("cpu:1")), devices=make_devices(1))
    (evaluator,) = evaluators
    assert evaluator.predict()[0].loss == evaluation_of(config).loss


def test_a_loss_that_is_not_finite_ends_the_run(config: TrainConfig, run: Run) -> None:
    with pytest.raises(JobError, match=r"the training loss became (nan|inf) in epoch \d") as error:
        run(replace(config, learning_rate=1e300))
    assert error.value.exit_code == 1
    assert "no checkpoint has been saved yet; run again with --precision float32" in str(
        error.value
    )
    assert manifest_of(config).outcome == "failed"
    assert not (config.output_dir / "cifar10_model.h5").exists()


@pytest.mark.slow
def test_a_run_stopped_at_every_possible_point_ends_with_the_same_bits(
    config: TrainConfig, run: Run, whole_run: WholeRun, tmp_path: Path
) -> None:
    prom = tmp_path / "job.prom"
    stopped = replace(config, tensorboard=True, metrics_textfile=prom)
    # Within an epoch, before and after its validation, and within the next epoch.
    for step in (2, 4, 4, 6):
        with pytest.raises(StoppedError, match=f"everything up to step {step} of 8 is in"):
            run(replace(stopped, stop_after=1e-9))
    run(stopped)
    one, two = last_state(whole_run.config), last_state(stopped)
    assert one.keys() == two.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(two[name], array)
    assert without_times(stopped) == without_times(whole_run.config)
    manifest = manifest_of(stopped)
    outcomes = [attempt.outcome for attempt in manifest.attempts]
    assert outcomes == ["stopped"] * 4 + ["done"]
    assert manifest.attempts[0].reason == "--stop-after 1e-09"
    assert manifest.elapsed_seconds >= metrics(stopped)[-1].elapsed_seconds
    best = max(metrics(whole_run.config), key=lambda line: line.val_accuracy)
    assert manifest.best
    assert (manifest.best.epoch, manifest.best.val_accuracy) == (best.epoch, best.val_accuracy)
    # The curves contain the epochs of earlier attempts exactly once.
    event_file = max((stopped.output_dir / "tensorboard").iterdir())
    for tag, key in TAGS.items():
        expected = [(line.step, pytest.approx(getattr(line, key))) for line in metrics(stopped)]
        assert curve(event_file, tag) == expected
    values = samples(prom)
    assert values["cifar10_job_statedone"] == 1
    assert values["cifar10_job_finished_steps"] == values["cifar10_job_planned_steps"] == 8
    assert values["cifar10_job_validation_loss"] == metrics(stopped)[-1].val_loss
    elapsed = [line.elapsed_seconds for line in metrics(stopped)]
    assert elapsed == sorted(elapsed)
    assert elapsed[0] >= metrics(stopped)[0].seconds


def test_a_changed_environment_is_logged_as_a_warning_and_recorded(
    finished: TrainConfig, run: Run, make_devices: MakeDevices, capsys: pytest.CaptureFixture[str]
) -> None:
    log.configure("json")
    longer = replace(finished, epochs=finished.epochs + 1)
    with pytest.raises(StoppedError):
        run(longer, devices=make_devices(1), observers=[Failing(StoppedError("SIGTERM"))])
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (changed,) = [event for event in events if event["event"] == "changed"]
    assert changed["level"] == "warning"
    assert "replicas: 2 -> 1" in changed["changes"]
    assert manifest_of(longer).attempts[-1].changes == changed["changes"]


def test_a_worker_that_is_not_the_chief_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("the chief's")
    output = UnwrittenDir(tmp_path)
    output.write_bytes("run.json", b"of another")
    output.write_text("report.html", "text")
    output.append_bytes("events", b"content")
    output.make_folder("checkpoints")
    History().write_metrics(output)
    output.remove([tmp_path / "run.json"])
    output.discard()
    output.check()
    assert visible(tmp_path) == ["run.json"]
    assert (tmp_path / "run.json").read_text() == "the chief's"


def test_the_end_is_prepared_in_a_thread_after_a_whole_epoch_and_can_fail() -> None:
    threads = []

    def prepare() -> None:
        threads.append(threading.current_thread())
        raise MemoryError

    preparation = _Preparation(prepare)
    preparation.show(Status("compiling", 1, 3, steps=15, steps_per_epoch=30))  # resumed within it
    preparation.finish_epoch(LINE)
    assert (preparation.result(), threads) == (None, [])
    preparation.show(Status("training", 2, 3, steps=0, steps_per_epoch=30))
    for _ in range(2):
        preparation.finish_epoch(LINE)
        assert preparation.result() is None
    assert len(threads) == 1
    assert threads[0] is not threading.current_thread()
