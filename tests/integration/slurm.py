"""A Slurm cluster on this machine: a controller and two nodes, n1 and n2, each with 2 + 2 GPUs.

Alternatively there are three nodes, with n3, each a host with its own network. The GPUs are device
nodes without hardware, and CPUs and memory are only declared in the configuration, so that the
script can be submitted unmodified.
"""

import contextlib
import copy
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY, free_ports
from tests.integration.containers import NOBODY
from tests.integration.namespaces import Hosts
from tests.integration.tools import require_tools

TOOLS = ("slurmctld", "slurmd", "sbatch", "munged")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")

# A requeued job waits until its credentials have expired: by default two minutes, at least five
# seconds. KillWait is set to its default.
SLURM_CONF = """\
ClusterName=test
SlurmctldHost={controller}
SlurmctldPort={port}
JobRequeue=0
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,sched_min_interval=500000
SlurmdTimeout=10
KillWait=30
ReturnToService=2
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=gpu Nodes=ALL Default=YES PriorityTier=1 PreemptMode=OFF
PartitionName=urgent Nodes=ALL PriorityTier=10
PartitionName=preemptible Nodes=ALL PriorityTier=1 GraceTime=60
PartitionName=graceless Nodes=ALL PriorityTier=1
"""
CONTROLLER = "n0"
"""Host of the controller if the nodes are separate hosts."""
NODE = "CPUs=8 RealMemory=65536 Gres=gpu:a:2,gpu:b:2"


def require_slurm() -> None:
    """Skip the test if no cluster can be started."""
    require_tools(TOOLS, "starting a Slurm cluster")


class Cluster:
    """Starts a Slurm cluster, submits jobs to it and queries it.

    Attributes:
        folder: Folder of the cluster; every user can read it.
        checkout: A checkout of the project with the program installed and the data downloaded.
        nodes: Names of the nodes.
        hosts: The hosts of controller and nodes, if they do not share this machine's network.
    """

    def __init__(self, data: Path, separate: bool = False) -> None:
        """Create the folders of a cluster.

        Args:
            data: The data set.
            separate: Use three nodes, each a separate host, instead of two nodes on this host.
        """
        self.folder = Path(tempfile.mkdtemp(prefix="cifar10-job-slurm-"))
        self.folder.chmod(0o755)
        (self.folder / "state").mkdir()
        self.checkout = self._make_checkout(data)
        self.nodes = ("n1", "n2", "n3") if separate else ("n1", "n2")
        self.hosts = Hosts((CONTROLLER, *self.nodes), self.folder) if separate else None
        self._user: tuple[str, ...] = ()
        self.env = {"PATH": os.environ["PATH"], "SLURM_CONF": str(self.folder / "slurm.conf")}

    def _make_checkout(self, data: Path) -> Path:
        checkout = Path(tempfile.mkdtemp(prefix="checkout-", dir=self.folder))
        checkout.chmod(0o755)
        (checkout / "job").symlink_to(REPOSITORY / "job")
        shutil.copytree(REPOSITORY / "slurm", checkout / "slurm")
        (checkout / ".venv").symlink_to(sys.prefix)
        (checkout / "data").symlink_to(data)
        return checkout

    def with_data(self, data: Path) -> "Cluster":
        """Return the same cluster with another checkout that contains other data."""
        other = copy.copy(self)
        other.checkout = self._make_checkout(data)
        return other

    def for_ordinary_user(self, **env: str) -> "Cluster":
        """Return the same cluster for the user nobody, with only the script in the checkout."""
        other = copy.copy(self)
        other.checkout = Path(tempfile.mkdtemp(prefix="nobody-", dir=self.folder))
        other.checkout.chmod(0o755)
        shutil.copytree(REPOSITORY / "slurm", other.checkout / "slurm")
        subprocess.run(["chown", "-R", "nobody", other.checkout], check=True)
        other.env = {**self.env, **env}
        other._user = NOBODY
        return other

    def start(self) -> None:
        folder = self.folder
        (folder / "slurm.conf").write_text(self._configuration())
        (folder / "gres.conf").write_text(
            f"NodeName=n[1-3] Name=gpu Type=a File={folder}/gpu[0-1]\n"
            f"NodeName=n[1-3] Name=gpu Type=b File={folder}/gpu[2-3]\n"
        )
        (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        for number in range(4):
            os.mknod(folder / f"gpu{number}", 0o020666, os.makedev(1, 3))  # as /dev/null
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {"key": key, "socket": folder / "munge.socket", "pid": folder / "munge.pid"}
        files |= {"log": folder / "munge.log", "seed": folder / "munge.seed"}
        names = {"socket": "--socket"}
        self.run(
            "munged",
            "--force",
            *(f"{names.get(name, f'--{name}-file')}={path}" for name, path in files.items()),
        )
        self.run("slurmctld")
        for node in self.nodes:
            self.start_node(node)
        wait_until(self.is_idle, 60)

    def _configuration(self) -> str:
        here, loopback, (port, *node_ports) = socket.gethostname(), "127.0.0.1", free_ports(4)
        controller, nodes = f"{here}({loopback})", []
        for node, node_port in zip(self.nodes, node_ports, strict=False):
            host, address = here, loopback
            if self.hosts:
                host, address = node, self.hosts.address(node)
            at = f"NodeHostname={host} NodeAddr={address} Port={node_port}"
            nodes.append(f"NodeName={node} {at} {NODE}")
        if self.hosts:
            controller = f"{CONTROLLER}({self.hosts.address(CONTROLLER)})"
        return SLURM_CONF.format(
            folder=self.folder, controller=controller, port=port, nodes="\n".join(nodes)
        )

    def is_idle(self) -> bool:
        return self.node_states() == {f"{node}:idle" for node in self.nodes}

    def node_states(self) -> set[str]:
        return set(self.run("sinfo", "--noheader", "--Node", "--format=%N:%t").split())

    def start_node(self, node: str) -> None:
        self.run("slurmd", "-N", node, host=node)

    def kill_node(self, node: str) -> None:
        """Kill a node's daemon but not its jobs, as when the network is lost."""
        os.kill(int((self.folder / f"{node}.pid").read_text()), signal.SIGKILL)

    def stop(self) -> None:
        """Kill every process of the cluster, including jobs of lost nodes, and remove its files."""
        mark = f"SLURM_CONF={self.env['SLURM_CONF']}".encode()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (process / "environ").read_bytes():
                    os.kill(int(process.name), signal.SIGKILL)
        if self.hosts:
            self.hosts.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(
        self, *command: str | Path, host: str = CONTROLLER, env: dict[str, str] | None = None
    ) -> str:
        """Run a Slurm command at the top of the checkout and return its output."""
        prefix = self.hosts.prefix(host, self.checkout) if self.hosts else ()
        result = subprocess.run(
            [*prefix, *self._user, *map(str, command)],
            cwd=self.checkout,
            env={**self.env, **(env or {})},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    def submit(self, *words: str | Path, **env: str) -> str:
        """Submit a job with sbatch and return its ID."""
        return self.run("sbatch", "--parsable", *words, env=env).strip()

    def fields(self, job: str) -> dict[str, str]:
        """The fields that `scontrol show job` prints."""
        line = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(re.findall(r"(\S+?)=(\S*)", line))

    def state(self, job: str) -> str:
        return self.fields(job)["JobState"]

    def wait(self, *jobs: str, timeout: float = 300) -> str:
        """Wait until jobs have ended and return the state of the last."""
        for job in jobs:
            has_ended = functools.partial(self._has_ended, job)
            wait_until(has_ended, timeout, functools.partial(self.log, job))
        return self.state(jobs[-1])

    def _has_ended(self, job: str) -> bool:
        return self.state(job) in ENDED

    def wait_for_log(self, job: str, text: str, times: int = 1, timeout: float = 200) -> None:
        wait_until(lambda: self.log(job).count(text) >= times, timeout, lambda: self.log(job))

    def log(self, job: str) -> str:
        path = self.checkout / f"slurm-{job}.out"
        return path.read_text() if path.exists() else ""


def processes(job: str) -> list[Path]:
    """The folders in /proc of a job's processes, on all nodes of this machine."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"SLURM_JOB_ID={job}".encode() in environment(process):
                found.append(process)
    return found


def environment(process: Path) -> list[bytes]:
    """The variables that a process was started with, each as NAME=VALUE."""
    return (process / "environ").read_bytes().split(b"\0")


def attempts(output: Path) -> list[dict[str, Any]]:
    """The attempts in the ``run.json`` of an output folder."""
    document: dict[str, Any] = json.loads((output / "run.json").read_text())
    return list(document["attempts"])


def holder_pid(output: Path) -> int:
    """The process ID of the holder of an output folder."""
    lease = max((output / ".lease").glob("[0-9]*[0-9]"))
    return int(json.loads(lease.read_text())["pid"])


@contextlib.contextmanager
def suspended(pid: int) -> Iterator[None]:
    """Suspend a training during the block, so that it does not end before the fault."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def wait_until(
    condition: Callable[[], bool], timeout: float, explain: Callable[[], str] = lambda: ""
) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"timed out after {timeout:g} s: {explain()}")
        time.sleep(0.3)
