"""A short version of `make chaos`, for the gate."""

from pathlib import Path

from tests.integration.chaos import run_rounds

PLAN = [
    ("SIGKILL at a checkpoint's file operation", 2),
    ("SIGTERM", 1),
    ("SIGKILL at an artifact's file operation", 1),
]


def test_a_killed_run_ends_with_the_same_bits(cifar10_dir: Path, tmp_path: Path) -> None:
    rounds = list(run_rounds(cifar10_dir, tmp_path, PLAN, seed=2, jobs=2))
    assert len(rounds) == len(PLAN)
    for one in rounds:
        assert one.problems == [], one
