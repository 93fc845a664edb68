from dataclasses import replace
from typing import Any, Literal

import pytest
import tensorflow as tf

from job.cluster import devices
from job.cluster.devices import Devices, LocalDevices, Previous, open_devices
from job.config import DeviceRequest, UserError
from tests.conftest import MakeDevices

PREVIOUS = Previous(
    kind="cpu",
    replicas=2,
    precision="bfloat16",
    jit="off",
    deterministic=False,
    global_batch_size=256,
)


def test_more_gpus_than_there_are_is_the_users_to_change() -> None:
    with pytest.raises(UserError, match=r"--devices received gpu:99, expected at most the \d+"):
        open_devices(DeviceRequest("gpu", 99), "auto", "auto")


def test_rows_per_replica(make_devices: MakeDevices) -> None:
    assert make_devices(4).rows_per_replica(256) == 64
    with pytest.raises(UserError, match="use 12 or another multiple"):
        make_devices(4).rows_per_replica(10)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Open devices on a machine with some GPUs, or none, without setting any up."""

    def use(count: int, kind: Literal["cpu", "gpu"], model: str) -> LocalDevices:
        names = tuple(f"{kind.upper()}:{index}" for index in range(count))
        return LocalDevices(kind, names, ({"model": model},) * count, model == "new")

    def open_with(gpus: int, model: str, *settings: Any, **options: Any) -> Devices:
        monkeypatch.setattr(devices, "visible_gpus", lambda: ["GPU"] * gpus)
        monkeypatch.setattr(devices, "use_gpus", lambda used: use(len(used), "gpu", model))
        monkeypatch.setattr(devices, "use_cpu", lambda count: use(count, "cpu", "cpu"))
        monkeypatch.setattr(tf.distribute, "MirroredStrategy", lambda names: None)
        monkeypatch.setattr(tf.config.experimental, "enable_op_determinism", lambda: None)
        return open_devices(DeviceRequest.parse(settings[0]), *settings[1:], **options)

    return open_with


def test_auto_takes_every_gpu_and_is_deterministic_on_cpus(opened: Any) -> None:
    gpus = opened(4, "new", "auto", "auto", "auto")
    assert (gpus.kind, gpus.replicas, gpus.precision) == ("gpu", 4, "bfloat16")
    assert (gpus.deterministic, gpus.compilation.network) == (False, True)
    # Collectives stay outside of XLA, so only a single replica's loop is compiled.
    assert not gpus.compilation.loops
    assert opened(1, "new", "auto", "auto", "auto").compilation.loops
    cpu = opened(0, "", "auto", "auto", "auto")
    assert (cpu.kind, cpu.replicas) == ("cpu", 1)
    assert (cpu.deterministic, cpu.compilation.network) == (True, False)


def test_auto_keeps_what_the_attempt_before_came_to(opened: Any) -> None:
    cpu = opened(0, "", "auto", "auto", "auto", previous=PREVIOUS)
    assert (cpu.replicas, cpu.precision, cpu.jit, cpu.deterministic) == (
        2,
        "bfloat16",
        "off",
        False,
    )
    assert not cpu.compilation.elementwise


def test_threads_are_those_that_tensorflow_is_told(
    opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TF_NUM_INTRAOP_THREADS", "3")
    assert opened(0, "", "auto", "auto", "auto").threads == 3


def test_a_setting_of_this_attempt_wins(opened: Any) -> None:
    cpu = opened(0, "", "cpu:1", "float32", "on", "on", PREVIOUS)
    assert (cpu.replicas, cpu.precision, cpu.jit, cpu.deterministic) == (1, "float32", "on", True)


def test_a_run_goes_on_with_the_gpus_that_the_next_node_has(opened: Any) -> None:
    gpus = opened(3, "new", "auto", "auto", "auto", previous=PREVIOUS)
    assert (gpus.kind, gpus.replicas) == ("gpu", 2)  # 256 does not divide by 3
    assert not gpus.deterministic
    on_gpus = replace(PREVIOUS, kind="gpu", replicas=4)
    assert opened(8, "new", "auto", "auto", "auto", previous=on_gpus).replicas == 4
    assert opened(3, "new", "auto", "auto", "auto", previous=on_gpus).replicas == 2
    assert opened(8, "new", "gpu:8", "auto", "auto", previous=on_gpus).replicas == 8
    # GPUs that cannot compute in bfloat16 do not keep it.
    assert opened(1, "old", "auto", "auto", "auto", previous=PREVIOUS).precision == "float32"
