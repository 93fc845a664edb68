"""The manifests as the files say and as kustomize renders them."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import REPOSITORY

Manifest = dict[str, Any]
FETCH = "fetch/pod.yaml"


def copy_of_the_repository(folder: Path) -> Path:
    """What the make targets need, in a folder that they may write."""
    shutil.copytree(REPOSITORY / "k8s", folder / "k8s")
    shutil.copy(REPOSITORY / "Makefile", folder)
    return folder


def make(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run make with arguments, and with variables in its environment."""
    environ = {"PATH": os.environ["PATH"], **variables}
    return subprocess.run(
        ["make", *arguments], cwd=folder, env=environ, capture_output=True, text=True
    )


def kustomize(folder: Path) -> str:
    for command in (["kustomize", "build"], ["kubectl", "kustomize"]):
        if shutil.which(command[0]):
            rendered = subprocess.run([*command, folder], capture_output=True, text=True)
            assert rendered.returncode == 0, rendered.stderr
            return rendered.stdout
    missing = "neither kustomize nor kubectl is installed"
    if os.environ.get("CI"):
        pytest.fail(missing)
    pytest.skip(missing)


def render(folder: Path, overlays: tuple[str, ...], nodes: str = "") -> list[Manifest]:
    """The Job, its claims and the Pod of `make k8s-fetch`, with overlays and on several nodes."""
    chosen = f"OVERLAY={' '.join(overlays)}", f"NODES={nodes}"
    made = make(copy_of_the_repository(folder), "k8s-render", *chosen)
    assert made.returncode == 0, made.stderr
    return list(yaml.safe_load_all(kustomize(folder / "build" / "k8s")))


def read_manifests(*names: str) -> list[Manifest]:
    """What files of k8s/ say, by default the Job and the Pod of `make k8s-fetch`."""
    texts = [(REPOSITORY / "k8s" / name).read_text() for name in names or ("job.yaml", FETCH)]
    return [manifest for text in texts for manifest in yaml.safe_load_all(text)]


def of_kind(kind: str, manifests: list[Manifest]) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def the_job(manifests: list[Manifest]) -> Manifest:
    (job,) = of_kind("Job", manifests)
    return job


def the_container(pod: Manifest) -> Manifest:
    (container,) = pod["containers"]
    assert isinstance(container, dict)
    return container
