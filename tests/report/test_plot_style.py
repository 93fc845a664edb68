import io
import warnings

import pytest
from matplotlib.figure import Figure

from job.report.pictures import lay_out_epochs, save_png


@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 50, 1000])
def test_every_tick_is_an_epoch_of_the_run(epochs: int) -> None:
    figure = Figure()
    axes = figure.subplots()
    numbers = range(1, epochs + 1)
    axes.plot(numbers, numbers, "o")
    lay_out_epochs(axes, epochs)
    low, high = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert ticks
    assert set(ticks) <= set(numbers)
    assert axes.get_xlabel() == "Epoch"


def test_letters_that_the_font_lacks_are_no_warning() -> None:
    figure = Figure()
    figure.suptitle("飛行機 고양이")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        buffer = io.BytesIO()
        save_png(figure, buffer, 50)
    assert buffer.getvalue().startswith(b"\x89PNG")
