import os
from pathlib import Path
from typing import Any

import pytest

from job.config import UserError
from job.data.image_files import STDIN, ImageFile, find_images, require_no_source


def test_folders_are_walked_in_order_past_what_is_hidden_or_no_image(tmp_path: Path) -> None:
    names = ["b/2.png", "b/10.jpg", "b/c/1.webp", "a.JPEG", "c.mpo"]
    others = [".hidden.png", ".cache/1.png", "README.md", "cifar10_model.h5", "b/labels", "x.pdf"]
    for name in (*names, *others):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop").symlink_to(tmp_path)
    root = str(tmp_path)
    sorted_names = ["a.JPEG", "b/10.jpg", "b/2.png", "b/c/1.webp", "c.mpo"]
    assert find_images([root]) == [ImageFile(f"{root}/{name}") for name in sorted_names]
    given = ["notes.txt", f"{root}/b", "-"]
    assert [source.name for source in find_images(given)] == [
        "notes.txt",
        *(f"{root}/b/{name}" for name in ("10.jpg", "2.png", "c/1.webp")),
        "-",
    ]


def test_a_folder_without_images_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    (source,) = find_images([str(tmp_path)])
    assert source.problem == "no file in this folder has the suffix of an image format"


def test_a_folder_that_cannot_be_read_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "open.png").touch()
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if path.endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr("os.scandir", refuse)  # root may read every folder
    closed, opened = find_images([str(tmp_path)])
    assert closed == ImageFile(f"{tmp_path}/closed", "Permission denied")
    assert opened.problem is None


def test_a_picture_replaces_no_image_however_it_is_spelt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png"):
        Path(name).touch()
    (tmp_path / "link.png").symlink_to("a.png")
    for target in ("a.png", "./a.png", str(tmp_path / "a.png"), "link.png"):
        with pytest.raises(UserError) as error:
            require_no_source(
                Path(target), [ImageFile("b.png"), ImageFile("../" + tmp_path.name + "/a.png")]
            )
        assert f"received --png {Path(target)}, which is the image ../" in str(error.value)
    with Path("a.png").open() as file:
        standard_input = os.dup(0)
        os.dup2(file.fileno(), 0)
        try:
            with pytest.raises(UserError, match="which is the image - to be"):
                require_no_source(Path("a.png"), [ImageFile(STDIN)])
        finally:
            os.dup2(standard_input, 0)
            os.close(standard_input)
    for target in ("a.png", "new.png"):
        require_no_source(
            Path(target), [ImageFile("b.png"), ImageFile("missing.png"), ImageFile("\0")]
        )
