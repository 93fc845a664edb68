import io
import sys
from dataclasses import replace

import pytest
from rich.console import Console

from job import log
from job.commands.terminal import DownloadBar, EpochBar, _StatusLines
from job.training.observer import Status

STATUS = Status(
    phase="training",
    epoch=12,
    epochs=50,
    steps=120,
    steps_per_epoch=195,
    loss=1.23456,
    accuracy=0.5534,
    steps_per_second=23.44,
    images_per_second=6000.6,
    seconds_left=3723.4,
)


def rendered(status: Status, width: int, **settings: bool) -> list[str]:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, **settings)  # type: ignore[arg-type]
    console.print(_StatusLines(status), end="")
    return file.getvalue().splitlines()


def plain(status: Status, width: int) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=width, color_system=None).print(_StatusLines(status), end="")
    return file.getvalue().splitlines()


def test_a_wide_terminal_has_everything_in_one_line() -> None:
    (line,) = plain(STATUS, 120)
    assert line.startswith("epoch 12/50 ━━━━")
    assert line.endswith(
        " 120/195  loss 1.2346  acc 55.3%  23.4 steps/s  6,001 img/s  1:02:03 left"
    )


def test_a_narrow_terminal_has_everything_in_two_lines() -> None:
    first, second = plain(STATUS, 60)
    assert first.startswith("epoch 12/50 ━━━━")
    assert first.endswith(" 120/195  1:02:03 left")
    assert second == "loss 1.2346  acc 55.3%  23.4 steps/s  6,001 img/s"


@pytest.mark.parametrize("phase", ["compiling", "training", "validating"])
def test_no_line_is_as_wide_as_the_terminal(phase: str) -> None:
    large = replace(STATUS, epoch=10_000, epochs=10_000, steps=99_999, steps_per_epoch=100_000)
    for status in (STATUS, large):
        for width in range(12, 200):
            lines = plain(replace(status, phase=phase), width)  # type: ignore[arg-type]
            assert 1 <= len(lines) <= 2
            # A terminal shows ^C behind the last line.
            assert max(map(len, lines)) <= width - 2, lines
            assert lines[0].startswith("epoch 1"[: width - 2])


def test_what_is_not_known_yet_is_not_shown() -> None:
    start = Status("compiling", 1, 50, 0, 195, seconds_left_is_least=True)
    (line,) = plain(start, 60)
    assert line.endswith(" 0/195  compiling")
    first = replace(STATUS, epoch=1, steps_per_second=None, seconds_left=None)
    (line,) = plain(first, 120)
    assert line.endswith(" 120/195  loss 1.2346  acc 55.3%")


def test_a_time_left_without_validations_is_a_least_one() -> None:
    (line,) = plain(replace(STATUS, seconds_left=59.6, seconds_left_is_least=True), 120)
    assert line.endswith("  >1:00 left")


def test_a_validation_has_no_pace() -> None:
    (line,) = plain(replace(STATUS, phase="validating", steps=195), 120)
    assert line.endswith(" 195/195  validating  loss 1.2346  acc 55.3%  1:02:03 left")


def test_colours_are_left_out_where_they_are_not_wanted() -> None:
    assert "\x1b[" in rendered(STATUS, 60)[0]
    assert all("\x1b[" not in line for line in rendered(STATUS, 60, no_color=True))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stdout", "variables", "is_drawn"),
    [
        (Terminal(), {"TERM": "xterm"}, True),
        (Terminal(), {"TERM": "dumb"}, False),
        (io.StringIO(), {"TERM": "xterm"}, False),
        (io.StringIO(), {"TERM": "xterm", "FORCE_COLOR": "1"}, False),
    ],
)
def test_bars_are_drawn_on_terminals_that_can(
    monkeypatch: pytest.MonkeyPatch,
    stdout: io.StringIO,
    variables: dict[str, str],
    is_drawn: bool,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", stdout)
    with EpochBar(enabled=True) as bar:
        bar.show(STATUS)
    with DownloadBar("archive", enabled=True) as download:
        download.total = 10
        download.update(5)
    written = stdout.getvalue()
    assert ("epoch 12/50" in written) == ("archive" in written) == is_drawn
    if is_drawn:
        assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")
    else:
        assert written == ""


def test_a_bar_is_erased_once_and_from_any_side(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", stdout)
    with EpochBar(enabled=True) as bar:
        bar.show(STATUS)
        bar.erase("SIGINT")
        written = stdout.getvalue()
        assert written.endswith("\x1b[2K")
        assert "\x1b[?25h" in written
        assert sys.stdout is stdout
    assert stdout.getvalue() == written


def test_events_go_above_the_bar_and_break_between_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stdout = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(sys, "stdout", stdout)
    log.configure("text")
    with EpochBar(enabled=True) as bar:
        bar.show(STATUS)
        log.event("epoch", message="epoch 3 of 5 " + "and so on " * 8)
    lines = [line.removeprefix("\r\x1b[2K") for line in stdout.getvalue().split("\n")]
    assert lines[0].endswith(" epoch 3 of 5 and so on and so on and so on and so")
    assert lines[1] == " " * 9 + "on and so on and so on and so on and so on"
    assert lines[2].startswith("epoch 12/50 ")
