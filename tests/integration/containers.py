"""The project's image, built with buildah on a substitute base image, for podman and Apptainer."""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from job import __version__
from tests.conftest import REPOSITORY
from tests.integration.tools import require_tools

HERE = Path(__file__).parent
IMAGE = "localhost/cifar10-job:test"
REVISION = "0123456789abcdef0123456789abcdef01234567"
TOOLS = ("podman", "buildah", "runc", "mmdebstrap")
NOBODY = ("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups")
"""Prefix of a command that runs it as an ordinary user."""

_DISK = Path("/var/tmp")
_DEBIAN = "localhost/cifar10-job-debian:bookworm"


def require_containers() -> None:
    """Skip the test if containers cannot be built and run."""
    require_tools(TOOLS, "running containers as any user, on the real network,")


def podman(*args: str | Path) -> subprocess.CompletedProcess[str]:
    """Run podman and return its result; its exit code is not checked."""
    return _run("podman", *args)


def shell(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a script that uses podman with the same settings as `podman`."""
    return _run("bash", "-c", script, folder=folder)


def build_image(tag: str = IMAGE, context: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    """Build the unmodified Dockerfile on the substitute base; unchanged layers are reused.

    Only one process builds at a time; the others then reuse its layers.
    """
    with _exclusive_lock("image"):
        return _build(
            *("--file", context / "docker" / "Dockerfile", "--tag", tag),
            *("--build-arg", f"BASE_IMAGE={_base()}"),
            *("--build-arg", f"VERSION={__version__}", "--build-arg", f"REVISION={REVISION}"),
            context,
        )


def build_sif() -> Path:
    """Convert the built image for Apptainer, as an ordinary user; reuse an existing file."""
    with _exclusive_lock("sif"):
        image = podman("image", "inspect", "--format", "{{.Id}}", IMAGE).stdout.strip()
        sif = _DISK / f"cifar10-job-{image[:12]}.sif"
        if not sif.exists():
            for old in _DISK.glob("cifar10-job-*.sif"):
                old.unlink()
            with tempfile.TemporaryDirectory(dir=_DISK) as temporary:
                folder = Path(temporary)
                save, convert = _documented_conversion()
                shell(save, folder).check_returncode()
                subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
                shutil.chown(folder, "nobody")
                env = {f"APPTAINER_{name}DIR": temporary for name in ("TMP", "CACHE")}
                result = subprocess.run(
                    [*NOBODY, "bash", "-c", convert],
                    cwd=folder,
                    env={"PATH": os.environ["PATH"], "HOME": temporary, **env},
                    capture_output=True,
                    text=True,
                )
                assert result.returncode == 0, result.stderr
                (folder / "cifar10-job.sif").rename(sif)
    return sif


def _documented_conversion() -> tuple[str, str]:
    """The commands of docs/container.md, adapted to the tests' image and without compression."""
    page = (REPOSITORY / "docs" / "container.md").read_text()
    lines = re.findall(r"^(podman save .*|apptainer build .*)$", page, re.MULTILINE)
    (plain,) = re.findall(r"--mksquashfs-args \"[^\"]+\"", page)
    save, convert = lines
    return (
        save.replace(f"cifar10-job:{__version__}", IMAGE),
        convert.replace("build", f"build {plain}"),
    )


@contextlib.contextmanager
def _exclusive_lock(work: str) -> Iterator[None]:
    """Let only one process at a time do this work."""
    lock = Path(tempfile.gettempdir()) / f"cifar10-job-test-{work}.lock"
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _base() -> str:
    """The substitute for the base image; built once per machine."""
    lock = (REPOSITORY / "locks" / "gpu.txt").read_text()
    tensorflow = re.search(r"^tensorflow==.*?(?=^\w)", lock, re.MULTILINE | re.DOTALL)
    assert tensorflow
    recipe = (HERE / "base.Dockerfile").read_text()
    digest = hashlib.sha256((recipe + tensorflow[0]).encode()).hexdigest()[:12]
    tag = f"localhost/cifar10-job-base:{digest}"
    if podman("image", "exists", tag).returncode:
        context = _DISK / f"cifar10-job-base-{digest}"
        context.mkdir(exist_ok=True)
        try:
            debian = context / "debian.tar"
            packages = "--include=python3,python3-pip,ca-certificates"
            _run(
                "mmdebstrap", "--quiet", "--variant=minbase", packages, "bookworm", debian
            ).check_returncode()
            podman("import", debian, _DEBIAN).check_returncode()
            debian.unlink()
            (context / "tensorflow.txt").write_text(tensorflow[0])
            base = _build("--file", HERE / "base.Dockerfile", "--tag", tag, context)
            assert base.returncode == 0, base.stdout + base.stderr
        finally:
            shutil.rmtree(context)
    return tag


def _build(*args: str | Path) -> subprocess.CompletedProcess[str]:
    # The certificates may be needed for a package mirror.
    settings = "--layers --isolation chroot --network host -v /etc/ssl/certs:/etc/ssl/certs:ro"
    return _run("buildah", "build", *settings.split(), *args)


def _run(*command: str | Path, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "CONTAINERS_CONF": str(HERE / "containers.conf")}
    return subprocess.run([*map(str, command)], cwd=folder, env=env, capture_output=True, text=True)


if __name__ == "__main__":
    # The gate starts this build before the tests.
    print(build_image().stderr)
    print(build_sif())
