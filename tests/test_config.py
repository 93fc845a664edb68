from pathlib import Path

import pytest

from job.config import (
    DeviceRequest,
    ExitCode,
    GpuMissingError,
    JobError,
    UserError,
    modules_that_define,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("auto", DeviceRequest("auto", 0)),
        ("cpu:2", DeviceRequest("cpu", 2)),
        ("gpu:16", DeviceRequest("gpu", 16)),
    ],
)
def test_device_request_parses(text: str, expected: DeviceRequest) -> None:
    assert DeviceRequest.parse(text) == expected


@pytest.mark.parametrize(
    "text", ["", "cpu", "cpu:0", "cpu:-1", "tpu:1", "gpu:x", "gpu:1 ", "cpu:1000"]
)
def test_device_request_refuses_anything_else(text: str) -> None:
    with pytest.raises(ValueError, match="expected auto, cpu:N or gpu:N"):
        DeviceRequest.parse(text)


def test_errors_carry_the_documented_exit_codes() -> None:
    assert (JobError.exit_code, UserError.exit_code, GpuMissingError.exit_code) == (1, 2, 3)
    assert [code.value for code in ExitCode] == [0, 1, 2, 3, 75]


def test_recipes_are_found_beside_what_an_editor_leaves(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("RECIPE: Recipe = Recipe()\n")
    (tmp_path / "yours.py").write_text("RECIPE = Recipe()\n")
    (tmp_path / "other.py").write_text("RECIPES = ()\nif RECIPE == 1: pass\n")
    (tmp_path / ".#mine.py").symlink_to("nowhere")
    (tmp_path / "._mine.py").write_bytes(b"\xff\x00")
    assert modules_that_define("RECIPE", tmp_path) == ("mine", "yours")
