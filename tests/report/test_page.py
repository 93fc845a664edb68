import base64
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest

from job import log
from job.commands.cli import evaluate, train
from job.config import DeviceRequest, TrainConfig, UserError
from job.environment import program
from job.report import tolerate_drawing_errors
from job.report.page import (
    attempt_table,
    class_table,
    confusion_table,
    epoch_table,
    facts,
    mistake_table,
    render,
    rerun_command,
    resume_command,
    write_report,
)
from job.run.attempt import hold_output_dir
from job.run.folder import REPORT, REPORT_PICTURES, OutputDir
from job.run.predictions import Predictions, reliability
from job.run.record import ClassRecord, Manifest, Outcome, RunRecord, decode, encode
from job.run.stop import StopRequest
from tests.conftest import REPOSITORY, RunJob
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
    """The folder of a whole run with its report."""
    output = make_whole_run(tmp_path_factory.mktemp("reported"))
    write_report(output)
    return output.path


@pytest.fixture
def record(whole: OutputDir) -> RunRecord:
    return RunRecord.load(whole.path)


@pytest.fixture
def manifest(record: RunRecord) -> Manifest:
    """The manifest of the record, which a test can change."""
    assert record.manifest is not None
    return record.manifest


def written(folder: Path) -> Page:
    return Page((folder / "report.html").read_text())


def without_pictures(folder: Path) -> Page:
    """The page of a folder without pictures, because drawing takes long."""
    return Page(render(RunRecord.load(folder), {}))


def test_the_page_has_every_section_and_is_self_contained(reported: Path) -> None:
    page = written(reported)
    assert "Finished on 20" in page.text
    for heading in (
        *("Training", "Evaluation of the saved model", "Confusion matrix", "Precision and recall"),
        *("Calibration", "Most confident mistakes", "Augmented training images", "Attempts"),
        *("Repeat this run", "Configuration", "Devices", "Data", "Versions"),
    ):
        assert heading in page.text
    assert f"{program()} train --output-dir out-again --epochs 3\n" in f"{page.text}\n"
    assert "model a processor, memory 23.5 GiB" in page.text
    assert not page.all("script")
    links = [*page.all("a"), *page.all("link"), *page.all("img")]
    targets = [link.get("href") or link["src"] or "" for link in links]
    ids = {f"#{one['id']}" for _, one in page.elements if "id" in one}
    assert all(target.startswith("data:") or target in ids for target in targets)
    assert page.text.count("undefined") == 0
    (root,) = page.all("html")
    assert root["lang"] == "en"


def test_the_page_contains_the_pictures_in_the_folder(reported: Path) -> None:
    files = sorted(reported / name for name in REPORT_PICTURES)
    assert sorted((reported / "report").iterdir()) == files
    sources = [(image["src"] or "").split(",")[1] for image in written(reported).all("img")]
    embedded = [base64.b64decode(source) for source in sources]
    assert sorted(embedded) == sorted(path.read_bytes() for path in files)


def test_the_calibration_error_is_that_of_the_predictions(reported: Path) -> None:
    predictions = Predictions.load(reported)
    assert predictions is not None
    result = reliability(predictions.labels, predictions.probabilities)
    error = f"{result.expected_error:.2%}"
    page = written(reported)
    assert f"Expected calibration error: {error}." in page.text
    (alt,) = [alt for alt in page.alts if alt.startswith("Reliability curve")]
    assert error in alt
    predicted = predictions.probabilities.argmax(axis=1)
    confidence = predictions.probabilities.max(axis=1).mean()
    accuracy = (predicted == predictions.labels).mean()
    assert f"The mean confidence is {confidence:.1%}, the accuracy {accuracy:.1%}" in alt


def test_names_from_users_are_escaped(tmp_path: Path) -> None:
    config = TrainConfig(output_dir=Path(HOSTILE), data_dir=Path(HOSTILE))
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
    ("outcome", "reason", "sentence"),
    [
        ("stopped", "SIGTERM", r"the run was stopped on .* UTC \(SIGTERM\); 2 of 3 epochs are"),
        ("failed", "a broken GPU", r"the run failed on .* UTC \(a broken GPU\); 2 of 3 epochs"),
    ],
)
def test_the_page_of_an_unfinished_run_reports_how_it_ended(
    tmp_path: Path, outcome: Outcome, reason: str, sentence: str
) -> None:
    output = make_run(tmp_path / "run", ends=((outcome, reason),), epochs=2)
    page = without_pictures(output.path)
    assert re.search(f"Not finished: {sentence}", page.text)
    assert "The saved model has not been evaluated yet" in page.text
    assert "Confusion matrix" not in page.text


def test_a_run_with_few_remaining_files_gets_a_page_from_them(tmp_path: Path) -> None:
    output = make_run(tmp_path / "run")
    (output.path / "metrics.jsonl").unlink()
    write_report(output)
    assert not written(output.path).all("img")
    (output.path / "run.json").unlink()
    add_evaluation(output)
    page = without_pictures(output.path)
    assert "The folder contains no run.json" in page.text
    assert "Confusion matrix" in page.text
    assert "Repeat this run" not in page.text


def test_an_attempt_without_a_recorded_end_and_an_evaluation_of_an_earlier_model(
    whole: OutputDir,
) -> None:
    change(whole.path, outcome="running", end=None)
    page = without_pictures(whole.path)
    assert "Not finished: the last attempt did not record how it ended" in page.text
    assert "The evaluation belongs to the model that an earlier attempt saved" in page.text


def test_a_folder_of_an_earlier_version_gets_a_report_without_predictions(
    whole: OutputDir,
) -> None:
    (whole.path / "predictions.npz").unlink()
    page = without_pictures(whole.path)
    assert "The folder contains no predictions.npz" in page.text
    assert f"{program()} evaluate --output-dir out" in page.text
    assert "Calibration" not in page.text


def tiles(page: Page) -> str:
    return " ".join(page.text.split("Sections")[0].split())


def test_a_run_stopped_in_its_first_epoch_shows_its_progress(tmp_path: Path) -> None:
    config = TrainConfig(output_dir=Path("out"), epochs=20, batch_size=100)
    output = make_run(tmp_path / "run", config, (("stopped", "SIGTERM"),), epochs=0)
    text = tiles(without_pictures(output.path))
    # 2,560 training images are 25 steps per epoch.
    assert "Progressepoch 1 of 2015 of 500 steps" in text
    assert "Time9.0 s" in text
    assert "Restarts0" in text
    assert "Throughput" not in text


def test_an_unfinished_run_shows_its_current_epoch_and_a_finished_one_its_epochs(
    tmp_path: Path, whole: OutputDir
) -> None:
    ends: tuple[tuple[Outcome, str], ...] = (("stopped", "SIGTERM"), ("stopped", "SIGTERM"))
    output = make_run(tmp_path / "two", TrainConfig(epochs=5), ends, epochs=2)
    assert "Progressepoch 3 of 530 of 50 steps" in tiles(without_pictures(output.path))
    assert "Epochs345 steps" in tiles(without_pictures(whole.path))


def test_a_time_is_shown_in_suitable_units(record: RunRecord, manifest: Manifest) -> None:
    for seconds, text in (
        *((0.0, "0.0 s"), (6.04, "6.0 s"), (59.4, "59.4 s"), (59.6, "1 min 0 s")),
        *((167.2, "2 min 47 s"), (3599.7, "1 h 0 min"), (90_061.0, "25 h 1 min")),
    ):
        manifest.elapsed_seconds = seconds
        shown = Page(render(msgspec.structs.replace(record, epochs=[]), {}))
        assert f"Time{text}in training and validation" in tiles(shown)


def test_every_epoch_has_a_row(record: RunRecord) -> None:
    table = epoch_table(record)
    assert len(table.head) == 7
    assert table.rows[1] == ("2", "1.0000", "40.00%", "0.9500", "45.00%", "5.00", "502")
    assert len(table.rows) == 3


def test_the_confusion_matrix_has_the_classes_on_both_sides(record: RunRecord) -> None:
    table = confusion_table(record)
    assert list(table.head) == ["True class", "cat", "dog", "eel"]
    assert [row[0] for row in table.rows] == ["cat", "dog", "eel"]
    assert sum(int(cell) for row in table.rows for cell in row[1:]) == 200


def test_an_undefined_precision_is_shown_as_undefined(record: RunRecord) -> None:
    assert record.evaluation is not None
    record.evaluation.classes["dog"] = ClassRecord(precision=None, recall=0.0, support=7)
    assert class_table(record).rows[1] == ("dog", "undefined", "0.0%", "7")


def test_mistakes_are_listed_with_their_predicted_classes(record: RunRecord) -> None:
    table = mistake_table(record)
    assert len(table.rows) == 16
    assert all(true != predicted for _, true, predicted, _ in table.rows)
    assert mistake_table(msgspec.structs.replace(record, predictions=None)).rows == []


def test_every_attempt_is_shown_with_its_steps_and_end(manifest: Manifest) -> None:
    second = manifest.attempts[1]
    second.first_step = second.end = None
    second.changes = ["threads: 1 -> 2"]
    rows = attempt_table(manifest).rows
    assert [row[3] for row in rows] == ["0 to 15", "none", "30 to 45"]
    assert rows[1][1:3] == ("unknown", "failed")
    assert rows[1][5] == "a broken GPU; threads: 1 -> 2"
    assert attempt_table(None).rows == []


def test_facts_are_shown_with_units_and_explanations(manifest: Manifest) -> None:
    manifest.precision = "bfloat16"
    shown = {heading: dict(rows) for heading, _, rows in facts(manifest)}
    assert shown["Configuration"]["--batch-size"] == "256"
    assert shown["Devices"]["precision"].startswith("bfloat16 (16-bit numbers with the range")
    assert shown["Devices"]["xla"] == "false"
    assert shown["Devices"]["device 1"] == "CPU:0, model a processor, memory 23.5 GiB"
    assert shown["Versions"]["recipe fingerprint"] == "ef" * 32
    manifest.precision = "float8"
    assert ("precision", "float8") in facts(manifest)[1][2]


def test_facts_of_a_run_that_never_trained(manifest: Manifest) -> None:
    manifest.devices = manifest.data = manifest.precision = manifest.recipe_fingerprint = None
    headings = [heading for heading, _, _ in facts(manifest)]
    assert headings == ["Configuration", "Devices", "Data", "Versions"]


# Every option that all attempts of a run share, none of them with its default value.
EVERYTHING = TrainConfig(
    output_dir=Path("out put/$HOME; rm -rf 'x' \"y\" `z`"),
    data_dir=Path("-data\\dir\nwith a line"),
    dataset="synthetic",
    cifar10_url="https://x/a'b",
    seed=7,
    epochs=3,
    batch_size=64,
    learning_rate=0.1 + 0.2,
    limit=5120,
    precision="bfloat16",
    jit="off",
    deterministic="off",
    devices=DeviceRequest("cpu:2"),
    require_gpus=4,
    join_timeout=7.0,
    stall_timeout=1e-3,
    checkpoint_every=1e6,
    tensorboard=True,
)
# The same run with options that apply only to one attempt.
ATTEMPT = replace(
    EVERYTHING,
    fresh=True,
    run_id="mine",
    stop_after=5.0,
    compile_cache=Path("code"),
    metrics_textfile=Path("one.prom"),
)


def parse(command: str) -> TrainConfig:
    """The configuration that the program reads from a command line."""
    words = shlex.split(command)
    assert words[:2] == [program(), "train"]
    options = train.make_context("train", words[2:]).params
    del options["log_format"], options["expect_mount"], options["dry_run"]
    return TrainConfig(**options)


def as_recorded(config: TrainConfig) -> TrainConfig:
    return decode(encode(config), TrainConfig)


@pytest.mark.parametrize("config", [TrainConfig(), EVERYTHING], ids=["defaults", "everything"])
def test_the_command_has_the_runs_configuration_and_another_folder(config: TrainConfig) -> None:
    again = Path(f"{config.output_dir}-again")
    assert parse(rerun_command(as_recorded(config))) == replace(config, output_dir=again)


def test_options_of_a_single_attempt_are_not_repeated() -> None:
    assert rerun_command(as_recorded(ATTEMPT)) == rerun_command(as_recorded(EVERYTHING))


def test_the_resume_command_keeps_folder_run_id_and_textfile_but_not_fresh() -> None:
    expected = replace(ATTEMPT, fresh=False, stop_after=None)
    assert parse(resume_command(as_recorded(ATTEMPT))) == expected


def test_only_the_folder_and_options_that_differ_from_the_defaults_are_named() -> None:
    for config, options in (
        (TrainConfig(epochs=5), "--output-dir output-again --epochs 5"),
        (TrainConfig(data_dir=Path("d")), "--output-dir output-again --data-dir d"),
        (TrainConfig(dataset="synthetic"), "--output-dir output-again --dataset synthetic"),
        (TrainConfig(output_dir=Path()), "--output-dir .-again"),
        # The values of the run, which can differ from the recipe's own defaults.
        (
            TrainConfig(recipe="fast"),
            "--output-dir output-again --recipe fast --epochs 50 --batch-size 256 "
            "--learning-rate 0.0001",
        ),
    ):
        assert rerun_command(as_recorded(config)) == f"{program()} train {options}"


def test_options_that_this_version_does_not_have_are_omitted_from_the_command(
    whole: OutputDir,
) -> None:
    document = json.loads((whole.path / "run.json").read_text())
    document["config"] |= {"colour": "red", "limit": 77}
    (whole.path / "run.json").write_text(json.dumps(document))
    (command,) = re.findall("cifar10-job train.*", without_pictures(whole.path).text)
    assert command == "cifar10-job train --output-dir out-again --epochs 3 --limit 77"


def test_a_stopped_run_shows_first_how_to_resume_it(tmp_path: Path, whole: OutputDir) -> None:
    config = TrainConfig(output_dir=Path("out"), epochs=3, fresh=True, run_id="mine")
    output = make_run(tmp_path / "stopped", config, (("stopped", "SIGTERM"),), epochs=1)
    text = without_pictures(output.path).text
    on = text.index("--output-dir out --epochs 3 --run-id mine\n")
    again = text.index("--output-dir out-again --epochs 3\n")
    assert text.index("Resume this run") < on < text.index("Repeat this run") < again
    assert "--fresh" not in text[on - 20 : again + 80]
    assert "Resume this run" not in without_pictures(whole.path).text


def test_the_evaluate_command_has_the_folder_and_data_of_the_run(tmp_path: Path) -> None:
    config = replace(EVERYTHING, data_dir=Path("da ta"))
    output = make_run(tmp_path / "run", config)
    add_evaluation(output)
    (output.path / "predictions.npz").unlink()
    (command,) = re.findall("cifar10-job evaluate.*", without_pictures(output.path).text)
    options = evaluate.make_context("evaluate", shlex.split(command)[2:]).params
    names = ("output_dir", "data_dir", "dataset", "seed", "recipe")
    assert [options[name] for name in names] == [getattr(config, name) for name in names]


def test_the_page_contains_no_secret_of_an_address(tmp_path: Path, whole: OutputDir) -> None:
    url = "https://me:secret@mirror/c.tar.gz?token=secret"
    output = make_run(tmp_path / "mirror", TrainConfig(cifar10_url=url, epochs=3))
    assert "secret" not in (output.path / "run.json").read_text()
    # As earlier versions wrote it.
    change(output.path, cifar10_url=url)
    page = render(RunRecord.load(output.path), {})
    assert "secret" not in page
    assert "--cifar10-url &#39;https://REMOVED@mirror/c.tar.gz?REMOVED&#39;" in page
    assert "Put them back in place of REMOVED in --cifar10-url" in page
    assert "REMOVED" not in render(RunRecord.load(whole.path), {})


def test_pictures_of_an_earlier_model_are_removed(tmp_path: Path) -> None:
    output = make_run(tmp_path / "run", ends=(("stopped", "SIGTERM"),))
    output.make_folder("report")
    output.write_text("report/mistakes.png", "of an earlier model")
    write_report(output)
    files = sorted(path.name for path in (output.path / "report").iterdir())
    assert files == ["accuracy.png", "loss.png", "throughput.png"]
    assert (output.path / "report.html").read_text().count("<img") == 3


def test_a_defect_in_drawing_is_logged_and_tolerated(
    whole: OutputDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: Any) -> None:
        raise ZeroDivisionError("a broken plot")

    monkeypatch.setattr("job.report.page.draw_figures", broken)
    log.configure("json")
    with tolerate_drawing_errors("the report"):
        write_report(whole)
    (event,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (event["event"], event["level"]) == ("not_drawn", "warning")
    assert "ZeroDivisionError: a broken plot" in event["trace"]
    assert "could not draw the report; all other artifacts are complete" in event["message"]


def test_the_users_settings_of_matplotlib_change_no_byte(
    whole: OutputDir, run_job: RunJob, tmp_path: Path
) -> None:
    def content() -> dict[str, bytes]:
        return {name: (whole.path / name).read_bytes() for name in (REPORT, *REPORT_PICTURES)}

    write_report(whole)
    before = content()
    # The first of several files that matplotlib reads; its second line would raise an error.
    (tmp_path / "matplotlibrc").write_bytes(b"text.usetex: True\n# gr\xf6\xdfer\nfont.size: 30\n")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    env = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "TMPDIR": str(temporary)}
    env |= {"HOME": "/dev/null/none", "MPLCONFIGDIR": "/dev/null/none"}
    result = run_job("report", whole.path, env=env)
    assert (result.returncode, result.stderr) == (0, "")
    assert content() == before
    assert list(temporary.iterdir()) == []


def test_a_report_that_cannot_be_written_is_an_error(whole: OutputDir) -> None:
    (whole.path / "report").write_text("a file in its place")
    with (
        pytest.raises(UserError, match=r"cannot create the folder .*report: File exists"),
        tolerate_drawing_errors("it"),
    ):
        write_report(whole)


def test_half_a_character_in_a_runs_files_is_an_error_and_nothing_is_written(
    reported: Path, tmp_path: Path
) -> None:
    shutil.copytree(reported, tmp_path / "run")
    change(tmp_path / "run", recipe="\ud800")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    with pytest.raises(UserError, match=r"run\.json is damaged: .*; run the same train command"):
        write_report(OutputDir(tmp_path / "run"))
    assert {path: path.read_bytes() for path in before} == before


def test_a_folder_without_a_run_is_refused_and_not_created(run_job: RunJob, tmp_path: Path) -> None:
    result = run_job("report", "nowhere")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "nowhere contains no run: it has neither run.json nor metrics.jsonl nor" in line
    assert list(tmp_path.iterdir()) == []


def test_the_command_accepts_the_folder_in_two_ways_and_does_not_import_tensorflow(
    run_job: RunJob, reported: Path, tmp_path: Path
) -> None:
    first = (reported / "report.html").read_bytes()
    folder = tmp_path / "another place"
    shutil.copytree(reported, folder, ignore=shutil.ignore_patterns("report*"))
    result = run_job("report", env={"JOB_OUTPUT_DIR": str(folder)})
    assert result.returncode == 0, result.stderr
    (event,) = [json.loads(line) for line in result.stdout.splitlines()]
    assert (event["event"], event["path"]) == ("report", str(folder / "report.html"))
    assert (folder / "report.html").read_bytes() == first
    (folder / "report.html").unlink()
    script = (
        "import sys\nfrom job.commands.cli import cli\nfrom job.run.stop import StopRequest\n"
        "cli(['report', sys.argv[1]], obj=StopRequest(), standalone_mode=False)\n"
        "assert not {'tensorflow', 'keras'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", script, str(folder)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    assert (folder / "report.html").read_bytes() == first


def test_a_folder_in_use_by_a_training_is_refused(run_job: RunJob, whole: OutputDir) -> None:
    with hold_output_dir(whole.path, StopRequest()):
        result = run_job("report", whole.path)
    assert result.returncode == 2
    assert "is in use by" in result.stderr
    assert not (whole.path / "report.html").exists()
