"""The manifests as they are rendered, field by field."""

import os
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubernetes_validate.utils import all_versions

from job import __version__
from job.cluster.scheduler import ALONE, ClusterSpec, RunIdentity, cluster_spec, run_identity
from job.commands.cli import train
from job.config import UserError
from tests.conftest import REPOSITORY
from tests.k8s.manifests import (
    Manifest,
    copy_of_the_repository,
    kustomize,
    of_kind,
    only,
    render,
    the_container,
)

K8S = REPOSITORY / "k8s"
COMPONENTS = sorted(folder.name for folder in (K8S / "components").iterdir())
VERSIONS = [
    version for version in all_versions() if tuple(map(int, version.split(".")[:2])) >= (1, 31)
]
# Each overlay alone, and what `k8s/kustomization.yaml` combines with all components.
RENDERINGS = [
    "k8s",
    *(f"k8s/overlays/{folder.name}" for folder in sorted((K8S / "overlays").iterdir())),
    "base",
    "overlays/multi-node",
    "overlays/sweep",
]
MULTI_NODE = "k8s/overlays/multi-node"


@pytest.fixture(scope="module", params=RENDERINGS)
def manifests(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[Manifest]:
    folder = copy_of_the_repository(tmp_path_factory.mktemp("rendering"))
    if request.param.startswith("k8s"):
        return render(folder, request.param)
    combination = folder / "k8s" / "kustomization.yaml"
    listed = yaml.safe_load(combination.read_text())
    assert listed["resources"] == ["base"]
    listed["resources"] = [request.param]
    listed["components"] = [f"components/{name}" for name in COMPONENTS]
    combination.write_text(yaml.safe_dump(listed))
    return render(folder, "k8s")


@pytest.fixture
def job(manifests: list[Manifest]) -> Manifest:
    return only("Job", manifests)


@pytest.fixture
def pod(job: Manifest) -> Manifest:
    return pod_of(job)


@pytest.fixture
def container(pod: Manifest) -> Manifest:
    return the_container(pod)


@pytest.fixture(params=["Job", "Pod"])
def any_pod(request: pytest.FixtureRequest, manifests: list[Manifest]) -> Manifest:
    """The Job's Pod, and the one of `make k8s-fetch`."""
    return pod_of(only(request.param, manifests))


def pod_of(manifest: Manifest) -> Manifest:
    spec: Manifest = manifest["spec"]
    return spec["template"]["spec"] if manifest["kind"] == "Job" else spec


def test_manifests_are_valid_for_every_supported_version(manifests: list[Manifest]) -> None:
    assert VERSIONS[0].startswith("1.31.")
    for version in VERSIONS:
        for manifest in manifests:
            kubernetes_validate.validate(manifest, version, strict=True)


def test_the_validation_refuses_a_field_that_does_not_exist() -> None:
    job = only("Job", kustomize(K8S))
    job["spec"]["backofLimit"] = 4
    with pytest.raises(kubernetes_validate.ValidationError, match="backofLimit"):
        kubernetes_validate.validate(job, VERSIONS[-1], strict=True)


def by_name(manifests: list[Manifest]) -> dict[tuple[str, str], Manifest]:
    return {(manifest["kind"], manifest["metadata"]["name"]): manifest for manifest in manifests}


def test_without_overlays_kustomize_gives_job_yaml() -> None:
    file = list(yaml.safe_load_all((K8S / "job.yaml").read_text()))
    assert by_name(kustomize(K8S)) == by_name(file)
    assert {kind for kind, _ in by_name(file)} == {"Job", "PersistentVolumeClaim"}


def test_pods_keep_to_the_restricted_standard(any_pod: Manifest) -> None:
    assert any_pod["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 10001,
        "runAsGroup": 10001,
        "fsGroup": 10001,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert the_container(any_pod)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & any_pod.keys()
    for volume in any_pod["volumes"]:
        assert volume.keys() - {"name"} <= {"persistentVolumeClaim", "emptyDir"}


def test_pods_get_neither_a_token_nor_the_services_variables(any_pod: Manifest) -> None:
    assert any_pod["automountServiceAccountToken"] is False
    assert any_pod["enableServiceLinks"] is False


def test_the_images_tag_is_this_version(any_pod: Manifest) -> None:
    assert re.fullmatch(
        rf"(\S+/)?cifar10-job:{re.escape(__version__)}", the_container(any_pod)["image"]
    )


@pytest.mark.parametrize("kustomization", ["k8s", MULTI_NODE])
def test_the_image_is_one_line_of_job_yaml(tmp_path: Path, kustomization: str) -> None:
    image, mine = f"image: cifar10-job:{__version__}", "registry.example.com/mine:1"
    folder = copy_of_the_repository(tmp_path)
    file = folder / "k8s" / "job.yaml"
    assert file.read_text().count(image) == 1
    file.write_text(file.read_text().replace(image, f"image: {mine}"))
    rendered = render(folder, kustomization)
    for kind in ("Job", "Pod"):
        assert the_container(pod_of(only(kind, rendered)))["image"] == mine


def is_sweep(job: Manifest) -> bool:
    return bool(job["metadata"]["name"].endswith("-sweep"))


def rules(job: Manifest) -> list[Manifest]:
    listed: list[Manifest] = job["spec"]["podFailurePolicy"]["rules"]
    return listed


def reaction(job: Manifest, exit_code: int, disrupted: bool = False) -> str:
    """What happens to a Pod that ended: the first rule that matches decides, and none counts it."""
    for rule in rules(job):
        if "onPodConditions" in rule:
            condition = {"type": "DisruptionTarget", "status": "True"}
            matches = disrupted and condition in rule["onPodConditions"]
        else:
            codes = rule["onExitCodes"]
            assert codes["operator"] == "In"
            name = the_container(pod_of(job))["name"]
            matches = codes["containerName"] == name and exit_code in codes["values"]
        if matches:
            return str(rule["action"])
    return "Count"


def test_each_end_of_a_pod_has_its_consequence(job: Manifest) -> None:
    for exit_code in (1, 2, 3, 75, 137, 143):
        assert reaction(job, exit_code, disrupted=True) == "Ignore"
    assert reaction(job, 75) == "Ignore"
    assert reaction(job, 2) == ("FailIndex" if is_sweep(job) else "FailJob")
    assert [reaction(job, exit_code) for exit_code in (1, 3, 137)] == ["Count"] * 3
    # Written down, although it is what happens without a rule.
    codes = [rule.get("onExitCodes", {}).get("values") for rule in rules(job)]
    assert [3] in codes


def test_retries_are_bounded(job: Manifest) -> None:
    spec = job["spec"]
    if "completions" in spec:
        # A limit over all indexes would be used up by one seed, or by one failure of all nodes.
        assert "backoffLimit" not in spec
        assert spec["backoffLimitPerIndex"] == 4
        # A run cannot do without one of its nodes.
        assert spec["maxFailedIndexes"] == (2 if is_sweep(job) else 0)
    else:
        assert spec["backoffLimit"] == 4
    assert spec["podReplacementPolicy"] == "Failed"
    assert 3600 <= spec["activeDeadlineSeconds"] <= 7 * 86400
    assert spec["ttlSecondsAfterFinished"] >= 86400


def test_a_pod_has_the_time_to_write_its_checkpoint(pod: Manifest) -> None:
    assert pod["restartPolicy"] == "Never"
    # It takes 3 s on a fast volume; a slow one may need ten times as long.
    assert pod["terminationGracePeriodSeconds"] >= 30


def test_requests_equal_limits(any_pod: Manifest) -> None:
    resources = the_container(any_pod)["resources"]
    assert resources["requests"] == resources["limits"]
    assert {"cpu", "memory"} <= resources["limits"].keys()


def test_the_gpus_are_limited_required_and_tolerated(pod: Manifest, container: Manifest) -> None:
    limit = container["resources"]["limits"]["nvidia.com/gpu"]
    params = train.make_context("train", container["args"][1:]).params
    assert params["require_gpus"] == int(limit)
    toleration = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    assert toleration in pod["tolerations"]


def test_shared_memory_is_memory_and_less_than_the_limit(
    pod: Manifest, container: Manifest
) -> None:
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    shm = volumes[mounts["/dev/shm"]]["emptyDir"]
    assert shm["medium"] == "Memory"
    gib = [
        int(text.removesuffix("Gi"))
        for text in (shm["sizeLimit"], container["resources"]["limits"]["memory"])
    ]
    assert gib[0] * 4 <= gib[1]
    assert "medium" not in volumes[mounts["/tmp"]]["emptyDir"]


def environment(container: Manifest, index: int = 1) -> dict[str, str]:
    """The variables as Kubernetes gives them to the Pod of a Job or of an index."""
    pod = {
        "metadata.labels['batch.kubernetes.io/controller-uid']": "6a41c0ac",
        "metadata.labels['batch.kubernetes.io/job-name']": "cifar10-multi-node",
        "metadata.annotations['batch.kubernetes.io/job-completion-index']": str(index),
    }
    environ: dict[str, str] = {}
    for variable in container["env"]:
        if "valueFrom" in variable:
            value = pod[variable["valueFrom"]["fieldRef"]["fieldPath"]]
        else:
            # Only variables further up are replaced.
            value = re.sub(r"\$\((\w+)\)", lambda name: environ[name[1]], variable["value"])
        environ[variable["name"]] = value
    if "KUBERNETES_JOB_COMPLETIONS" in environ:
        environ["JOB_COMPLETION_INDEX"] = str(index)
    return environ


def outcome(
    monkeypatch: pytest.MonkeyPatch, container: Manifest, environ: dict[str, str]
) -> tuple[dict[str, Any], RunIdentity, ClusterSpec | str]:
    """Options, the run's identity and its workers, as the program sees arguments and variables."""
    command, *arguments = container["args"]
    assert command == "train"
    with monkeypatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("JOB_")]:
            patch.delenv(name)
        for name, value in environ.items():
            patch.setenv(name, value)
        params = train.make_context("train", arguments).params
    try:
        cluster: ClusterSpec | str = cluster_spec(environ)
    except UserError as error:
        cluster = str(error)
    return params, run_identity(environ, params["run_id"]), cluster


def test_every_variable_reaches_the_program(
    container: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = environment(container)
    with_all = outcome(monkeypatch, container, environ)
    assert with_all[1].name == "kubernetes job 6a41c0ac"
    for name in environ:
        without = {other: value for other, value in environ.items() if other != name}
        assert outcome(monkeypatch, container, without) != with_all, name


def test_the_folders_are_on_the_claims(
    manifests: list[Manifest], container: Manifest, pod: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, _, _ = outcome(monkeypatch, container, environment(container))
    mounts = {mount["name"]: Path(mount["mountPath"]) for mount in container["volumeMounts"]}
    claims = {
        volume["persistentVolumeClaim"]["claimName"]: mounts[volume["name"]]
        for volume in pod["volumes"]
        if "persistentVolumeClaim" in volume
    }
    made = {claim["metadata"]["name"] for claim in of_kind("PersistentVolumeClaim", manifests)}
    assert claims.keys() == made
    output, data = claims.values()
    assert params["output_dir"].is_relative_to(output)
    assert params["data_dir"] == data


def test_the_fetching_pod_sleeps_on_the_output_of_the_job(
    manifests: list[Manifest], pod: Manifest
) -> None:
    manifest = only("Pod", manifests)
    # `k8s/fetch.sh` applies it by this label.
    assert manifest["metadata"]["labels"]["app.kubernetes.io/component"] == "fetch"
    fetch = pod_of(manifest)
    container = the_container(fetch)
    assert container["command"] == ["sleep", str(fetch["activeDeadlineSeconds"])]
    assert not {"args", "env"} & container.keys()
    # It waits for no GPU, and not for a node without the Job's Pods.
    assert container["resources"]["limits"].keys() == {"cpu", "memory"}
    assert fetch["affinity"].keys() == {"podAffinity"}
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert mounts["/output"]["readOnly"] is True
    claims = [volume for volume in fetch["volumes"] if "persistentVolumeClaim" in volume]
    assert claims == [volume for volume in pod["volumes"] if volume["name"] == "output"]
    assert fetch.get("imagePullSecrets") == pod.get("imagePullSecrets")


def test_overlay_gpus_asks_for_several() -> None:
    container = the_container(pod_of(only("Job", kustomize(K8S / "overlays" / "gpus"))))
    assert int(container["resources"]["limits"]["nvidia.com/gpu"]) > 1


def test_overlay_image_pulls_from_a_private_registry() -> None:
    pod = pod_of(only("Job", kustomize(K8S / "overlays" / "image")))
    assert pod["imagePullSecrets"]
    assert "/" in the_container(pod)["image"]


def test_overlay_gpus_refuses_arguments_in_another_order(tmp_path: Path) -> None:
    folder = copy_of_the_repository(tmp_path)
    job = folder / "k8s" / "job.yaml"
    job.write_text(job.read_text().replace("[train, ", '[train, --epochs, "9", '))
    with pytest.raises(AssertionError, match="args/1"):
        kustomize(folder / "k8s" / "overlays" / "gpus")


def test_overlay_kueue_waits_in_a_queue() -> None:
    job = only("Job", kustomize(K8S / "overlays" / "kueue"))
    assert job["spec"]["suspend"] is True
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]


def test_overlay_sweep_gives_each_seed_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    manifests = kustomize(K8S / "overlays" / "sweep")
    spec = only("Job", manifests)["spec"]
    container = the_container(spec["template"]["spec"])
    assert (spec["completionMode"], spec["parallelism"] > 1) == ("Indexed", True)
    options = [
        outcome(monkeypatch, container, environment(container, index))[0]
        for index in range(spec["completions"])
    ]
    assert [params["seed"] for params in options] == list(range(spec["completions"]))
    for one, other in pairwise(sorted(params["output_dir"] for params in options)):
        assert not other.is_relative_to(one)
    for claim in of_kind("PersistentVolumeClaim", manifests):
        assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_one_node_trains_alone(container: Manifest, job: Manifest) -> None:
    several = job["metadata"]["name"] == "cifar10-multi-node"
    assert (cluster_spec(environment(container)) is ALONE) == (not several)


@pytest.fixture(scope="module", params=[2, 16])
def multi_node(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[Manifest]:
    """Overlay multi-node with `completions` as it is, and changed."""
    folder = copy_of_the_repository(tmp_path_factory.mktemp("nodes"))
    file = folder / MULTI_NODE / "job.yaml"
    assert file.read_text().count("completions: 2 ") == 1
    file.write_text(file.read_text().replace("completions: 2 ", f"completions: {request.param} "))
    manifests = kustomize(folder / MULTI_NODE)
    assert only("Job", manifests)["spec"]["completions"] == request.param
    return manifests


def test_the_number_of_nodes_is_the_same_everywhere(multi_node: list[Manifest]) -> None:
    spec = only("Job", multi_node)["spec"]
    nodes = spec["completions"]
    variables = environment(the_container(spec["template"]["spec"]))
    assert spec["completionMode"] == "Indexed"
    assert spec["parallelism"] == int(variables["KUBERNETES_JOB_COMPLETIONS"]) == nodes
    # The run is complete when the chief is.
    assert spec["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}


def test_each_pod_derives_the_names_that_kubernetes_gives_to_all(
    multi_node: list[Manifest],
) -> None:
    job, service = only("Job", multi_node), only("Service", multi_node)
    pod, name = pod_of(job), job["metadata"]["name"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert "hostname" not in pod
    nodes = job["spec"]["completions"]
    hosts = [f"{name}-{index}.{service['metadata']['name']}" for index in range(nodes)]
    assert max(len(host.partition(".")[0]) for host in hosts) <= 63
    for index in range(nodes):
        environ = environment(the_container(pod), index)
        assert environ["KUBERNETES_JOB_NAME"] == name
        spec = cluster_spec(environ)
        assert spec.index == index
        assert [worker.partition(":")[0] for worker in spec.workers] == hosts
        assert run_identity(environ, None) == RunIdentity("kubernetes job 6a41c0ac")


def own_pods(manifests: list[Manifest]) -> dict[str, str]:
    """The label that Kubernetes gives to the Pods of this Job and no others."""
    return {"batch.kubernetes.io/job-name": only("Job", manifests)["metadata"]["name"]}


def test_names_resolve_before_the_pods_are_ready(multi_node: list[Manifest]) -> None:
    spec = only("Service", multi_node)["spec"]
    assert spec["clusterIP"] == "None"
    assert spec["publishNotReadyAddresses"] is True
    assert spec["selector"] == own_pods(multi_node)


def test_only_its_own_pods_reach_a_worker(multi_node: list[Manifest]) -> None:
    own = {"matchLabels": own_pods(multi_node)}
    assert only("NetworkPolicy", multi_node)["spec"] == {
        "podSelector": own,
        "policyTypes": ["Ingress"],
        "ingress": [{"from": [{"podSelector": own}]}],
    }


def test_each_worker_has_a_node_of_its_own(multi_node: list[Manifest]) -> None:
    affinity = pod_of(only("Job", multi_node))["affinity"]
    assert affinity["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"] == [
        {
            "topologyKey": "kubernetes.io/hostname",
            "labelSelector": {"matchLabels": own_pods(multi_node)},
        }
    ]


def test_every_node_can_mount_the_claims(multi_node: list[Manifest]) -> None:
    claims = of_kind("PersistentVolumeClaim", multi_node)
    assert [claim["spec"]["accessModes"] for claim in claims] == [["ReadWriteMany"]] * 2
    # Applied beside job.yaml, whose claims have another access mode, it changes nothing there.
    assert not by_name(claims).keys() & by_name(kustomize(K8S)).keys()
