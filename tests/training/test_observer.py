import pytest

from job.training.observer import Pace, Status


def test_the_first_span_of_each_length_is_compiled_and_does_not_count() -> None:
    pace = Pace()
    pace.add_span(15, 60.0)
    assert pace.seconds_left(1, 0) is None
    pace.add_span(15, 3.0)
    pace.add_span(4, 30.0)
    assert pace.steps_per_second == 5.0
    pace.add_span(4, 0.8)
    assert pace.steps_per_second == pytest.approx(19 / 3.8)


def test_the_pace_follows_the_last_spans() -> None:
    pace = Pace()
    for seconds in [1.0] * 50 + [4.0] * 50:
        pace.add_span(20, seconds)
    assert pace.steps_per_second == 5.0


def test_the_time_left_is_that_of_steps_and_measured_validations() -> None:
    assert Pace().seconds_left(100, 3) is None
    pace = Pace()
    pace.add_span(10, 9.0)
    pace.add_span(10, 2.0)
    assert pace.seconds_left(100, 3) == 20.0
    pace.add_validation(7.0)
    pace.add_validation(4.0)
    assert pace.seconds_left(100, 3) == 32.0


def test_a_status_counts_the_steps_of_the_run() -> None:
    status = Status("training", 3, 5, 15, 195)
    assert (status.step, status.total_steps) == (405, 975)
