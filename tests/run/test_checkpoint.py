import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from job import log
from job.cluster import Environment
from job.config import UserError
from job.run.checkpoint import Arrays, Checkpoint, CheckpointStore, History, Progress
from job.run.fingerprint import Fingerprint
from job.run.folder import OutputDir
from job.run.record import BestEpoch, EpochRecord, read_epochs
from tests.conftest import REPOSITORY
from tests.run_folders import lines

FINGERPRINT = Fingerprint(
    {"seed": 42, "limit": None, "learning_rate": 0.1 + 0.2, "optimizer.beta_1": 0.9},
    Environment(
        device_kind="cpu",
        device_models=["a processor"],
        replicas=2,
        threads=4,
        precision="float32",
        jit="auto",
        deterministic=True,
        versions={"job": "1"},
        git_commit=None,
        variables={"XLA_FLAGS": "--none"},
        workers=3,
    ),
    "ab" * 32,
)


def line(epoch: int, val_accuracy: float) -> EpochRecord:
    return msgspec.structs.replace(lines(epoch)[-1], val_accuracy=val_accuracy)


def make(step: int) -> Checkpoint:
    arrays: Arrays = {
        "network/0000": np.arange(step, step + 1000, dtype=np.float32),
        "optimizer/0000": np.array(step, np.int64),
    }
    history = History([line(1, 0.1 + 0.2)], Progress(7, step / 3, 5), 0.7, 2.5)
    return Checkpoint(step, arrays, FINGERPRINT, history)


def store(folder: Path) -> CheckpointStore:
    return CheckpointStore(OutputDir(folder))


def load(folder: Path) -> Checkpoint:
    checkpoint = store(folder).load_latest()
    assert checkpoint is not None
    return checkpoint


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_the_best_epoch_is_the_first_of_equals() -> None:
    history = History()
    assert history.best is None
    for epoch, accuracy in enumerate([0.5, 0.7, 0.7, 0.6], 1):
        history.finish_epoch(line(epoch, accuracy))
    assert history.best == BestEpoch(2, 0.7)


def test_finishing_an_epoch_begins_the_next_one() -> None:
    history = History(progress=Progress(3, 1.5, 2), epoch_seconds=4.0)
    assert history.epochs_begun == 1
    history.finish_epoch(line(1, 0.5))
    assert (history.progress, history.epoch_seconds) == (Progress(), 0.0)
    assert history.epochs_begun == 1
    assert History().epochs_begun == len(History().epochs) == 0


def test_metrics_are_the_whole_history(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n{"epo')
    History(lines(2)).write_metrics(OutputDir(tmp_path))
    assert read_epochs(tmp_path) == lines(2)


def test_a_loaded_checkpoint_is_bit_identical_to_the_saved_one(tmp_path: Path) -> None:
    assert store(tmp_path).load_latest() is None
    size = store(tmp_path).save(make(16))
    (name,) = names(tmp_path)
    assert (tmp_path / "checkpoints" / name).stat().st_size == size
    loaded = load(tmp_path)
    assert (loaded.step, loaded.fingerprint, loaded.history) == (16, FINGERPRINT, make(16).history)
    assert loaded.arrays.keys() == make(16).arrays.keys()
    for key, array in make(16).arrays.items():
        assert loaded.arrays[key].dtype == array.dtype
        np.testing.assert_array_equal(loaded.arrays[key], array)


def test_two_checkpoints_are_kept_and_the_last_written_one_counts(tmp_path: Path) -> None:
    first = store(tmp_path)
    for step in (15, 30, 30):
        first.save(make(step))
    assert [name[:20] for name in names(tmp_path)] == [
        "000002-step-00000030",
        "000003-step-00000030",
    ]
    second = store(tmp_path)
    second.load_latest()
    second.save(make(45))
    assert [name[:20] for name in names(tmp_path)] == [
        "000003-step-00000030",
        "000004-step-00000045",
    ]


@pytest.mark.parametrize("damage", ["truncated", "emptied", "flipped", "flipped in the middle"])
def test_a_damaged_checkpoint_is_reported_and_skipped(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = store(tmp_path)
    first.save(make(15))
    first.save(make(30))
    path = tmp_path / "checkpoints" / names(tmp_path)[-1]
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[:-1]
    elif damage == "emptied":
        content.clear()
    else:
        content[0 if damage == "flipped" else len(content) // 2] ^= 1
    path.write_bytes(content)

    log.configure("json")
    second = store(tmp_path)
    loaded = second.load_latest()
    assert loaded is not None
    assert loaded.step == 15
    (event,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (event["event"], event["level"]) == ("checkpoint_damaged", "warning")
    assert event["path"] == str(path)
    # A damaged checkpoint does not displace an intact one.
    second.save(make(20))
    assert [name[7:20] for name in names(tmp_path)] == ["step-00000015", "step-00000020"]


def test_a_run_with_only_damaged_checkpoints_does_not_start_over_by_itself(
    tmp_path: Path,
) -> None:
    store(tmp_path).save(make(15))
    (tmp_path / "checkpoints" / names(tmp_path)[0]).write_bytes(b"")
    with pytest.raises(UserError, match=r"no checkpoint in .* is intact, .* start over with"):
        store(tmp_path).load_latest()


def test_an_unreadable_checkpoint_is_not_treated_as_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(tmp_path).save(make(15))

    def fail(path: Path) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(UserError, match=r"cannot read .*\.npz: Input/output error"):
        store(tmp_path).load_latest()


def test_a_folder_that_cannot_be_listed_is_not_treated_as_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(tmp_path).save(make(15))

    def fail(path: Path) -> Iterator[Path]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", fail)
    with pytest.raises(UserError, match=r"cannot read .*/checkpoints: Permission denied"):
        store(tmp_path).load_latest()


def metadata_of(checkpoint: Checkpoint) -> Any:
    with np.load(io.BytesIO(checkpoint.to_bytes())) as file:
        return json.loads(str(file["metadata"]))


def save_with(folder: Path, metadata: Any) -> None:
    """Save a checkpoint as another version of this program could have written it."""
    buffer = io.BytesIO()
    members: dict[str, Any] = {**make(15).arrays, "metadata": np.array(json.dumps(metadata))}
    np.savez(buffer, **members)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()[:16]
    (folder / "checkpoints").mkdir()
    path = folder / "checkpoints" / f"000001-step-00000015-{digest}.npz"
    path.write_bytes(buffer.getvalue())


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"format": 2, "fingerprint": "another"}, r"Invalid enum value 2 - at `\$\.format`"),
        ({"history": {"progress": []}}, r"Expected `object`, got `array`.*history\.progress"),
    ],
)
def test_a_checkpoint_of_another_format_is_refused(
    tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    save_with(tmp_path, metadata_of(make(15)) | change)
    with pytest.raises(UserError, match=f"{problem}.*; resume with the version of this program"):
        store(tmp_path).load_latest()


def test_a_checkpoint_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    metadata = metadata_of(make(15))
    del metadata["fingerprint"]["recipe"], metadata["fingerprint"]["environment"]["workers"]
    save_with(tmp_path, metadata)
    loaded = load(tmp_path)
    assert (loaded.fingerprint.environment.workers, loaded.fingerprint.recipe) == (1, "")
    assert loaded.history == make(15).history


KILLED_WHILE_SAVING = """
import sys
from pathlib import Path
from tests.integration.faults import Injector
import numpy as np
from job.run.checkpoint import Checkpoint, CheckpointStore
from job.run.folder import OutputDir
folder = Path(sys.argv[1])
store = CheckpointStore(OutputDir(folder))
last = store.load_latest()
step = last.step + 15
arrays = {"network/0000": np.arange(step, step + 1000, dtype=np.float32)}
Injector(folder, "checkpoints", int(sys.argv[2]), sys.argv[3]).install()
store.save(Checkpoint(step, arrays, last.fingerprint, last.history))
print("saved")
"""


@pytest.mark.slow
def test_a_kill_at_any_operation_leaves_the_old_or_the_new_checkpoint(tmp_path: Path) -> None:
    """No operation is left out: the number increases until a save completes."""
    for moment in ("before", "half", "after"):
        folder = tmp_path / moment
        folder.mkdir()
        first = store(folder)
        for step in (15, 30):
            first.save(make(step))
        for number in range(1, 100):
            before = load(folder)
            result = subprocess.run(
                [sys.executable, "-c", KILLED_WHILE_SAVING, folder, str(number), moment],
                cwd=REPOSITORY,
                capture_output=True,
                text=True,
            )
            after = load(folder)
            assert after.step in (before.step, before.step + 15)
            np.testing.assert_array_equal(
                after.arrays["network/0000"], make(after.step).arrays["network/0000"]
            )
            if result.stdout:
                break
            assert result.returncode == -9, result.stderr
        else:
            pytest.fail("no save completed")
        assert number > 6  # write, two fsyncs, replace, and two unlinks
        OutputDir(folder).tidy()
        assert len(names(folder)) == 2
