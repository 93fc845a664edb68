import io
import os
import sys
from contextlib import closing
from dataclasses import replace

import pytest
from rich.console import Console

from job import log
from job.commands.terminal import (
    DownloadBar,
    EpochBar,
    StatusLine,
    padded,
    printable,
    write_lines,
    write_table,
)
from job.config import UserError
from job.run.checkpoint import History
from job.training.observer import Start, Status

COLUMNS = ("run", "learning rate", "model")
ROWS = [("output/[a] sweep/seed-42", "0.001", "66.73%"), ("output/seed-7", "0.0003", "6.82%")]
STATUS = Status(
    phase="training",
    epoch=12,
    epochs=50,
    steps=120,
    steps_per_epoch=195,
    loss=1.23456,
    accuracy=0.5534,
    images_per_second=6000.6,
    seconds_left=3723.4,
)


class Terminal(io.TextIOWrapper):
    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8")

    def isatty(self) -> bool:
        return True

    def text(self) -> str:
        self.seek(0)
        return self.read()


def open_terminal(monkeypatch: pytest.MonkeyPatch, columns: int, **env: str) -> Terminal:
    # Not a fixture: pytest replaces stdout again before it calls the test.
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    # COLUMNS is outdated, as it can be in a script.
    for name, value in {"TERM": "xterm", "COLUMNS": "1000", **env}.items():
        monkeypatch.setenv(name, value)
    size = os.terminal_size((columns, 24))
    monkeypatch.setattr(os, "get_terminal_size", lambda descriptor: size)
    return terminal


def test_names_are_printed_in_one_line_without_control_characters() -> None:
    assert printable("größe 日本.png") == "größe 日本.png"
    assert printable("a\nb\x1b[31m\u202e") == r"a\nb\x1b[31m\u202e"
    assert printable(os.fsdecode(b"caf\xe9.png")) == r"caf\xe9.png"
    assert printable("\ud800") == r"\ud800"  # JSON can contain it


def test_wide_letters_take_two_columns() -> None:
    assert padded("日本", 6) == "日本  "
    assert padded("longer", 3) == "longer"


def test_a_closed_pipe_ends_the_command_with_exit_code_0(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    with pytest.raises(SystemExit) as end:
        write_lines(["a"])
    assert end.value.code == 0
    with pytest.raises(BrokenPipeError):
        sys.stdout.close()


def test_a_full_disk_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", os.fdopen(os.open("/dev/full", os.O_WRONLY), "w"))
    with pytest.raises(UserError, match="cannot write to standard output: No space left"):
        write_lines(["a"])
    with pytest.raises(OSError, match="No space left"):
        sys.stdout.close()


def test_a_table_is_plain_and_complete_without_control_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_table(COLUMNS, [*ROWS, ("日本\x1b[2J\nb", "", "1%")], left=("run",))
    assert capsys.readouterr().out.splitlines() == [
        "run                       learning rate   model",
        "output/[a] sweep/seed-42          0.001  66.73%",
        "output/seed-7                    0.0003   6.82%",
        r"日本\x1b[2J\nb                               1%",
    ]


def rendered(status: Status, width: int, **settings: bool) -> list[str]:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, **settings)  # type: ignore[arg-type]
    console.print(StatusLine(status), end="")
    return file.getvalue().splitlines()


def plain(status: Status, width: int) -> str:
    file = io.StringIO()
    Console(file=file, width=width, color_system=None).print(StatusLine(status), end="")
    (line,) = file.getvalue().splitlines()
    return line


def test_a_status_line_shows_what_fits_on_the_terminal() -> None:
    for width, end in (
        (120, "120/195  1:02:03 left  loss 1.2346  acc 55.3%  6,001 img/s"),
        (80, "120/195  1:02:03 left  loss 1.2346  acc 55.3%"),
        (60, "120/195  1:02:03 left  loss 1.2346"),
        (46, "120/195  1:02:03 left"),
        (32, "120/195"),
    ):
        line = plain(STATUS, width)
        assert line.startswith("epoch 12/50 ━━")
        assert line.endswith(f"  {end}"), line
    assert plain(STATUS, 12) == "epoch 12/5"


@pytest.mark.parametrize("phase", ["compiling", "training", "validating"])
def test_a_status_line_is_narrower_than_the_terminal(phase: str) -> None:
    large = replace(STATUS, epoch=10_000, epochs=10_000, steps=99_999, steps_per_epoch=100_000)
    for status in (STATUS, large):
        for width in range(12, 200):
            # A terminal shows ^C behind the line.
            line = plain(replace(status, phase=phase), width)  # type: ignore[arg-type]
            assert len(line) <= width - 2, line


def test_unknown_values_are_omitted() -> None:
    start = Status("compiling", 1, 50, 0, 195, seconds_left_is_least=True)
    assert plain(start, 60).endswith("  0/195  compiling")
    first = replace(STATUS, epoch=1, images_per_second=None, seconds_left=None)
    assert plain(first, 120).endswith("  120/195  loss 1.2346  acc 55.3%")
    least = replace(STATUS, seconds_left=59.6, seconds_left_is_least=True)
    assert "  >0:01:00 left  " in plain(least, 120)
    validating = plain(replace(STATUS, phase="validating", steps=195), 120)
    assert validating.endswith("  195/195  validating  1:02:03 left  loss 1.2346  acc 55.3%")


def test_colours_can_be_turned_off() -> None:
    assert "\x1b[" in rendered(STATUS, 60)[0]
    assert all("\x1b[" not in line for line in rendered(STATUS, 60, no_color=True))


START = Start("float32", "1 x a processor", 195, History())


@pytest.mark.parametrize(
    ("on_terminal", "variables", "is_drawn"),
    [
        (True, {"TERM": "xterm"}, True),
        (True, {"TERM": "dumb"}, False),
        (False, {"TERM": "xterm"}, False),
        (False, {"TERM": "xterm", "FORCE_COLOR": "1"}, False),
    ],
)
def test_bars_are_drawn_only_on_capable_terminals(
    monkeypatch: pytest.MonkeyPatch, on_terminal: bool, variables: dict[str, str], is_drawn: bool
) -> None:
    stdout = open_terminal(monkeypatch, 80, **variables)
    monkeypatch.setattr(stdout, "isatty", lambda: on_terminal)
    with closing(EpochBar(enabled=True)) as bar:
        bar.begin(START)
        bar.show(STATUS)
    with closing(DownloadBar(enabled=True)) as download:
        download.total = 10
        download.update(5)
    written = stdout.text()
    assert ("epoch 12/50" in written) == ("download" in written) == is_drawn
    if is_drawn:
        assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")
    else:
        assert written == ""


def test_disabled_bars_are_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = open_terminal(monkeypatch, 80)
    with closing(EpochBar(enabled=False)) as bar, closing(DownloadBar(enabled=False)) as download:
        bar.begin(START)
        bar.show(STATUS)
        download.update(5)
        download.close()
    assert stdout.text() == ""


def test_a_bar_is_erased_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = open_terminal(monkeypatch, 80)
    with closing(EpochBar(enabled=True)) as bar:
        bar.begin(START)
        bar.show(STATUS)
        bar.close()
        written = stdout.text()
        assert written.endswith("\x1b[2K")
        assert "\x1b[?25h" in written
        assert sys.stdout is stdout
    assert stdout.text() == written


def test_events_are_printed_above_the_bar_which_is_erased_before_the_evaluation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stdout = open_terminal(monkeypatch, 60)
    log.configure("text")
    message = "epoch 3 of 5 " + "and so on " * 8
    with closing(EpochBar(enabled=True)) as bar:
        bar.begin(START)
        bar.show(STATUS)
        log.event("epoch", message=message)
        bar.evaluate()
        written = stdout.text()
        log.event("evaluation", message="accuracy 66.7%")
    above, _, bar_lines = written.partition("epoch 12/50 ")
    assert message in "".join(above.splitlines())
    assert max(map(len, above.removeprefix("\x1b[?25l").splitlines())) <= 60
    assert "\n" in bar_lines
    assert stdout.text().removeprefix(written).endswith(" accuracy 66.7%\n")
    assert "\x1b" not in stdout.text().removeprefix(written)
