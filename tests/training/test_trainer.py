import re

import pytest

from job.training.trainer import _describe_epoch

LINE = {"epoch": 50, "loss": 0.12345, "accuracy": 0.62496, "val_loss": 1.98766}
LINE |= {"val_accuracy": 0.06674, "seconds": 0.4321, "images_per_second": 123456.7}


def test_the_line_of_an_epoch_has_every_figure() -> None:
    assert _describe_epoch(LINE, 50) == (
        "epoch 50/50 loss 0.1235 acc 62.5% val 1.9877 6.7% 0.4 s 123,457 img/s"
    )


@pytest.mark.parametrize(
    "figures",
    [
        {"seconds": 0.04, "images_per_second": 999_999.4, "val_accuracy": 0.9994},
        {"seconds": 0.04, "images_per_second": 999_999.4, "accuracy": 1.0, "val_accuracy": 0.9996},
        {"seconds": 123.4, "images_per_second": 9_999.4, "val_accuracy": 0.1},
    ],
)
def test_the_line_of_an_epoch_fits_behind_the_time_in_79_columns(
    figures: dict[str, float],
) -> None:
    line = _describe_epoch({**LINE, **figures}, 50)
    assert len("12:00:00 " + line) <= 79
    assert re.fullmatch(r"epoch 50/50 loss \S+ acc \S+% val \S+ \S+% \S+ s \S+ img/s", line)
