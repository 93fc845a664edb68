"""What the scheduler's environment says; the only module that reads it."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class RunIdentity:
    """Which run an attempt belongs to.

    Attributes:
        name: The same for all attempts of a run and for no other; None where nothing tells.
        attempt: Number of the attempt, higher for later ones, as far as the scheduler counts them.
    """

    name: str | None
    attempt: int = 0

    def replaces(self, name: str | None, attempt: int) -> bool:
        """Whether this is the same run as another and no earlier attempt of it."""
        return self.name is not None and self.name == name and self.attempt >= attempt


NO_RUN = RunIdentity(None)
"""Of a process that no other one replaces, and that replaces no other."""


def run_identity(environ: Mapping[str, str], run_id: str | None) -> RunIdentity:
    """Find out which run this process is an attempt of.

    Args:
        environ: Environment variables. Slurm sets ``SLURM_JOB_ID``, ``SLURM_RESTART_COUNT`` and in
            arrays ``SLURM_ARRAY_JOB_ID`` and ``SLURM_ARRAY_TASK_ID``; a Kubernetes manifest passes
            the Job's UID as ``KUBERNETES_JOB_UID``, and Kubernetes adds ``JOB_COMPLETION_INDEX`` in
            Indexed Jobs.
        run_id: The user's ``--run-id``, which comes first.
    """
    if run_id:
        return RunIdentity(f"run {run_id}")
    slurm_job = environ.get("SLURM_JOB_ID")
    if slurm_job:
        restarts = environ.get("SLURM_RESTART_COUNT", "")
        task = environ.get("SLURM_ARRAY_TASK_ID")
        job = f"{environ.get('SLURM_ARRAY_JOB_ID', slurm_job)}_{task}" if task else slurm_job
        return RunIdentity(f"slurm job {job}", int(restarts) if restarts.isdecimal() else 0)
    kubernetes_job = environ.get("KUBERNETES_JOB_UID")
    if kubernetes_job:
        index = environ.get("JOB_COMPLETION_INDEX")
        return RunIdentity(f"kubernetes job {kubernetes_job}" + (f"/{index}" if index else ""))
    return NO_RUN
