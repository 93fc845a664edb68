from pathlib import Path
from typing import cast

import pytest

from job.config import UserError
from job.run.folder import OutputDir
from job.run.lease import Lease, LeaseLostError


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_failed_write_leaves_the_earlier_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    OutputDir(tmp_path).write_text("file.txt", "whole")
    output = OutputDir(tmp_path)
    with pytest.raises(RuntimeError), output.replacing("file.txt") as temporary:  # noqa: PT012
        temporary.write_text("ha")
        assert path.read_text() == "whole"
        raise RuntimeError("killed while writing")
    assert path.read_text() == "whole"
    assert listing(tmp_path) == ["file.txt"]


def test_a_write_that_the_system_refuses_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "gone" / "file.txt"
    with pytest.raises(UserError, match=f"cannot write {path}: No such file or directory"):
        OutputDir(tmp_path).write_text("gone/file.txt", "text")


def test_what_a_killed_process_left_is_tidied_away(tmp_path: Path) -> None:
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


def test_discarding_keeps_what_is_not_the_jobs(tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    for name in (
        *("cifar10_model.h5", "evaluation.json", "prediction.png", "predictions.npz"),
        *("metrics.jsonl", "report.html", "report/accuracy.png"),
    ):
        (tmp_path / name).write_text("old")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "old.npz").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    OutputDir(tmp_path).discard()
    assert listing(tmp_path) == ["notes.txt"]


def test_discarding_keeps_somebodys_files_beside_the_reports_pictures(tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    for name in ("accuracy.png", "mine.png"):
        (tmp_path / "report" / name).write_text("content")
    OutputDir(tmp_path).discard()
    assert listing(tmp_path / "report") == ["mine.png"]


def test_a_folder_that_was_taken_over_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("theirs")

    class LostLease:
        token = "deadbeef"

        def check(self) -> None:
            raise LeaseLostError("taken over")

    output = OutputDir(tmp_path, cast(Lease, LostLease()))
    with pytest.raises(LeaseLostError):
        output.write_text("file.txt", "mine")
    with pytest.raises(LeaseLostError):
        output.remove([tmp_path / "file.txt"])
    with pytest.raises(LeaseLostError):
        output.discard()
    assert listing(tmp_path) == ["file.txt"]
    assert (tmp_path / "file.txt").read_text() == "theirs"
