import pytest

from job.report.page import duration, percent, whole_seconds


def test_a_fraction_is_told_in_percent() -> None:
    assert (percent(0.62349), percent(0.0), percent(None)) == ("62.35%", "0.00%", "")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0.0, "0.0 s"), (6.04, "6.0 s"), (59.4, "59.4 s"), (59.6, "1 min 0 s")),
        *((167.2, "2 min 47 s"), (3599.7, "1 h 0 min"), (90_061.0, "25 h 1 min")),
    ],
)
def test_a_time_is_told_in_the_units_that_suit_it(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_time_in_a_column_is_in_seconds() -> None:
    assert whole_seconds(1234.4) == "1,234 s"
