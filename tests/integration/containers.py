"""The project's image, built by buildah on a stand-in base and run by podman."""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from job import __version__
from tests.conftest import REPOSITORY
from tests.integration.tools import require_tools

HERE = Path(__file__).parent
IMAGE = "localhost/cifar10-job:test"
REVISION = "0123456789abcdef0123456789abcdef01234567"
TOOLS = ("podman", "buildah", "runc", "mmdebstrap")

_DEBIAN = "localhost/cifar10-job-debian:bookworm"


def require_containers() -> None:
    """Skip where containers cannot be built and run."""
    require_tools(TOOLS, "running containers as any user, on the real network,")


def podman(*args: str | Path) -> subprocess.CompletedProcess[str]:
    """Run podman to its end, whatever that is."""
    return _run("podman", *args)


def shell(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a script whose podman is set up like `podman`."""
    return _run("bash", "-c", script, folder=folder)


def build_image(tag: str = IMAGE, context: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    """Build the Dockerfile as it stands on the stand-in base; unchanged layers are reused.

    One process at a time: the first builds for all that ask for the same.
    """
    lock = Path(tempfile.gettempdir()) / "cifar10-job-test-image.lock"
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        return _build(
            *("--file", context / "docker" / "Dockerfile", "--tag", tag),
            *("--build-arg", f"BASE_IMAGE={_base()}"),
            *("--build-arg", f"VERSION={__version__}", "--build-arg", f"REVISION={REVISION}"),
            context,
        )


def _base() -> str:
    """The stand-in for the base image; built once on a machine."""
    lock = (REPOSITORY / "locks" / "gpu.txt").read_text()
    tensorflow = re.search(r"^tensorflow==.*?(?=^\w)", lock, re.MULTILINE | re.DOTALL)
    assert tensorflow
    recipe = (HERE / "base.Dockerfile").read_text()
    digest = hashlib.sha256((recipe + tensorflow[0]).encode()).hexdigest()[:12]
    tag = f"localhost/cifar10-job-base:{digest}"
    if podman("image", "exists", tag).returncode:
        context = Path("/var/tmp") / f"cifar10-job-base-{digest}"
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
    # The certificates are those of a package mirror that a machine may be behind.
    settings = "--layers --isolation chroot --network host -v /etc/ssl/certs:/etc/ssl/certs:ro"
    return _run("buildah", "build", *settings.split(), *args)


def _run(*command: str | Path, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "CONTAINERS_CONF": str(HERE / "containers.conf")}
    return subprocess.run([*map(str, command)], cwd=folder, env=env, capture_output=True, text=True)


if __name__ == "__main__":
    # The gate builds ahead of the tests.
    print(build_image().stderr)
