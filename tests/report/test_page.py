import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from job.config import DataConfig, TrainConfig
from job.report.figures import draw_figures, reliability
from job.report.page import render, write_report
from job.run.folder import OutputDir
from job.run.predictions import Predictions
from job.run.record import RunRecord
from tests.run_folders import add_evaluation, change, make_run, make_whole_run

HOSTILE = "\"><script>alert('x')</script>&amp;<img src=http://example.com/x>$\\frac"
HOSTILE_CLASS = '"><b>$\\f'


class Page(HTMLParser):
    """The elements of a page and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def alts(self) -> list[str]:
        return [image["alt"] or "" for image in self.all("img")]


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of such a run with its report."""
    output = make_whole_run(tmp_path_factory.mktemp("reported"))
    write_report(output)
    return output.path


def written(folder: Path) -> Page:
    return Page((folder / "report.html").read_text())


def without_pictures(folder: Path) -> Page:
    """The page of a folder without the time that drawing takes."""
    return Page(render(RunRecord.load(folder), {}))


def test_the_page_has_every_section_and_needs_nothing_else(reported: Path) -> None:
    page = written(reported)
    assert "Finished on 20" in page.text
    for heading in (
        *("Training", "Evaluation of the saved model", "Confusion matrix", "Precision and recall"),
        *("Calibration", "Most confident mistakes", "Augmented training images", "Attempts"),
        *("How to run it again", "Configuration", "Devices", "Data", "Versions"),
    ):
        assert heading in page.text
    assert "python -m job train --output-dir out-again --data-dir data --epochs 3" in page.text
    assert "model a processor, memory 23.5 GiB" in page.text
    assert not page.all("script")
    links = [*page.all("a"), *page.all("link"), *page.all("img")]
    targets = [link.get("href") or link["src"] or "" for link in links]
    ids = {f"#{one['id']}" for _, one in page.elements if "id" in one}
    assert all(target.startswith("data:") or target in ids for target in targets)
    assert page.text.count("undefined") == 0
    (root,) = page.all("html")
    assert root["lang"] == "en"


def test_the_calibration_error_is_that_of_the_predictions(reported: Path) -> None:
    predictions = Predictions.load(reported)
    assert predictions is not None
    result = reliability(predictions.labels, predictions.probabilities)
    error = f"{result.expected_error:.2%}"
    page = written(reported)
    assert f"Expected calibration error: {error}." in page.text
    (alt,) = [alt for alt in page.alts if alt.startswith("Reliability curve")]
    assert error in alt
    more = (result.counts * np.nan_to_num(result.confidence - result.accuracy)).sum() > 0
    assert f"the model is {'more' if more else 'less'} confident than accurate" in alt


def test_what_anybody_named_is_text_and_nothing_else(tmp_path: Path) -> None:
    config = TrainConfig(output_dir=Path(HOSTILE), data=DataConfig(data_dir=Path(HOSTILE)))
    output = make_run(tmp_path / "run", config, (("failed", HOSTILE),))
    add_evaluation(output, (HOSTILE_CLASS, "a$b$", "c'd"))
    write_report(output)
    page = written(output.path)
    assert not page.all("script")
    assert len(page.all("img")) == 8
    assert all(image["src"].startswith("data:") for image in page.all("img") if image["src"])
    assert HOSTILE in page.text
    assert any(HOSTILE_CLASS in alt for alt in page.alts)


@pytest.mark.parametrize(
    ("end", "sentence"),
    [
        (("stopped", "SIGTERM"), r"it was stopped on .* UTC \(SIGTERM\); 2 of 3 epochs are done"),
        (("failed", "a broken GPU"), r"it failed on .* UTC \(a broken GPU\); 2 of 3 epochs"),
    ],
)
def test_a_run_that_is_not_finished_says_so(
    tmp_path: Path, end: tuple[str, str], sentence: str
) -> None:
    output = make_run(tmp_path / "run", ends=(end,), epochs=2)
    page = without_pictures(output.path)
    assert re.search(f"Not finished: {sentence}", page.text)
    assert "There is no evaluation of the saved model yet" in page.text
    assert "Confusion matrix" not in page.text


def test_a_run_of_which_little_is_left_gets_a_page_of_that(tmp_path: Path) -> None:
    output = make_run(tmp_path / "run")
    (output.path / "metrics.jsonl").unlink()
    write_report(output)
    assert not written(output.path).all("img")
    (output.path / "run.json").unlink()
    add_evaluation(output)
    page = without_pictures(output.path)
    assert "There is no run.json" in page.text
    assert "Confusion matrix" in page.text
    assert "How to run it again" not in page.text


def test_an_attempt_that_left_no_word_and_an_evaluation_of_an_earlier_model(
    whole: OutputDir,
) -> None:
    manifest = json.loads((whole.path / "run.json").read_text())
    whole.write_json("run.json", manifest | {"outcome": "running", "end": None})
    page = without_pictures(whole.path)
    assert "Not finished: its last attempt has left no word of its end" in page.text
    assert "The evaluation is of the model that an earlier attempt saved" in page.text


def test_a_folder_of_an_earlier_version_gets_a_report_without_predictions(
    whole: OutputDir,
) -> None:
    (whole.path / "predictions.npz").unlink()
    record = RunRecord.load(whole.path)
    names = {"accuracy", "loss", "throughput", "confusion", "classes"}
    assert draw_figures(record).keys() == names
    page = without_pictures(whole.path)
    assert "There is no predictions.npz in the folder" in page.text
    assert "python -m job evaluate --output-dir out" in page.text
    assert "Calibration" not in page.text


def tiles(page: Page) -> str:
    return " ".join(page.text.split("Sections")[0].split())


def test_a_run_stopped_in_its_first_epoch_tells_how_far_it_is(tmp_path: Path) -> None:
    config = TrainConfig(output_dir=Path("out"), epochs=20, global_batch_size=100)
    output = make_run(tmp_path / "run", config, (("stopped", "SIGTERM"),), epochs=0)
    text = tiles(without_pictures(output.path))
    # 2,560 training images are 25 steps an epoch.
    assert "Progressepoch 1 of 2015 of 500 steps" in text
    assert "Time9.0 s" in text
    assert "Restarts0" in text
    assert "Throughput" not in text


def test_an_unfinished_run_tells_its_epoch_and_a_finished_one_its_epochs(tmp_path: Path) -> None:
    ends = (("stopped", "SIGTERM"), ("stopped", "SIGTERM"))
    output = make_run(tmp_path / "run", TrainConfig(epochs=5), ends, epochs=2)
    assert "Progressepoch 4 of 530 of 50 steps" in tiles(without_pictures(output.path))
    done = make_whole_run(tmp_path / "done")
    assert "Epochs345 steps" in tiles(without_pictures(done.path))


def test_a_stopped_run_tells_first_how_to_go_on(tmp_path: Path) -> None:
    config = TrainConfig(output_dir=Path("out"), epochs=3, fresh=True, run_id="mine")
    output = make_run(tmp_path / "run", config, (("stopped", "SIGTERM"),), epochs=1)
    text = without_pictures(output.path).text
    on = text.index("--output-dir out --data-dir data --epochs 3 --run-id mine\n")
    again = text.index("--output-dir out-again --data-dir data --epochs 3\n")
    assert text.index("How to go on") < on < text.index("How to run it again") < again
    assert "--fresh" not in text[on - 20 : again + 80]
    assert "How to go on" not in without_pictures(make_whole_run(tmp_path / "done").path).text


def test_no_secret_of_an_address_gets_into_the_page(tmp_path: Path) -> None:
    url = "https://me:secret@mirror/c.tar.gz?token=secret"
    config = TrainConfig(data=DataConfig(cifar10_url=url), epochs=3)
    output = make_run(tmp_path / "run", config)
    assert "secret" not in (output.path / "run.json").read_text()
    # As earlier versions have left it.
    change(output.path, cifar10_url=url)
    page = render(RunRecord.load(output.path), {})
    assert "secret" not in page
    assert "--cifar10-url &#39;https://REMOVED@mirror/c.tar.gz?REMOVED&#39;" in page
    assert "put them back where --cifar10-url has REMOVED" in page
    assert "REMOVED" not in render(RunRecord.load(make_whole_run(tmp_path / "done").path), {})
