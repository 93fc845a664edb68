"""What the cluster is told: the manifests as they are rendered, judged field by field."""

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
from tests.manifests import (
    FETCH,
    Manifest,
    copy_of_the_repository,
    kustomize,
    make,
    of_kind,
    read_manifests,
    render,
    the_container,
    the_job,
)

OVERLAYS = sorted(folder.name for folder in (REPOSITORY / "k8s" / "overlays").iterdir())
VERSIONS = [
    version for version in all_versions() if tuple(map(int, version.split(".")[:2])) >= (1, 31)
]


# Of what make is told: overlays, and the number of nodes.
RENDERINGS: dict[str, tuple[tuple[str, ...], str]] = {
    "base": ((), ""),
    **{overlay: ((overlay,), "") for overlay in OVERLAYS},
    "all": (tuple(OVERLAYS), ""),
    "nodes": ((), "3"),
    "nodes-all": (tuple(overlay for overlay in OVERLAYS if overlay != "sweep"), "4"),
}


@pytest.fixture(scope="module", params=["files", *RENDERINGS])
def manifests(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[Manifest]:
    """The files as they are, and rendered with no overlay, with each, and with all together."""
    if request.param == "files":
        return read_manifests()
    return render(tmp_path_factory.mktemp(request.param), *RENDERINGS[request.param])


@pytest.fixture
def job(manifests: list[Manifest]) -> Manifest:
    return the_job(manifests)


@pytest.fixture
def pod(job: Manifest) -> Manifest:
    template: Manifest = job["spec"]["template"]["spec"]
    return template


@pytest.fixture
def container(pod: Manifest) -> Manifest:
    return the_container(pod)


@pytest.fixture(params=["job", "fetch"])
def any_pod(request: pytest.FixtureRequest, manifests: list[Manifest]) -> Manifest:
    """The Job's Pod, and the one of `make k8s-fetch`."""
    (fetch,) = of_kind("Pod", manifests)
    spec = the_job(manifests)["spec"]["template"]["spec"]
    chosen: Manifest = spec if request.param == "job" else fetch["spec"]
    return chosen


def test_manifests_are_valid_for_every_supported_version(manifests: list[Manifest]) -> None:
    assert VERSIONS[0].startswith("1.31.")
    for version in VERSIONS:
        for manifest in manifests:
            kubernetes_validate.validate(manifest, version, strict=True)


def test_the_validation_refuses_a_field_that_does_not_exist() -> None:
    job = the_job(read_manifests())
    job["spec"]["backofLimit"] = 4
    with pytest.raises(kubernetes_validate.ValidationError, match="backofLimit"):
        kubernetes_validate.validate(job, VERSIONS[-1], strict=True)


def by_name(manifests: list[Manifest]) -> dict[tuple[str, str], Manifest]:
    return {(manifest["kind"], manifest["metadata"]["name"]): manifest for manifest in manifests}


def test_without_overlays_kustomize_gives_the_files(tmp_path: Path) -> None:
    assert by_name(render(tmp_path, ())) == by_name(read_manifests())
    alone = yaml.safe_load_all(kustomize(REPOSITORY / "k8s"))
    kinds = [manifest["kind"] for manifest in alone]
    assert sorted(kinds) == ["Job", "PersistentVolumeClaim", "PersistentVolumeClaim"]


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


@pytest.mark.parametrize(("name", "nodes"), [("job.yaml", ""), ("multi-node.yaml", "2")])
def test_the_image_is_one_line_of_the_job_which_the_fetching_pod_follows(
    tmp_path: Path, name: str, nodes: str
) -> None:
    image, mine = f"image: cifar10-job:{__version__}", "registry.example.com/mine:1"
    assert (REPOSITORY / "k8s" / name).read_text().count(image) == 1
    folder = copy_of_the_repository(tmp_path)
    job = folder / "k8s" / name
    job.write_text(job.read_text().replace(image, f"image: {mine}"))
    assert make(folder, "k8s-render", f"NODES={nodes}").returncode == 0
    rendered = list(yaml.safe_load_all(kustomize(folder / "build" / "k8s")))
    (fetch,) = of_kind("Pod", rendered)
    for pod in (the_job(rendered)["spec"]["template"]["spec"], fetch["spec"]):
        assert the_container(pod)["image"] == mine


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
            name = the_container(job["spec"]["template"]["spec"])["name"]
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
    # Said aloud, although it is what happens without a rule.
    codes = [rule.get("onExitCodes", {}).get("values") for rule in rules(job)]
    assert [3] in codes


def test_retries_are_bounded(job: Manifest) -> None:
    spec = job["spec"]
    if is_sweep(job):
        # A limit over all indexes would be used up by one of them.
        assert "backoffLimit" not in spec
        assert 1 <= spec["backoffLimitPerIndex"] <= 6
        assert spec["maxFailedIndexes"] < spec["completions"]
    else:
        # One failure of a run on several nodes can count once for each.
        retries, rest = divmod(spec["backoffLimit"], spec.get("completions", 1))
        assert (1 <= retries <= 6, rest) == (True, 0)
    assert spec["podReplacementPolicy"] == "Failed"
    assert 3600 <= spec["activeDeadlineSeconds"] <= 7 * 86400
    assert spec["ttlSecondsAfterFinished"] >= 86400


def test_a_pod_has_the_time_to_write_its_checkpoint(pod: Manifest) -> None:
    assert pod["restartPolicy"] == "Never"
    # The README tells 2.9 s; a slow volume may need ten times as long.
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
    (fetch,) = of_kind("Pod", manifests)
    (volume,) = fetch["spec"]["volumes"]
    assert volume["persistentVolumeClaim"]["claimName"] == next(iter(claims))


@pytest.mark.parametrize("nodes", ["", "2"])
def test_overlay_gpus_asks_for_several(tmp_path: Path, nodes: str) -> None:
    manifests = render(tmp_path, ("gpus",), nodes)
    container = the_container(the_job(manifests)["spec"]["template"]["spec"])
    assert int(container["resources"]["limits"]["nvidia.com/gpu"]) > 1


def test_overlay_gpus_refuses_arguments_that_it_does_not_know(tmp_path: Path) -> None:
    render(tmp_path, ("gpus",))
    job = tmp_path / "k8s" / "job.yaml"
    job.write_text(job.read_text().replace("[train, ", '[train, --epochs, "9", '))
    with pytest.raises(AssertionError, match="args/1"):
        kustomize(tmp_path / "build" / "k8s")


def test_overlay_image_pulls_from_a_private_registry(tmp_path: Path) -> None:
    manifests = render(tmp_path, ("image",))
    (fetch,) = of_kind("Pod", manifests)
    for pod in (the_job(manifests)["spec"]["template"]["spec"], fetch["spec"]):
        assert pod["imagePullSecrets"]
        assert the_container(pod)["image"].count("/") >= 1


def test_overlay_kueue_waits_in_a_queue(tmp_path: Path) -> None:
    job = the_job(render(tmp_path, ("kueue",)))
    assert job["spec"]["suspend"] is True
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]


def test_overlay_sweep_gives_each_seed_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifests = render(tmp_path, ("sweep",))
    spec = the_job(manifests)["spec"]
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


MULTI_NODE = {"files": "", "two": "2", "one": "1", "sixteen": "16"}


@pytest.fixture(scope="module", params=list(MULTI_NODE))
def multi_node(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[Manifest]:
    """The file as it is, and rendered for a number of nodes."""
    if request.param == "files":
        return read_manifests("multi-node.yaml")
    return render(tmp_path_factory.mktemp(request.param), (), MULTI_NODE[request.param])


def only(kind: str, manifests: list[Manifest]) -> Manifest:
    (manifest,) = of_kind(kind, manifests)
    return manifest


def test_two_nodes_are_what_the_file_says(tmp_path: Path) -> None:
    rendered, file = render(tmp_path, (), "2"), read_manifests("multi-node.yaml")
    # kustomize puts a variable that it replaces first, and none refers to another.
    for manifests in (rendered, file):
        environment = the_container(the_job(manifests)["spec"]["template"]["spec"])["env"]
        assert not [variable for variable in environment if "$(" in variable.get("value", "")]
        environment.sort(key=lambda variable: variable["name"])
    fetch = by_name(read_manifests(FETCH))
    del fetch["Pod", "cifar10-fetch"]["spec"]["volumes"]
    pod = by_name(rendered)["Pod", "cifar10-fetch"]
    (volume,) = pod["spec"].pop("volumes")
    assert volume["persistentVolumeClaim"]["claimName"] == "cifar10-multi-node-output"
    assert by_name(rendered) == by_name(file) | fetch


def test_the_file_for_several_nodes_is_valid(multi_node: list[Manifest]) -> None:
    for version in VERSIONS:
        for manifest in multi_node:
            kubernetes_validate.validate(manifest, version, strict=True)


def test_the_number_of_nodes_is_the_same_everywhere(multi_node: list[Manifest]) -> None:
    spec = the_job(multi_node)["spec"]
    nodes = spec["completions"]
    variables = environment(the_container(spec["template"]["spec"]))
    assert spec["completionMode"] == "Indexed"
    assert spec["parallelism"] == int(variables["KUBERNETES_JOB_COMPLETIONS"]) == nodes
    assert spec["backoffLimit"] == 4 * nodes
    # The chief's end is the run's.
    assert spec["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}


def test_each_pod_knows_all_by_the_names_that_kubernetes_gives_them(
    multi_node: list[Manifest],
) -> None:
    job, service = the_job(multi_node), only("Service", multi_node)
    template, name = job["spec"]["template"], job["metadata"]["name"]
    assert template["spec"]["subdomain"] == service["metadata"]["name"]
    assert "hostname" not in template["spec"]
    hosts = [f"{name}-{index}.{service['metadata']['name']}" for index in range(16)]
    assert max(len(host.partition(".")[0]) for host in hosts) <= 63
    nodes = job["spec"]["completions"]
    for index in range(nodes):
        environ = environment(the_container(template["spec"]), index)
        assert environ["KUBERNETES_JOB_NAME"] == name
        spec = cluster_spec(environ)
        if nodes > 1:
            assert spec.index == index
            assert [worker.partition(":")[0] for worker in spec.workers] == hosts[:nodes]
        assert run_identity(environ, None) == RunIdentity("kubernetes job 6a41c0ac")


def test_names_resolve_before_the_pods_are_ready(multi_node: list[Manifest]) -> None:
    spec = only("Service", multi_node)["spec"]
    assert spec["clusterIP"] == "None"
    assert spec["publishNotReadyAddresses"] is True
    # Set by Kubernetes on the Pods of this Job and no others.
    assert spec["selector"] == own_pods(multi_node)


def own_pods(manifests: list[Manifest]) -> dict[str, str]:
    return {"batch.kubernetes.io/job-name": the_job(manifests)["metadata"]["name"]}


def test_only_its_own_pods_reach_a_worker(multi_node: list[Manifest]) -> None:
    own = {"matchLabels": own_pods(multi_node)}
    assert only("NetworkPolicy", multi_node)["spec"] == {
        "podSelector": own,
        "policyTypes": ["Ingress"],
        "ingress": [{"from": [{"podSelector": own}]}],
    }


def test_each_worker_has_a_node_of_its_own(multi_node: list[Manifest]) -> None:
    affinity = the_job(multi_node)["spec"]["template"]["spec"]["affinity"]
    assert affinity["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"] == [
        {
            "topologyKey": "kubernetes.io/hostname",
            "labelSelector": {"matchLabels": own_pods(multi_node)},
        }
    ]


def test_every_node_can_mount_the_claims(multi_node: list[Manifest]) -> None:
    claims = of_kind("PersistentVolumeClaim", multi_node)
    assert [claim["spec"]["accessModes"] for claim in claims] == [["ReadWriteMany"]] * 2
    # Applied beside job.yaml, whose claims have another access mode, nothing is changed there.
    assert not by_name(claims).keys() & by_name(read_manifests()).keys()


def test_several_nodes_differ_from_one_only_in_what_they_need(multi_node: list[Manifest]) -> None:
    one, several = (the_job(manifests)["spec"] for manifests in (read_manifests(), multi_node))
    apart = {"completionMode", "completions", "parallelism", "successPolicy", "backoffLimit"}
    assert {key: value for key, value in several.items() if key not in {*apart, "template"}} == {
        key: value for key, value in one.items() if key not in {"backoffLimit", "template"}
    }
    one, several = (spec["template"]["spec"] for spec in (one, several))
    assert several.keys() - one.keys() == {"affinity", "subdomain"}
    apart = {"affinity", "subdomain", "containers", "volumes"}
    assert {key: value for key, value in several.items() if key not in apart} == {
        key: value for key, value in one.items() if key not in apart
    }
    one, several = (the_container(pod) for pod in (one, several))
    assert several | {"env": None} == one | {"env": None}
