import dataclasses
import io
from pathlib import Path

import matplotlib.image as mpl_image
import numpy as np
from msgspec.structs import replace

from job.report.figures import draw_figures
from job.report.page import render
from job.run.folder import REPORT_PICTURES, OutputDir
from job.run.predictions import Predictions, confusion_matrix
from job.run.record import RunRecord, encode
from job.training.evaluate import Evaluation
from tests.run_folders import make_run


def test_every_picture_is_a_png_with_an_alternative_text(whole: OutputDir) -> None:
    figures = draw_figures(RunRecord.load(whole.path))
    assert sorted(f"report/{name}.png" for name in figures) == sorted(REPORT_PICTURES)
    for figure in figures.values():
        assert mpl_image.imread(io.BytesIO(figure.png)).shape[1] == 1000
    alts = {name: figure.alt for name, figure in figures.items()}
    assert len(set(alts.values())) == 8
    assert all(len(alt) > 60 for alt in alts.values())
    assert "training goes from 30.0% to 43.3%" in alts["accuracy"]
    assert "validation from 1.900 to 0.633" in alts["loss"]
    assert "median 502, lowest 501, highest 503" in alts["throughput"]


def test_restarts_are_marked_at_their_time(whole: OutputDir) -> None:
    record = RunRecord.load(whole.path)
    # Step 15 is in the middle of the second epoch, step 30 at the end of the third.
    assert record.restarts == [(15, 9.0), (30, 18.0)]
    few = replace(record, evaluation=None, predictions=None)
    marked = draw_figures(few)["throughput"]
    assert "restarts at 9.0 s (step 15), 18.0 s (step 30)" in marked.alt
    unmarked = draw_figures(replace(few, manifest=None))["throughput"]
    assert "no restart" in unmarked.alt
    assert unmarked.png != marked.png


def test_a_restart_in_an_unfinished_epoch_is_marked_after_the_last_epoch(tmp_path: Path) -> None:
    output = make_run(
        tmp_path / "run",
        ends=(("stopped", "SIGTERM"), ("failed", "a broken GPU"), ("stopped", "SIGTERM")),
        epochs=2,
    )
    figure = draw_figures(RunRecord.load(output.path))["throughput"]
    assert "restarts at 9.0 s (step 15), 18.0 s (step 30)" in figure.alt


def test_without_predictions_their_figures_are_omitted(whole: OutputDir) -> None:
    record = replace(RunRecord.load(whole.path), predictions=None)
    names = {"accuracy", "loss", "throughput", "confusion", "classes"}
    assert draw_figures(record).keys() == names


def test_figures_of_a_model_without_mistakes(whole: OutputDir) -> None:
    predictions = Predictions.load(whole.path)
    assert predictions is not None
    right = dataclasses.replace(
        predictions,
        labels=predictions.probabilities.argmax(axis=1).astype(np.int32),
        mistakes=predictions.mistakes[:0],
        mistake_images=predictions.mistake_images[:0],
    )
    right.save(whole)
    confusion = confusion_matrix(right.labels, right.probabilities)
    names = ("cat", "dog", "eel")
    evaluation = Evaluation(0.1, confusion).record(names, "cifar10_model.h5", "0" * 64)
    whole.write_bytes("evaluation.json", encode(evaluation))
    figures = draw_figures(RunRecord.load(whole.path))
    assert "there are no mistakes" in figures["confusion"].alt
    assert "mistakes" not in figures
    assert "There are none: every test image is classified correctly." in render(
        RunRecord.load(whole.path), {}
    )
