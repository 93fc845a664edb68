"""The make targets for Kubernetes, without a cluster: a stub records kubectl's arguments."""

import subprocess
from pathlib import Path

import pytest

from tests.k8s.manifests import copy_repository, make

# Output of `kubectl create --output=name` for overlay sweep.
NAMES = "persistentvolumeclaim/cifar10-output-sweep job.batch/cifar10-sweep"

KUBECTL = """#!/bin/sh
echo "$*" >> {log}
case " $* " in *" create "*) printf '%s\\n' {names} ;; esac
case " $* " in
  *" {failing} "*) exit 1 ;;
  *" exec "*)
    while [ "$1" != -- ]; do shift; done
    exec sh -c "$(echo "$4" | sed s,/output,{volume},)" ;;
esac
"""


class Cluster:
    """A folder to run make in, with a log of the kubectl calls and a volume to fetch from."""

    def __init__(self, folder: Path, failing: str = "-") -> None:
        self.folder = copy_repository(folder)
        self.volume = folder / "volume"
        self.log = folder / "log"
        self.kubectl = folder / "kubectl"
        self.kubectl.write_text(
            KUBECTL.format(log=self.log, volume=self.volume, failing=failing, names=NAMES)
        )
        self.kubectl.chmod(0o755)

    def make(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        self.log.write_text("")
        return make(self.folder, *arguments, f"KUBECTL={self.kubectl} --namespace=team")

    @property
    def calls(self) -> list[str]:
        lines = self.log.read_text().splitlines()
        assert all(line.startswith("--namespace=team ") for line in lines)
        return [line.removeprefix("--namespace=team ") for line in lines]


def test_k8s_run_replaces_only_the_job(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    assert cluster.make("k8s-run", "K8S=k8s/overlays/sweep").returncode == 0
    assert cluster.calls == [
        "create -k k8s/overlays/sweep --dry-run=client --validate=strict --output=name",
        "delete --ignore-not-found --cascade=foreground job.batch/cifar10-sweep",
        "apply -k k8s/overlays/sweep",
    ]


@pytest.mark.parametrize("failing", ["create", "delete"])
def test_k8s_run_stops_at_the_first_failure(tmp_path: Path, failing: str) -> None:
    cluster = Cluster(tmp_path, failing)
    assert cluster.make("k8s-run").returncode != 0
    assert cluster.calls[-1].split()[0] == failing


def test_k8s_fetch_copies_the_artifacts_and_deletes_its_pod(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    names = ("run.json", "seed-1/run.json", "seed-1/prediction.png")
    others = (".lease/1", "checkpoints/1.npz", "seed-1/checkpoints/1.npz", "seed-1/.run.1.json")
    for name in (*names, *others):
        file = cluster.volume / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    fetched = cluster.make("k8s-fetch", "FETCH_DIR=here")
    assert fetched.returncode == 0, fetched.stderr
    files = {
        str(path.relative_to(tmp_path / "here")): path.read_text()
        for path in (tmp_path / "here").rglob("*")
        if path.is_file()
    }
    assert files == {name: name for name in names}
    # A Pod left by an earlier call has ended; applying the manifest again does not restart it.
    assert cluster.calls[:2] == [
        "delete pod cifar10-fetch --ignore-not-found",
        "apply -k build/k8s-fetch --selector app.kubernetes.io/component=fetch",
    ]
    assert cluster.calls[-1] == "delete pod cifar10-fetch --ignore-not-found"


def test_k8s_fetch_prints_the_events_of_a_pod_that_does_not_start(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, failing="wait")
    cluster.make("k8s-fetch", "FETCH_DIR=here")
    assert "get events --field-selector involvedObject.name=cifar10-fetch" in cluster.calls


@pytest.mark.parametrize("failing", ["wait", "exec"])
def test_k8s_fetch_deletes_its_pod_when_it_fails(tmp_path: Path, failing: str) -> None:
    cluster = Cluster(tmp_path, failing)
    assert cluster.make("k8s-fetch", "FETCH_DIR=here").returncode != 0
    assert cluster.calls[-1] == "delete pod cifar10-fetch --ignore-not-found"
    assert not (tmp_path / "here").exists()
