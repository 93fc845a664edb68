import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image as mpl_image
import numpy as np
import pytest

from job import log, report
from job.attempt import hold_output_dir
from job.calibration import reliability
from job.cluster import RunIdentity
from job.config import DataConfig, TrainConfig, UserError
from job.evaluate import Evaluation
from job.manifest import RunManifest
from job.output import REPORT_PICTURES, OutputDir
from job.predictions import Predictions, confusion_matrix, most_confident_mistakes
from job.preemption import StopRequest
from job.report_figures import draw_figures
from job.report_page import render
from job.run_record import RunRecord
from tests.conftest import REPOSITORY, RunJob

HOSTILE = "\"><script>alert('x')</script>&amp;<img src=http://example.com/x>$\\frac"
HOSTILE_CLASS = '"><b>$\\f'
EXAMPLES = 200
DETAILS = {
    "devices": [{"name": "CPU:0", "model": "a processor", "memory_gib": 23.5}],
    "replicas": 1,
    "threads": 2,
    "precision": "float32",
    "xla": False,
    "deterministic": True,
    "data": {"name": "cifar10", "fingerprint": "ab" * 32, "train_examples": 2560},
}


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


def lines(epochs: int) -> list[dict[str, Any]]:
    return [
        {
            **{"epoch": n, "step": 10 * n, "loss": 2 / n, "accuracy": 0.5 - 0.2 / n},
            **{"val_loss": 1.9 / n, "val_accuracy": 0.6 - 0.3 / n, "learning_rate": 1e-3},
            **{"seconds": 5.0, "images_per_second": 500.0 + n, "elapsed_seconds": 6.0 * n},
        }
        for n in range(1, epochs + 1)
    ]


def make_run(
    folder: Path,
    config: TrainConfig | None = None,
    ends: tuple[tuple[str, str | None], ...] = (("done", None),),
    epochs: int = 3,
) -> OutputDir:
    """Leave in a folder what the attempts at a run leave, each 15 steps further than the last."""
    folder.mkdir(exist_ok=True)
    output = OutputDir(folder)
    config = config or TrainConfig(output_dir=Path("out"), epochs=3)
    for number, (outcome, reason) in enumerate(ends):
        manifest = RunManifest(output, RunIdentity(None))
        manifest.begin(config)
        manifest.start_training(config, DETAILS, 15 * number, [])
        manifest.progress(15 * number + 15, None, 6.0)
        manifest.finish(outcome, reason)
    text = "".join(json.dumps(line) + "\n" for line in lines(epochs))
    output.write_text("metrics.jsonl", text)
    return output


def add_evaluation(output: OutputDir, names: tuple[str, ...] = ("cat", "dog", "eel")) -> None:
    """Add the evaluation of a model that is right half of the time."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, len(names), EXAMPLES, np.int32)
    scores = rng.random((EXAMPLES, len(names))) + 0.5 * np.eye(len(names))[labels]
    probabilities = (scores / scores.sum(axis=1, keepdims=True)).astype(np.float32)
    mistakes = most_confident_mistakes(labels, probabilities, 16)

    def images(*shape: int) -> np.ndarray:
        return rng.integers(0, 256, (*shape, 32, 32, 3), np.uint8)

    Predictions(
        *(labels, probabilities, mistakes, images(len(mistakes))),
        *(images(3), np.arange(3, dtype=np.int32), images(3, 5)),
    ).save(output)
    evaluation = Evaluation(1.25, confusion_matrix(labels, probabilities))
    output.write_json("evaluation.json", evaluation.document(names))


def make_whole_run(folder: Path) -> OutputDir:
    """A finished run with everything, stopped twice on its way."""
    ends = (("stopped", "SIGTERM"), ("failed", "a broken GPU"), ("done", None))
    output = make_run(folder, ends=ends)
    add_evaluation(output)
    return output


@pytest.fixture
def whole(tmp_path: Path) -> OutputDir:
    """Such a run, to be changed."""
    return make_whole_run(tmp_path / "run")


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of such a run with its report."""
    output = make_whole_run(tmp_path_factory.mktemp("reported"))
    report.write_report(output)
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


def test_every_picture_is_a_png_of_its_own_too_and_says_what_it_shows(reported: Path) -> None:
    files = sorted(path.name for path in (reported / "report").iterdir())
    assert files == sorted(Path(name).name for name in REPORT_PICTURES)
    figures = draw_figures(RunRecord.load(reported))
    for name, figure in figures.items():
        # Drawn again, it has the same bytes.
        assert (reported / "report" / f"{name}.png").read_bytes() == figure.png
        assert mpl_image.imread(io.BytesIO(figure.png)).shape[1] == 1000
    page = written(reported)
    assert len(set(page.alts)) == len(page.alts) == len(figures) == 8
    assert all(len(alt) > 60 for alt in page.alts)
    alts = {name: figure.alt for name, figure in figures.items()}
    assert "in training it goes from 30.0% to 43.3%" in alts["accuracy"]
    assert "in validation from 1.900 to 0.633" in alts["loss"]
    assert "median 502, lowest 501, highest 503" in alts["throughput"]


def test_restarts_are_marked_at_their_time(whole: OutputDir) -> None:
    record = RunRecord.load(whole.path)
    # The steps 15 and 30 lie in the middle of the second epoch and at the end of the third.
    assert record.restarts == [(15, 9.0), (30, 18.0)]
    few = replace(record, evaluation={}, predictions=None)
    marked = draw_figures(few)["throughput"]
    assert "restarts at 9.0 s (step 15), 18.0 s (step 30)" in marked.alt
    unmarked = draw_figures(replace(few, manifest={}))["throughput"]
    assert "no restart" in unmarked.alt
    assert unmarked.png != marked.png


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
    report.write_report(output)
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


def test_a_report_has_no_pictures_of_an_earlier_model(tmp_path: Path) -> None:
    output = make_run(tmp_path / "run", ends=(("stopped", "SIGTERM"),))
    output.make_folder("report")
    output.write_text("report/mistakes.png", "of an earlier model")
    report.write_report(output)
    files = sorted(path.name for path in (output.path / "report").iterdir())
    assert files == ["accuracy.png", "loss.png", "throughput.png"]
    assert len(written(output.path).all("img")) == 3


def test_a_run_of_which_little_is_left_gets_a_page_of_that(tmp_path: Path) -> None:
    output = make_run(tmp_path / "run")
    (output.path / "metrics.jsonl").unlink()
    report.write_report(output)
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


def test_a_model_without_a_mistake(whole: OutputDir) -> None:
    predictions = Predictions.load(whole.path)
    assert predictions is not None
    right = replace(
        predictions,
        labels=predictions.probabilities.argmax(axis=1).astype(np.int32),
        mistakes=predictions.mistakes[:0],
        mistake_images=predictions.mistake_images[:0],
    )
    right.save(whole)
    confusion = confusion_matrix(right.labels, right.probabilities)
    whole.write_json("evaluation.json", Evaluation(0.1, confusion).document(("cat", "dog", "eel")))
    figures = draw_figures(RunRecord.load(whole.path))
    assert "of the mistakes there is none" in figures["confusion"].alt
    assert "mistakes" not in figures
    text = without_pictures(whole.path).text
    assert "There is none: every test image is classified correctly." in text


def test_predictions_of_another_model_are_refused(whole: OutputDir) -> None:
    predictions = Predictions.load(whole.path)
    assert predictions is not None
    replace(predictions, probabilities=predictions.probabilities[::-1]).save(whole)
    with pytest.raises(UserError, match="are of another model than its evaluation"):
        report.write_report(whole)
    assert not (whole.path / "report.html").exists()


def test_metrics_that_cannot_be_read_are_named(whole: OutputDir) -> None:
    (whole.path / "metrics.jsonl").write_text('{"epoch": 1, "st')
    with pytest.raises(UserError, match=r"cannot read .*metrics\.jsonl"):
        report.write_report(whole)


def test_a_defect_of_drawing_is_told_and_spoils_nothing(
    whole: OutputDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: Any) -> None:
        raise ZeroDivisionError("a broken plot")

    monkeypatch.setattr(report, "draw_figures", broken)
    log.configure("json")
    report.try_to_write_report(whole)
    (event,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (event["event"], event["level"]) == ("report_failed", "error")
    assert "ZeroDivisionError: a broken plot" in event["trace"]
    assert "everything but the report is in" in event["message"]


def test_a_report_that_cannot_be_written_is_an_error(whole: OutputDir) -> None:
    (whole.path / "report").write_text("a file in its place")
    with pytest.raises(UserError, match=r"cannot make the folder .*report: File exists"):
        report.try_to_write_report(whole)


def test_a_folder_without_a_run_is_refused_and_not_made(run_job: RunJob, tmp_path: Path) -> None:
    result = run_job("report", "nowhere")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "nowhere holds no run: it has neither run.json nor metrics.jsonl nor" in line
    assert list(tmp_path.iterdir()) == []


def test_the_command_takes_the_folder_either_way_gives_the_same_bytes_and_loads_no_tensorflow(
    run_job: RunJob, whole: OutputDir
) -> None:
    result = run_job("report", env={"JOB_OUTPUT_DIR": str(whole.path)})
    assert result.returncode == 0, result.stderr
    (event,) = [json.loads(line) for line in result.stdout.splitlines()]
    assert (event["event"], event["path"]) == ("report", str(whole.path / "report.html"))
    first = (whole.path / "report.html").read_bytes()
    (whole.path / "report.html").unlink()
    script = (
        "import sys\nfrom job.cli import cli\nfrom job.preemption import StopRequest\n"
        "cli(['report', sys.argv[1]], obj=StopRequest(), standalone_mode=False)\n"
        "assert not {'tensorflow', 'keras'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", script, str(whole.path)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    assert (whole.path / "report.html").read_bytes() == first


def test_a_folder_that_a_training_holds_is_left_alone(run_job: RunJob, whole: OutputDir) -> None:
    with hold_output_dir(whole.path, StopRequest()):
        result = run_job("report", whole.path)
    assert result.returncode == 2
    assert "is in use by" in result.stderr
    assert not (whole.path / "report.html").exists()


def test_an_undefined_precision_is_said(whole: OutputDir) -> None:
    document = json.loads((whole.path / "evaluation.json").read_text())
    document["classes"]["dog"]["precision"] = None
    record = replace(RunRecord.load(whole.path), evaluation=document)
    assert "<td>undefined</td>" in render(record, {})
    figure = draw_figures(replace(record, epochs=[], predictions=None))["classes"]
    assert "(cat)" in figure.alt
