import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from job.config import UserError
from job.run.folder import OutputDir
from job.run.predictions import Predictions
from job.run.record import RunRecord
from tests.conftest import RunJob
from tests.run_folders import make_run

TRAIN_AGAIN = "run the same train command again"
EVALUATE = "write it anew with python -m job evaluate --output-dir"


def test_a_whole_run_is_read(whole: OutputDir) -> None:
    record = RunRecord.load(whole.path)
    assert record.manifest["outcome"] == "done"
    assert [line["epoch"] for line in record.epochs] == [1, 2, 3]
    assert record.class_names == ["cat", "dog", "eel"]
    assert record.predictions is not None
    assert RunRecord.load(whole.path, with_predictions=False).predictions is None


@pytest.mark.parametrize(
    ("outcomes", "restarts"),
    [
        (["done"], []),
        (["stopped", "done"], [15]),
        (["done", "done"], []),  # more epochs, or the report alone
        (["done", "stopped", "done"], [30]),
        (["stopped", "failed", "done", "done"], [15, 30]),
    ],
)
def test_going_on_with_a_finished_run_is_no_restart(
    tmp_path: Path, outcomes: list[str], restarts: list[int]
) -> None:
    output = make_run(tmp_path / "run", ends=tuple((outcome, None) for outcome in outcomes))
    assert [step for step, _ in RunRecord.load(output.path).restarts] == restarts


def test_an_attempt_that_did_not_train_interrupts_nothing(tmp_path: Path) -> None:
    output = make_run(tmp_path / "run", ends=(("done", None), ("failed", None), ("done", None)))
    document = json.loads((output.path / "run.json").read_text())
    document["attempts"][1]["first_step"] = None
    output.write_json("run.json", document)
    assert RunRecord.load(output.path).restarts == []


def set_entry(*names: str | int, value: Any) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        for name in names[:-1]:
            document = document[name]
        document[names[-1]] = value

    return change


def remove(*names: str | int) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        for name in names[:-1]:
            document = document[name]
        del document[names[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (remove("config"), "config: received nothing, expected a value"),
        (remove("config", "seed"), "config.seed: received nothing"),
        (remove("versions"), "versions: received nothing"),
        (remove("versions", "job"), "versions.job: received nothing"),
        (set_entry("config", value=[]), "config: received [], expected an object"),
        (set_entry("config", "epochs", value="3"), "received '3', expected a whole number from 1"),
        (set_entry("config", "epochs", value=True), "received True, expected a whole number"),
        (set_entry("config", "batch_size", value=10**400), "expected a whole number from 1"),
        (set_entry("config", "recipe", value=None), "config.recipe: received None, expected a"),
        (set_entry("outcome", value="ended"), "outcome: received 'ended', expected one of"),
        (set_entry("outcome", value=[]), "outcome: received [], expected one of running, done"),
        (set_entry("end", value=12), "end: received 12, expected a text"),
        (set_entry("elapsed_seconds", value=float("nan")), "received nan, expected a finite"),
        (set_entry("elapsed_seconds", value=-1.0), "received -1.0, expected a finite number from"),
        (set_entry("attempts", value=[]), "attempts: received [], expected a list of at least 1"),
        (set_entry("attempts", value={}), "attempts: received {}, expected a list"),
        (set_entry("attempts", 1, "first_step", value="x"), "attempts[1].first_step: received"),
        (set_entry("attempts", 1, "changes", value=[1]), "attempts[1].changes[0]: received 1"),
        (remove("attempts", 0, "host"), "attempts[0].host: received nothing"),
        (set_entry("devices", value=["CPU"]), "devices[0]: received 'CPU', expected an object"),
        (set_entry("data", value="cifar10"), "data: received 'cifar10', expected an object"),
    ],
)
def test_a_damaged_run_json_is_told_by_the_entry(
    whole: OutputDir, change: Callable[[Any], None], problem: str
) -> None:
    expect_damage(whole.path, "run.json", change, problem, TRAIN_AGAIN)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (remove("loss"), "loss: received nothing"),
        (set_entry("loss", value=float("inf")), "loss: received inf, expected a finite number"),
        (set_entry("accuracy", value=1.5), "accuracy: received 1.5, expected a number from 0 to"),
        (set_entry("classes", value=["cat"]), "classes: received ['cat'], expected an object"),
        (set_entry("classes", "cat", "recall", value="1"), "classes.cat.recall: received '1'"),
        (remove("classes", "eel"), "confusion_matrix: received 3 rows of [3] and 200 images"),
        (set_entry("examples", value=201), "expected the 3 classes and 201 examples"),
        (remove("confusion_matrix"), "confusion_matrix: received nothing"),
        (set_entry("confusion_matrix", 2, value=[1, 2]), "received 3 rows of [2, 3]"),
        (set_entry("confusion_matrix", 2, 1, value=-1), "confusion_matrix[2][1]: received -1"),
    ],
)
def test_a_damaged_evaluation_is_told_by_the_entry(
    whole: OutputDir, change: Callable[[Any], None], problem: str
) -> None:
    expect_damage(whole.path, "evaluation.json", change, problem, EVALUATE)


def expect_damage(
    folder: Path, name: str, change: Callable[[Any], None], problem: str, advice: str
) -> None:
    document = json.loads((folder / name).read_text())
    change(document)
    (folder / name).write_text(json.dumps(document))
    expect_refusal(folder, f"{folder / name}: ", problem, advice)


def expect_refusal(folder: Path, *parts: str) -> None:
    with pytest.raises(UserError) as error:
        RunRecord.load(folder)
    for part in parts:
        assert part in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("name", ["run.json", "evaluation.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"nonsense", b"\xff\xfe\xff", b"[" * 100_000, b"[]", b"null", b'"text"', b"{}"],
    ids=["empty", "cut off", "no JSON", "no UTF-8", "deep", "list", "null", "text", "nothing"],
)
def test_a_file_that_is_no_such_document_is_named(
    whole: OutputDir, name: str, content: bytes
) -> None:
    (whole.path / name).write_bytes(content)
    advice = TRAIN_AGAIN if name == "run.json" else EVALUATE
    expect_refusal(whole.path, f"{whole.path / name}: ", "received", "expected", advice)


LINE = {
    **{"epoch": 3, "step": 30, "loss": 0.5, "accuracy": 0.4, "val_loss": 0.6, "val_accuracy": 0.5},
    **{"learning_rate": 1e-3, "seconds": 5.0, "images_per_second": 500.0, "elapsed_seconds": 18.0},
}


@pytest.mark.parametrize(
    ("last", "problem"),
    [
        ('{"epoch": 3, "st', 'received \'{"epoch": 3, "st\', expected a JSON object'),
        ("", "received '', expected a JSON object"),
        ("\0\0\0\0", "expected a JSON object"),
        (json.dumps(LINE | {"epoch": 4}), "epoch: received 4, expected 3"),
        (json.dumps(LINE | {"loss": None}), "loss: received None, expected a finite number"),
        (json.dumps(LINE | {"val_loss": float("nan")}), "val_loss: received nan"),
        (json.dumps(LINE | {"val_accuracy": 50}), "val_accuracy: received 50, expected a number"),
        (json.dumps(LINE | {"elapsed_seconds": "6"}), "elapsed_seconds: received '6'"),
        (json.dumps({"epoch": 3}), "step: received nothing"),
        ("[3]", "received [3], expected an object"),
    ],
)
def test_a_damaged_line_of_the_metrics_is_told_by_its_number(
    whole: OutputDir, last: str, problem: str
) -> None:
    path = whole.path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], last, "\n" if not last else ""]))
    expect_refusal(whole.path, f"{path}, line 3: ", problem, "remove report.html and", TRAIN_AGAIN)


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "evaluation.json"])
def test_a_file_that_cannot_be_opened_is_named(whole: OutputDir, name: str) -> None:
    (whole.path / name).unlink()
    (whole.path / name).mkdir()
    expect_refusal(whole.path, f"cannot read {whole.path / name}: Is a directory")


def test_predictions_of_another_model_are_refused(whole: OutputDir) -> None:
    predictions = Predictions.load(whole.path)
    assert predictions is not None
    replace(predictions, probabilities=predictions.probabilities[::-1]).save(whole)
    expect_refusal(whole.path, "are of another model than its evaluation", "job evaluate")


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": np.full(200, 3, np.int32)},
        {"labels": np.full(200, -1, np.int32)},
        {"labels": np.zeros(199, np.int32)},
        {"labels": np.zeros(200, np.float32)},
        {"probabilities": np.full((200, 3), np.nan, np.float32)},
        {"probabilities": np.zeros((0, 3), np.float32), "labels": np.zeros(0, np.int32)},
        {"probabilities": np.full((200, 3), "a")},
        {"mistakes": np.full(16, 200, np.int64)},
        {"mistake_images": np.zeros((15, 32, 32, 3), np.uint8)},
        {"originals": np.zeros((3, 32, 32), np.uint8)},
        {"original_labels": np.full(3, 9, np.int32)},
        {"augmented": np.zeros((3, 5, 16, 32, 3), np.uint8)},
        {"augmented": np.zeros((3, 0, 32, 32, 3), np.uint8)},
    ],
)
def test_predictions_that_do_not_fit_one_another_are_refused(
    whole: OutputDir, changes: dict[str, Any]
) -> None:
    predictions = Predictions.load(whole.path)
    assert predictions is not None
    replace(predictions, **changes).save(whole)
    expect_refusal(whole.path, "predictions.npz is no file of this version", EVALUATE)


def test_the_command_ends_with_exit_code_2_and_one_line(run_job: RunJob, whole: OutputDir) -> None:
    with (whole.path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 4, "st')
    result = run_job("report", whole.path)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "metrics.jsonl, line 4: received" in line


def test_a_run_of_an_earlier_version_is_read(whole: OutputDir) -> None:
    document = json.loads((whole.path / "run.json").read_text())
    for name in ("threads", "xla", "deterministic", "devices", "data"):
        document.pop(name)
    whole.write_json("run.json", document)
    assert RunRecord.load(whole.path).manifest["outcome"] == "done"
