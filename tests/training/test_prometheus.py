import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from prometheus_client import parser

from job import log
from job.commands.cli import cli
from job.config import ExitCode, StoppedError, TrainConfig, UserError
from job.run import folder
from job.run.attempt import open_attempt
from job.run.checkpoint import Checkpoint, History, Progress
from job.run.lease import LeaseLostError
from job.run.predictions import confusion_matrix
from job.run.record import EpochRecord, encode
from job.run.stop import StopRequest
from job.training.evaluate import Evaluation
from job.training.observer import Phase, Start, Status
from job.training.prometheus import (
    GAUGES,
    PHASES,
    STATES,
    MetricsTextfile,
    open_textfile,
    require_folder,
)
from tests.conftest import REPOSITORY
from tests.run_folders import TRAINING, lines
from tests.training.test_trainer import make_fingerprint

STATUS = Status("training", 2, 5, 15, 195, 1.5, 0.25, 5120.0, 42.0)
LINE = EpochRecord(2, 195, 1.5, 0.25, 1.25, 0.5, 1e-3, 9.0, 5000.0, 20.0)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        output_dir=tmp_path / "output",
        dataset="synthetic",
        epochs=5,
        run_id="mine",
        metrics_textfile=tmp_path / "job.prom",
    )


def open_file(config: TrainConfig, check: Callable[[], None] = lambda: None) -> MetricsTextfile:
    assert config.metrics_textfile
    return MetricsTextfile(config.metrics_textfile, config, "run mine", check)


def samples(path: Path) -> dict[str, float]:
    families = parser.text_string_to_metric_families(path.read_text())
    return {
        sample.name
        + "".join(
            sample.labels.get(f"cifar10_job_{name}", "") for name in ("state", "phase")
        ): sample.value
        for family in families
        for sample in family.samples
    }


def test_the_file_contains_the_progress_of_the_run(config: TrainConfig, tmp_path: Path) -> None:
    file = open_file(config)
    file.begin(Start("bfloat16", "2 x NVIDIA H200", 195, History([LINE], Progress(15))))
    before = samples(tmp_path / "job.prom")
    assert before["cifar10_job_finished_steps"] == 210
    assert before["cifar10_job_validation_loss"] == 1.25
    file.show(STATUS)
    file.finish_epoch(LINE)
    families = {
        family.name: family
        for family in parser.text_string_to_metric_families((tmp_path / "job.prom").read_text())
    }
    assert families.keys() == {
        f"cifar10_job_{name}" for name in (*GAUGES, "info", "phase", "state")
    }
    for family in families.values():
        assert family.type == "gauge"
        assert len(family.documentation) > 10
        for sample in family.samples:
            assert sample.labels["run_id"] == "run mine"
            assert sample.labels["output_dir"] == str(tmp_path / "output")
    (info,) = families["cifar10_job_info"].samples
    assert info.labels["devices"] == "2 x NVIDIA H200"
    assert (info.labels["recipe"], info.labels["precision"]) == ("classic", "bfloat16")
    values = samples(tmp_path / "job.prom")
    expected = {
        "planned_epochs": 5,
        "finished_epochs": 2,
        "planned_steps": 975,
        "finished_steps": 210,
        "training_loss": 1.5,
        "training_accuracy_ratio": 0.25,
        "validation_loss": 1.25,
        "validation_accuracy_ratio": 0.5,
        "learning_rate": 1e-3,
        "images_per_second": 5120.0,
        "remaining_seconds": 42.0,
        "phasetraining": 1,
        "phasestarting": 0,
        "staterunning": 1,
        "statedone": 0,
    }
    assert {name: values[f"cifar10_job_{name}"] for name in expected} == expected


def test_metrics_without_a_value_are_omitted(config: TrainConfig, tmp_path: Path) -> None:
    file = open_file(config)
    file.show(Status("compiling", 1, 5, 0, 195))
    assert set(samples(tmp_path / "job.prom")) == {
        "cifar10_job_planned_epochs",
        "cifar10_job_finished_epochs",
        "cifar10_job_finished_steps",
        "cifar10_job_last_update_timestamp_seconds",
        *(f"cifar10_job_phase{phase}" for phase in PHASES),
        *(f"cifar10_job_state{state}" for state in STATES),
    }


def test_the_file_is_replaced_atomically_and_always_readable_for_other_users(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []
    replace_file = Path.replace

    def note(temporary: Path, target: Path) -> Path:
        modes.append(stat.S_IMODE(temporary.stat().st_mode))
        assert temporary.suffix != ".prom"  # otherwise the node exporter reads it
        return replace_file(temporary, target)

    monkeypatch.setattr(Path, "replace", note)
    umask = os.umask(0o077)
    try:
        file = open_file(config)
        before = (tmp_path / "job.prom").stat()
        file.show(STATUS)
        after = (tmp_path / "job.prom").stat()
    finally:
        os.umask(umask)
    assert after.st_ino != before.st_ino
    assert stat.S_IMODE(after.st_mode) == 0o644
    assert modes == [0o644, 0o644]
    assert [path.name for path in tmp_path.iterdir()] == ["job.prom"]


def test_the_temporary_file_of_a_killed_process_is_replaced_without_following_links(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(temporary: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            open_file(config)
    (left,) = tmp_path.iterdir()
    left.unlink()
    (tmp_path / "mine").write_text("mine")
    left.symlink_to(tmp_path / "mine")
    open_file(config)
    assert (tmp_path / "mine").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job.prom", "mine"]


def test_a_failed_write_leaves_no_temporary_file(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "job.prom").mkdir()
    with pytest.raises(UserError, match="Is a directory"):
        open_file(config)
    assert [path.name for path in tmp_path.iterdir()] == ["job.prom"]


def test_executions_do_not_update_the_file_too_often(config: TrainConfig, tmp_path: Path) -> None:
    file = open_file(config)
    file.show(STATUS)  # a new phase is always written
    before = (tmp_path / "job.prom").read_bytes()
    file.show(replace(STATUS, steps=30))
    assert (tmp_path / "job.prom").read_bytes() == before
    file.finish_epoch(LINE)
    assert samples(tmp_path / "job.prom")["cifar10_job_finished_steps"] == 225


def test_every_phase_is_written_when_it_begins(config: TrainConfig, tmp_path: Path) -> None:
    def phase() -> str:
        values = samples(tmp_path / "job.prom")
        (name,) = [name for name, value in values.items() if "_phase" in name and value == 1]
        return name.removeprefix("cifar10_job_phase")

    file = open_file(config)
    assert phase() == "starting"
    phases: list[Phase] = ["compiling", "training", "validating", "training"]
    for shown in phases:
        file.show(replace(STATUS, phase=shown))
        assert phase() == shown
    file.evaluate()
    assert phase() == "evaluating"
    file.finish("stopped")
    assert phase() == "evaluating"


def test_writes_that_fail_later_are_a_single_warning(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log.configure("text")
    (tmp_path / "node").mkdir()
    path = tmp_path / "node" / "job.prom"
    file = open_file(replace(config, metrics_textfile=path))
    (tmp_path / "node").rename(tmp_path / "gone")
    file.show(STATUS)
    file.finish_epoch(LINE)
    (line,) = capsys.readouterr().out.splitlines()
    assert f"warning: cannot write --metrics-textfile {path}: No such file" in line
    (tmp_path / "gone").rename(tmp_path / "node")
    file.finish("done")
    assert samples(path)["cifar10_job_statedone"] == 1


def test_a_file_that_cannot_be_written_at_the_start_is_refused(
    config: TrainConfig, tmp_path: Path
) -> None:
    path = tmp_path / "missing" / "job.prom"
    for act in (
        lambda: require_folder(path),
        lambda: open_file(replace(config, metrics_textfile=path)),
    ):
        with pytest.raises(UserError, match=r"cannot write --metrics-textfile .*: No such f"):
            act()
    require_folder(tmp_path / "job.prom")


@pytest.mark.parametrize(
    ("error", "state"),
    [(None, "done"), (StoppedError("SIGTERM"), "stopped"), (RuntimeError("broken"), "failed")],
)
def test_the_end_of_the_attempt_is_written(
    config: TrainConfig, tmp_path: Path, error: Exception | None, state: str
) -> None:
    path, stop = tmp_path / "job.prom", StopRequest()

    def end() -> None:
        with open_attempt(config, stop) as attempt, open_textfile(path, config, attempt):
            assert samples(path)["cifar10_job_staterunning"] == 1
            if error:
                raise error

    if error:
        with pytest.raises(type(error)):
            end()
    else:
        end()
    values = samples(path)
    assert [values[f"cifar10_job_state{name}"] for name in (state, "running")] == [1, 0]


END_AT_ONCE = """
import sys
from pathlib import Path
from job.config import ExitCode, TrainConfig
from job.run.attempt import open_attempt
from job.run.stop import StopRequest
from job.training.prometheus import open_textfile

config, stop = TrainConfig(), StopRequest()
with open_attempt(config, stop) as attempt, open_textfile(
    Path("job.prom"), config, attempt
):
    stop.end(ExitCode(int(sys.argv[1])), "a reason")
"""


@pytest.mark.parametrize(
    ("code", "state"), [(ExitCode.RUN_AGAIN, "stopped"), (ExitCode.DEFECT, "failed")]
)
def test_the_end_is_written_if_the_process_ends_at_once(
    tmp_path: Path, code: ExitCode, state: str
) -> None:
    result = subprocess.run(
        [sys.executable, "-c", END_AT_ONCE, str(int(code))],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert result.returncode == code
    assert samples(tmp_path / "job.prom")[f"cifar10_job_state{state}"] == 1


def test_a_run_without_a_textfile_does_not_import_the_library() -> None:
    code = "import sys, job.training.train; assert 'prometheus_client' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


def test_an_attempt_that_lost_the_run_does_not_overwrite_the_file_of_its_successor(
    config: TrainConfig, tmp_path: Path
) -> None:
    def check() -> None:
        raise LeaseLostError("taken over")

    file = open_file(config, check)
    (tmp_path / "job.prom").write_text("the successor's")
    with pytest.raises(LeaseLostError):
        file.show(STATUS)
    assert (tmp_path / "job.prom").read_text() == "the successor's"


@pytest.fixture
def finished(tmp_path: Path) -> TrainConfig:
    """A finished run of three epochs, configured to write a textfile."""
    config = TrainConfig(output_dir=tmp_path / "output", epochs=3)
    with open_attempt(config, StopRequest()) as attempt:
        attempt.manifest.start_training(config, TRAINING, 0, [])
        attempt.checkpoints.save(
            Checkpoint(
                30, {"network/0000": np.zeros(3)}, make_fingerprint(config), History(lines(3))
            )
        )
        for name in (folder.MODEL, folder.PREDICTION, folder.PREDICTIONS, folder.REPORT):
            attempt.output.write_text(name, "whole")
        digest = folder.sha256_of(config.output_dir / folder.MODEL)
        confusion = confusion_matrix(np.array([0, 1]), np.eye(2, dtype=np.float32))
        record = Evaluation(0.5, confusion).record(("cat", "dog"), folder.MODEL, digest)
        attempt.output.write_bytes(folder.EVALUATION, encode(record))
    return replace(config, metrics_textfile=tmp_path / "job.prom")


def train(config: TrainConfig, *options: str) -> list[dict[str, str]]:
    words = ["train", "--epochs", "3", "--output-dir", str(config.output_dir), *options]
    result = CliRunner().invoke(
        cli, [*words, "--log-format", "json"], obj=StopRequest(), catch_exceptions=False
    )
    assert result.exit_code == 0
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_a_finished_run_is_reported_and_not_changed(finished: TrainConfig, tmp_path: Path) -> None:
    before = (finished.output_dir / "run.json").read_bytes()
    (event,) = train(finished)
    assert event["event"] == "finished"
    assert "raise --epochs to resume it" in event["message"]
    assert (finished.output_dir / "run.json").read_bytes() == before
    assert list(tmp_path.glob("*.prom")) == []


def test_the_textfile_of_a_finished_run_has_the_state_done(finished: TrainConfig) -> None:
    path = finished.metrics_textfile
    assert path
    path.write_text("what a killed process left")
    train(finished, "--metrics-textfile", str(path))
    values = samples(path)
    assert (values["cifar10_job_statedone"], values["cifar10_job_staterunning"]) == (1, 0)
    assert values["cifar10_job_finished_steps"] == values["cifar10_job_planned_steps"] == 30
    assert values["cifar10_job_finished_epochs"] == 3
    assert values["cifar10_job_validation_accuracy_ratio"] == pytest.approx(0.5)
    assert values["cifar10_job_remaining_seconds"] == 0
    assert 'devices="1 x a processor"' in path.read_text()
    # Without a checkpoint, the state is still "done".
    for checkpoint in (finished.output_dir / "checkpoints").iterdir():
        checkpoint.unlink()
    train(finished, "--metrics-textfile", str(path))
    values = samples(path)
    assert values["cifar10_job_statedone"] == 1
    assert "cifar10_job_finished_steps" not in values
