"""The short form of `make chaos`, for the gate."""

from pathlib import Path

import pytest

from tests.integration.chaos import make_rounds

PLAN = [("SIGKILL", 1), ("file operation", 2), ("SIGTERM", 2), ("file operation", 1)]


def test_whatever_kills_a_run_its_bits_stay_the_same(cifar10_dir: Path, tmp_path: Path) -> None:
    rounds = list(make_rounds(cifar10_dir, tmp_path, PLAN, seed=2, jobs=2))
    for one in rounds:
        assert one.problems == [], one
    if all(code == 0 for one in rounds for code in one.exits):
        pytest.fail("no fault hit anything")
