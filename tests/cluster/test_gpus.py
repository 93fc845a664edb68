import re
from pathlib import Path

import pytest

from job.cluster import gpus
from job.cluster.gpus import (
    ExpectedGpus,
    check_expected_gpus,
    cuda_libraries,
    driver_version,
    expected_gpus,
    xla_tools,
)
from job.config import GpuMissingError, UserError


@pytest.mark.parametrize(
    ("environ", "nodes", "count"),
    [
        ({}, [], 0),
        ({}, ["nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "nvidia-caps"], 2),
        ({"NVIDIA_VISIBLE_DEVICES": "all"}, [], 0),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2"}, [], 3),
        ({"CUDA_VISIBLE_DEVICES": "1"}, ["nvidia0", "nvidia1"], 1),
        ({"CUDA_VISIBLE_DEVICES": "0,-1,2"}, [], 1),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8932f937-d72c"}, [], 1),
        ({"CUDA_VISIBLE_DEVICES": "MIG-GPU-8932/1/0"}, [], 1),
        ({"CUDA_VISIBLE_DEVICES": ""}, ["nvidia0"], 0),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, ["nvidia0"], 0),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, ["nvidia0"], 0),
        ({"SLURM_GPUS_ON_NODE": "4"}, [], 4),
        ({"SLURM_GPUS_ON_NODE": "0"}, ["nvidia0"], 1),
        ({"SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "0"}, [], 1),
        ({"SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "NoDevFiles"}, [], 4),
    ],
)
def test_expected_gpus(
    tmp_path: Path, environ: dict[str, str], nodes: list[str], count: int
) -> None:
    for node in nodes:
        (tmp_path / node).touch()
    assert expected_gpus(environ, tmp_path).count == count


def test_an_invalid_number_of_gpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="SLURM_GPUS_ON_NODE received 'gpu:2', expected a number"):
        expected_gpus({"SLURM_GPUS_ON_NODE": "gpu:2"}, tmp_path)


def test_missing_gpus_are_named_with_their_source() -> None:
    expected = ExpectedGpus(2, "SLURM_GPUS_ON_NODE=2")
    check_expected_gpus(expected, visible=2, required=2)
    message = r"expected 2 GPUs \(SLURM_GPUS_ON_NODE=2\), TensorFlow detects 1"
    with pytest.raises(GpuMissingError, match=message):
        check_expected_gpus(expected, visible=1, required=0)
    with pytest.raises(GpuMissingError, match=r"--require-gpus expected 1 GPU, .* detects 0"):
        check_expected_gpus(expected, visible=0, required=1)
    with pytest.raises(GpuMissingError, match=r"--require-gpus expected 4 GPUs, .* detects 2"):
        check_expected_gpus(expected, visible=2, required=4)


def test_libraries_are_located_by_name() -> None:
    names = cuda_libraries().keys()
    assert {"libcuda.so.1", "libcudnn.so.9", "libnccl.so.2"} <= set(names)
    assert all(re.fullmatch(r"lib\w+\.so\.\d+", name) for name in names)


def test_a_missing_driver_is_the_only_library_that_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    libraries = {"libcuda.so.1": None, "libcudnn.so.9": None}
    monkeypatch.setattr(gpus, "cuda_libraries", lambda: libraries)
    with pytest.raises(
        GpuMissingError, match=r"libcuda\.so\.1: .* no NVIDIA driver, .*--gpus"
    ) as end:
        check_expected_gpus(ExpectedGpus(0, "nothing"), visible=0, required=1)
    assert "libcudnn" not in str(end.value)
    monkeypatch.setattr(
        gpus, "cuda_libraries", lambda: {"libcudnn.so.9": None, "libnccl.so.2": "found"}
    )
    with pytest.raises(GpuMissingError, match=r"\(cannot find libcudnn\.so\.9\)"):
        check_expected_gpus(ExpectedGpus(0, "nothing"), visible=0, required=1)


def test_the_assembler_is_located_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [*xla_tools()] == ["ptxas", "libdevice.10.bc"]
    assembler = tmp_path / "ptxas"
    assembler.write_text("#!/bin/sh\n")
    assembler.chmod(0o755)
    assert xla_tools()["ptxas"] == str(assembler)


def test_the_drivers_version_comes_from_the_kernel(tmp_path: Path) -> None:
    version = tmp_path / "version"
    assert driver_version(version) is None
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15")
    assert "550.54.15" in str(driver_version(version))
