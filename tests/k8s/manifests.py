"""The manifests as kustomize renders them."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import REPOSITORY

Manifest = dict[str, Any]


def copy_repository(folder: Path) -> Path:
    """Copy the files that the make targets need into a folder that they can write to."""
    shutil.copytree(REPOSITORY / "k8s", folder / "k8s", symlinks=True)
    shutil.copy(REPOSITORY / "Makefile", folder)
    return folder


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {"PATH": os.environ["PATH"]}
    return subprocess.run(
        ["make", *arguments], cwd=folder, env=environ, capture_output=True, text=True
    )


def kustomize(folder: Path) -> list[Manifest]:
    for command in (["kustomize", "build"], ["kubectl", "kustomize"]):
        if shutil.which(command[0]):
            rendered = subprocess.run([*command, folder], capture_output=True, text=True)
            assert rendered.returncode == 0, rendered.stderr
            return list(yaml.safe_load_all(rendered.stdout))
    missing = "neither kustomize nor kubectl is installed"
    if os.environ.get("CI"):
        pytest.fail(missing)
    pytest.skip(missing)


def fetch_pod(folder: Path, kustomization: str) -> Manifest:
    """The Pod of `make k8s-fetch` in a copy of the repository."""
    make(folder, "k8s-fetch", f"K8S={kustomization}", "KUBECTL=true")
    return only("Pod", kustomize(folder / "build" / "k8s-fetch"))


def render(folder: Path, kustomization: str) -> list[Manifest]:
    """The manifests that `make k8s-run` applies, and the Pod of `make k8s-fetch`."""
    return [*kustomize(folder / kustomization), fetch_pod(folder, kustomization)]


def of_kind(kind: str, manifests: list[Manifest]) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def only(kind: str, manifests: list[Manifest]) -> Manifest:
    (manifest,) = of_kind(kind, manifests)
    return manifest


def container_of(pod: Manifest) -> Manifest:
    """The container of a Pod's spec."""
    (container,) = pod["containers"]
    assert isinstance(container, dict)
    return container
