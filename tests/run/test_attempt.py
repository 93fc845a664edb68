import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from job import log
from job.cluster import Environment
from job.config import ExitCode, LostWorkerError, StoppedError, TrainConfig, UserError, run_options
from job.run import folder
from job.run.attempt import Attempt, hold_output_dir, open_attempt
from job.run.checkpoint import Checkpoint, History, Progress
from job.run.fingerprint import Fingerprint
from job.run.lease import LeaseLostError, read_lease
from job.run.record import ClassRecord, EvaluationRecord, encode
from job.run.stop import RUN_AGAIN, StopRequest
from tests.conftest import REPOSITORY
from tests.run_folders import TRAINING, lines

Body = Callable[[Attempt], None]

CLASSES = {"cat": ClassRecord(1.0, 1.0, 2)}
ENVIRONMENT = Environment("cpu", ["Zen"], 1, 2, "float32", "auto", True, {}, None, {})


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return TrainConfig(output_dir=tmp_path / "output", epochs=2)


def run(config: TrainConfig, body: Body = lambda attempt: None) -> Attempt:
    stop = StopRequest()
    stop.defer()
    with open_attempt(config, stop) as attempt:
        if not attempt.is_finished:
            if attempt.fresh:
                attempt.output.discard()
            attempt.manifest.start_training(config, TRAINING, 0, [])
        body(attempt)
    return attempt


def save(config: TrainConfig, epochs: int, steps: int = 0, **settings: Any) -> Body:
    fingerprint = Fingerprint({**run_options(config), **settings}, ENVIRONMENT)
    history = History(lines(epochs), Progress(steps))

    def body(attempt: Attempt) -> None:
        arrays = {"network/0000": np.zeros(3)}
        attempt.checkpoints.save(Checkpoint(10 * epochs + steps, arrays, fingerprint, history))

    return body


def finish(config: TrainConfig) -> Body:
    def body(attempt: Attempt) -> None:
        save(config, config.epochs)(attempt)
        attempt.output.write_text(folder.MODEL, "model")
        for name in (folder.PREDICTION, folder.PREDICTIONS, folder.REPORT):
            attempt.output.write_text(name, "whole")
        digest = folder.sha256_of(config.output_dir / folder.MODEL)
        evaluation = EvaluationRecord(1.0, 1.0, 2, CLASSES, [[2]], folder.MODEL, digest)
        attempt.output.write_bytes(folder.EVALUATION, encode(evaluation))

    return body


def manifest(config: TrainConfig) -> Any:
    return json.loads((config.output_dir / "run.json").read_text())


def raising(error: BaseException) -> Body:
    def body(attempt: Attempt) -> None:
        raise error

    return body


def test_an_attempt_resumes_from_the_last_checkpoint(config: TrainConfig) -> None:
    assert run(config, save(config, 1, 5)).checkpoint is None
    later = run(config)
    assert later.checkpoint is not None
    assert later.checkpoint.step == 15
    assert len(manifest(config)["attempts"]) == 2


def test_a_finished_run_is_left_alone(config: TrainConfig) -> None:
    run(config, finish(config))
    before = manifest(config)
    assert run(config).is_finished
    assert manifest(config) == before


@pytest.mark.parametrize(
    "name",
    ["cifar10_model.h5", "evaluation.json", "prediction.png", "predictions.npz", "report.html"],
)
def test_a_run_that_lacks_an_artifact_is_not_finished(config: TrainConfig, name: str) -> None:
    run(config, finish(config))
    (config.output_dir / name).unlink()
    attempt = run(config)
    assert not attempt.is_finished
    assert attempt.checkpoint is not None


def test_an_evaluation_of_another_model_is_not_finished(config: TrainConfig) -> None:
    run(config, finish(config))
    (config.output_dir / folder.MODEL).write_text("another")
    assert not run(config).is_finished


def test_an_unreadable_manifest_is_not_treated_as_missing(
    config: TrainConfig,
) -> None:
    run(config)
    (config.output_dir / "run.json").unlink()
    (config.output_dir / "run.json").mkdir()
    with pytest.raises(UserError, match=r"cannot read .*run\.json: Is a directory"):
        run(config)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"outcome": "done"}', '{"attempts": 1}'])
def test_a_damaged_manifest_is_replaced_and_the_run_resumes(
    config: TrainConfig, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(config, finish(config))
    (config.output_dir / "run.json").write_text(content)
    log.configure("text")
    attempt = run(config)
    assert "run.json is damaged; its record of earlier attempts is lost" in capsys.readouterr().out
    assert not attempt.is_finished
    assert attempt.checkpoint is not None
    assert manifest(config)["outcome"] == "done"


def test_more_epochs_resume_a_finished_run_and_fewer_are_refused(config: TrainConfig) -> None:
    run(config, finish(config))
    attempt = run(replace(config, epochs=3))
    assert not attempt.is_finished
    assert attempt.checkpoint is not None
    with pytest.raises(UserError, match="--epochs received 1, expected at least 2"):
        run(replace(config, epochs=1))


def test_an_epoch_that_has_begun_counts(config: TrainConfig) -> None:
    run(config, save(config, 1, 5))
    with pytest.raises(UserError, match="--epochs received 1, expected at least 2"):
        run(replace(config, epochs=1))


@pytest.mark.parametrize("first", [save, finish])
def test_another_run_in_the_folder_is_refused_and_not_changed(
    config: TrainConfig, first: Any
) -> None:
    run(config, save(config, 1) if first is save else finish(config))
    before = manifest(config)
    with pytest.raises(UserError, match="--seed received 43, expected 42"):
        run(replace(config, seed=43))
    assert manifest(config) == before


def test_a_finished_run_needs_no_checkpoint_to_be_recognised(config: TrainConfig) -> None:
    run(config, finish(config))
    shutil.rmtree(config.output_dir / "checkpoints")
    assert run(config).is_finished
    with pytest.raises(UserError, match="--seed received 43, expected 42"):
        run(replace(config, seed=43))
    with pytest.raises(UserError, match="contains a model but no checkpoint to resume from"):
        run(replace(config, epochs=3))


def test_a_model_without_a_checkpoint_is_not_overwritten(config: TrainConfig) -> None:
    config.output_dir.mkdir()
    (config.output_dir / folder.MODEL).write_text("somebody's")
    with pytest.raises(UserError, match="contains a model but no checkpoint to resume from"):
        run(config)
    assert (config.output_dir / folder.MODEL).read_text() == "somebody's"


def test_fresh_keeps_nothing_of_the_previous_run(config: TrainConfig) -> None:
    run(config, finish(config))
    other = replace(config, seed=43, fresh=True)
    stop = StopRequest()
    stop.defer()
    with pytest.raises(UserError, match="no data"), open_attempt(other, stop):
        raise UserError("no data")
    # Nothing is discarded before the new run can begin.
    assert run(config).is_finished
    with open_attempt(other, stop) as attempt:
        assert attempt.checkpoint is None
        attempt.output.discard()
        attempt.manifest.start_training(other, TRAINING, 0, [])
        left = [path.name for path in config.output_dir.iterdir() if path.name[0] != "."]
        assert left == ["run.json"]
    assert len(manifest(config)["attempts"]) == 1
    assert manifest(config)["config"]["seed"] == 43


def test_fresh_is_applied_once_if_a_scheduler_repeats_the_command(config: TrainConfig) -> None:
    run(config, save(config, 1))
    repeated = replace(config, fresh=True, run_id="mine")
    stop = StopRequest()
    stop.defer()
    with pytest.raises(UserError), open_attempt(repeated, stop):
        raise UserError("no data")  # before anything is discarded
    assert run(repeated, save(config, 1, 5)).checkpoint is None
    again = run(repeated)
    assert again.checkpoint is not None
    assert again.checkpoint.step == 15
    # Another run, or one without a name, starts over each time.
    assert run(replace(config, fresh=True, run_id="other"), save(config, 1)).checkpoint is None
    assert run(replace(config, fresh=True)).checkpoint is None


def test_fresh_starts_over_each_time_a_person_repeats_it(config: TrainConfig) -> None:
    fresh = replace(config, fresh=True, run_id="mine")
    run(fresh, finish(fresh))
    assert run(fresh, finish(fresh)).fresh
    assert run(replace(fresh, seed=43)).fresh


def test_fresh_starts_over_each_time_in_the_shell_of_an_allocation(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = replace(config, fresh=True)
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    run(fresh, save(fresh, 1))
    again = run(fresh)
    assert again.fresh
    assert again.stop.advice == "run the same command without --fresh to resume"


def test_a_fresh_run_without_a_name_is_resumed_without_fresh(config: TrainConfig) -> None:
    fresh = replace(config, fresh=True)
    assert run(fresh).stop.advice == "run the same command without --fresh to resume"
    assert run(replace(fresh, run_id="mine")).stop.advice == RUN_AGAIN
    assert run(config).stop.advice == RUN_AGAIN


def test_a_requeued_job_that_has_finished_is_not_started_over(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = replace(config, fresh=True)
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    run(fresh, finish(fresh))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert run(fresh).is_finished


def test_a_wrong_command_of_the_same_run_does_not_stop_it(config: TrainConfig) -> None:
    same = replace(config, run_id="mine")

    def second(attempt: Attempt) -> None:
        with pytest.raises(UserError, match="--seed received 43, expected 42"):
            run(replace(same, seed=43))
        assert attempt.stop.reason is None

    run(same, second)


@pytest.mark.parametrize(
    ("error", "outcome", "reason"),
    [
        (StoppedError("SIGTERM"), "stopped", "SIGTERM"),
        (LostWorkerError("worker 1 is gone"), "stopped", "worker 1 is gone"),
        (RuntimeError("broken"), "failed", "RuntimeError: broken"),
        (UserError("wrong"), "failed", "wrong"),
        (LeaseLostError("taken over"), "running", None),
    ],
)
def test_the_end_of_an_attempt_is_recorded(
    config: TrainConfig, error: Exception, outcome: str, reason: str | None
) -> None:
    with pytest.raises(type(error)):
        run(config, raising(error))
    (attempt,) = manifest(config)["attempts"]
    assert (attempt["outcome"], attempt["reason"]) == (outcome, reason)


ENDED_IMMEDIATELY = """
import sys
from pathlib import Path
from job.config import ExitCode, TrainConfig
from job.run.attempt import open_attempt
from job.run.stop import StopRequest
stop = StopRequest()
with open_attempt(TrainConfig(Path(sys.argv[1])), stop):
    stop.end(ExitCode(int(sys.argv[2])), "a reason")
"""


@pytest.mark.parametrize(
    ("exit_code", "outcome"), [(ExitCode.RUN_AGAIN, "stopped"), (ExitCode.DEFECT, "failed")]
)
def test_the_end_of_a_process_that_ends_immediately_is_recorded(
    config: TrainConfig, exit_code: ExitCode, outcome: str
) -> None:
    program = [sys.executable, "-c", ENDED_IMMEDIATELY]
    ended = subprocess.run([*program, config.output_dir, str(int(exit_code))], cwd=REPOSITORY)
    assert ended.returncode == exit_code
    document = manifest(config)
    (attempt,) = document["attempts"]
    assert (document["outcome"], attempt["outcome"], attempt["reason"]) == (
        *(outcome, outcome),
        "a reason",
    )
    assert document["error"] == ("a reason" if outcome == "failed" else None)
    (lease,) = (config.output_dir / ".lease").iterdir()
    holder = read_lease(lease)
    assert holder is not None
    assert holder.released


def test_the_folder_is_free_after_an_attempt(config: TrainConfig) -> None:
    with pytest.raises(RuntimeError):
        run(config, raising(RuntimeError("broken")))
    run(config)


def test_a_folder_that_is_held_is_refused(config: TrainConfig) -> None:
    def second(attempt: Attempt) -> None:
        with pytest.raises(UserError, match=r"is in use by process \d+ on host"):
            run(config)

    run(config, second)


def test_a_process_without_a_run_replaces_no_attempt(config: TrainConfig) -> None:
    """For example when a model is evaluated inside the Slurm job that is training it."""

    def evaluate(attempt: Attempt) -> None:
        with (
            pytest.raises(UserError, match="is in use by run mine, process"),
            hold_output_dir(config.output_dir, StopRequest()),
        ):
            pass
        attempt.output.check()
        assert attempt.stop.reason is None

    run(replace(config, run_id="mine"), evaluate)
