import importlib.util
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from job.config import (
    CIFAR10_URL,
    DeviceRequest,
    DownloadError,
    ExitCode,
    GpuMissingError,
    JobError,
    LostWorkerError,
    StoppedError,
    TrainConfig,
    UserError,
    describe_config,
    list_datasets,
    list_recipes,
    option_name,
    redact_url,
    run_options,
)
from tests.conftest import REPOSITORY


def test_device_requests_are_parsed() -> None:
    for text, kind, replicas in (("auto", "auto", 0), ("cpu:2", "cpu", 2), ("gpu:16", "gpu", 16)):
        request = DeviceRequest(text)
        assert (request, request.kind, request.replicas) == (text, kind, replicas)


@pytest.mark.parametrize(
    "text", ["", "cpu", "cpu:0", "cpu:-1", "tpu:1", "gpu:x", "gpu:1 ", "cpu:1000"]
)
def test_an_invalid_device_request_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="expected auto, cpu:N or gpu:N"):
        DeviceRequest(text)


def test_a_value_below_an_options_minimum_is_rejected() -> None:
    with pytest.raises(ValueError, match="batch_size is 0, expected at least 1"):
        TrainConfig(batch_size=0)
    assert TrainConfig(limit=None).limit is None


def test_errors_carry_the_documented_exit_codes() -> None:
    errors = (JobError, UserError, GpuMissingError, StoppedError, LostWorkerError, DownloadError)
    assert [error.exit_code for error in errors] == [1, 2, 3, 75, 75, 75]
    assert [code.value for code in ExitCode] == [0, 1, 2, 3, 75]


def test_recipes_and_data_sets_are_the_modules_of_their_folders(tmp_path: Path) -> None:
    assert (list_recipes(), list_datasets()) == (("classic", "fast"), ("cifar10", "synthetic"))
    # In a copy of the program, next to files that an editor leaves.
    (tmp_path / "config.py").write_bytes((REPOSITORY / "job" / "config.py").read_bytes())
    (tmp_path / "recipes").mkdir()
    for name in ("yours.py", "mine.py", "__init__.py", "_augment.py", "mine.py~", "notes.md"):
        (tmp_path / "recipes" / name).touch()
    (tmp_path / "recipes" / ".#mine.py").symlink_to("nowhere")
    spec = importlib.util.spec_from_file_location("copy_of_config", tmp_path / "config.py")
    assert spec
    assert spec.loader
    copy = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, copy)
        spec.loader.exec_module(copy)
    assert copy.list_recipes() == ("mine", "yours")


def test_a_configuration_is_described_by_its_options_as_json_values() -> None:
    address = "https://me:secret@mirror/c.tar.gz"
    config = TrainConfig(Path("out"), cifar10_url=address, devices=DeviceRequest("cpu:2"))
    described = describe_config(config)
    assert list(described) == [field.name for field in fields(TrainConfig)]
    assert (described["output_dir"], described["devices"]) == ("out", "cpu:2")
    assert (described["batch_size"], described["limit"], described["fresh"]) == (256, None, False)
    assert described["cifar10_url"] == "https://REMOVED@mirror/c.tar.gz"
    assert option_name("batch_size") == "--batch-size"


def test_other_folders_and_times_are_still_the_same_run() -> None:
    config = TrainConfig()
    others = replace(config, output_dir=Path("b"), epochs=3, stall_timeout=5, jit="off", fresh=True)
    assert run_options(others) == run_options(config)
    changed = replace(config, seed=1, limit=512, batch_size=128, dataset="synthetic")
    assert run_options(changed) == {
        **run_options(config),
        **{"seed": 1, "limit": 512, "batch_size": 128, "dataset": "synthetic"},
    }


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (CIFAR10_URL, CIFAR10_URL),
        ("https://me:secret@mirror:8080/c.tar.gz", "https://REMOVED@mirror:8080/c.tar.gz"),
        ("https://me@mirror/c.tar.gz", "https://REMOVED@mirror/c.tar.gz"),
        ("https://a@b:secret@mirror/c", "https://REMOVED@mirror/c"),
        ("me:secret@mirror/c", "REMOVED@mirror/c"),
        ("https://mirror/a@b.tar.gz", "https://mirror/a@b.tar.gz"),
        ("https://mirror/c?token=secret&x=1", "https://mirror/c?REMOVED"),
        ("https://mirror/c#secret", "https://mirror/c#REMOVED"),
        ("https://mirror/c?a=secret\nsecret", "https://mirror/c?REMOVED"),
        ("", ""),
    ],
)
def test_credentials_are_removed_from_an_address(url: str, shown: str) -> None:
    assert redact_url(url) == shown
    assert redact_url(shown) == shown
