"""The report of a training on real data, opened in a real browser."""

import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

from job.run.folder import REPORT_PICTURES
from tests.conftest import Job, RunJob
from tests.integration.chaos import check_visible

CHROMIUM = Path("/usr/bin/chromium")
# No sandbox, because root runs the browser, and no requests by the browser itself.
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"),
    *("--disable-component-update", "--disable-sync"),
]
# A long name without spaces, as in paths on clusters.
LONG = "a-folder-with-a-name-that-no-telephone-has-room-for-in-a-line" * 2
VIEWS = [(width, scheme) for width in (390, 1280) for scheme in ("light", "dark")]


@dataclass(frozen=True)
class Trained:
    """A training that was stopped once during an epoch and once while drawing the report.

    Attributes:
        folder: Its output folder.
        interrupted: Result of the attempt that was stopped while drawing the report.
        problems: Problems of the folder after that attempt.
        had_report: Whether the folder contained a report after that attempt.
    """

    folder: Path
    interrupted: subprocess.CompletedProcess[str]
    problems: list[str]
    had_report: bool


@pytest.fixture(scope="module")
def training(cifar10_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("training")
    data_dir, output = folder / f"data-{LONG}", folder / LONG
    data_dir.symlink_to(cifar10_dir)
    options = "--limit 2560 --batch-size 64 --epochs 2 --devices cpu:1 --log-format json"
    folders = ("--data-dir", str(data_dir), "--output-dir", str(output))
    words = ("train", *options.split(), *folders)

    def stop_at(event: str) -> subprocess.CompletedProcess[str]:
        job = Job(folder, *words)
        job.wait_for(event)
        job.send_signal(signal.SIGTERM)
        return job.finish()

    assert stop_at("epoch").returncode == 75
    interrupted = stop_at("evaluation")
    problems, had_report = check_visible(output), (output / "report.html").exists()
    result = Job(folder, *words).finish()
    assert result.returncode == 0, result.stderr
    return Trained(output, interrupted, problems, had_report)


@pytest.fixture(scope="module")
def trained(training: Trained) -> Path:
    """The output folder of the training."""
    return training.folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM.exists():
        pytest.skip(f"no {CHROMIUM}; install the package chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(params=VIEWS, ids=[f"{width}-{scheme}" for width, scheme in VIEWS])
def page(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Page]:
    """An empty page with a window width and a colour scheme."""
    width, scheme = request.param
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
    )
    yield context.new_page()
    context.close()


def test_a_browser_shows_the_report_without_requests_messages_or_overflow(
    page: Page, trained: Path
) -> None:
    requests: list[str] = []
    messages: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    address = (trained / "report.html").as_uri()
    page.goto(address)
    assert [url for url in requests if not url.startswith("data:")] == [address]
    assert messages == []
    for _ in range(2):
        widths = "[document.scrollingElement.scrollWidth, innerWidth]"
        content, window = page.evaluate(widths)
        assert content <= window
        # Check again with all details expanded.
        page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    images = page.evaluate(
        "Array.from(document.images, image => [image.alt, image.complete && image.naturalWidth])"
    )
    alts = [alt for alt, _ in images]
    assert all(alts)
    assert len(set(alts)) == len(alts) == len(REPORT_PICTURES)
    assert all(width == 1000 for _, width in images)


def test_the_report_is_accessible_to_screen_readers(page: Page, trained: Path) -> None:
    page.goto((trained / "report.html").as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    found = Axe().run(page).response
    assert len(found["passes"]) > 20
    faults: list[dict[str, Any]] = found["violations"]
    assert [(fault["id"], fault["impact"], fault["nodes"]) for fault in faults] == []


def test_the_attempts_need_no_scrolling_on_a_phone(browser: Browser, trained: Path) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 900})
    page.goto((trained / "report.html").as_uri())
    table = page.locator(".attempts")
    region, content = table.evaluate(
        "table => [table.parentElement.clientWidth, table.parentElement.scrollWidth]"
    )
    assert content <= region
    assert table.locator("caption").evaluate("caption => caption.clientHeight") < 60
    cell = table.locator("td[data-column=Outcome]").first
    assert cell.evaluate("cell => getComputedStyle(cell, '::before').content") != "none"
    # Still a table to a screen reader.
    assert page.get_by_role("table", name="Every attempt of this run").get_by_role("row").count()
    page.close()


def test_the_page_follows_the_colour_scheme(browser: Browser, trained: Path) -> None:
    colours = {}
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.goto((trained / "report.html").as_uri())
        colours[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.close()
    assert colours == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 26)"}


def test_a_report_drawn_again_from_the_folder_is_identical(
    run_job: RunJob, trained: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy, ignore=shutil.ignore_patterns("report*", "*.h5", "checkpoints"))
    result = run_job("report", copy)
    assert result.returncode == 0, result.stderr
    for name in ("report.html", *REPORT_PICTURES):
        assert (copy / name).read_bytes() == (trained / name).read_bytes()


def test_a_run_stopped_while_drawing_the_report_resumes_with_the_same_command(
    training: Trained,
) -> None:
    assert training.interrupted.returncode == 75
    said = training.interrupted.stderr
    assert said == "cifar10-job: stopped: SIGTERM; run the same command again to resume\n"
    assert training.problems == []
    assert not training.had_report
    assert check_visible(training.folder) == []
    attempts = json.loads((training.folder / "run.json").read_text())["attempts"]
    # The second attempt may have finished before the signal.
    assert [attempt["outcome"] for attempt in attempts[::2]] == ["stopped", "done"]
    assert attempts[1]["outcome"] in ("done", "stopped")
    assert attempts[2]["first_step"] == 80
