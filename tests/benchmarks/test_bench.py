import click
import pytest

from tests.benchmarks.bench import Kernels, kernels_in
from tests.benchmarks.harness import interleave, run_python, table


def test_overlapping_kernels_cover_their_time_once() -> None:
    spans = [(2.0, 4.0), (3.0, 6.0), (8.0, 9.0)]
    assert kernels_in(spans, start=0.0, end=10.0) == Kernels(covered=0.5, summed=0.6)


def test_kernels_outside_of_the_time_count_nothing() -> None:
    # As `_measure_kernels` cuts spans to the time, one outside ends before it begins.
    assert kernels_in([(5.0, 3.0)], start=5.0, end=10.0) == Kernels(0.0, 0.0)
    assert kernels_in([(5.0, 10.0)], start=5.0, end=10.0).covered == pytest.approx(1.0)


def test_rounds_take_all_sides_in_turn(capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[str] = []

    def measure(side: str) -> int:
        calls.append(side)
        return len(calls)

    results = interleave(2, "ab", measure, lambda side, result: f"{side}{result}")
    assert (calls, results) == (["a", "b", "a", "b"], {"a": [1, 3], "b": [2, 4]})
    assert capsys.readouterr().out.splitlines()[-1] == "round 2/2  b4"


def test_programs_get_no_options_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOB_LIMIT", "256")
    show = "import os; print(os.environ.get('JOB_LIMIT'), os.environ['ADDED'])"
    assert run_python(["-c", show], env={"ADDED": "1"}) == ["None 1"]
    with pytest.raises(click.ClickException, match=r"(?s)exit code 1.*what went wrong"):
        run_python(["-c", "raise SystemExit('what went wrong')"])


def test_a_table_is_aligned_markdown() -> None:
    lines = table(("", "s"), [("this job", "1.5"), ("it", "10.25")]).splitlines()
    assert lines[1:3] == ["| -------- | ----: |", "| this job |   1.5 |"]
    assert len({len(line) for line in lines}) == 1
