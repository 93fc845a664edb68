import pytest

from job.cluster import RunIdentity, run_identity

SLURM = {"SLURM_JOB_ID": "123"}
KUBERNETES = {"KUBERNETES_JOB_UID": "6f1c"}


@pytest.mark.parametrize(
    ("environ", "run_id", "identity"),
    [
        ({}, None, RunIdentity(None)),
        (SLURM, None, RunIdentity("slurm job 123")),
        ({**SLURM, "SLURM_RESTART_COUNT": "2"}, None, RunIdentity("slurm job 123", 2)),
        (
            {**SLURM, "SLURM_ARRAY_JOB_ID": "120", "SLURM_ARRAY_TASK_ID": "3"},
            None,
            RunIdentity("slurm job 120_3"),
        ),
        (KUBERNETES, None, RunIdentity("kubernetes job 6f1c")),
        ({**KUBERNETES, "JOB_COMPLETION_INDEX": "4"}, None, RunIdentity("kubernetes job 6f1c/4")),
        ({"JOB_COMPLETION_INDEX": "4"}, None, RunIdentity(None)),
        ({**SLURM, **KUBERNETES}, "mine", RunIdentity("run mine")),
    ],
)
def test_run_identity(environ: dict[str, str], run_id: str | None, identity: RunIdentity) -> None:
    assert run_identity(environ, run_id) == identity


def test_an_attempt_replaces_no_newer_one_and_no_other_run() -> None:
    second = RunIdentity("slurm job 1", attempt=1)
    assert second.replaces("slurm job 1", 0)
    assert second.replaces("slurm job 1", 1)
    assert not second.replaces("slurm job 1", 2)
    assert not second.replaces("slurm job 2", 0)
    assert not RunIdentity(None).replaces(None, 0)
