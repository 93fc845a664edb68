import pytest

from tests.benchmarks.bench import Kernels, kernels_in


def test_overlapping_kernels_cover_their_time_once() -> None:
    spans = [(2.0, 4.0), (3.0, 6.0), (8.0, 9.0)]
    assert kernels_in(spans, start=0.0, end=10.0) == Kernels(covered=0.5, summed=0.6)


def test_kernels_outside_of_the_time_count_nothing() -> None:
    # As `_measure_kernels` cuts spans to the time, one outside ends before it begins.
    assert kernels_in([(5.0, 3.0)], start=5.0, end=10.0) == Kernels(0.0, 0.0)
    assert kernels_in([(5.0, 10.0)], start=5.0, end=10.0).covered == pytest.approx(1.0)
