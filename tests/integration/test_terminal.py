"""The display of trainings in real terminals with 60 and 120 columns."""

import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, RunJob

TRAIN = "train --dataset synthetic --limit 4800 --batch-size 32 --epochs 2 --devices cpu:1"
BAR = re.compile(r"^epoch \d+/\d+ ")
SGR = re.compile(r"\x1b\[[0-9;]*m")
DEADLINE_SECONDS = 240.0


@dataclass
class Terminal:
    """A tmux terminal that runs a shell, with every screen that it showed."""

    width: int
    folder: Path
    screens: list[list[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir()
        size = ("-x", str(self.width), "-y", "30")
        # COLUMNS of another terminal must have no effect.
        environ = "env -u LC_ALL LANG=C.UTF-8 COLUMNS=80 PS1='$ ' sh"
        self.tmux("-f", "/dev/null", "new-session", "-d", *size, environ)
        self.tmux("pipe-pane", f"cat >> {shlex.quote(str(self.folder / 'written'))}")

    def tmux(self, *arguments: str) -> str:
        command = ["tmux", "-S", str(self.folder / "socket"), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def start(self, command: str, **variables: str) -> None:
        settings = " ".join(f"{name}={value}" for name, value in variables.items())
        python = f"PYTHONPATH={REPOSITORY} {settings} {sys.executable} -m job"
        self.tmux("send-keys", "-l", f"cd {self.folder}; clear; {python} {command}; echo rc=$?")
        self.tmux("send-keys", "Enter")

    def capture(self) -> list[str]:
        # -J joins wrapped lines, so a line that is too long is wider than the screen.
        screen = self.tmux("capture-pane", "-p", "-J").rstrip().splitlines()
        if screen not in self.screens[-1:]:
            self.screens.append(screen)
        return screen

    def shows(self, pattern: str) -> bool:
        return any(re.search(pattern, line) for line in self.capture())

    @property
    def cursor_is_visible(self) -> bool:
        return self.tmux("display-message", "-p", "#{cursor_flag}").strip() == "1"

    @property
    def written(self) -> str:
        return (self.folder / "written").read_text()

    def bars(self) -> list[list[str]]:
        """The progress bar of each screen that shows one: its lines to the end of the screen."""
        starts = [
            (screen, index)
            for screen in self.screens
            for index, line in enumerate(screen)
            if BAR.match(line)
        ]
        return [screen[index:] for screen, index in starts]


def wait_for_screens(pattern: str, *terminals: Terminal) -> None:
    """Capture the screens until all of them show a pattern."""
    end = time.monotonic() + DEADLINE_SECONDS
    while True:
        showing = [terminal.shows(pattern) for terminal in terminals]
        if all(showing):
            return
        if time.monotonic() > end:
            pytest.fail("\n".join(line for terminal in terminals for line in terminal.capture()))
        time.sleep(0.05)


@pytest.fixture
def terminals(tmp_path: Path) -> Iterator[dict[int, Terminal]]:
    if not shutil.which("tmux"):
        pytest.skip("no tmux; install the package tmux")
    opened = {width: Terminal(width, tmp_path / str(width)) for width in (60, 120)}
    yield opened
    for terminal in opened.values():
        terminal.tmux("kill-server")


def test_the_display_is_intact_at_60_and_120_columns(terminals: dict[int, Terminal]) -> None:
    for width, terminal in terminals.items():
        variables = {"NO_COLOR": "1"} if width == 60 else {}
        terminal.start(f"{TRAIN} --checkpoint-every 0.3", **variables)
    wait_for_screens(r"^rc=\d", *terminals.values())
    for terminal in terminals.values():
        last = terminal.screens[-1]
        assert "rc=0" in last
        assert not any(BAR.match(line) for line in last), "\n".join(last)
        assert terminal.cursor_is_visible
    for width, terminal in terminals.items():
        bars = terminal.bars()
        # The bar must fit; the terminal wraps longer log lines.
        assert max(len(line) for bar in bars for line in bar) <= width
        assert any(bar[0].endswith("0/150  compiling") for bar in bars)
        assert any("  validating  " in bar for (bar,) in bars)
        assert max(map(len, bars)) == 1, bars
        # At the start of an epoch the bar shows no loss.
        full = [bar for (bar,) in bars if "left" in bar and "loss" in bar]
        assert full
        for bar in full:
            for pattern in (r"\d+/150", r"loss \d\.\d{4}", r">?\d+:\d\d:\d\d left"):
                assert re.search(pattern, bar), bar
        assert any(re.search(r"acc \d+\.\d%.*[\d,]+ img/s", bar) for bar in full) == (width == 120)
        # Events scroll above the bar; no remains of the bar and no second bar are visible.
        assert sum("checkpoint at step" in line for line in terminal.screens[-1]) >= 2
        for screen in terminal.screens:
            assert sum(bool(BAR.match(line)) for line in screen) <= 1
    colours = {width: set(SGR.findall(terminal.written)) for width, terminal in terminals.items()}
    assert not any(re.search(r"[39][0-7]|38;", code) for code in colours[60]), colours[60]
    assert any(re.search(r"[39][0-7]|38;", code) for code in colours[120])


def test_ctrl_c_during_compilation_and_training_leaves_a_clean_screen(
    terminals: dict[int, Terminal],
) -> None:
    moments = {60: "0/150  compiling", 120: "img/s"}
    for terminal in terminals.values():
        terminal.start(TRAIN)
    for width, moment in moments.items():
        wait_for_screens(moment, terminals[width])
        terminals[width].tmux("send-keys", "C-c")
    wait_for_screens(r"^rc=\d", *terminals.values())
    for terminal in terminals.values():
        last = terminal.screens[-1]
        assert "rc=75" in last
        assert not any(BAR.match(line) for line in last), "\n".join(last)
        (index,) = [number for number, line in enumerate(last) if "cifar10-job: stopped" in line]
        assert last[index].startswith("cifar10-job: stopped: SIGINT; ")
        assert last[index + 1 :][0] == "rc=75"
        assert terminal.cursor_is_visible


def test_a_pipe_gets_plain_lines_whatever_variables_are_set(run_job: RunJob) -> None:
    colourful = {"TERM": "xterm-256color", "FORCE_COLOR": "1", "COLUMNS": "60"}
    short = ("--limit", "512", "--epochs", "1", "--log-format", "text")
    result = run_job("train", "--dataset", "synthetic", *short, env=colourful)
    assert result.returncode == 0
    assert "\x1b" not in result.stdout + result.stderr
    assert "\r" not in result.stdout
    # Each event is a single line, however long.
    assert {line[8] for line in result.stdout.splitlines()} == {" "}
    assert len(result.stdout.splitlines()) == 6


def test_a_dumb_terminal_gets_plain_lines(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    command = ("train", "--dataset", "synthetic", "--limit", "512", "--stop-after", "0.1")
    process = subprocess.Popen(
        [sys.executable, "-m", "job", *command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "TERM": "dumb"},
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    written = b""
    while True:
        try:
            written += os.read(master, 65536)
        except OSError:  # the other side has closed the terminal
            break
    assert process.wait() == 75
    assert b"synthetic: 512 training" in written
    assert b"\x1b" not in written
