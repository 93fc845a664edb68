import json
import os
import subprocess
from typing import Any

import pytest

from job.cluster.scheduler import (
    ALONE,
    ClusterSpec,
    RunIdentity,
    cluster_spec,
    expand_nodelist,
    refuse_shell_of_tasks,
    run_identity,
)
from job.config import ExitCode, UserError


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("n1", ["n1"]),
        ("localhost", ["localhost"]),
        ("gpu-a100.cluster_2", ["gpu-a100.cluster_2"]),
        ("n1,n2", ["n1", "n2"]),
        ("n2,n10,n1", ["n2", "n10", "n1"]),
        ("login,n[1-2],login2", ["login", "n1", "n2", "login2"]),
        ("n[1-3,07-09]", ["n1", "n2", "n3", "n07", "n08", "n09"]),
        ("n[2-3,10]", ["n2", "n3", "n10"]),
        ("n[10,2]", ["n10", "n2"]),
        ("n[8-11]", ["n8", "n9", "n10", "n11"]),
        ("n[08-11]", ["n08", "n09", "n10", "n11"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("n[0-0]", ["n0"]),
        ("n[000]", ["n000"]),
        ("n[5]", ["n5"]),
        ("a[1-2]b[3-4]", ["a1b3", "a1b4", "a2b3", "a2b4"]),
        ("rack[01-02]-n[1,3].local", [f"rack0{r}-n{n}.local" for r in (1, 2) for n in (1, 3)]),
        ("[1-2]n", ["1n", "2n"]),
        ("a[1-2][3-4]", ["a13", "a14", "a23", "a24"]),
        ("a[1,3],b[2-3]", ["a1", "a3", "b2", "b3"]),
        # Names at real sites: Perlmutter, Frontier, JUWELS, Snellius, AWS ParallelCluster, Azure.
        ("nid[001028-001029,001032]", ["nid001028", "nid001029", "nid001032"]),
        ("frontier[00001-00003]", ["frontier00001", "frontier00002", "frontier00003"]),
        ("jwb[0097,0100]", ["jwb0097", "jwb0100"]),
        ("r28n[1-2],r29n12", ["r28n1", "r28n2", "r29n12"]),
        ("gpu-dy-p4d-[1-2]", ["gpu-dy-p4d-1", "gpu-dy-p4d-2"]),
        ("cluster-hpc-pg0-[9-11]", [f"cluster-hpc-pg0-{n}" for n in (9, 10, 11)]),
        # From submitit's tests.
        ("learnfair[0300-0302]", ["learnfair0300", "learnfair0301", "learnfair0302"]),
        (
            "compute-b24-[1-3,5-6],compute-a-1",
            [
                *(f"compute-b24-{n}" for n in (1, 2, 3, 5, 6)),
                "compute-a-1",
            ],
        ),
        ("hostname[90-92]suffix", [f"hostname{n}suffix" for n in (90, 91, 92)]),
    ],
)
def test_a_nodelist_is_expanded_in_order(text: str, nodes: list[str]) -> None:
    assert expand_nodelist(text) == nodes


def test_a_nodelist_can_be_as_long_as_slurm_allows() -> None:
    nodes = expand_nodelist("n[1-65536]")
    assert (len(nodes), nodes[0], nodes[-1]) == (65536, "n1", "n65536")


@pytest.mark.parametrize(
    "text",
    [
        "",
        ",",
        "n1,",
        ",n1",
        "n1,,n2",
        "n1 n2",
        "n1, n2",
        "n1\n",
        "n[",
        "n]",
        "n[]",
        "n[1",
        "n1]",
        "n[1-]",
        "n[-1]",
        "n[,1]",
        "n[1,]",
        "n[1-2-3]",
        "n[3-1]",
        "n[a-c]",
        "n[1-0x3]",
        "n[1 - 3]",
        "n[٣]",
        "n[[1-2]]",
        "n[1-[2-3]]",
        "n[1-2",
        "(null)[1",
        "n[0-999999999]",
        "n[1-300]m[1-300]",
        "n[1-40000],m[1-40000]",
        "n[" + "9" * 5000 + "]",
    ],
)
def test_text_that_is_not_a_nodelist_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        expand_nodelist(text)


SLURM = {"SLURM_JOB_ID": "123"}
KUBERNETES = {"KUBERNETES_JOB_UID": "6f1c"}


@pytest.mark.parametrize(
    ("environ", "run_id", "identity"),
    [
        ({}, None, RunIdentity(None)),
        (SLURM, None, RunIdentity("slurm job 123", 0)),
        ({**SLURM, "SLURM_RESTART_COUNT": "2"}, None, RunIdentity("slurm job 123", 2)),
        (
            {**SLURM, "SLURM_ARRAY_JOB_ID": "120", "SLURM_ARRAY_TASK_ID": "3"},
            None,
            RunIdentity("slurm job 120_3", 0),
        ),
        ({**SLURM, "SLURM_PROCID": "1"}, None, RunIdentity("slurm job 123", 0)),
        (KUBERNETES, None, RunIdentity("kubernetes job 6f1c")),
        ({**KUBERNETES, "JOB_COMPLETION_INDEX": "4"}, None, RunIdentity("kubernetes job 6f1c/4")),
        (
            {**KUBERNETES, "JOB_COMPLETION_INDEX": "1", "KUBERNETES_JOB_COMPLETIONS": "2"},
            None,
            RunIdentity("kubernetes job 6f1c"),
        ),
        ({"JOB_COMPLETION_INDEX": "4"}, None, RunIdentity(None)),
        ({**SLURM, **KUBERNETES}, "mine", RunIdentity("run mine")),
    ],
)
def test_run_identity(environ: dict[str, str], run_id: str | None, identity: RunIdentity) -> None:
    assert run_identity(environ, run_id) == identity


def test_an_attempt_replaces_only_earlier_ones_of_its_run() -> None:
    """A second training in the shell of an allocation is not a later attempt of the first."""
    second = RunIdentity("slurm job 1", attempt=1)
    assert second.replaces("slurm job 1", 0)
    assert not second.replaces("slurm job 1", 1)
    assert not second.replaces("slurm job 1", 2)
    assert not second.replaces("slurm job 2", 0)
    assert not RunIdentity(None).replaces(None, 0)
    assert RunIdentity("kubernetes job 1").replaces("kubernetes job 1", 0)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"TF_CONFIG": ""},
        {"TF_CONFIG": " "},
        # A batch script, or a shell of salloc.
        {**SLURM, "SLURM_NNODES": "2", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"},
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1"},
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "n1", "SLURM_PROCID": "0"},
        # A seed of overlay sweep.
        {**KUBERNETES, "JOB_COMPLETION_INDEX": "4"},
        {**KUBERNETES, "JOB_COMPLETION_INDEX": "0", "KUBERNETES_JOB_COMPLETIONS": "1"},
    ],
)
def test_a_process_can_train_alone(environ: dict[str, str]) -> None:
    assert cluster_spec(environ) is ALONE
    assert (ALONE.is_chief, ALONE.count) == (True, 1)


def test_the_chief_is_the_first_worker() -> None:
    spec = ClusterSpec(("n1:12345", "n2:12345"), 1)
    assert (spec.is_chief, spec.count) == (False, 2)
    assert spec.name(1) == "worker 1 (n2:12345)"
    assert ClusterSpec(spec.workers, 0).is_chief


def tf_config(cluster: Any, kind: Any = "worker", index: Any = 0) -> dict[str, str]:
    config = {"cluster": cluster, "task": {"type": kind, "index": index}}
    return {"TF_CONFIG": json.dumps(config)}


TWO = {"worker": ["n1:12345", "n2:12345"]}


@pytest.mark.parametrize(
    ("environ", "spec"),
    [
        (tf_config(TWO, "worker", 0), ClusterSpec(("n1:12345", "n2:12345"), 0)),
        (tf_config(TWO, "worker", 1), ClusterSpec(("n1:12345", "n2:12345"), 1)),
        (tf_config(TWO, "worker", "1"), ClusterSpec(("n1:12345", "n2:12345"), 1)),
        (tf_config({"worker": ["n1:1"]}), ClusterSpec(("n1:1",), 0)),
        (tf_config({"chief": ["n1:1"]}, "chief"), ClusterSpec(("n1:1",), 0)),
        (
            tf_config({"worker": ["n1:1", "n2:65535"], "chief": ["n3:3"]}, "chief", 0),
            ClusterSpec(("n3:3", "n1:1", "n2:65535"), 0),
        ),
        (
            tf_config({"worker": ["n1:1", "n2:65535"], "chief": ["n3:3"]}, "worker", 1),
            ClusterSpec(("n3:3", "n1:1", "n2:65535"), 2),
        ),
        (
            tf_config({"worker": ["[::1]:2222", "[fd00::10]:2222"]}, "worker", 1),
            ClusterSpec(("[::1]:2222", "[fd00::10]:2222"), 1),
        ),
        (
            tf_config({"worker": ["127.0.0.1:1", "job-worker-0.ns.svc:2"], "ps": []}),
            ClusterSpec(("127.0.0.1:1", "job-worker-0.ns.svc:2"), 0),
        ),
        # Other programs add entries.
        (
            {
                "TF_CONFIG": '{"cluster": {"worker": ["a:1", "b:1"]}, "environment": "cloud", '
                '"task": {"type": "worker", "index": 1, "trial": "x"}}'
            },
            ClusterSpec(("a:1", "b:1"), 1),
        ),
    ],
)
def test_tf_config(environ: dict[str, str], spec: ClusterSpec) -> None:
    assert cluster_spec(environ) == spec


def test_tf_config_comes_first() -> None:
    environ = {**tf_config(TWO, "worker", 1), **SLURM_STEP, **INDEXED_JOB}
    assert cluster_spec(environ).workers == ("n1:12345", "n2:12345")


@pytest.mark.parametrize(
    ("environ", "part"),
    [
        ({"TF_CONFIG": "{"}, "Input data was truncated"),
        ({"TF_CONFIG": "[" * 100000}, "got `array`"),
        ({"TF_CONFIG": "n1:1,n2:1"}, "malformed"),
        ({"TF_CONFIG": '{"cluster": "\udcff"}'}, "utf-8"),
        ({"TF_CONFIG": "[]"}, "got `array`"),
        ({"TF_CONFIG": "{}"}, "missing required field `cluster`"),
        ({"TF_CONFIG": '{"cluster": {"worker": ["a:1"]}}'}, "missing required field `task`"),
        ({"TF_CONFIG": '{"cluster": {"worker": ["a:1"]}, "task": 0}'}, "at `$.task`"),
        (tf_config(["a:1", "b:1"]), "at `$.cluster`"),
        (tf_config({}), "0 chiefs and 0 workers"),
        (tf_config({"worker": []}), "0 chiefs and 0 workers"),
        (tf_config({"worker": "a:1"}), "at `$.cluster[...]`"),
        (tf_config({"worker": {"0": "a:1"}}), "at `$.cluster[...]`"),
        (tf_config({"worker": ["a:1", 1]}), "at `$.cluster[...][1]`"),
        (tf_config({"worker": ["a:1"], "chief": ["b:1", "c:1"]}), "2 chiefs and 1 workers"),
        (tf_config({**TWO, "ps": ["p:1"]}), "cluster has ps, which"),
        (tf_config({**TWO, "evaluator": ["p:1"]}), "cluster has evaluator, which"),
        *(
            (tf_config({"worker": ["a:1", address]}), f"the address {address!r}, which")
            for address in (
                "b",
                "b:",
                ":1",
                "b:0",
                "b:65536",
                "b:-1",
                "b:1x",
                "b:1:1",
                "::1:1",
                "[::1]",
                "b:1 ",
                "http://b:1",
                "[1.2.3.4]:1",
                "[::g]:1",
                "-b:1",
                "b/c:1",
                "",
            )
        ),
        (tf_config({"worker": ["a:1", "b:1", "a:1"]}), "the address 'a:1', which"),
        (tf_config({"worker": ["a:1"], "chief": ["a:1"]}), "the address 'a:1', which"),
        *((tf_config(TWO, kind), "at `$.task.type`") for kind in ("ps", None, ["worker"])),
        (tf_config(TWO, "chief"), "task.index is 0, which has no address in cluster.chief"),
        (tf_config(TWO, "worker", 2), "task.index is 2, which has no address"),
        *(
            (tf_config(TWO, "worker", index), "at `$.task.index`")
            for index in (-1, 1.5, True, None, "", "one", "٣", [0])
        ),
    ],
)
def test_an_invalid_tf_config_is_refused(environ: dict[str, str], part: str) -> None:
    with pytest.raises(UserError) as refused:
        cluster_spec(environ)
    message = str(refused.value)
    assert message.startswith("TF_CONFIG")
    assert part in message
    assert "expected" in message
    assert "; fix it" in message
    assert refused.value.exit_code == ExitCode.USER_ERROR


def slurm_step(
    nodes: str, tasks: str, total: int, rank: int, node: int, place: int = 0, job: int = 123
) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": nodes,
        "SLURM_STEP_TASKS_PER_NODE": tasks,
        "SLURM_STEP_NUM_TASKS": str(total),
        "SLURM_PROCID": str(rank),
        "SLURM_NODEID": str(node),
        "SLURM_LOCALID": str(place),
    }


SLURM_STEP = slurm_step("n[1-2]", "1(x2)", 2, rank=1, node=1)
PORT = 12000 + 16 * 123


@pytest.mark.parametrize(
    ("environ", "spec"),
    [
        (SLURM_STEP, ClusterSpec((f"n1:{PORT}", f"n2:{PORT}"), 1)),
        # Variables inherited from a batch script do not count.
        (
            {**SLURM_STEP, "SLURM_NODELIST": "n[1-8]", "SLURM_NTASKS": "8", "SLURM_NNODES": "8"},
            ClusterSpec((f"n1:{PORT}", f"n2:{PORT}"), 1),
        ),
        (
            slurm_step("n[2,10]", "1,1", 2, rank=0, node=0),
            ClusterSpec((f"n2:{PORT}", f"n10:{PORT}"), 0),
        ),
        (
            slurm_step("n1", "2", 2, rank=1, node=0, place=1),
            ClusterSpec((f"n1:{PORT}", f"n1:{PORT + 1}"), 1),
        ),
        (
            slurm_step("a,b[1-2],c", "2(x3),1", 7, rank=6, node=3),
            ClusterSpec(
                tuple(
                    f"{host}:{PORT + place}"
                    for host, count in (("a", 2), ("b1", 2), ("b2", 2), ("c", 1))
                    for place in range(count)
                ),
                6,
            ),
        ),
        (
            slurm_step("n[1-2]", "1,2", 3, rank=1, node=1, place=0),
            ClusterSpec((f"n1:{PORT}", f"n2:{PORT}", f"n2:{PORT + 1}"), 1),
        ),
        (
            slurm_step("n[1-2]", "16(x2)", 32, rank=31, node=1, place=15, job=1250 * 7 + 1249),
            ClusterSpec(
                tuple(f"n{node}:{31984 + place}" for node in (1, 2) for place in range(16)), 31
            ),
        ),
    ],
)
def test_the_tasks_of_a_slurm_step(environ: dict[str, str], spec: ClusterSpec) -> None:
    assert cluster_spec(environ) == spec
    assert cluster_spec({**environ, **INDEXED_JOB}) == spec


def test_consecutive_jobs_share_no_port() -> None:
    ports = [
        {
            int(address.rpartition(":")[2])
            for address in cluster_spec(
                slurm_step("n[1-2]", "16(x2)", 32, rank=0, node=0, job=job)
            ).workers
        }
        for job in range(4_000_000, 4_000_000 + 1250)
    ]
    assert sum(map(len, ports)) == len(set.union(*ports)) == 20000
    # From 32768 on, Linux uses ports for outgoing connections.
    assert 1024 <= min(map(min, ports)) < max(map(max, ports)) < 32768


@pytest.mark.parametrize("name", sorted(SLURM_STEP.keys() - {"SLURM_STEP_NUM_TASKS"}))
@pytest.mark.parametrize("value", [None, ""])
def test_a_missing_variable_of_slurm_is_named(name: str, value: str | None) -> None:
    environ = {other: text for other, text in SLURM_STEP.items() if other != name}
    if value is not None:
        environ[name] = value
    with pytest.raises(
        UserError, match=rf"^{name} is not set.*; start the job with srun"
    ) as refused:
        cluster_spec(environ)
    assert refused.value.exit_code == ExitCode.USER_ERROR


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        *(
            ({name: text}, (name, repr(text)))
            for name in ("STEP_NUM_TASKS", "PROCID", "NODEID", "LOCALID", "JOB_ID", "STEP_ID")
            for text in ("-1", "two", "1.5", " 1", "٣", "9" * 5000)
        ),
        ({"STEP_NODELIST": "n[1-"}, ("STEP_NODELIST", "n[1-")),
        ({"STEP_NODELIST": "n1"}, ("STEP_NODELIST", "STEP_TASKS_PER_NODE", "1 different")),
        ({"STEP_NODELIST": "n[1-3]"}, ("STEP_NODELIST", "STEP_TASKS_PER_NODE", "3 different")),
        ({"STEP_NODELIST": "n1,n1"}, ("STEP_NODELIST", "STEP_TASKS_PER_NODE", "1 different")),
        *(
            ({"STEP_TASKS_PER_NODE": text}, ("STEP_TASKS_PER_NODE", repr(text)))
            for text in ("x", "0,2", "2(x", "1(x0)", "1(2)", "1,,1", "1, 1", "1(x2),", "-1(x2)")
        ),
        ({"STEP_TASKS_PER_NODE": "2(x2)"}, ("STEP_TASKS_PER_NODE", "STEP_NUM_TASKS", "4 tasks")),
        ({"STEP_NUM_TASKS": "3"}, ("STEP_TASKS_PER_NODE", "STEP_NUM_TASKS", "expected 3")),
        (
            {"STEP_TASKS_PER_NODE": "17,1", "STEP_NUM_TASKS": "18"},
            ("STEP_TASKS_PER_NODE", "at most 16 tasks per node", "--ntasks-per-node=1"),
        ),
        ({"PROCID": "0"}, ("PROCID", "NODEID", "LOCALID", "--distribution=block")),
        ({"PROCID": "2"}, ("PROCID", "NODEID", "LOCALID", "ranks below 2")),
        ({"NODEID": "0"}, ("PROCID", "NODEID", "LOCALID", "--distribution=block")),
        ({"LOCALID": "1"}, ("PROCID", "NODEID", "LOCALID", "--distribution=block")),
    ],
)
def test_invalid_variables_of_slurm_are_named(
    changed: dict[str, str], named: tuple[str, ...]
) -> None:
    environ = {**SLURM_STEP, **{f"SLURM_{name}": text for name, text in changed.items()}}
    with pytest.raises(UserError, match="expected") as refused:
        cluster_spec(environ)
    assert all(text in str(refused.value) for text in named)


def test_each_step_of_a_job_has_its_own_ports() -> None:
    steps = (cluster_spec({**SLURM_STEP, "SLURM_STEP_ID": str(step)}) for step in range(50))
    assert len({spec.workers for spec in steps}) == 50
    # A step does not share ports with a job of about the same time either.
    jobs = (slurm_step("n[1-2]", "1(x2)", 2, 1, 1, job=job) for job in range(100, 150))
    near = {*map(cluster_spec, jobs)}
    for step in range(1, 10):
        assert cluster_spec({**SLURM_STEP, "SLURM_STEP_ID": str(step)}) not in near


def test_a_command_in_the_shell_of_several_tasks_is_refused() -> None:
    """It waits for tasks that never get the command; a task, its script and its steps train."""
    pty = {**SLURM_STEP, "SLURM_PTY_PORT": "4711"}
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as shell:
        environ = {**pty, "SLURM_TASK_PID": str(shell.pid)}
        with pytest.raises(UserError, match=r"one of the 2 tasks .* srun --ntasks=1 --pty"):
            refuse_shell_of_tasks(environ)
        refuse_shell_of_tasks({**environ, "SLURM_STEP_NUM_TASKS": "1"})
        refuse_shell_of_tasks({**environ, "SLURM_PTY_PORT": ""})
        shell.kill()
    refuse_shell_of_tasks({**pty, "SLURM_TASK_PID": str(os.getpid())})
    refuse_shell_of_tasks({**pty, "SLURM_TASK_PID": "99999999"})


def test_a_cyclic_distribution_is_refused() -> None:
    # From --nodes=2 --ntasks=4 --distribution=cyclic: rank 1 is on the second node.
    cyclic = slurm_step("n[1-2]", "2(x2)", 4, rank=1, node=1, place=0)
    with pytest.raises(
        UserError,
        match=r"^SLURM_PROCID 1, SLURM_NODEID 1 and SLURM_LOCALID 0 contradict "
        r"SLURM_STEP_TASKS_PER_NODE 2\(x2\), .* SLURM_NODEID 0 and SLURM_LOCALID 1; "
        r"use srun --distribution=block$",
    ):
        cluster_spec(cyclic)


INDEXED_JOB = {
    "KUBERNETES_JOB_UID": "6a41c0ac-7a3c-4a8e-9f0e-0d5c1f6f4d11",
    "KUBERNETES_JOB_NAME": "cifar10-nodes",
    "KUBERNETES_JOB_COMPLETIONS": "2",
    "KUBERNETES_JOB_SERVICE": "cifar10-workers",
    "JOB_COMPLETION_INDEX": "1",
}


def test_the_pods_of_an_indexed_job() -> None:
    spec = cluster_spec(INDEXED_JOB)
    hosts, ports = zip(*(address.split(":") for address in spec.workers), strict=True)
    assert hosts == ("cifar10-nodes-0.cifar10-workers", "cifar10-nodes-1.cifar10-workers")
    assert spec.index == 1
    # The same port in every Pod and with every Python, and a different one for the next Job.
    assert set(ports) == {"13456"}
    chief = cluster_spec({**INDEXED_JOB, "JOB_COMPLETION_INDEX": "0"})
    assert (chief.workers, chief.index) == (spec.workers, 0)
    other = cluster_spec({**INDEXED_JOB, "KUBERNETES_JOB_UID": "another"})
    assert other.workers != spec.workers


@pytest.mark.parametrize("name", sorted(INDEXED_JOB.keys() - {"KUBERNETES_JOB_COMPLETIONS"}))
def test_a_missing_variable_of_kubernetes_is_named(name: str) -> None:
    environ = {other: text for other, text in INDEXED_JOB.items() if other != name}
    with pytest.raises(UserError, match=rf"^{name} is not set, expected .*; "):
        cluster_spec(environ)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"KUBERNETES_JOB_COMPLETIONS": "0"}, ("KUBERNETES_JOB_COMPLETIONS", "'0'")),
        ({"KUBERNETES_JOB_COMPLETIONS": "two"}, ("KUBERNETES_JOB_COMPLETIONS", "'two'")),
        ({"JOB_COMPLETION_INDEX": "-1"}, ("JOB_COMPLETION_INDEX", "'-1'")),
        (
            {"JOB_COMPLETION_INDEX": "2"},
            ("JOB_COMPLETION_INDEX", "KUBERNETES_JOB_COMPLETIONS 2"),
        ),
    ],
)
def test_invalid_variables_of_kubernetes_are_named(
    changed: dict[str, str], named: tuple[str, ...]
) -> None:
    with pytest.raises(UserError, match="expected") as refused:
        cluster_spec({**INDEXED_JOB, **changed})
    assert all(text in str(refused.value) for text in named)
