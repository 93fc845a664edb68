from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf

from job.config import UserError
from job.run.checkpoint import History
from job.run.folder import OutputDir
from job.run.lease import LeaseLostError
from job.run.record import EpochRecord
from job.training.observer import Start
from job.training.tensorboard import TAGS, EventFile


def line(epoch: int, **changes: float) -> EpochRecord:
    values: dict[str, Any] = {**dict.fromkeys(TAGS.values(), 0.5 / epoch), **changes}
    return EpochRecord(
        epoch=epoch, step=20 * epoch, seconds=9.0, elapsed_seconds=10.0 * epoch, **values
    )


def begin(output: OutputDir, *epochs: int) -> EventFile:
    """Begin an attempt that resumes after these epochs."""
    event_file = EventFile(output)
    history = History([line(epoch) for epoch in epochs], elapsed_seconds=10.0 * len(epochs))
    event_file.begin(Start("float32", "1 x CPU", 20, history))
    return event_file


def files(output: OutputDir) -> list[Path]:
    return sorted((output.path / "tensorboard").iterdir())


def events(path: Path) -> list[Any]:
    records = tf.data.TFRecordDataset(str(path))
    return [tf.compat.v1.Event.FromString(record.numpy()) for record in records]


def curve(path: Path, tag: str) -> list[tuple[int, Any]]:
    return [
        (event.step, pytest.approx(value.simple_value))
        for event in events(path)
        for value in event.summary.value
        if value.tag == tag
    ]


def test_every_epoch_is_a_point_of_every_curve(tmp_path: Path) -> None:
    output = OutputDir(tmp_path)
    event_file = begin(output)
    for epoch in (1, 2, 3):
        event_file.finish_epoch(line(epoch, val_loss=epoch, learning_rate=0.25))
    (path,) = files(output)
    first, session, *_ = events(path)
    assert first.file_version == "brain.Event:2"
    assert session.session_log.status == tf.compat.v1.SessionLog.START
    assert curve(path, "loss/validation") == [(20, 1.0), (40, 2.0), (60, 3.0)]
    assert curve(path, "learning_rate") == [(20, 0.25), (40, 0.25), (60, 0.25)]
    for tag, key in TAGS.items():
        assert len(curve(path, tag)) == 3, key
    times = [event.wall_time for event in events(path)[2:]]
    assert [later - times[0] for later in times] == pytest.approx([0.0, 10.0, 20.0])


def test_an_attempt_removes_points_of_epochs_that_it_trains_again(tmp_path: Path) -> None:
    output = OutputDir(tmp_path)
    killed = begin(output)
    for epoch in (1, 2, 3):
        killed.finish_epoch(line(epoch))
    # The last checkpoint of the killed attempt was that of the second epoch.
    later = begin(output, 1, 2)
    later.finish_epoch(line(3, loss=9.0))
    old, new = files(output)
    # A reader of the old file moves on to the file with the next name.
    assert old.name < new.name
    assert "tfevents" in new.name
    assert old.read_bytes() == b""
    assert curve(new, "loss/train") == [(20, 0.5), (40, 0.25), (60, 9.0)]
    third = begin(output, 1, 2, 3)
    third.finish_epoch(line(4))
    assert [path.stat().st_size > 0 for path in files(output)] == [False, True]
    assert len(curve(files(output)[-1], "loss/train")) == 4


def test_a_file_truncated_anywhere_is_read_up_to_its_last_complete_epoch(tmp_path: Path) -> None:
    output = OutputDir(tmp_path)
    event_file = begin(output, 1)
    (path,) = files(output)
    size = path.stat().st_size
    event_file.finish_epoch(line(2))
    content = path.read_bytes()
    for end in range(size, len(content), 7):
        path.write_bytes(content[:end])
        seen = []
        try:
            for record in tf.data.TFRecordDataset(str(path)):
                seen.append(tf.compat.v1.Event.FromString(record.numpy()).step)
        except tf.errors.DataLossError:
            pass
        assert seen == [0, 0, 20]
    # The next attempt writes a complete file.
    begin(output, 1, 2)
    assert len(curve(files(output)[-1], "loss/train")) == 2


def test_an_attempt_that_lost_the_folder_writes_nothing(tmp_path: Path) -> None:
    is_lost = False

    def check() -> None:
        if is_lost:
            raise LeaseLostError("taken over")

    stale = begin(OutputDir(tmp_path, check))
    newer = begin(OutputDir(tmp_path))
    newer.finish_epoch(line(1))
    before = {path: path.read_bytes() for path in files(OutputDir(tmp_path))}
    is_lost = True
    with pytest.raises(LeaseLostError):
        stale.finish_epoch(line(1))
    assert {path: path.read_bytes() for path in files(OutputDir(tmp_path))} == before


def test_a_deleted_file_is_an_error_and_not_created_again(tmp_path: Path) -> None:
    output = OutputDir(tmp_path)
    event_file = begin(output)
    files(output)[0].unlink()
    with pytest.raises(UserError, match=r"cannot write .*tfevents\.000001: No such file"):
        event_file.finish_epoch(line(1))
    assert files(output) == []


def test_a_folder_that_cannot_be_created_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("mine")
    with pytest.raises(UserError, match="tensorboard"):
        begin(OutputDir(tmp_path))
    assert (tmp_path / "tensorboard").read_text() == "mine"


def test_event_files_of_other_programs_are_kept(tmp_path: Path) -> None:
    output = OutputDir(tmp_path)
    output.make_folder("tensorboard")
    other = tmp_path / "tensorboard" / "events.out.tfevents.1700000000.host"
    other.write_text("not this job's")
    begin(output, 1)
    begin(output, 1, 2)
    output.discard()
    assert [path.name for path in (tmp_path / "tensorboard").iterdir()] == [other.name]
    assert other.read_text() == "not this job's"


def test_starting_over_discards_the_event_files_and_the_remains_of_a_kill(tmp_path: Path) -> None:
    output = OutputDir(tmp_path)
    begin(output, 1)
    half = tmp_path / "tensorboard" / ".events.out.tfevents.1234.partial.000002"
    half.write_bytes(b"half")
    output.tidy()
    assert len(files(output)) == 1
    output.discard()
    assert list(tmp_path.iterdir()) == []
