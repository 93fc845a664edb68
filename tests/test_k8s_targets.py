"""The make targets for Kubernetes. There is no cluster: a stand-in records what kubectl is told."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.manifests import (
    copy_of_the_repository,
    kustomize,
    make,
    of_kind,
    read_manifests,
    the_job,
)

KUBECTL = """#!/bin/sh
echo "$*" >> {log}
case " $* " in
  *" {failing} "*) exit 1 ;;
  *" get job "*) echo Complete ;;
  *" exec "*)
    while [ "$1" != -- ]; do shift; done
    exec sh -c "$(echo "$4" | sed s,/output,{volume},)" ;;
esac
"""


class Cluster:
    """A folder to run make in, with what kubectl is told and a volume to fetch from."""

    def __init__(self, folder: Path, failing: str = "-") -> None:
        self.folder = copy_of_the_repository(folder)
        self.volume = folder / "volume"
        self.log = folder / "log"
        self.kubectl = folder / "kubectl"
        self.kubectl.write_text(KUBECTL.format(log=self.log, volume=self.volume, failing=failing))
        self.kubectl.chmod(0o755)

    def make(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        self.log.write_text("")
        return make(self.folder, *arguments, f"KUBECTL={self.kubectl}")

    @property
    def told(self) -> list[str]:
        return self.log.read_text().splitlines()


def test_k8s_run_replaces_the_job_and_leaves_the_fetching_pod_out(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    assert cluster.make("k8s-run", "NAMESPACE=team").returncode == 0
    assert cluster.told == [
        "--namespace=team create -k build/k8s --dry-run=client --validate=strict --output=name",
        "--namespace=team delete job cifar10 --ignore-not-found --cascade=foreground",
        "--namespace=team apply -k build/k8s --selector app.kubernetes.io/component!=fetch",
    ]
    (fetch,) = of_kind("Pod", read_manifests())
    assert fetch["metadata"]["labels"]["app.kubernetes.io/component"] == "fetch"


def test_k8s_run_leaves_the_job_alone_if_the_new_one_is_not_valid(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, failing="create")
    assert cluster.make("k8s-run").returncode != 0
    assert [line.split()[0] for line in cluster.told] == ["create"]


@pytest.mark.parametrize(
    ("overlays", "nodes"),
    [("", ""), ("gpus sweep", ""), ("sweep sweep", ""), ("", "2"), ("gpus kueue", "3")],
)
def test_the_targets_name_what_was_rendered(tmp_path: Path, overlays: str, nodes: str) -> None:
    cluster = Cluster(tmp_path)
    (tmp_path / "volume").mkdir()
    for target in ("k8s-run", "k8s-logs", "k8s-fetch", "k8s-delete"):
        assert cluster.make(target, f"OVERLAY={overlays}", f"NODES={nodes}").returncode == 0
        rendered = list(yaml.safe_load_all(kustomize(tmp_path / "build" / "k8s")))
        (fetch,) = of_kind("Pod", rendered)
        job_name, pod_name = (one["metadata"]["name"] for one in (the_job(rendered), fetch))
        names = set(re.findall(r"\bcifar10[a-z-]*", " ".join(cluster.told)))
        assert names == {pod_name if target == "k8s-fetch" else job_name}


@pytest.mark.parametrize("target", ["k8s-run", "k8s-logs", "k8s-fetch", "k8s-delete"])
@pytest.mark.parametrize("name", ["gpu", "..", "sweep/", "sweep/kustomization.yaml"])
def test_an_overlay_that_does_not_exist_is_refused(tmp_path: Path, target: str, name: str) -> None:
    cluster = Cluster(tmp_path)
    refused = cluster.make(target, f"OVERLAY=kueue {name}")
    assert refused.returncode != 0
    assert f"OVERLAY has {name}, expected any of gpus image kueue sweep" in refused.stderr
    assert cluster.told == []


@pytest.mark.parametrize("target", ["k8s-run", "k8s-logs", "k8s-fetch", "k8s-delete"])
@pytest.mark.parametrize("nodes", ["0", "-1", "two", "2.5", "02", "2 3", "1000"])
def test_what_is_no_number_of_nodes_is_refused(tmp_path: Path, target: str, nodes: str) -> None:
    cluster = Cluster(tmp_path)
    refused = cluster.make(target, f"NODES={nodes}")
    assert refused.returncode != 0
    assert f"NODES is {nodes}, expected a number of nodes from 1 to 999" in refused.stderr
    assert cluster.told == []


def test_a_sweep_on_several_nodes_is_refused(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    refused = cluster.make("k8s-run", "OVERLAY=kueue sweep", "NODES=2")
    assert refused.returncode != 0
    assert "OVERLAY has sweep, whose trainings take a node each; leave NODES out" in refused.stderr
    assert cluster.told == []


def test_k8s_delete_deletes_the_job_alone(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    assert cluster.make("k8s-delete").returncode == 0
    assert cluster.told == ["delete job cifar10 --ignore-not-found --cascade=foreground"]


def test_k8s_fetch_copies_the_artifacts_and_removes_its_pod(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    names = ("run.json", "seed-1/run.json", "seed-1/prediction.png")
    others = (".lease/1", "checkpoints/1.npz", "seed-1/checkpoints/1.npz", "seed-1/.run.1.json")
    for name in (*names, *others):
        file = cluster.volume / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    assert cluster.make("k8s-fetch", "FETCH_DIR=here").returncode == 0
    fetched = {
        str(path.relative_to(tmp_path / "here")): path.read_text()
        for path in (tmp_path / "here").rglob("*")
        if path.is_file()
    }
    assert fetched == {name: name for name in names}
    # A Pod that an earlier copy left has ended, and applying would change nothing.
    assert cluster.told[:2] == [
        "delete pod cifar10-fetch --ignore-not-found",
        "apply -k build/k8s --selector app.kubernetes.io/component=fetch",
    ]
    assert cluster.told[-1] == "delete pod cifar10-fetch --ignore-not-found"


def test_k8s_fetch_says_why_its_pod_does_not_start(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, failing="wait")
    cluster.make("k8s-fetch", "FETCH_DIR=here")
    events = "get events --field-selector involvedObject.name=cifar10-fetch"
    assert cluster.told.index(events) < len(cluster.told) - 1


@pytest.mark.parametrize("failing", ["wait", "exec"])
def test_k8s_fetch_removes_its_pod_when_it_fails(tmp_path: Path, failing: str) -> None:
    cluster = Cluster(tmp_path, failing)
    assert cluster.make("k8s-fetch", "FETCH_DIR=here").returncode != 0
    assert cluster.told[-1] == "delete pod cifar10-fetch --ignore-not-found"
    assert not (tmp_path / "here").exists()


# Nothing at first, then a Pod, then another in its place, then the end.
LIFE_OF_A_JOB = """#!/bin/sh
cd {folder}
case "$*" in
  "get job"*)
    echo . >> asked
    test $(wc -l < asked) -lt 4 || echo SuccessCriteriaMet Complete ;;
  "get pods"*)
    test $(wc -l < asked) -lt 2 || echo pod/a
    test $(wc -l < asked) -lt 3 || echo pod/b ;;
  *--since=10s*) echo "later log of $5" ;;
  logs*) echo "log of $4"; test $4 != pod/a ;;
  "get pod/a") ;;
esac
"""


def test_k8s_logs_follows_every_pod_until_the_job_has_ended(tmp_path: Path) -> None:
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(LIFE_OF_A_JOB.format(folder=tmp_path))
    kubectl.chmod(0o755)
    (tmp_path / "repository").mkdir()
    folder = copy_of_the_repository(tmp_path / "repository")
    followed = make(folder, "k8s-logs", f"KUBECTL={kubectl}", POLL_SECONDS="0.1")
    assert followed.returncode == 0, followed.stderr
    # The stream of the first breaks off once.
    expected = ["later log of pod/a", "log of pod/a", "log of pod/b"]
    assert sorted(followed.stdout.splitlines()) == expected
    assert followed.stderr.count("waiting for a Pod of job cifar10 to start") >= 1
    assert "job cifar10: SuccessCriteriaMet Complete" in followed.stderr


def test_k8s_logs_without_a_job_is_kubectls_error(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, failing="job")
    assert make(
        cluster.folder, "k8s-logs", f"KUBECTL={cluster.kubectl}", POLL_SECONDS="0.1"
    ).returncode
    assert len(cluster.told) == 3  # one failure of the API is not the end
