import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from job import log
from job.config import UserError
from job.run.checkpoint import Arrays, Checkpoint, CheckpointStore
from job.run.folder import OutputDir
from tests.conftest import REPOSITORY


def make(step: int) -> Checkpoint:
    arrays: Arrays = {
        "network/0000": np.arange(step, step + 1000, dtype=np.float32),
        "optimizer/0000": np.array(step, np.int64),
    }
    return Checkpoint(step, arrays, {"history": {"loss": step / 3}})


def store(folder: Path) -> CheckpointStore:
    return CheckpointStore(OutputDir(folder))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_a_checkpoint_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    assert store(tmp_path).load_latest() is None
    size = store(tmp_path).save(make(15))
    (name,) = names(tmp_path)
    assert (tmp_path / "checkpoints" / name).stat().st_size == size
    loaded = store(tmp_path).load_latest()
    assert loaded is not None
    assert (loaded.step, loaded.metadata) == (15, make(15).metadata)
    for key, array in make(15).arrays.items():
        assert loaded.arrays[key].dtype == array.dtype
        np.testing.assert_array_equal(loaded.arrays[key], array)


def test_two_are_kept_and_the_last_written_counts(tmp_path: Path) -> None:
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
    # A good one is not counted out by a damaged one.
    second.save(make(20))
    assert [name[7:20] for name in names(tmp_path)] == ["step-00000015", "step-00000020"]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over_by_itself(
    tmp_path: Path,
) -> None:
    store(tmp_path).save(make(15))
    (tmp_path / "checkpoints" / names(tmp_path)[0]).write_bytes(b"")
    with pytest.raises(UserError, match=r"no checkpoint in .* is intact, .* start over with"):
        store(tmp_path).load_latest()


def test_a_checkpoint_that_cannot_be_read_is_not_taken_for_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(tmp_path).save(make(15))

    def fail(path: Path) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(UserError, match=r"cannot read .*\.npz: Input/output error"):
        store(tmp_path).load_latest()


def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(tmp_path).save(make(15))

    def fail(path: Path) -> Iterator[Path]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", fail)
    with pytest.raises(UserError, match=r"cannot read .*/checkpoints: Permission denied"):
        store(tmp_path).load_latest()


def test_a_checkpoint_of_another_format_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.run.checkpoint._FORMAT", 2)
    store(tmp_path).save(make(15))
    monkeypatch.undo()
    with pytest.raises(UserError, match="received format 2, expected 1; go on with"):
        store(tmp_path).load_latest()


KILLED_WHILE_SAVING = """
import sys
from collections.abc import Iterator
from pathlib import Path
from tests.integration.faults import Injector
import numpy as np
from job.run.checkpoint import Checkpoint, CheckpointStore
from job.run.folder import OutputDir
folder = Path(sys.argv[1])
store = CheckpointStore(OutputDir(folder))
step = store.load_latest().step + 15
arrays = {"network/0000": np.arange(step, step + 1000, dtype=np.float32)}
Injector(folder, "checkpoints", int(sys.argv[2]), sys.argv[3]).install()
store.save(Checkpoint(step, arrays, {}))
print("saved")
"""


def test_a_kill_at_any_operation_leaves_the_earlier_or_the_new_checkpoint(tmp_path: Path) -> None:
    """No operation is left out: the numbers go up until a save gets to its end."""
    for moment in ("before", "half", "after"):
        folder = tmp_path / moment
        folder.mkdir()
        first = store(folder)
        for step in (15, 30):
            first.save(make(step))
        for number in range(1, 100):
            before = store(folder).load_latest()
            assert before is not None
            result = subprocess.run(
                [sys.executable, "-c", KILLED_WHILE_SAVING, folder, str(number), moment],
                cwd=REPOSITORY,
                capture_output=True,
                text=True,
            )
            after = store(folder).load_latest()
            assert after is not None
            assert after.step in (before.step, before.step + 15)
            np.testing.assert_array_equal(
                after.arrays["network/0000"], make(after.step).arrays["network/0000"]
            )
            if result.stdout:
                break
            assert result.returncode == -9, result.stderr
        else:
            pytest.fail("no save got to its end")
        assert number > 6  # write, two fsyncs, replace, and two unlinks
        OutputDir(folder).tidy()
        assert len(names(folder)) == 2
