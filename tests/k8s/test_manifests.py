"""The rendered manifests, field by field."""

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
    container_of,
    copy_repository,
    kustomize,
    of_kind,
    only,
    render,
)

K8S = REPOSITORY / "k8s"
COMPONENTS = sorted(folder.name for folder in (K8S / "components").iterdir())
VERSIONS = [
    version for version in all_versions() if tuple(map(int, version.split(".")[:2])) >= (1, 31)
]
# Each overlay alone, and each base in `k8s/kustomization.yaml` with all components.
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
    folder = copy_repository(tmp_path_factory.mktemp("rendering"))
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
    return container_of(pod)


@pytest.fixture(params=["Job", "Pod"])
def any_pod(request: pytest.FixtureRequest, manifests: list[Manifest]) -> Manifest:
    """The Pod of the Job, and the Pod of `make k8s-fetch`."""
    return pod_of(only(request.param, manifests))


def pod_of(manifest: Manifest) -> Manifest:
    spec: Manifest = manifest["spec"]
    return spec["template"]["spec"] if manifest["kind"] == "Job" else spec


def test_manifests_are_valid_for_every_supported_version(manifests: list[Manifest]) -> None:
    assert VERSIONS[0].startswith("1.31.")
    for version in VERSIONS:
        for manifest in manifests:
            kubernetes_validate.validate(manifest, version, strict=True)


def test_validation_rejects_an_unknown_field() -> None:
    job = only("Job", kustomize(K8S))
    job["spec"]["backofLimit"] = 4
    with pytest.raises(kubernetes_validate.ValidationError, match="backofLimit"):
        kubernetes_validate.validate(job, VERSIONS[-1], strict=True)


def by_name(manifests: list[Manifest]) -> dict[tuple[str, str], Manifest]:
    return {(manifest["kind"], manifest["metadata"]["name"]): manifest for manifest in manifests}


def test_without_overlays_kustomize_renders_job_yaml() -> None:
    file = list(yaml.safe_load_all((K8S / "job.yaml").read_text()))
    assert by_name(kustomize(K8S)) == by_name(file)
    assert {kind for kind, _ in by_name(file)} == {"Job", "PersistentVolumeClaim"}


def test_pods_comply_with_the_restricted_pod_security_standard(any_pod: Manifest) -> None:
    assert any_pod["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 10001,
        "runAsGroup": 10001,
        "fsGroup": 10001,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert container_of(any_pod)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & any_pod.keys()
    for volume in any_pod["volumes"]:
        assert volume.keys() - {"name"} <= {"persistentVolumeClaim", "emptyDir"}


def test_pods_get_no_token_and_no_service_variables(any_pod: Manifest) -> None:
    assert any_pod["automountServiceAccountToken"] is False
    assert any_pod["enableServiceLinks"] is False


def test_the_image_tag_is_this_version(any_pod: Manifest) -> None:
    assert re.fullmatch(
        rf"(\S+/)?cifar10-job:{re.escape(__version__)}", container_of(any_pod)["image"]
    )


@pytest.mark.parametrize("kustomization", ["k8s", MULTI_NODE])
def test_the_image_is_set_in_a_single_line_of_job_yaml(tmp_path: Path, kustomization: str) -> None:
    image, mine = f"image: cifar10-job:{__version__}", "registry.example.com/mine:1"
    folder = copy_repository(tmp_path)
    file = folder / "k8s" / "job.yaml"
    assert file.read_text().count(image) == 1
    file.write_text(file.read_text().replace(image, f"image: {mine}"))
    rendered = render(folder, kustomization)
    for kind in ("Job", "Pod"):
        assert container_of(pod_of(only(kind, rendered)))["image"] == mine


def is_sweep(job: Manifest) -> bool:
    return bool(job["metadata"]["name"].endswith("-sweep"))


def rules(job: Manifest) -> list[Manifest]:
    listed: list[Manifest] = job["spec"]["podFailurePolicy"]["rules"]
    return listed


def action_for(job: Manifest, exit_code: int, disrupted: bool = False) -> str:
    """The Job's action for a Pod that ended: the first matching rule, by default Count."""
    for rule in rules(job):
        if "onPodConditions" in rule:
            condition = {"type": "DisruptionTarget", "status": "True"}
            matches = disrupted and condition in rule["onPodConditions"]
        else:
            codes = rule["onExitCodes"]
            assert codes["operator"] == "In"
            name = container_of(pod_of(job))["name"]
            matches = codes["containerName"] == name and exit_code in codes["values"]
        if matches:
            return str(rule["action"])
    return "Count"


def test_each_exit_code_of_a_pod_leads_to_the_right_action(job: Manifest) -> None:
    for exit_code in (1, 2, 3, 75, 137, 143):
        assert action_for(job, exit_code, disrupted=True) == "Ignore"
    assert action_for(job, 75) == "Ignore"
    assert action_for(job, 2) == ("FailIndex" if is_sweep(job) else "FailJob")
    assert [action_for(job, exit_code) for exit_code in (1, 3, 137)] == ["Count"] * 3
    # Listed explicitly, although it is also the default.
    codes = [rule.get("onExitCodes", {}).get("values") for rule in rules(job)]
    assert [3] in codes


def test_retries_are_bounded(job: Manifest) -> None:
    spec = job["spec"]
    if "completions" in spec:
        # One seed, or one failure that ends all nodes, could use up a limit over all indexes.
        assert "backoffLimit" not in spec
        assert spec["backoffLimitPerIndex"] == 4
        # A run cannot continue without one of its nodes.
        assert spec["maxFailedIndexes"] == (2 if is_sweep(job) else 0)
    else:
        assert spec["backoffLimit"] == 4
    assert spec["podReplacementPolicy"] == "Failed"
    assert 3600 <= spec["activeDeadlineSeconds"] <= 7 * 86400
    assert spec["ttlSecondsAfterFinished"] >= 86400


def test_a_pod_has_enough_time_to_write_its_checkpoint(pod: Manifest) -> None:
    assert pod["restartPolicy"] == "Never"
    # The checkpoint takes 3 s on a fast volume; a slow one can need ten times as long.
    assert pod["terminationGracePeriodSeconds"] >= 30


def test_requests_equal_limits(any_pod: Manifest) -> None:
    resources = container_of(any_pod)["resources"]
    assert resources["requests"] == resources["limits"]
    assert {"cpu", "memory"} <= resources["limits"].keys()


def test_the_gpus_are_limited_required_and_tolerated(pod: Manifest, container: Manifest) -> None:
    limit = container["resources"]["limits"]["nvidia.com/gpu"]
    params = train.make_context("train", container["args"][1:]).params
    assert params["require_gpus"] == int(limit)
    toleration = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    assert toleration in pod["tolerations"]


def test_shared_memory_is_in_memory_and_far_below_the_limit(
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
    """The variables that Kubernetes sets in the Pod of a Job or of an index."""
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
            # Kubernetes expands only variables that are defined earlier.
            value = re.sub(r"\$\((\w+)\)", lambda name: environ[name[1]], variable["value"])
        environ[variable["name"]] = value
    if "KUBERNETES_JOB_COMPLETIONS" in environ:
        environ["JOB_COMPLETION_INDEX"] = str(index)
    return environ


def parsed(
    monkeypatch: pytest.MonkeyPatch, container: Manifest, environ: dict[str, str]
) -> tuple[dict[str, Any], RunIdentity, ClusterSpec | str]:
    """Options, run identity and workers that the program derives from arguments and variables."""
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


def test_the_program_reads_every_variable(
    container: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = environment(container)
    with_all = parsed(monkeypatch, container, environ)
    assert with_all[1].name == "kubernetes job 6a41c0ac"
    for name in environ:
        without = {other: value for other, value in environ.items() if other != name}
        assert parsed(monkeypatch, container, without) != with_all, name


def test_output_and_data_folders_are_on_the_claims(
    manifests: list[Manifest], container: Manifest, pod: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, _, _ = parsed(monkeypatch, container, environment(container))
    mounts = {mount["name"]: Path(mount["mountPath"]) for mount in container["volumeMounts"]}
    claims = {
        volume["persistentVolumeClaim"]["claimName"]: mounts[volume["name"]]
        for volume in pod["volumes"]
        if "persistentVolumeClaim" in volume
    }
    created = {claim["metadata"]["name"] for claim in of_kind("PersistentVolumeClaim", manifests)}
    assert claims.keys() == created
    output, data = claims.values()
    assert params["output_dir"].is_relative_to(output)
    assert params["data_dir"] == data


def test_the_fetch_pod_mounts_the_output_of_the_job_and_sleeps(
    manifests: list[Manifest], pod: Manifest
) -> None:
    manifest = only("Pod", manifests)
    # `k8s/fetch.sh` selects the Pod by this label.
    assert manifest["metadata"]["labels"]["app.kubernetes.io/component"] == "fetch"
    fetch = pod_of(manifest)
    container = container_of(fetch)
    assert container["command"] == ["sleep", str(fetch["activeDeadlineSeconds"])]
    assert not {"args", "env"} & container.keys()
    # It needs no GPU, and can run on the same node as the Job's Pods.
    assert container["resources"]["limits"].keys() == {"cpu", "memory"}
    assert fetch["affinity"].keys() == {"podAffinity"}
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert mounts["/output"]["readOnly"] is True
    claims = [volume for volume in fetch["volumes"] if "persistentVolumeClaim" in volume]
    assert claims == [volume for volume in pod["volumes"] if volume["name"] == "output"]
    assert fetch.get("imagePullSecrets") == pod.get("imagePullSecrets")


def test_overlay_gpus_requests_several() -> None:
    container = container_of(pod_of(only("Job", kustomize(K8S / "overlays" / "gpus"))))
    assert int(container["resources"]["limits"]["nvidia.com/gpu"]) > 1


def test_overlay_image_pulls_from_a_private_registry() -> None:
    pod = pod_of(only("Job", kustomize(K8S / "overlays" / "image")))
    assert pod["imagePullSecrets"]
    assert "/" in container_of(pod)["image"]


def test_overlay_gpus_rejects_arguments_in_another_order(tmp_path: Path) -> None:
    folder = copy_repository(tmp_path)
    job = folder / "k8s" / "job.yaml"
    job.write_text(job.read_text().replace("[train, ", '[train, --epochs, "9", '))
    with pytest.raises(AssertionError, match="args/1"):
        kustomize(folder / "k8s" / "overlays" / "gpus")


def test_overlay_kueue_waits_in_a_queue() -> None:
    job = only("Job", kustomize(K8S / "overlays" / "kueue"))
    assert job["spec"]["suspend"] is True
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]


def test_overlay_sweep_uses_a_folder_per_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    manifests = kustomize(K8S / "overlays" / "sweep")
    spec = only("Job", manifests)["spec"]
    container = container_of(spec["template"]["spec"])
    assert (spec["completionMode"], spec["parallelism"] > 1) == ("Indexed", True)
    options = [
        parsed(monkeypatch, container, environment(container, index))[0]
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
    """Overlay multi-node with the default `completions`, and with another number."""
    folder = copy_repository(tmp_path_factory.mktemp("nodes"))
    file = folder / MULTI_NODE / "job.yaml"
    assert file.read_text().count("completions: 2 ") == 1
    file.write_text(file.read_text().replace("completions: 2 ", f"completions: {request.param} "))
    manifests = kustomize(folder / MULTI_NODE)
    assert only("Job", manifests)["spec"]["completions"] == request.param
    return manifests


def test_the_number_of_nodes_is_the_same_everywhere(multi_node: list[Manifest]) -> None:
    spec = only("Job", multi_node)["spec"]
    nodes = spec["completions"]
    variables = environment(container_of(spec["template"]["spec"]))
    assert spec["completionMode"] == "Indexed"
    assert spec["parallelism"] == int(variables["KUBERNETES_JOB_COMPLETIONS"]) == nodes
    # The Job is complete when the chief is.
    assert spec["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}


def test_each_pod_derives_the_host_names_of_all_pods(
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
        environ = environment(container_of(pod), index)
        assert environ["KUBERNETES_JOB_NAME"] == name
        spec = cluster_spec(environ)
        assert spec.index == index
        assert [worker.partition(":")[0] for worker in spec.workers] == hosts
        assert run_identity(environ, None) == RunIdentity("kubernetes job 6a41c0ac")


def own_pods(manifests: list[Manifest]) -> dict[str, str]:
    """The label that Kubernetes adds only to the Pods of this Job."""
    return {"batch.kubernetes.io/job-name": only("Job", manifests)["metadata"]["name"]}


def test_names_resolve_before_the_pods_are_ready(multi_node: list[Manifest]) -> None:
    spec = only("Service", multi_node)["spec"]
    assert spec["clusterIP"] == "None"
    assert spec["publishNotReadyAddresses"] is True
    assert spec["selector"] == own_pods(multi_node)


def test_only_pods_of_the_same_job_can_reach_a_worker(multi_node: list[Manifest]) -> None:
    own = {"matchLabels": own_pods(multi_node)}
    assert only("NetworkPolicy", multi_node)["spec"] == {
        "podSelector": own,
        "policyTypes": ["Ingress"],
        "ingress": [{"from": [{"podSelector": own}]}],
    }


def test_each_worker_runs_on_its_own_node(multi_node: list[Manifest]) -> None:
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
    # The overlay can be applied together with job.yaml, whose claims have another access mode.
    assert not by_name(claims).keys() & by_name(kustomize(K8S)).keys()
