import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from job.cluster.scheduler import run_identity
from job.config import DeviceRequest, TrainConfig, UserError
from job.environment import program
from job.run.folder import OutputDir
from job.run.predictions import Predictions
from job.run.record import (
    DamagedError,
    EpochRecord,
    EvaluationRecord,
    Manifest,
    Outcome,
    RunRecord,
    decode,
    encode,
    read_evaluation,
    read_manifest,
    unless_damaged,
)
from tests.conftest import RunJob
from tests.run_folders import TRAINING, change, lines, make_run

TRAIN_AGAIN = "run the same train command again"
EVALUATE = f"write it again with {program()} evaluate --output-dir"


def test_names_with_bytes_that_are_not_utf_8_are_escaped_in_records() -> None:
    config = TrainConfig(output_dir=Path("größe\udcff"), run_id="mine\udcff")
    read = decode(encode(config), TrainConfig)
    assert (read.output_dir, read.run_id) == (Path(r"größe\udcff"), r"mine\udcff")
    identity = run_identity({"KUBERNETES_JOB_UID": "uid\udcff"}, None)
    assert identity.name == r"kubernetes job uid\udcff"  # the same as in the records


def test_a_whole_run_is_read(whole: OutputDir) -> None:
    record = RunRecord.load(whole.path)
    assert record.manifest is not None
    assert (record.manifest.outcome, record.manifest.data) == ("done", TRAINING.data)
    assert record.epochs == lines(3)
    assert record.class_names == ["cat", "dog", "eel"]
    assert record.predictions is not None
    assert RunRecord.load(whole.path, with_predictions=False).predictions is None


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"contains no run: .* use the --output-dir of a training"):
        RunRecord.load(tmp_path)


def test_what_is_written_is_read_bit_for_bit(whole: OutputDir) -> None:
    kinds: dict[str, type] = {"run.json": Manifest, "evaluation.json": EvaluationRecord}
    for name, kind in kinds.items():
        content = (whole.path / name).read_bytes()
        assert encode(decode(content, kind), indent=True) == content
    for line in (whole.path / "metrics.jsonl").read_bytes().splitlines():
        assert encode(decode(line, EpochRecord)) == line


def test_every_option_survives_its_file() -> None:
    settings: dict[str, Any] = {
        **{"output_dir": Path("a b"), "data_dir": Path("/d"), "dataset": "synthetic", "seed": 7},
        **{"cifar10_url": "file:///c", "recipe": "other", "epochs": 1, "batch_size": 2**40},
        **{"learning_rate": 0.1 + 0.2, "limit": 9, "precision": "bfloat16", "jit": "on"},
        **{"deterministic": "off", "devices": DeviceRequest("gpu:2"), "require_gpus": 2},
        **{"join_timeout": 1.5, "stall_timeout": 2.5, "checkpoint_every": 3.5, "stop_after": 4.5},
        **{"fresh": True, "run_id": "\N{SNOWMAN}", "tensorboard": True},
        **{"compile_cache": Path("code"), "metrics_textfile": Path("m.prom")},
    }
    config = TrainConfig(**settings)
    for one in fields(TrainConfig):
        assert getattr(config, one.name) != one.default, f"{one.name} is not tested"
    read = decode(encode(config), TrainConfig)
    assert read == config
    assert isinstance(read.devices, DeviceRequest)
    assert decode(encode(TrainConfig()), TrainConfig) == TrainConfig()


@pytest.mark.parametrize(
    ("outcomes", "restarts"),
    [
        (["done"], []),
        (["stopped", "done"], [15]),
        (["done", "done"], []),  # more epochs, or only the report
        (["done", "stopped", "done"], [30]),
        (["stopped", "failed", "done", "done"], [15, 30]),
    ],
)
def test_resuming_a_finished_run_is_not_a_restart(
    tmp_path: Path, outcomes: list[Outcome], restarts: list[int]
) -> None:
    output = make_run(tmp_path / "run", ends=tuple((outcome, None) for outcome in outcomes))
    assert [step for step, _ in RunRecord.load(output.path).restarts] == restarts


def test_an_attempt_that_did_not_train_is_not_an_interruption(tmp_path: Path) -> None:
    output = make_run(tmp_path / "run", ends=(("done", None), ("failed", None), ("done", None)))
    attempts = json.loads((output.path / "run.json").read_text())["attempts"]
    attempts[1]["first_step"] = None
    change(output.path, attempts=attempts)
    assert RunRecord.load(output.path).restarts == []


MISSING = object()


def altered(content: bytes, place: str, value: Any) -> bytes:
    """A JSON document with another value at a place such as ``attempts.1.host``."""
    document = part = json.loads(content)
    *names, last = (int(name) if name.isdecimal() else name for name in place.split("."))
    for name in names:
        part = part[name]
    if value is MISSING:
        del part[last]
    else:
        part[last] = value
    return json.dumps(document).encode()


def expect_refusal(folder: Path, *parts: str, kind: type[UserError] = DamagedError) -> None:
    with pytest.raises(kind) as error:
        RunRecord.load(folder)
    for part in parts:
        assert part in str(error.value)
    assert len(str(error.value)) < 600


def expect_damage(folder: Path, name: str, damages: list[tuple[str, Any, str]], end: str) -> None:
    """Each damage is refused with file, problem and advice."""
    path = folder / name
    content = path.read_bytes()
    for place, value, problem in damages:
        path.write_bytes(altered(content, place, value))
        expect_refusal(folder, f"{path}", problem, end)


def test_the_refusal_of_a_damaged_run_json_names_the_entry(whole: OutputDir) -> None:
    damages = [
        ("config", MISSING, "is damaged: Object missing required field `config`; "),
        ("config", [], "Expected `object`, got `array` - at `$.config`"),
        ("config.epochs", "3", "Expected `int`, got `str` - at `$.config.epochs`"),
        ("config.epochs", True, "Expected `int`, got `bool` - at `$.config.epochs`"),
        ("config.seed", MISSING, "is damaged: config lacks seed; "),
        ("config.batch_size", 0, "batch_size is 0, expected at least 1 - at `$.config`"),
        ("config.recipe", None, "Expected `str`, got `null` - at `$.config.recipe`"),
        ("config.devices", "tpu", "received 'tpu', expected auto, cpu:N or gpu:N"),
        ("config.output_dir", 5, "at `$.config.output_dir`"),
        ("versions", MISSING, "missing required field `versions`"),
        ("outcome", "ended", "Invalid enum value 'ended' - at `$.outcome`"),
        ("outcome", [], "Expected `str`, got `array` - at `$.outcome`"),
        ("end", 12, "Expected `str | null`, got `int` - at `$.end`"),
        ("elapsed_seconds", float("nan"), "JSON is malformed"),
        ("elapsed_seconds", -1.0, "Expected `float` >= 0.0 - at `$.elapsed_seconds`"),
        ("attempts", [], "length >= 1 - at `$.attempts`"),
        ("attempts", {}, "Expected `array`, got `object` - at `$.attempts`"),
        ("attempts.1.first_step", "x", "at `$.attempts[1].first_step`"),
        ("attempts.1.changes", [1], "got `int` - at `$.attempts[1].changes[0]`"),
        ("attempts.0.host", MISSING, "missing required field `host` - at `$.attempts[0]`"),
        ("devices", ["CPU"], "Expected `object`, got `str` - at `$.devices[0]`"),
        ("data", "cifar10", "got `str` - at `$.data`"),
    ]
    expect_damage(whole.path, "run.json", damages, TRAIN_AGAIN)


def test_the_refusal_of_a_damaged_evaluation_names_the_entry(whole: OutputDir) -> None:
    damages = [
        ("loss", MISSING, "is damaged: Object missing required field `loss`; "),
        ("loss", float("inf"), "JSON is malformed"),
        ("accuracy", 1.5, "Expected `float` <= 1.0 - at `$.accuracy`"),
        ("classes", ["cat"], "Expected `object`, got `array` - at `$.classes`"),
        ("classes.cat.recall", "1", "got `str` - at `$.classes[...].recall`"),
        ("classes.eel", MISSING, "confusion_matrix: received 3 rows of [3] and 200 images"),
        ("examples", 201, "expected the 3 classes and 201 examples"),
        ("confusion_matrix", MISSING, "missing required field `confusion_matrix`"),
        ("confusion_matrix.2", [1, 2], "received 3 rows of [2, 3]"),
        ("confusion_matrix.2.1", -1, "Expected `int` >= 0 - at `$.confusion_matrix[2][1]`"),
    ]
    expect_damage(whole.path, "evaluation.json", damages, EVALUATE)
    assert unless_damaged(read_evaluation, whole.path) is None


def test_the_refusal_of_damaged_metrics_names_the_line(whole: OutputDir) -> None:
    path = whole.path / "metrics.jsonl"
    *before, last = path.read_bytes().splitlines(keepends=True)
    damages = [
        (last[:20], "is damaged: Input data was truncated; "),
        (b"\n", "truncated"),
        (b"\0\0\0\0", "JSON is malformed"),
        (altered(last, "epoch", 4), "epoch: received 4, expected 3"),
        (altered(last, "loss", None), "Expected `float`, got `null` - at `$.loss`"),
        (altered(last, "val_loss", float("nan")), "JSON is malformed"),
        (altered(last, "val_accuracy", 50), "Expected `float` <= 1.0 - at `$.val_accuracy`"),
        (altered(last, "elapsed_seconds", "6"), "got `str` - at `$.elapsed_seconds`"),
        (b'{"epoch": 3}', "missing required field `step`"),
        (b"[3]", "Expected `object`, got `array`"),
    ]
    for damaged, problem in damages:
        path.write_bytes(b"".join([*before, damaged]))
        expect_refusal(
            whole.path, f"{path}, line 3", problem, "remove report.html and", TRAIN_AGAIN
        )


def test_a_file_that_is_not_such_a_document_is_named(whole: OutputDir) -> None:
    for name, advice in (("evaluation.json", EVALUATE), ("run.json", TRAIN_AGAIN)):
        path = whole.path / name
        whole_content = path.read_bytes()
        for content in (
            *(b"", b"{", b"nonsense", b"\xff\xfe\xff", b"[" * 100_000, b'{"a":' * 100_000),
            *(b"[]", b"null", b'"text"', b"{}", whole_content[:-20], whole_content + b"{}"),
        ):
            path.write_bytes(content)
            expect_refusal(whole.path, f"{path} is damaged: ", advice)
        path.write_bytes(whole_content)


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "evaluation.json"])
def test_a_file_that_cannot_be_opened_is_named(whole: OutputDir, name: str) -> None:
    (whole.path / name).unlink()
    (whole.path / name).mkdir()
    problem = f"cannot read {whole.path / name}: Is a directory"
    expect_refusal(whole.path, problem, kind=UserError)


def test_predictions_of_another_model_are_refused(whole: OutputDir) -> None:
    predictions = Predictions.load(whole.path)
    assert predictions is not None
    replace(predictions, probabilities=predictions.probabilities[::-1]).save(whole)
    problem = "are from another model than its evaluation"
    expect_refusal(whole.path, problem, "job evaluate", kind=UserError)


def test_the_command_ends_with_exit_code_2_and_one_line(run_job: RunJob, whole: OutputDir) -> None:
    with (whole.path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 4, "st')
    result = run_job("report", whole.path)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "metrics.jsonl, line 4 is damaged: Input data was truncated; remove" in line


def test_a_run_of_an_earlier_version_is_read(whole: OutputDir) -> None:
    """It lacks newer entries and contains removed ones."""
    document = json.loads((whole.path / "run.json").read_text())
    for name in (
        *("threads", "xla", "deterministic", "devices", "data", "workers", "replicas"),
        *("precision", "recipe_fingerprint"),
    ):
        del document[name]
    for name in ("cifar10_url", "join_timeout", "stall_timeout", "tensorboard"):
        del document["config"][name]
    for attempt in document["attempts"]:
        del attempt["devices"]
    document["config"]["removed"] = document["removed"] = {"a": [1]}
    (whole.path / "run.json").write_text(json.dumps(document))
    manifest = RunRecord.load(whole.path).manifest
    assert manifest is not None
    assert (manifest.outcome, manifest.workers, manifest.data) == ("done", None, None)
    assert manifest.config == TrainConfig(output_dir=Path("out"), epochs=3)


def test_a_password_stored_by_an_earlier_version_is_redacted(whole: OutputDir) -> None:
    change(whole.path, cifar10_url="https://me:secret@mirror/c.tar.gz?token=secret")
    manifest = read_manifest(whole.path)
    assert manifest is not None
    assert manifest.config.cifar10_url == "https://REMOVED@mirror/c.tar.gz?REMOVED"
