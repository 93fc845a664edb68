"""Fixtures shared by the integration tests: volumes, images and data."""

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.containers import IMAGE, build_image, build_sif, require_containers
from tests.integration.tools import require_tools

MakeVolume = Callable[[int], Path]


@pytest.fixture
def make_volume(tmp_path: Path) -> Iterator[MakeVolume]:
    """Create and mount a volume of the given size in KiB."""
    volumes: list[Path] = []

    def make(kibibytes: int) -> Path:
        volume = tmp_path / f"volume-{len(volumes)}"
        volume.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(volume)]
        mounted = subprocess.run(mount, capture_output=True, text=True)
        if mounted.returncode:
            pytest.skip(f"mounting a small volume needs root: {mounted.stderr.strip()}")
        volumes.append(volume)
        return volume

    yield make
    for volume in volumes:
        if volume.is_mount():
            # Lazily, because a process that was just killed can still have files open.
            subprocess.run(["umount", "-l", volume], check=True)


@pytest.fixture
def small_volume(make_volume: MakeVolume) -> Path:
    """A volume of 1 MiB."""
    return make_volume(1024)


@pytest.fixture(scope="session")
def image() -> str:
    """The project's image, built on a substitute for its base image."""
    require_containers()
    build = build_image()
    assert build.returncode == 0, build.stdout + build.stderr
    return IMAGE


@pytest.fixture(scope="session")
def sif(image: str) -> Path:
    """The same image as a file for Apptainer."""
    require_tools(("apptainer", "mksquashfs", "squashfuse"), "running Slurm for an ordinary user")
    # The mode that udev sets, which lets an ordinary user mount the image with FUSE.
    Path("/dev/fuse").chmod(0o666)
    return build_sif()


@pytest.fixture(scope="session")
def readable_data(cifar10_dir: Path) -> Iterator[Path]:
    """The data set in a folder that every user can read."""
    with tempfile.TemporaryDirectory(prefix="cifar10-job-data-") as folder:
        shutil.copytree(cifar10_dir, folder, dirs_exist_ok=True)
        subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
        yield Path(folder)
