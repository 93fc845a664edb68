"""The workers, the identity and the GPUs of a run, from the scheduler's environment.

The only module that reads a scheduler's variables. Pure functions over a mapping.
"""

import hashlib
import ipaddress
import itertools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from job.config import UserError, encodable

_HOSTS = 65536  # Slurm's maximum for one list
_NODES = r"(?:[^\s,\[\]]|\[[0-9][0-9,-]*\])+"
_NODELIST = re.compile(rf"{_NODES}(?:,{_NODES})*")


def expand_nodelist(text: str) -> list[str]:
    """List the nodes of a list in Slurm's short form, such as ``n[1-3,07-09],login``.

    Args:
        text: Value of ``SLURM_STEP_NODELIST``. The order is kept, because ranks follow it, and so
            are leading zeros.

    Raises:
        ValueError: If the text is not a list of nodes.
    """
    if not _NODELIST.fullmatch(text):
        raise ValueError(f"received {text!r}, expected nodes such as n1,n[2-4,07-09]")
    hosts: list[str] = []
    for nodes in re.findall(_NODES, text):
        # Parts at odd positions were inside brackets, the others outside.
        parts = re.split(r"\[([^]]*)\]", nodes)
        choices = [_expand_ranges(p) if i % 2 else [p] for i, p in enumerate(parts)]
        room = _HOSTS - len(hosts)
        found = ["".join(p) for p in itertools.islice(itertools.product(*choices), room + 1)]
        if len(found) > room:
            raise ValueError(f"received {text!r}, expected {_HOSTS} nodes at most")
        hosts += found
    return hosts


def _expand_ranges(text: str) -> list[str]:
    """List the numbers of ``1-3,07-09``, with leading zeros."""
    numbers: list[str] = []
    for part in text.split(","):
        bounds = part.split("-")
        if len(bounds) > 2 or not all(_NUMBER.fullmatch(bound) for bound in bounds):
            raise ValueError(f"received {part!r} in [{text}], expected a number or a range")
        first, last = int(bounds[0]), int(bounds[-1])
        if not first <= last < first + _HOSTS:
            raise ValueError(
                f"received the range {part} in [{text}], expected the lower end first and {_HOSTS} "
                f"nodes at most"
            )
        numbers += [str(number).zfill(len(bounds[0])) for number in range(first, last + 1)]
    return numbers


TASKS_PER_NODE = 16
"""Maximum number of processes of a run on one node, and number of ports reserved per job."""

_FIRST_PORT = 12000
_PORT_BLOCKS = 1250  # up to 31999, below the ports that Linux gives to outgoing connections

# Distance between the ports of two steps of a job, which can run at the same time. Its multiples
# stay far from each other and from neighbouring jobs: 1250 divided by the square of the golden
# ratio.
_STEP_STRIDE = 477

_NUMBER = re.compile(r"[0-9]{1,18}")
_ADDRESS = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*|\[([0-9A-Fa-f:.]+)\]):([0-9]{1,5})")
_TASKS = re.compile(r"([1-9][0-9]{0,5})(?:\(x([1-9][0-9]{0,5})\))?")


@dataclass(frozen=True)
class ClusterSpec:
    """The workers of a run, and the rank of this process.

    Attributes:
        workers: Addresses "host:port" in the order of the ranks; only one if it trains alone.
        index: This process's rank, from 0.
    """

    workers: tuple[str, ...]
    index: int

    @property
    def is_chief(self) -> bool:
        """Whether this process writes the files."""
        return self.index == 0

    @property
    def count(self) -> int:
        """Number of workers of the run."""
        return len(self.workers)

    def name(self, rank: int) -> str:
        """Name of a worker in messages."""
        return f"worker {rank} ({self.workers[rank]})"


ALONE = ClusterSpec(("localhost:0",), 0)
"""The spec of a process that trains alone."""


def cluster_spec(environ: Mapping[str, str]) -> ClusterSpec:
    """Determine the workers of the run, from the first of these variables that is set.

    Args:
        environ: Environment variables. ``TF_CONFIG`` is TensorFlow's own description of a cluster.
            srun sets ``SLURM_STEP_NUM_TASKS`` and related variables for each task of a step. A
            Kubernetes manifest passes ``KUBERNETES_JOB_COMPLETIONS``, ``…_NAME``, ``…_SERVICE`` and
            ``…_UID``, and Kubernetes adds ``JOB_COMPLETION_INDEX``; without the first of them, each
            Pod of an Indexed Job trains alone.

    Raises:
        UserError: If a variable is missing or malformed, or contradicts another.
    """
    if environ.get("TF_CONFIG", "").strip():
        return _from_tf_config(environ["TF_CONFIG"])
    if environ.get("SLURM_STEP_NUM_TASKS"):
        return _from_slurm_step(environ)
    if environ.get("KUBERNETES_JOB_COMPLETIONS"):
        return _from_indexed_job(environ)
    return ALONE


class _Task(msgspec.Struct):
    type: Literal["chief", "worker"]
    index: Annotated[int, Meta(ge=0)] | Annotated[str, Meta(pattern=r"^[0-9]{1,18}\Z")]


class _TfConfig(msgspec.Struct):
    cluster: dict[str, list[str]]
    task: _Task


def _from_tf_config(text: str) -> ClusterSpec:
    try:
        config = msgspec.json.decode(text, type=_TfConfig)
    except (msgspec.MsgspecError, ValueError) as error:
        raise _refused(str(error)) from error
    chief, others = config.cluster.get("chief", []), config.cluster.get("worker", [])
    kind, index, addresses = config.task.type, int(config.task.index), [*chief, *others]
    unknown = {name for name, has in config.cluster.items() if has} - {"chief", "worker"}
    if unknown:
        raise _refused(f"cluster has {', '.join(sorted(unknown))}, which this job does not support")
    if not addresses or len(chief) > 1:
        raise _refused(f"cluster has {len(chief)} chiefs and {len(others)} workers")
    for address in addresses:
        if not _is_address(address) or addresses.count(address) > 1:
            raise _refused(f"cluster has the address {address!r}, which is invalid or not unique")
    if index >= len(chief if kind == "chief" else others):
        raise _refused(f"task.index is {index}, which has no address in cluster.{kind}")
    return ClusterSpec((*chief, *others), index if kind == "chief" else len(chief) + index)


def _refused(received: str) -> UserError:
    return UserError(
        f"TF_CONFIG: {received}; expected "
        '{"cluster": {"worker": ["host:port", …]}, "task": {"type": "worker", "index": 0}}, with a '
        "port from 1 to 65535 and at most one chief in addition to the workers; fix it, or unset "
        "TF_CONFIG to train without it"
    )


def _is_address(address: str) -> bool:
    match = _ADDRESS.fullmatch(address)
    if match is None or not 1 <= int(match[3]) <= 65535:
        return False
    try:
        return match[2] is None or bool(ipaddress.IPv6Address(match[2]))
    except ValueError:
        return False


def _from_slurm_step(environ: Mapping[str, str]) -> ClusterSpec:
    advice = "start the job with srun, and pass Slurm's variables to a container"
    total = _number(environ, "SLURM_STEP_NUM_TASKS", advice)
    if total <= 1:
        return ALONE
    rank, node, place, job, step = (
        _number(environ, f"SLURM_{name}", advice)
        for name in ("PROCID", "NODEID", "LOCALID", "JOB_ID", "STEP_ID")
    )
    nodelist = _text(environ, "SLURM_STEP_NODELIST", advice)
    layout = _text(environ, "SLURM_STEP_TASKS_PER_NODE", advice)
    try:
        hosts = expand_nodelist(nodelist)
    except ValueError as error:
        raise UserError(f"SLURM_STEP_NODELIST: {error}; {advice}") from error
    tasks = _expand_tasks(layout, advice)
    if len(hosts) != len(tasks) or len(set(hosts)) != len(hosts):
        raise UserError(
            f"SLURM_STEP_NODELIST {nodelist} has {len(set(hosts))} different nodes, expected "
            f"{len(tasks)}, because SLURM_STEP_TASKS_PER_NODE is {layout}; {advice}"
        )
    if sum(tasks) != total:
        raise UserError(
            f"SLURM_STEP_TASKS_PER_NODE {layout} gives {sum(tasks)} tasks, expected {total} from "
            f"SLURM_STEP_NUM_TASKS; {advice}"
        )
    # The block distribution: the tasks of a node have consecutive ranks.
    places = [(n, local) for n, count in enumerate(tasks) for local in range(count)]
    if rank >= total or places[rank] != (node, place):
        expected = "SLURM_NODEID {} and SLURM_LOCALID {}".format(*places[min(rank, total - 1)])
        raise UserError(
            f"SLURM_PROCID {rank}, SLURM_NODEID {node} and SLURM_LOCALID {place} contradict "
            f"SLURM_STEP_TASKS_PER_NODE {layout}, expected ranks below {total} and for this one "
            f"{expected}; use srun --distribution=block"
        )
    key = job + _STEP_STRIDE * step
    return ClusterSpec(tuple(f"{hosts[n]}:{_port(key, local)}" for n, local in places), rank)


def refuse_shell_of_tasks(environ: Mapping[str, str]) -> None:
    """Refuse a command typed in a shell that srun started as several tasks: only one task gets it.

    An interactive shell starts each command in its own process group. A script that srun starts
    does not.

    Args:
        environ: Environment variables. ``SLURM_PTY_PORT`` is set by ``srun --pty``, and is also set
            in steps that are started in its shell, which are tasks themselves.

    Raises:
        UserError: If the command was typed in such a shell.
    """
    total, task = environ.get("SLURM_STEP_NUM_TASKS", "1"), environ.get("SLURM_TASK_PID", "")
    if total == "1" or not environ.get("SLURM_PTY_PORT") or not task.isdecimal():
        return
    try:
        in_shell = os.getpgid(int(task)) != os.getpgrp()
    except OSError:
        return  # the task is outside of this container
    if in_shell:
        raise UserError(
            f"received a command in one of the {total} tasks of srun --pty, expected it in all of "
            f"them; start the training with srun, or the shell with srun --ntasks=1 --pty"
        )


def _expand_tasks(text: str, advice: str) -> list[int]:
    """List the number of tasks per node from ``2(x3),1``."""
    tasks: list[int] = []
    for part in text.split(","):
        match = _TASKS.fullmatch(part)
        if match is None:
            raise UserError(
                f"SLURM_STEP_TASKS_PER_NODE received {text!r}, expected numbers of tasks such as "
                f"2(x3),1; {advice}"
            )
        tasks += [int(match[1])] * int(match[2] or 1)
    if max(tasks) > TASKS_PER_NODE:
        raise UserError(
            f"SLURM_STEP_TASKS_PER_NODE is {text}, expected at most {TASKS_PER_NODE} tasks per "
            f"node; use srun --ntasks-per-node=1, because one task uses all GPUs of its node"
        )
    return tasks


def _from_indexed_job(environ: Mapping[str, str]) -> ClusterSpec:
    advice = "set it in the Pod template, as k8s/overlays/multi-node does"
    count = _number(environ, "KUBERNETES_JOB_COMPLETIONS", advice, least=1)
    if count == 1:
        return ALONE
    index = _number(environ, "JOB_COMPLETION_INDEX", "set completionMode: Indexed in the Job")
    job, service, uid = (
        _text(environ, f"KUBERNETES_JOB_{name}", advice) for name in ("NAME", "SERVICE", "UID")
    )
    if index >= count:
        raise UserError(
            f"JOB_COMPLETION_INDEX is {index}, expected less than KUBERNETES_JOB_COMPLETIONS "
            f"{count}; set the Job's completions to the value of that variable"
        )
    # Another Job with the same name uses other ports: its last Pods cannot connect to these.
    port = _port(int.from_bytes(hashlib.sha256(encodable(uid).encode()).digest()), 0)
    return ClusterSpec(tuple(f"{job}-{rank}.{service}:{port}" for rank in range(count)), index)


def _port(key: int, place: int) -> int:
    """The port of a process on its node, from the ports reserved for a job's key."""
    return _FIRST_PORT + TASKS_PER_NODE * (key % _PORT_BLOCKS) + place


def _text(environ: Mapping[str, str], name: str, advice: str) -> str:
    value = environ.get(name, "")
    if not value:
        raise UserError(f"{name} is not set, expected with the other variables; {advice}")
    return value


def _number(environ: Mapping[str, str], name: str, advice: str, least: int = 0) -> int:
    value = _text(environ, name, advice)
    if not _NUMBER.fullmatch(value) or int(value) < least:
        raise UserError(
            f"{name} is {value!r}, expected a whole number of at least {least}; {advice}"
        )
    return int(value)


def gpus_on_node(environ: Mapping[str, str]) -> int:
    """The number of GPUs that Slurm gives to a job on this node; 0 if it gives none.

    Raises:
        UserError: If its variable is not a number.
    """
    text = environ.get("SLURM_GPUS_ON_NODE") or "0"
    if not text.isdecimal():
        raise UserError(
            f"SLURM_GPUS_ON_NODE received {text!r}, expected a number; unset or correct it"
        )
    return int(text)


@dataclass(frozen=True)
class RunIdentity:
    """Which run an attempt belongs to.

    Attributes:
        name: The same for all attempts of a run, and different for other runs, as returned by
            `encodable`; None if unknown.
        attempt: Number of the attempt, from 0, higher for later ones; None if the scheduler does
            not count them.
    """

    name: str | None
    attempt: int | None = None

    def replaces(self, name: str | None, attempt: int) -> bool:
        """Whether this is a later attempt than another one of the same run, as far as known."""
        is_later = self.attempt is None or self.attempt > attempt
        return self.name is not None and self.name == name and is_later


NO_RUN = RunIdentity(None)
"""The identity of a process that replaces no other one and is replaced by none."""


def run_identity(environ: Mapping[str, str], run_id: str | None) -> RunIdentity:
    """Determine the run that this process is an attempt of.

    Args:
        environ: Environment variables. Slurm sets ``SLURM_JOB_ID``, ``SLURM_RESTART_COUNT`` and in
            arrays ``SLURM_ARRAY_JOB_ID`` and ``SLURM_ARRAY_TASK_ID``; a Kubernetes manifest passes
            the Job's UID as ``KUBERNETES_JOB_UID``, and Kubernetes adds ``JOB_COMPLETION_INDEX`` in
            Indexed Jobs. If ``KUBERNETES_JOB_COMPLETIONS`` is set, the Pods of such a Job are the
            workers of one run, and the index is not part of the name.
        run_id: The user's ``--run-id``, which comes first.
    """
    if run_id:
        return RunIdentity(encodable(f"run {run_id}"))
    slurm_job = environ.get("SLURM_JOB_ID")
    if slurm_job:
        restarts = environ.get("SLURM_RESTART_COUNT", "")
        task = environ.get("SLURM_ARRAY_TASK_ID")
        job = f"{environ.get('SLURM_ARRAY_JOB_ID', slurm_job)}_{task}" if task else slurm_job
        return RunIdentity(
            encodable(f"slurm job {job}"), int(restarts) if restarts.isdecimal() else 0
        )
    kubernetes_job = environ.get("KUBERNETES_JOB_UID")
    if kubernetes_job:
        one_run = environ.get("KUBERNETES_JOB_COMPLETIONS")
        index = None if one_run else environ.get("JOB_COMPLETION_INDEX")
        name = f"kubernetes job {kubernetes_job}" + (f"/{index}" if index else "")
        return RunIdentity(encodable(name))
    return NO_RUN
