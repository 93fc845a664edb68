import errno
import os
from pathlib import Path

import pytest

from job import log
from job.config import UserError
from job.run.folder import (
    MODEL,
    OutputDir,
    prepare_output_dir,
    refused,
    require_model,
    warn_unless_mounted,
)
from job.run.lease import LeaseLostError


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_output_folder_is_created_and_left_empty(tmp_path: Path) -> None:
    prepare_output_dir(tmp_path / "a" / "b", make=False)
    assert listing(tmp_path) == []
    prepare_output_dir(tmp_path / "a" / "b")
    assert listing(tmp_path / "a" / "b") == []


def test_an_output_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="is a file, expected a folder"):
        prepare_output_dir(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_an_output_folder_with_an_impossible_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write to --output-dir"):
        prepare_output_dir(tmp_path / ("x" * 300))


@pytest.mark.parametrize(
    ("mount_point", "is_lost"),
    [
        ("/", True),
        ("/o", True),
        ("/a out", False),
        ("/a out/put", False),
        ("/a out/put\udcff", True),
        ("/a out/put/below", True),
    ],
)
def test_a_folder_that_is_not_on_a_volume_causes_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mount_point: str, is_lost: bool
) -> None:
    table, escaped = tmp_path / "mountinfo", mount_point.replace(" ", r"\040")
    table.write_bytes(
        os.fsencode(
            "21 1 0:20 / / rw,relatime - overlay overlay rw\n"
            f"22 21 8:1 /home/user/output {escaped} rw,relatime - ext4 /dev/sda1 rw\n"
        )
    )
    log.configure("text")
    warn_unless_mounted(Path("/a out/put"), table)
    output = capsys.readouterr().out
    assert ("is not on a mounted volume: its contents are lost" in output) == is_lost


def test_a_missing_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no model file .*; train a model first"):
        require_model(tmp_path / "model.h5")
    (tmp_path / "model.h5").write_text("model")
    require_model(tmp_path / "model.h5")
    for name in ("demo", "train"):
        (tmp_path / name).mkdir()
        (tmp_path / name / MODEL).touch()
    advice = f"use --output-dir {tmp_path}/demo or {tmp_path}/train$"
    with pytest.raises(UserError, match=advice):
        require_model(tmp_path / MODEL)


def test_a_failed_write_leaves_the_earlier_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    OutputDir(tmp_path).write_text("file.txt", "whole")
    output = OutputDir(tmp_path)
    with pytest.raises(RuntimeError), output.atomic_write("file.txt") as temporary:  # noqa: PT012
        temporary.write_text("ha")
        assert path.read_text() == "whole"
        raise RuntimeError("killed while writing")
    assert path.read_text() == "whole"
    assert listing(tmp_path) == ["file.txt"]


def test_a_write_that_the_system_refuses_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "gone" / "file.txt"
    with pytest.raises(UserError, match=f"cannot write {path}: No such file or directory"):
        OutputDir(tmp_path).write_text("gone/file.txt", "text")
    with pytest.raises(UserError, match=f"cannot write {path}: No such file or directory"):
        OutputDir(tmp_path).append_bytes("gone/file.txt", b"text")


def test_each_error_of_the_system_has_its_own_advice(tmp_path: Path) -> None:
    for number, advice in (
        (errno.ENOSPC, "free some space, then"),
        (errno.EDQUOT, "free some space, or ask for a larger quota, then"),
        (errno.EFBIG, "raise the limit on file sizes (ulimit -f), then"),
        (errno.EROFS, "mount the volume writable, then"),
        (errno.EACCES, f"give user {os.getuid()} access, or run as"),
        (errno.EIO, "fix the volume, then"),
        (errno.EINVAL, "fix the path or the volume, then"),
    ):
        error = refused("write", tmp_path, OSError(number, os.strerror(number)))
        assert str(error).startswith(f"cannot write {tmp_path}: {os.strerror(number)}; {advice}")


def test_a_volume_without_fsync_causes_one_warning_and_a_broken_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def writing_while(name: str, number: int) -> None:
        def refuse(*_arguments: object) -> None:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(os, name, refuse)
            OutputDir(tmp_path).write_text("file.txt", "text")
            OutputDir(tmp_path).append_bytes("file.txt", b"more")

    log.configure("text")
    for name, number in (
        *(("fsync", number) for number in (errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF)),
        *(("open", number) for number in (errno.EACCES, errno.EISDIR)),
    ):
        writing_while(name, number)
        assert (tmp_path / "file.txt").read_text() == "textmore"
    assert capsys.readouterr().out.count("does not support fsync") == 1
    for number in (errno.EIO, errno.ENOSPC):
        with pytest.raises(UserError, match=os.strerror(number)):
            writing_while("fsync", number)


def test_a_volume_that_does_not_report_its_free_space_is_not_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_path: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(os, "statvfs", refuse)
    prepare_output_dir(tmp_path)


def test_partial_files_of_killed_processes_are_removed(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".x.deadbeef.partial.npz").write_text("half")
    (tmp_path / ".file.deadbeef.partial.txt").write_text("half")
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / ".x.deadbeef.partial.png").write_text("half")
    (tmp_path / ".discarded.deadbeef").mkdir()
    (tmp_path / ".discarded.deadbeef" / "old.npz").write_text("old")
    (tmp_path / ".mine").write_text("whole")
    OutputDir(tmp_path).tidy()
    assert listing(tmp_path) == [".mine", "checkpoints", "report"]
    assert listing(tmp_path / "checkpoints") == listing(tmp_path / "report") == []


def test_discarding_keeps_files_that_are_not_the_jobs(tmp_path: Path) -> None:
    for name in ("report", "tensorboard", "checkpoints"):
        (tmp_path / name).mkdir()
    for name in (
        *("cifar10_model.h5", "evaluation.json", "prediction.png", "predictions.npz", "run.json"),
        *("metrics.jsonl", "report.html", "report/accuracy.png", "checkpoints/old.npz"),
        "tensorboard/events.out.tfevents.000001",
    ):
        (tmp_path / name).write_text("old")
    for name in ("notes.txt", "report/mine.png"):
        (tmp_path / name).write_text("mine")
    OutputDir(tmp_path).discard()
    assert listing(tmp_path) == ["notes.txt", "report"]
    assert listing(tmp_path / "report") == ["mine.png"]


def test_a_folder_that_was_taken_over_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("theirs")
    taken = False

    def check() -> None:
        if taken:
            raise LeaseLostError("taken over")

    output = OutputDir(tmp_path, check, "deadbeef")
    with pytest.raises(LeaseLostError), output.atomic_write("file.txt") as temporary:  # noqa: PT012
        temporary.write_text("mine")
        taken = True
    with pytest.raises(LeaseLostError):
        output.write_text("file.txt", "mine")
    with pytest.raises(LeaseLostError):
        output.append_bytes("file.txt", b"mine")
    with pytest.raises(LeaseLostError):
        output.remove([tmp_path / "file.txt"])
    with pytest.raises(LeaseLostError):
        output.discard()
    assert listing(tmp_path) == ["file.txt"]
    assert (tmp_path / "file.txt").read_text() == "theirs"
