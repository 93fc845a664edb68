"""The Job's Pod in podman: evicted, restarted on the same volumes, and its artifacts fetched.

podman 4.3 differs from Kubernetes: every emptyDir, even /dev/shm, is a folder on disk, and fsGroup,
the grace period and seccompProfile are ignored (podman uses its own default profile).
"""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import REPOSITORY
from tests.integration.containers import HERE, podman
from tests.k8s.manifests import (
    Manifest,
    container_of,
    copy_repository,
    fetch_pod,
    make,
    of_kind,
    only,
)

UID = "6a41c0ac-5a6b-4f6e-9d2e-0f4f2f1c7a11"
CONTAINER = "cifar10-cifar10"

KUBECTL = """#!/bin/sh -e
export CONTAINERS_CONF={config}
case $1 in
  apply) podman kube play {pod} ;;
  wait) ;;
  exec) shift 3; exec podman exec cifar10-fetch-cifar10 "$@" ;;
  delete) podman pod rm --force --ignore --time 0 "$3" ;;
esac
"""


def job_yaml() -> list[Manifest]:
    return list(yaml.safe_load_all((REPOSITORY / "k8s" / "job.yaml").read_text()))


def run(*args: str | Path) -> str:
    result = podman(*map(str, args))
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def pod_of(job: Manifest, image: str) -> Manifest:
    """The Pod that Kubernetes creates, except for the image, the GPU and the size of the run."""
    template = job["spec"]["template"]
    container = container_of(template["spec"])
    container["image"] = image
    container["args"][container["args"].index("--require-gpus") + 1] = "0"
    container["args"] += ["--epochs", "3", "--limit", "768"]
    for resources in container["resources"].values():
        del resources["nvidia.com/gpu"]
    # The Job controller adds this label.
    labels = {**template["metadata"]["labels"], "batch.kubernetes.io/controller-uid": UID}
    metadata = {"name": job["metadata"]["name"], "labels": labels}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def wait_for_an_epoch() -> None:
    deadline = time.monotonic() + 300
    while '"event": "epoch"' not in podman("logs", CONTAINER).stdout:
        running = run("inspect", "--format", "{{.State.Running}}", CONTAINER) == "true"
        assert running, podman("logs", CONTAINER)
        assert time.monotonic() < deadline, "no epoch within five minutes"
        time.sleep(0.2)


@dataclass
class Played:
    """Results of two Pods of one Job.

    Attributes:
        exit_codes: Exit codes of the evicted Pod and its replacement.
        inspected: Settings of the first container.
        output: Folder of the output volume.
    """

    exit_codes: tuple[int, int]
    inspected: dict[str, Any]
    output: Path


@pytest.fixture(scope="module")
def volumes(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """The folders of the volumes for the claims in the manifest, by name."""
    claims = tmp_path_factory.mktemp("claims") / "claims.yaml"
    volumes = of_kind("PersistentVolumeClaim", job_yaml())
    claims.write_text(yaml.safe_dump_all(volumes))
    run("kube", "play", claims)  # fails if volumes with these names exist
    names = [volume["metadata"]["name"] for volume in volumes]
    try:
        yield {
            name: Path(run("volume", "inspect", "--format", "{{.Mountpoint}}", name))
            for name in names
        }
    finally:
        run("volume", "rm", "--force", *names)


@pytest.fixture(scope="module")
def played(
    image: str,
    volumes: dict[str, Path],
    cifar10_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Played:
    """Run the Job's Pod, evict it after an epoch, and run its replacement."""
    shutil.copytree(cifar10_dir, volumes["cifar10-data"], dirs_exist_ok=True)
    pod = pod_of(only("Job", job_yaml()), image)
    manifest = tmp_path_factory.mktemp("pod") / "pod.yaml"
    manifest.write_text(yaml.safe_dump(pod))
    exit_codes = []
    for evicted in (True, False):
        try:
            run("kube", "play", manifest)
            if evicted:
                (inspected,) = json.loads(run("inspect", CONTAINER))
                wait_for_an_epoch()
                grace = str(pod["spec"]["terminationGracePeriodSeconds"])
                run("stop", "--time", grace, CONTAINER)
            exit_codes.append(int(run("wait", CONTAINER)))
        finally:
            run("kube", "down", manifest)
    return Played((exit_codes[0], exit_codes[1]), inspected, volumes["cifar10-output"])


def test_an_evicted_pod_is_replaced_and_the_run_completes(played: Played) -> None:
    assert played.exit_codes == (75, 0)
    lines = (played.output / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]
    attempts = json.loads((played.output / "run.json").read_text())["attempts"]
    assert [attempt["outcome"] for attempt in attempts] == ["stopped", "done"]
    assert {attempt["run_id"] for attempt in attempts} == {f"kubernetes job {UID}"}
    assert attempts[1]["first_step"] == attempts[0]["last_step"] > 0
    assert json.loads((played.output / "evaluation.json").read_text())["examples"] == 10_000


def test_the_pod_ran_with_the_restrictions_of_the_manifest(played: Played) -> None:
    settings, host = played.inspected, played.inspected["HostConfig"]
    assert settings["Config"]["User"] == "10001:10001"
    assert not settings["EffectiveCaps"]
    assert host["ReadonlyRootfs"]
    assert "no-new-privileges" in host["SecurityOpt"]
    assert host["Memory"] == 16 * 2**30
    mounts = {mount["Destination"] for mount in settings["Mounts"]}
    assert mounts == {"/output", "/data", "/tmp", "/dev/shm"}
    owners = {(path.stat().st_uid, path.stat().st_gid) for path in played.output.iterdir()}
    assert owners == {(10001, 10001)}


def test_k8s_fetch_copies_the_artifacts_out_of_the_volume(
    played: Played, image: str, tmp_path: Path
) -> None:
    folder = copy_repository(tmp_path / "repository")
    fetch = fetch_pod(folder, "k8s")
    container_of(fetch["spec"])["image"] = image
    pod, kubectl = tmp_path / "fetch.yaml", tmp_path / "kubectl"
    pod.write_text(yaml.safe_dump(fetch))
    kubectl.write_text(KUBECTL.format(config=HERE / "containers.conf", pod=pod))
    kubectl.chmod(0o755)
    fetched = make(folder, "k8s-fetch", f"KUBECTL={kubectl}", "FETCH_DIR=fetched")
    assert fetched.returncode == 0, fetched.stderr
    artifacts = contents(folder / "fetched")
    assert artifacts == {
        name: content
        for name, content in contents(played.output).items()
        if not name.startswith((".", "checkpoints/"))
    }
    assert {"cifar10_model.h5", "prediction.png", "report/accuracy.png"} <= artifacts.keys()
    assert podman("pod", "exists", "cifar10-fetch").returncode == 1
