from dataclasses import replace
from typing import Any

import pytest

from job.cluster import devices
from job.cluster.devices import LocalDevices, Placement, place_replicas_on_all
from job.cluster.scheduler import ClusterSpec
from job.cluster.workers import Workers
from job.config import DeviceRequest, UserError
from tests.conftest import MakeDevices

SPEC = ClusterSpec(("n1:1", "n2:1"), 1)
CPUS = LocalDevices("cpu", ("CPU:0", "CPU:1"), ({"name": "CPU:0"}, {"name": "CPU:1"}), True)


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Place replicas on two workers, of which the first offers what is told."""

    def place_with(**first: Any) -> Placement:
        def gather(self: Workers, document: dict[str, Any]) -> list[dict[str, Any]]:
            return [document | first, document]

        monkeypatch.setattr(devices, "use_cpu", lambda count: CPUS)
        monkeypatch.setattr(devices, "rendezvous", lambda spec, create, seconds: None)
        monkeypatch.setattr(Workers, "gather", gather)
        monkeypatch.setattr(Workers, "leave", lambda self: None)
        return place_replicas_on_all(DeviceRequest("cpu", 2), SPEC, 1.0)

    return place_with


def test_replicas_of_all_workers_count_and_are_named(place: Any) -> None:
    placed = place()
    assert placed.replicas == 4
    assert [one["name"] for one in placed.descriptions] == [
        "worker 0 CPU:0",
        "worker 0 CPU:1",
        "worker 1 CPU:0",
        "worker 1 CPU:1",
    ]
    assert placed.computes_bfloat16


def test_one_worker_that_lacks_bfloat16_decides_for_all(place: Any) -> None:
    assert not place(computes_bfloat16=False).computes_bfloat16


@pytest.mark.parametrize(
    ("devices", "advice"), [("cpu:1", "--devices cpu:1"), ("gpu:2", "--devices cpu:1")]
)
def test_workers_with_other_devices_are_refused(place: Any, devices: str, advice: str) -> None:
    with pytest.raises(UserError) as caught:
        place(devices=devices)
    assert f"worker 0 (n1:1) {devices}, worker 1 (n2:1) cpu:2" in str(caught.value)
    assert str(caught.value).endswith(f"or say {advice}")


def test_a_worker_without_the_others_has_its_own_first_replica(make_devices: MakeDevices) -> None:
    descriptions = tuple({"name": name} for name in "abcd")
    placed = replace(
        make_devices(2).placement, descriptions=descriptions, workers=Workers(SPEC)
    ).without_other_workers()
    assert (placed.replicas, placed.local_names) == (1, ("CPU:0",))
    assert placed.descriptions == ({"name": "c"},)
