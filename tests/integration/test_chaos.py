"""The short form of `make chaos`, for the gate."""

from pathlib import Path

from tests.integration.chaos import make_rounds

PLAN = [
    ("SIGKILL at a checkpoint's file operation", 2),
    ("SIGTERM", 1),
    ("SIGKILL at an artifact's file operation", 1),
]


def test_whatever_kills_a_run_its_bits_stay_the_same(cifar10_dir: Path, tmp_path: Path) -> None:
    rounds = list(make_rounds(cifar10_dir, tmp_path, PLAN, seed=2, jobs=2))
    assert len(rounds) == len(PLAN)
    for one in rounds:
        assert one.problems == [], one
