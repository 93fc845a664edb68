import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf

from job import log, train
from job.config import DataConfig, DeviceRequest, JobError, TrainConfig, UserError
from job.dataset import Dataset
from job.watchdog import Watchdog
from tests.conftest import MakeDevices

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
]


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
    """Stand in for the devices, which a process sets up once, and the full data set."""
    monkeypatch.setattr(train, "open_devices", lambda *arguments: make_devices(2))
    monkeypatch.setattr(train, "load_dataset", lambda data: small_dataset)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_a_whole_run_leaves_every_artifact(
    config: TrainConfig, small_dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    log.configure("json")
    evaluation = train.train_and_evaluate(config)
    output = config.output_dir
    assert sorted(path.name for path in output.iterdir()) == [
        "cifar10_model.h5",
        "evaluation.json",
        "metrics.jsonl",
        "prediction.png",
        "run.json",
    ]
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [list(line) for line in metrics] == [METRICS_KEYS] * EPOCHS
    assert [(line["epoch"], line["step"]) for line in metrics] == [(1, 8), (2, 16)]
    assert metrics[1]["loss"] < metrics[0]["loss"]

    document = read(output / "evaluation.json")
    assert document["examples"] == 300
    assert document["loss"] == evaluation.loss
    # The file holds the network that was last validated.
    assert document["accuracy"] == pytest.approx(metrics[-1]["val_accuracy"])
    assert document["loss"] == pytest.approx(metrics[-1]["val_loss"], abs=1e-5)
    assert list(document["classes"]) == list(small_dataset.class_names)

    manifest = read(output / "run.json")
    assert (manifest["outcome"], manifest["error"]) == ("done", None)
    assert manifest["data"]["fingerprint"] == small_dataset.fingerprint
    assert (manifest["replicas"], len(manifest["devices"])) == (2, 2)

    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in events] == ["start", "epoch", "epoch", "evaluation"]
    assert {"epoch", "step", "loss", "accuracy", "images_per_second"} <= events[1].keys()


def test_evaluating_the_folder_again_gives_the_same_figures(config: TrainConfig) -> None:
    train.train_and_evaluate(config)
    path = config.output_dir / "evaluation.json"
    first, picture = read(path), (config.output_dir / "prediction.png").read_bytes()
    path.unlink()
    train.evaluate_output_dir(config)
    assert read(path) == first
    assert (config.output_dir / "prediction.png").read_bytes() == picture


def test_a_batch_larger_than_the_data_is_refused_before_anything_is_written(
    config: TrainConfig, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="--batch-size received 1024, expected at most the 512"):
        train.train_and_evaluate(replace(config, global_batch_size=1024))
    assert list(config.output_dir.iterdir()) == []


def test_a_defect_is_recorded_as_the_runs_outcome(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("a broken GPU")

    monkeypatch.setattr(train, "_train", fail)
    with pytest.raises(RuntimeError):
        train.train_and_evaluate(config)
    manifest = read(config.output_dir / "run.json")
    assert (manifest["outcome"], manifest["error"]) == ("failed", "RuntimeError: a broken GPU")


def test_memory_running_out_names_the_batch_size(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")

    monkeypatch.setattr(train, "_train", fail)
    with pytest.raises(UserError, match=r"--batch-size 64 \(32 images a replica\); lower"):
        train.train_and_evaluate(config)


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

    monkeypatch.setattr(train, "_train", fail)
    with pytest.raises(UserError, match="lower --batch-size"):
        train.train_and_evaluate(config)


def test_a_loss_that_is_no_number_ends_the_run(config: TrainConfig) -> None:
    with pytest.raises(JobError, match=r"the training loss became (nan|inf) in epoch \d") as error:
        train.train_and_evaluate(replace(config, learning_rate=1e300))
    assert error.value.exit_code == 1
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
    train.train_and_evaluate(config)
    assert watched[0] == ("a span of training steps", True)
    assert ("a validation", True) in watched
    assert watched[-1] == ("the evaluation of the saved model", True)
    assert ("a span of training steps", False) in watched


def test_a_model_is_not_judged_by_images_of_another_data_set(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, small_dataset: Dataset
) -> None:
    train.train_and_evaluate(config)
    before = (config.output_dir / "evaluation.json").read_bytes()
    other = replace(small_dataset, test_images=small_dataset.test_images[::-1])
    monkeypatch.setattr(train, "load_dataset", lambda data: other)
    with pytest.raises(UserError, match=r"expected those that the run in .* was validated on"):
        train.evaluate_output_dir(config)
    assert (config.output_dir / "evaluation.json").read_bytes() == before


def test_a_data_set_of_another_name_is_refused_before_it_is_loaded(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    train.train_and_evaluate(config)
    monkeypatch.setattr(train, "load_dataset", lambda data: pytest.fail("it was loaded"))
    with pytest.raises(UserError, match="received cifar10, expected synthetic"):
        train.evaluate_output_dir(replace(config, data=DataConfig(dataset="cifar10")))


def test_evaluating_a_folder_without_a_model_makes_nothing(config: TrainConfig) -> None:
    with pytest.raises(UserError, match="there is no model"):
        train.evaluate_output_dir(config)
    assert not config.output_dir.exists()


def test_a_model_of_other_images_is_not_evaluated(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, small_dataset: Dataset
) -> None:
    train.train_and_evaluate(config)
    (config.output_dir / "run.json").unlink()
    grey = replace(small_dataset, test_images=small_dataset.test_images[..., :1])
    monkeypatch.setattr(train, "load_dataset", lambda data: grey)
    with pytest.raises(UserError, match=r"\(32, 32, 3, 10\), expected \(32, 32, 1, 10\)"):
        train.evaluate_output_dir(config)
