import contextlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from job import log
from job.config import DataConfig, DeviceRequest, JobError, StoppedError, TrainConfig, UserError
from job.data import Dataset
from job.recipes import classic
from job.run.attempt import open_attempt
from job.run.folder import OutputDir
from job.run.predictions import Predictions, confusion_matrix
from job.run.stop import StopRequest, Watchdog
from job.training import prometheus, saved_model, train
from job.training.engine import Engine
from job.training.evaluate import Evaluation, Evaluator
from job.training.tensorboard import TAGS
from job.training.trainer import Trainer
from tests.conftest import MakeDevices, stand_in_for_devices_and_data
from tests.test_tensorboard import curve
from tests.test_textfile import samples

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


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        output_dir=tmp_path / "output",
        data=DataConfig(dataset="synthetic"),
        epochs=EPOCHS,
        global_batch_size=64,
        learning_rate=1e-3,
        devices=DeviceRequest("cpu", 2),
    )


@pytest.fixture(autouse=True)
def two_replicas_and_little_data(
    monkeypatch: pytest.MonkeyPatch, small_dataset: Dataset, make_devices: MakeDevices
) -> None:
    stand_in_for_devices_and_data(monkeypatch, (train, saved_model), make_devices(2), small_dataset)


def run(config: TrainConfig, stop: StopRequest | None = None) -> Evaluation:
    with open_attempt(config, stop or StopRequest()) as attempt:
        evaluation = train.train_and_evaluate(config, attempt)
    assert evaluation is not None
    return evaluation


def evaluate_again(config: TrainConfig) -> Evaluation:
    return saved_model.evaluate_output_dir(config, OutputDir(config.output_dir))


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def metrics(config: TrainConfig) -> list[dict[str, Any]]:
    lines = (config.output_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_a_whole_run_leaves_every_artifact(
    config: TrainConfig, small_dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    log.configure("json")
    evaluation = run(config)
    output = config.output_dir
    assert visible(output) == [
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
    lines = metrics(config)
    assert [list(line) for line in lines] == [METRICS_KEYS] * EPOCHS
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 8), (2, 16)]
    assert lines[1]["loss"] < lines[0]["loss"]

    document = read(output / "evaluation.json")
    assert document["examples"] == 300
    assert document["loss"] == evaluation.loss
    # The file holds the network that was last validated.
    assert document["accuracy"] == pytest.approx(lines[-1]["val_accuracy"])
    assert document["loss"] == pytest.approx(lines[-1]["val_loss"], abs=1e-5)
    assert list(document["classes"]) == list(small_dataset.class_names)

    manifest = read(output / "run.json")
    assert (manifest["outcome"], manifest["error"]) == ("done", None)
    assert manifest["data"]["fingerprint"] == small_dataset.fingerprint
    assert len(manifest["recipe_fingerprint"]) == 64
    assert (manifest["replicas"], len(manifest["devices"])) == (2, 2)

    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    names = [event["event"] for event in events]
    assert names == ["start", "epoch", "epoch", "checkpoint", "evaluation", "report"]
    assert {"epoch", "step", "loss", "accuracy", "images_per_second"} <= events[1].keys()


def test_evaluating_the_folder_again_gives_the_same_figures(config: TrainConfig) -> None:
    run(config)
    path = config.output_dir / "evaluation.json"
    first, picture = read(path), (config.output_dir / "prediction.png").read_bytes()
    path.unlink()
    evaluate_again(config)
    assert read(path) == first
    assert (config.output_dir / "prediction.png").read_bytes() == picture


def test_the_report_is_the_last_artifact_and_one_that_is_missing_is_made_up_for(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(output: OutputDir) -> None:
        # As a full disk does; a signal ends the process itself.
        assert read(output.path / "run.json")["outcome"] == "done"
        assert (output.path / "evaluation.json").exists()
        raise UserError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(train, "try_to_write_report", end)
        with pytest.raises(UserError, match="no space left"):
            run(config)
    page, state = config.output_dir / "report.html", last_state(config)
    predictions = (config.output_dir / "predictions.npz").read_bytes()
    assert not page.exists()
    run(config)
    assert "Finished on" in page.read_text()
    for name, array in last_state(config).items():
        np.testing.assert_array_equal(state[name], array)
    assert (config.output_dir / "predictions.npz").read_bytes() == predictions
    with open_attempt(config, StopRequest()) as attempt:
        assert attempt.is_finished


def test_a_report_of_an_earlier_end_does_not_pass_for_the_last_one(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        pass

    def kill(output: OutputDir) -> None:
        raise KilledError

    run(config)
    longer = replace(config, epochs=config.epochs + 1)
    with monkeypatch.context() as patch:
        patch.setattr(train, "try_to_write_report", kill)
        with pytest.raises(KilledError):
            run(longer)
    with open_attempt(longer, StopRequest()) as attempt:
        assert not attempt.is_finished
    run(longer)
    assert f"over {longer.epochs} epochs" in (config.output_dir / "report.html").read_text()


def test_a_new_run_keeps_nothing_of_a_model_that_is_no_more(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any) -> None:
        raise StoppedError("SIGTERM")

    monkeypatch.setattr(Trainer, "train", stop)
    output = OutputDir(config.output_dir)
    config.output_dir.mkdir()
    output.make_folder("report")
    stale = ["predictions.npz", "report.html", "report/mistakes.png"]
    for name in stale:
        output.write_text(name, "old")
    with pytest.raises(StoppedError):
        run(config)
    assert not any((config.output_dir / name).exists() for name in stale)


def test_the_predictions_are_those_that_the_evaluation_counts(
    config: TrainConfig, small_dataset: Dataset
) -> None:
    evaluation = run(config)
    kept = Predictions.load(config.output_dir)
    assert kept is not None
    np.testing.assert_array_equal(kept.labels, small_dataset.test_labels)
    counted = confusion_matrix(kept.labels, kept.probabilities)
    np.testing.assert_array_equal(counted, evaluation.confusion)
    chosen = kept.probabilities[np.arange(300), kept.labels]
    assert -np.log(chosen).mean() == pytest.approx(evaluation.loss, abs=1e-5)
    np.testing.assert_array_equal(kept.mistake_images, small_dataset.test_images[kept.mistakes])
    # One of each class, as its augmentation in the run draws it.
    assert kept.original_labels.tolist() == list(range(6))
    seed_7 = saved_model.augmented_sample(classic.RECIPE, kept.originals, 7, config.epochs)
    assert kept.augmented.shape == (6, config.epochs, 32, 32, 3)
    assert (seed_7 != kept.augmented).mean() > 0.5
    # Evaluated from another seed, the sample stays that of the run.
    manifest = read(config.output_dir / "run.json")
    manifest["config"]["seed"] = 7
    (config.output_dir / "run.json").write_text(json.dumps(manifest))
    evaluate_again(config)
    again = Predictions.load(config.output_dir)
    assert again is not None
    np.testing.assert_array_equal(again.augmented, seed_7)


def test_the_augmented_sample_is_drawn_as_the_engine_draws_it(
    small_dataset: Dataset, make_devices: MakeDevices
) -> None:
    plan = train.make_plan(TrainConfig(global_batch_size=64, seed=9), 512)
    engine = Engine(classic.RECIPE, make_devices(1), small_dataset, plan, 1e-3)
    images = small_dataset.train_images[:4]
    sample = saved_model.augmented_sample(classic.RECIPE, images, 9, 5)
    for epoch in range(5):
        draws = engine._draw(tf.constant(epoch))[0, :4]
        rows = tf.constant(images.reshape(4, -1))
        expected = engine._prepare(rows, draws).numpy() * 255
        assert np.abs(expected - sample[:, epoch]).max() <= 0.51


def test_a_batch_larger_than_the_data_is_refused_before_anything_is_written(
    config: TrainConfig, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="--batch-size received 1024, expected at most the 512"):
        run(replace(config, global_batch_size=1024))
    assert visible(config.output_dir) == ["run.json"]


def test_a_defect_is_recorded_as_the_runs_outcome(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("a broken GPU")

    monkeypatch.setattr(Trainer, "train", fail)
    with pytest.raises(RuntimeError):
        run(config)
    manifest = read(config.output_dir / "run.json")
    assert (manifest["outcome"], manifest["error"]) == ("failed", "RuntimeError: a broken GPU")


def test_memory_running_out_names_the_batch_size(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")

    monkeypatch.setattr(Trainer, "train", fail)
    with pytest.raises(UserError, match=r"--batch-size 64 \(32 images a replica\); lower"):
        run(config)


@pytest.mark.parametrize(
    "error",
    [
        tf.errors.InternalError(None, None, "cuDNN: CUDA_ERROR_OUT_OF_MEMORY: out of memory"),
        tf.errors.UnknownError(None, None, "RESOURCE_EXHAUSTED: Out of memory"),
    ],
)
def test_memory_running_out_inside_a_library_is_recognised(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(Trainer, "train", fail)
    with pytest.raises(UserError, match="lower --batch-size"):
        run(config)


def test_a_loss_that_is_no_number_ends_the_run(config: TrainConfig) -> None:
    with pytest.raises(JobError, match=r"the training loss became (nan|inf) in epoch \d") as error:
        run(replace(config, learning_rate=1e300))
    assert error.value.exit_code == 1
    assert "there is no checkpoint yet; go on with --precision float32" in str(error.value)
    assert read(config.output_dir / "run.json")["outcome"] == "failed"
    assert not (config.output_dir / "cifar10_model.h5").exists()


def test_the_first_span_is_watched_too(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = []

    class Recorder(Watchdog):
        @contextlib.contextmanager
        def watch(self, what: str, *, compiling: bool = False) -> Iterator[None]:
            watched.append((what, compiling))
            yield

    monkeypatch.setattr(train, "Watchdog", Recorder)
    run(config)
    assert watched[0] == ("a span of training steps", True)
    assert ("a validation", True) in watched
    assert watched[-1] == ("the evaluation of the saved model", True)
    assert ("a span of training steps", False) in watched


def test_a_model_is_not_judged_by_images_of_another_data_set(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, small_dataset: Dataset
) -> None:
    run(config)
    before = (config.output_dir / "evaluation.json").read_bytes()
    other = replace(small_dataset, test_images=small_dataset.test_images[::-1])
    monkeypatch.setattr(saved_model, "load_dataset", lambda data: other)
    with pytest.raises(UserError, match=r"expected those that the run in .* was validated on"):
        evaluate_again(config)
    assert (config.output_dir / "evaluation.json").read_bytes() == before


def test_a_data_set_of_another_name_is_refused_before_it_is_loaded(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(config)
    monkeypatch.setattr(saved_model, "load_dataset", lambda data: pytest.fail("it was loaded"))
    with pytest.raises(UserError, match="received cifar10, expected synthetic"):
        evaluate_again(replace(config, data=DataConfig(dataset="cifar10")))


def test_a_model_of_other_images_is_not_evaluated(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, small_dataset: Dataset
) -> None:
    run(config)
    (config.output_dir / "run.json").unlink()
    grey = replace(small_dataset, test_images=small_dataset.test_images[..., :1])
    monkeypatch.setattr(saved_model, "load_dataset", lambda data: grey)
    with pytest.raises(UserError, match=r"\(32, 32, 3, 10\), expected \(32, 32, 1, 10\)"):
        evaluate_again(config)


def without_times(config: TrainConfig) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in metrics(config)]


def last_state(config: TrainConfig) -> dict[str, Any]:
    path = max((config.output_dir / "checkpoints").glob("*.npz"))
    with np.load(path) as file:
        return {name: file[name] for name in file.files if name != "metadata"}


def test_a_run_stopped_after_every_span_ends_with_the_same_bits(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.training.engine.STEPS_PER_EXECUTION", 5)  # two spans an epoch
    run(config)
    prom = config.output_dir.with_name("job.prom")
    stopped = replace(
        config,
        output_dir=config.output_dir.with_name("stopped"),
        tensorboard=True,
        metrics_textfile=prom,
    )
    steps = []
    for _ in range(20):
        stop = StopRequest()
        stop.stop_after(1e-9)
        try:
            run(stopped, stop)
        except StoppedError:
            steps.append(read(stopped.output_dir / "run.json")["attempts"][-1]["last_step"])
            continue
        break
    assert steps == [5, 8, 8, 13, 16, 16]
    one, two = last_state(config), last_state(stopped)
    assert one.keys() == two.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(two[name], array)
    assert without_times(stopped) == without_times(config)
    manifest = read(stopped.output_dir / "run.json")
    outcomes = [attempt["outcome"] for attempt in manifest["attempts"]]
    assert outcomes == ["stopped"] * 6 + ["done"]
    assert manifest["attempts"][0]["reason"] == "--stop-after 1e-09"
    assert manifest["elapsed_seconds"] >= metrics(stopped)[-1]["elapsed_seconds"]
    best = max(metrics(config), key=lambda line: float(line["val_accuracy"]))
    assert manifest["best"] == {key: best[key] for key in ("epoch", "val_accuracy")}
    # Epochs of earlier attempts are on the curves, each once.
    event_file = max((stopped.output_dir / "tensorboard").iterdir())
    for tag, key in TAGS.items():
        expected = [(line["step"], pytest.approx(line[key])) for line in metrics(stopped)]
        assert curve(event_file, tag) == expected
    values = samples(prom)
    assert values["cifar10_job_statedone"] == 1
    assert values["cifar10_job_finished_steps"] == values["cifar10_job_planned_steps"] == 16
    assert values["cifar10_job_validation_loss"] == metrics(stopped)[-1]["val_loss"]
    elapsed = [line["elapsed_seconds"] for line in metrics(stopped)]
    assert elapsed == sorted(elapsed)
    assert elapsed[0] >= metrics(stopped)[0]["seconds"]


def test_the_textfile_tells_every_phase(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, phases = config.output_dir.with_name("job.prom"), list[str]()
    replace_file = prometheus._replace

    def record(target: Path, content: bytes) -> None:
        replace_file(target, content)
        values = samples(target)
        (phase,) = [name for name, value in values.items() if "_phase" in name and value == 1]
        phases.append(phase.removeprefix("cifar10_job_phase"))

    monkeypatch.setattr(prometheus, "_replace", record)
    run(replace(config, metrics_textfile=path))
    assert [phase for phase, _ in itertools.groupby(phases)] == [
        *("starting", "compiling", "training", "validating", "training", "validating"),
        "evaluating",
    ]


def test_checkpoints_are_written_when_they_are_due(
    config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    log.configure("json")
    run(replace(config, checkpoint_every_seconds=1e-3))
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    steps = [event["step"] for event in events if event["event"] == "checkpoint"]
    assert steps == [8, 8, 16, 16]  # after each span, and after each validation
    # An epoch is reported once it cannot be lost any more.
    names = [event["event"] for event in events]
    assert names[:4] == ["start", "checkpoint", "checkpoint", "epoch"]


def test_another_environment_is_a_warning_and_on_the_record(
    config: TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
    make_devices: MakeDevices,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop = StopRequest()
    stop.stop_after(1e-9)
    with pytest.raises(StoppedError):
        run(config, stop)
    monkeypatch.setattr(train, "open_promised_devices", lambda *arguments: make_devices(1))
    log.configure("json")
    run(config)
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (changed,) = [event for event in events if event["event"] == "changed"]
    assert (changed["level"], changed["changes"][-1]) == ("warning", "replicas: 2 -> 1")
    last = read(config.output_dir / "run.json")["attempts"][-1]
    assert last["changes"] == changed["changes"]


def test_an_attempt_that_begins_with_a_validation_keeps_it_and_then_compiles(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.training.engine.STEPS_PER_EXECUTION", 8)  # a span an epoch
    stop = StopRequest()
    stop.stop_after(1e-9)
    with pytest.raises(StoppedError):
        run(config, stop)  # before the validation of the first epoch
    watched = []

    class Recorder(Watchdog):
        @contextlib.contextmanager
        def watch(self, what: str, *, compiling: bool = False) -> Iterator[None]:
            watched.append((what, compiling))
            yield

    monkeypatch.setattr(train, "Watchdog", Recorder)
    deferred = []
    finish = Trainer._finish_epoch

    def recorded(trainer: Trainer, *arguments: Any) -> None:
        finish(trainer, *arguments)
        deferred.append(trainer._stop._deferred)

    monkeypatch.setattr(Trainer, "_finish_epoch", recorded)
    run(config)
    assert deferred == [True, True]
    spans = [compiling for what, compiling in watched if what == "a span of training steps"]
    assert spans == [True, True, False]  # nothing left of one epoch, then the first real span
    validations = [compiling for what, compiling in watched if what == "a validation"]
    assert validations == [True, False]


def test_a_bad_number_keeps_and_names_the_last_good_checkpoint(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = StopRequest()
    stop.stop_after(1e-9)
    with pytest.raises(StoppedError):
        run(config, stop)
    (good,) = (config.output_dir / "checkpoints").iterdir()
    content = good.read_bytes()
    state = Engine.state

    def spoiled(engine: Engine) -> dict[str, Any]:
        arrays = state(engine)
        arrays["network/0000"] = arrays["network/0000"] * np.inf
        return arrays

    monkeypatch.setattr(Engine, "state", spoiled)
    with pytest.raises(JobError, match=f"a variable became .* the last good checkpoint is {good}"):
        run(config)
    assert good.read_bytes() == content
    assert len(list((config.output_dir / "checkpoints").iterdir())) == 1


def test_a_validation_loss_that_is_no_number_ends_the_run(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = Evaluation(float("inf"), np.eye(10, dtype=np.int64))
    monkeypatch.setattr(Evaluator, "__call__", lambda self: evaluation)
    with pytest.raises(JobError, match="the validation loss became inf in epoch 1"):
        run(config)


@pytest.mark.parametrize("error", [UserError("no space for the report"), StoppedError("SIGTERM")])
def test_what_becomes_of_the_report_does_not_change_how_the_training_ended(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, error: JobError
) -> None:
    """The error is told, and whoever looks at run.json or the textfile sees a finished training."""
    textfile = config.output_dir.with_name("job.prom")

    def refuse(output: OutputDir) -> None:
        assert samples(textfile)["cifar10_job_statedone"] == 1
        raise error

    monkeypatch.setattr(train, "try_to_write_report", refuse)
    with pytest.raises(type(error)):
        run(replace(config, metrics_textfile=textfile))
    assert samples(textfile)["cifar10_job_statedone"] == 1
    manifest = read(config.output_dir / "run.json")
    assert (manifest["outcome"], manifest["attempts"][0]["outcome"]) == ("done", "done")
