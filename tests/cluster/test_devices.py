from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import tensorflow as tf

from job.cluster import Device, Environment, devices
from job.cluster.devices import Devices, open_devices_of_all, open_visible_devices
from job.cluster.scheduler import ClusterSpec
from job.cluster.workers import Workers
from job.config import DeviceRequest, TrainConfig, UserError
from tests.conftest import MakeDevices

PREVIOUS = Environment(
    device_kind="cpu",
    device_models=["cpu"],
    replicas=2,
    threads=2,
    precision="bfloat16",
    jit="off",
    deterministic=False,
    versions={},
    git_commit=None,
    variables={},
)


def test_more_gpus_than_exist_are_a_user_error() -> None:
    with pytest.raises(
        UserError, match=r"--devices received gpu:99, expected at most \d+, .* detects;"
    ):
        open_visible_devices(TrainConfig(devices=DeviceRequest("gpu:99")))


def test_rows_per_replica(make_devices: MakeDevices) -> None:
    assert make_devices(4).rows_per_replica(256) == 64
    with pytest.raises(UserError, match="use 12 or another multiple"):
        make_devices(4).rows_per_replica(10)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Open devices on a machine with some GPUs, or none, without setting up any device."""

    def describe(count: int, model: str) -> tuple[Device, ...]:
        compute_capability = {"new": (8, 0), "old": (7, 5)}.get(model, ())
        return (Device("a device", model, None, compute_capability),) * count

    def open_with(
        gpus: int, model: str, request: str, previous: Environment | None = None, **options: Any
    ) -> Devices:
        monkeypatch.setattr(devices, "visible_gpus", lambda: ["GPU"] * gpus)
        monkeypatch.setattr(devices, "use_gpus", lambda used: describe(len(used), model))
        monkeypatch.setattr(devices, "use_cpu", lambda count: describe(count, "cpu"))
        monkeypatch.setattr(tf.distribute, "MirroredStrategy", lambda names: None)
        monkeypatch.setattr(tf.config.experimental, "enable_op_determinism", lambda: None)
        config = TrainConfig(devices=DeviceRequest(request), **options)
        return open_visible_devices(config, previous)

    return open_with


def test_auto_uses_every_gpu_and_is_deterministic_on_cpus(opened: Any) -> None:
    gpus = opened(4, "new", "auto")
    assert (gpus.kind, gpus.replicas, gpus.precision) == ("gpu", 4, "bfloat16")
    assert (gpus.deterministic, gpus.compilation.network) == (False, True)
    # Collectives stay outside XLA, so the loop is compiled only for a single replica.
    assert not gpus.compilation.loops
    assert opened(1, "new", "auto").compilation.loops
    cpu = opened(0, "", "auto")
    assert (cpu.kind, cpu.replicas) == ("cpu", 1)
    assert (cpu.deterministic, cpu.compilation.network) == (True, False)


@pytest.mark.parametrize(
    ("gpus", "precision", "in_tf32"),
    [(1, "float32", True), (1, "bfloat16", False), (0, "float32", False)],
)
def test_only_a_training_in_float32_on_gpus_computes_in_tf32(
    opened: Any, gpus: int, precision: str, in_tf32: bool
) -> None:
    is_enabled = tf.config.experimental.tensor_float_32_execution_enabled
    before = is_enabled()
    try:
        opened(gpus, "new", "auto", precision=precision)
        assert is_enabled() == in_tf32
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(before)


def test_auto_keeps_the_settings_of_the_previous_attempt(opened: Any) -> None:
    cpu = opened(0, "", "auto", PREVIOUS)
    assert (cpu.replicas, cpu.precision, cpu.jit) == (2, "bfloat16", "off")
    assert not cpu.deterministic
    assert not cpu.compilation.elementwise


def test_threads_are_those_of_tensorflows_setting(
    opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TF_NUM_INTRAOP_THREADS", "3")
    assert opened(0, "", "auto").threads == 3


def test_an_explicit_setting_of_this_attempt_wins(opened: Any) -> None:
    settings = {"precision": "float32", "jit": "on", "deterministic": "on"}
    cpu = opened(0, "", "cpu:1", PREVIOUS, **settings)
    assert (cpu.replicas, cpu.precision, cpu.jit, cpu.deterministic) == (1, "float32", "on", True)


def test_a_run_resumes_with_the_gpus_of_the_next_node(opened: Any) -> None:
    gpus = opened(3, "new", "auto", PREVIOUS)
    assert (gpus.kind, gpus.replicas) == ("gpu", 2)  # 256 is not divisible by 3
    assert not gpus.deterministic
    on_gpus = msgspec.structs.replace(PREVIOUS, device_kind="gpu", replicas=4)
    assert opened(8, "new", "auto", on_gpus).replicas == 4
    assert opened(3, "new", "auto", on_gpus).replicas == 2
    assert opened(8, "new", "gpu:8", on_gpus).replicas == 8
    # GPUs that cannot compute in bfloat16 do not keep it.
    assert opened(1, "old", "auto", PREVIOUS).precision == "float32"


TWO_WORKERS = ClusterSpec(("n1:1", "n2:1"), 1)
CPUS = (Device("CPU:0"), Device("CPU:1"))
ALL_CPUS = tuple(Device(f"worker {rank} {device.name}") for rank in range(2) for device in CPUS)


@pytest.fixture
def opened_of_all(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Open two CPU devices on each of two workers, with the given changes to their offers."""

    def open_with(*offers: dict[str, Any], replicas_in_sync: int = 4) -> Devices:
        def gather(self: Workers, own: Any) -> list[Any]:
            return [msgspec.structs.replace(own, **offer) for offer in offers]

        def connect(*_arguments: object) -> Any:
            return SimpleNamespace(num_replicas_in_sync=replicas_in_sync)

        monkeypatch.setattr(devices, "use_cpu", lambda count: CPUS)
        monkeypatch.setattr(devices, "rendezvous", connect)
        monkeypatch.setattr(Workers, "gather", gather)
        monkeypatch.setattr(Workers, "shutdown", lambda self: None)
        return open_devices_of_all(TrainConfig(devices=DeviceRequest("cpu:2")), TWO_WORKERS)

    return open_with


def test_replicas_of_all_workers_count_and_are_named(opened_of_all: Any) -> None:
    opened = opened_of_all({}, {})
    assert opened.replicas == 4
    assert opened.descriptions == ALL_CPUS


def test_one_worker_that_lacks_bfloat16_decides_for_all(opened_of_all: Any) -> None:
    has, lacks = {"computes_bfloat16": True}, {"computes_bfloat16": False}
    assert opened_of_all(has, has).computes_bfloat16
    assert not opened_of_all(has, lacks).computes_bfloat16


@pytest.mark.parametrize(
    ("kinds", "count", "listed", "advice"),
    [
        (("cpu", "cpu"), 1, "worker 0 (n1:1) cpu:1, worker 1 (n2:1) cpu:2", "cpu:1"),
        (("gpu", "cpu"), 2, "worker 0 (n1:1) gpu:2, worker 1 (n2:1) cpu:2", "cpu:1"),
        (("gpu", "gpu"), 1, "worker 0 (n1:1) gpu:1, worker 1 (n2:1) gpu:2", "gpu:1"),
    ],
)
def test_workers_with_other_devices_are_refused(
    opened_of_all: Any, kinds: tuple[str, str], count: int, listed: str, advice: str
) -> None:
    with pytest.raises(UserError) as caught:
        opened_of_all({"kind": kinds[0], "devices": CPUS[:count]}, {"kind": kinds[1]})
    assert listed in str(caught.value)
    assert str(caught.value).endswith(f"or pass --devices {advice}")


def test_several_cpu_replicas_per_worker_are_refused_if_tensorflow_uses_one(
    opened_of_all: Any,
) -> None:
    with pytest.raises(UserError) as caught:
        opened_of_all({}, {}, replicas_in_sync=2)
    assert str(caught.value).startswith("--devices received cpu:2 with 2 workers, expected cpu:1")


def test_a_worker_without_the_others_uses_its_own_first_replica(make_devices: MakeDevices) -> None:
    of_all = replace(
        make_devices(2), descriptions=tuple(map(Device, "abcd")), workers=Workers(TWO_WORKERS)
    )
    alone = of_all.without_other_workers()
    assert (alone.replicas, alone.local_names, alone.workers.count) == (1, ("CPU:0",), 1)
    assert alone.descriptions == (Device("c"),)
