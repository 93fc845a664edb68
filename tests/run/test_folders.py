from pathlib import Path

import pytest

from job import log
from job.config import UserError
from job.run.folder import (
    prepare_output_dir,
    require_folder_for,
    require_model,
    warn_unless_mounted,
)


def test_an_output_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    prepare_output_dir(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


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
        ("/a out/put/below", True),
    ],
)
def test_a_folder_on_no_volume_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mount_point: str, is_lost: bool
) -> None:
    table, escaped = tmp_path / "mountinfo", mount_point.replace(" ", r"\040")
    table.write_text(
        "21 1 0:20 / / rw,relatime - overlay overlay rw\n"
        f"22 21 8:1 /home/user/output {escaped} rw,relatime - ext4 /dev/sda1 rw\n"
    )
    log.configure("text")
    warn_unless_mounted(Path("/a out/put"), table)
    said = capsys.readouterr().out
    assert ("is no mounted volume: everything in it is lost" in said) == is_lost


def test_a_folder_that_need_not_be_made_is_not(tmp_path: Path) -> None:
    prepare_output_dir(tmp_path / "a" / "b", make=False)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no model .*; train one first"):
        require_model(tmp_path / "model.h5")
    (tmp_path / "model.h5").write_text("model")
    require_model(tmp_path / "model.h5")


def test_a_picture_that_could_not_be_written_is_refused(tmp_path: Path) -> None:
    require_folder_for(tmp_path / "a.PNG")
    with pytest.raises(UserError, match=r"expected a name that ends in \.png"):
        require_folder_for(tmp_path / "a.jpg")
    with pytest.raises(UserError, match="expected a file in a folder that user"):
        require_folder_for(tmp_path / "nowhere" / "a.png")
