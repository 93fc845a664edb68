import json
import statistics
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner
from matplotlib import image as mpl_image
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from job.commands import compare
from job.commands.cli import cli
from job.commands.compare import (
    Group,
    Run,
    compare_runs,
    read_run,
    run_folders,
    save_comparison,
)
from job.config import UserError
from job.report.pictures import save_png
from job.run.record import TrainingRecord
from tests.run_folders import TRAINING, change, climb, make_sweep_run


def training(fingerprint: str = "ab" * 32, **changes: Any) -> TrainingRecord:
    """The training record of a run with other images, or another precision or recipe."""
    assert TRAINING.data
    data = msgspec.structs.replace(TRAINING.data, fingerprint=fingerprint)
    return msgspec.structs.replace(TRAINING, data=data, **changes)


def test_each_run_folder_is_found_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_sweep_run(tmp_path / name, climb(0.5))
    folders = [str(tmp_path / "a"), str(tmp_path), str(tmp_path / "b" / "..")]
    assert sorted(Path(folder).name for folder in run_folders(folders)) == ["a", "b"]
    # This is the result of a job array started in the folder of a single job.
    nested = make_sweep_run(tmp_path / "a" / "seed-7", climb(0.5))
    assert run_folders([str(tmp_path / "a")]) == [str(tmp_path / "a"), str(nested)]
    assert run_folders([str(tmp_path / "nowhere")]) == [str(tmp_path / "nowhere")]


def test_a_run_is_read_with_its_settings_and_accuracies(tmp_path: Path) -> None:
    run = read_run(str(make_sweep_run(tmp_path / "run", climb(0.66), 0.64, seed=3)))
    assert run.problem is None
    assert (run.seed, run.accuracy, run.loss, run.outcome) == (3, 0.64, 1.0, "done")
    assert run.last == 0.66
    assert run.last_mean == pytest.approx(0.64)
    assert (run.settings["batch_size"], run.settings["precision"]) == (256, "float32")
    assert (run.settings["data"], run.elapsed_seconds) == ("abababab", 30.0)


def test_an_unfinished_run_reports_its_progress(tmp_path: Path) -> None:
    folder = make_sweep_run(tmp_path / "run", climb(0.4)[:3], outcome="stopped")
    run = read_run(str(folder))
    assert run.problem == "stopped after 3 of 7 epochs"
    assert (run.accuracy, run.loss, len(run.curve)) == (None, None, 3)


def test_a_folder_without_a_run_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"neither this folder nor a folder in it contains a run\.json"
    ):
        read_run(str(tmp_path))
    with pytest.raises(UserError, match="this folder does not exist"):
        read_run(str(tmp_path / "nowhere"))


DAMAGE = [
    ("run.json", "{", "run.json is damaged: Input data was truncated"),
    ("run.json", '{"config": {}, "outcome": "done"}', "missing required field `versions`"),
    ("run.json", None, "neither this folder nor a folder in it contains a run.json"),
    ("metrics.jsonl", "nonsense\n", "metrics.jsonl, line 1 is damaged"),
    ("metrics.jsonl", None, "its metrics.jsonl has 0 lines, expected 7"),
    ("metrics.jsonl", 1, "its metrics.jsonl has 1 line, expected 7"),
    ("evaluation.json", None, "it contains no evaluation.json"),
    ("evaluation.json", '{"loss": 1, "accuracy": []}', "got `array` - at `$.accuracy`"),
]


def test_damaged_runs_are_reported_and_excluded(tmp_path: Path) -> None:
    good = make_sweep_run(tmp_path / "good", climb(0.5))
    folders = []
    for number, (name, content, _) in enumerate(DAMAGE):
        folders.append(make_sweep_run(tmp_path / f"bad-{number}", climb(0.5)))
        path = folders[-1] / name
        if content is None:
            path.unlink()
        elif isinstance(content, str):
            path.write_text(content)
        else:  # the number of lines to keep
            path.write_text("".join(path.read_text().splitlines(keepends=True)[:content]))
    comparison = compare_runs(map(str, [good, *folders]))
    assert [run.folder for group in comparison.groups for run in group.runs] == [str(good)]
    for folder, (name, content, problem) in zip(folders, DAMAGE, strict=True):
        assert problem in comparison.left_out[str(folder)], (name, content)


def test_a_run_json_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    folder = make_sweep_run(tmp_path / "run", climb(0.5))
    document = json.loads((folder / "run.json").read_text())
    for name in ("recipe_fingerprint", "threads"):
        document.pop(name, None)
    (folder / "run.json").write_text(json.dumps(document))
    assert read_run(str(folder)).problem is None


def test_a_setting_that_is_not_a_single_value_is_reported_as_damage(tmp_path: Path) -> None:
    folder = make_sweep_run(tmp_path / "run", climb(0.5))
    change(folder, limit=[1, 2])
    with pytest.raises(UserError, match=r"got `array` - at `\$\.config\.limit`"):
        read_run(str(folder))


def invoke(*arguments: str | Path, **env: str) -> Any:
    command = ["compare", *map(str, arguments)]
    return CliRunner().invoke(cli, command, env=env, standalone_mode=False)


def test_runs_that_differ_only_in_their_seed_are_grouped(sweep: Path) -> None:
    comparison = compare_runs([str(sweep)])
    assert comparison.varying == ("learning_rate",)
    slow, fast = comparison.groups
    assert [run.seed for run in slow.runs] == [7, 10, 42]
    assert slow.accuracy.mean == pytest.approx((0.61 + 0.66 + 0.64) / 3)
    assert slow.accuracy.standard_deviation == pytest.approx(statistics.stdev([0.61, 0.66, 0.64]))
    assert slow.last_mean.mean == pytest.approx(slow.accuracy.mean + 0.01 - 0.02)
    assert slow.elapsed_seconds == pytest.approx(10 * (7 + 10 + 42) / 3)
    assert (slow.best.seed, slow.best.folder) == (7, f"{sweep}/seed-7")
    assert (fast.label, fast.best.seed) == ("classic, learning rate 0.001", 1)
    assert comparison.left_out == {f"{sweep}/stopped": "stopped after 3 of 7 epochs"}


@pytest.mark.parametrize(
    "other",
    [
        {"learning_rate": 1e-3},
        {"batch_size": 128},
        {"training": training(precision="bfloat16")},
        {"training": training("12" * 32)},
    ],
)
def test_different_settings_are_never_averaged(tmp_path: Path, other: dict[str, Any]) -> None:
    make_sweep_run(tmp_path / "a", climb(0.5))
    make_sweep_run(tmp_path / "b", climb(0.6), **other)
    comparison = compare_runs([str(tmp_path)])
    assert [len(group.runs) for group in comparison.groups] == [1, 1]
    assert [group.accuracy.standard_deviation for group in comparison.groups] == [None, None]
    assert len({group.label for group in comparison.groups}) == 2


def test_two_networks_with_the_same_name_are_never_averaged(tmp_path: Path) -> None:
    for name, digit in (("a", "1"), ("b", "2"), ("c", "2")):
        recipe = training(recipe_fingerprint=64 * digit)
        seed = 42 + ord(name)
        make_sweep_run(tmp_path / name, climb(0.5), training=recipe, seed=seed)
    make_sweep_run(tmp_path / "earlier version", climb(0.5))
    change(tmp_path / "earlier version", recipe_fingerprint=None)
    comparison = compare_runs([str(tmp_path)])
    assert [(group.label, len(group.runs)) for group in comparison.groups] == [
        ("classic", 1),
        ("classic, recipe fingerprint 11111111", 1),
        ("classic, recipe fingerprint 22222222", 2),
    ]


def test_a_repeated_seed_counts_as_another_run(tmp_path: Path) -> None:
    make_sweep_run(tmp_path / "a", climb(0.5))
    make_sweep_run(tmp_path / "b", climb(0.5))
    (group,) = compare_runs([str(tmp_path)]).groups
    assert len(group.runs) == 2
    lines = invoke(tmp_path).stdout.splitlines()
    assert lines[-1].split()[:2] == ["2", "1"]  # runs and seeds


def test_options_that_do_not_change_the_result_do_not_split_groups(tmp_path: Path) -> None:
    make_sweep_run(tmp_path / "a", climb(0.5), seed=1)
    make_sweep_run(tmp_path / "b", climb(0.6), seed=2, jit="off", stall_timeout=5.0, fresh=True)
    (group,) = compare_runs([str(tmp_path)]).groups
    assert len(group.runs) == 2


def test_synthetic_images_of_different_seeds_do_not_split_groups(tmp_path: Path) -> None:
    for seed in (1, 2):
        images = training(f"{seed:064}")
        folder = tmp_path / f"seed-{seed}"
        make_sweep_run(folder, climb(0.5), dataset="synthetic", training=images, seed=seed)
    (group,) = compare_runs([str(tmp_path)]).groups
    assert len(group.runs) == 2


def test_no_finished_run_is_a_user_error(tmp_path: Path) -> None:
    stopped = make_sweep_run(tmp_path / "stopped", climb(0.4)[:3], outcome="stopped")
    with pytest.raises(UserError) as error:
        compare_runs([str(stopped), str(tmp_path / "nowhere"), "x" * 300])
    assert "stopped after 3 of 7 epochs" in str(error.value)
    assert "nowhere: this folder does not exist" in str(error.value)


def test_no_text_of_a_run_can_control_the_terminal(tmp_path: Path) -> None:
    escape, escaped = "\x1b[2J\n", r"\x1b[2J\n"
    for name in ("common", "varying", "outcome", f"surrogate{escape}"):
        make_sweep_run(tmp_path / name, climb(0.5))
        change(tmp_path / name, recipe=escape)
    change(tmp_path / "varying", dataset=f"other{escape}")
    change(tmp_path / "outcome", outcome=f"ended{escape}")
    change(tmp_path / f"surrogate{escape}", recipe="\ud800")
    result = invoke(tmp_path, "--png", tmp_path / "runs.png")
    assert result.exception is None
    assert "\x1b" not in result.output
    assert f"All runs: recipe {escaped}" in result.stdout
    assert f" other{escaped} " in result.stdout
    outcome, surrogate = result.stderr.splitlines()
    assert f"Invalid enum value 'ended{escaped}'" in outcome
    assert f"{tmp_path}/surrogate{escaped}/run.json is damaged: " in surrogate
    with pytest.raises(UserError) as error:
        compare_runs([str(tmp_path / "outcome")])
    assert f"'ended{escaped}'" in str(error.value)


def test_json_contains_the_same_results(sweep: Path) -> None:
    document = json.loads(invoke(sweep, JOB_JSON="1").stdout)
    assert len(document["runs"]) == 6
    run = document["runs"][0]
    assert (run["folder"], run["seed"], run["accuracy"]) == (f"{sweep}/seed-7", 7, 0.66)
    assert (run["recipe"], run["learning_rate"], run["epochs_done"]) == ("classic", 1e-4, 7)
    group = document["groups"][0]
    assert (group["runs"], group["seeds"]) == (3, [7, 10, 42])
    assert group["best"] == {"folder": f"{sweep}/seed-7", "seed": 7, "accuracy": 0.66}
    assert [one["reason"] for one in document["left_out"]] == ["stopped after 3 of 7 epochs"]
    assert document["runs"][-1]["accuracy"] is None


def test_the_picture_replaces_an_earlier_one_and_an_invalid_path_is_rejected(
    sweep: Path,
) -> None:
    (sweep / "runs.png").write_text("an earlier one")
    assert invoke(sweep, "--png", sweep / "runs.png").exception is None
    with Image.open(sweep / "runs.png") as picture:
        assert picture.format == "PNG"
    for name, message in (
        ("runs.jpg", "expected a name that ends in .png"),
        ("nowhere/runs.png", f"create {sweep}/nowhere, or use another folder"),
    ):
        result = invoke(sweep, "--png", sweep / name)
        assert message in str(result.exception)
        assert result.stdout == ""


def test_the_tables_contain_every_run_and_the_means(sweep: Path) -> None:
    result = invoke(sweep)
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0][:6] == ["All", "runs:", "recipe", "classic,", "dataset", "cifar10,"]
    assert "learning" not in lines[0]
    rows = {Path(line[0]).name: line[1:] for line in lines if line and line[0].startswith("/")}
    assert [*rows] == ["seed-7", "seed-10", "seed-42", "fast-1", "fast-2", "stopped"]
    cells = ["0.0001", "7", "67.00%", "65.00%", "66.00%", "1.0000", "70", "s", "done"]
    assert rows["seed-7"] == cells
    assert rows["stopped"][-3:] == ["stopped,", "3", "epochs"]
    assert lines[-2][:8] == ["0.0001", "3", "3", "62.67%", "2.52%", "63.67%", "2.52%", "66.00%"]
    assert lines[-1][:7] == ["0.001", "2", "2", "48.00%", "0.00%", "50.00%", "0.00%"]
    stderr = f"cifar10-job: excluded: {sweep}/stopped: stopped after 3 of 7 epochs\n"
    assert result.stderr == stderr
    assert "\x1b" not in result.output


def test_settings_without_a_value_are_printed_as_words(tmp_path: Path) -> None:
    make_sweep_run(tmp_path / "a", climb(0.5), dataset="synthetic")
    heading = invoke(tmp_path).stdout.splitlines()[0]
    assert "limit all, " in heading
    assert "data " not in heading
    make_sweep_run(tmp_path / "b", climb(0.5))
    change(tmp_path / "b", limit=512)
    result = invoke(tmp_path)
    assert "None" not in result.stdout
    rows = [line.split() for line in result.stdout.splitlines() if line.startswith(str(tmp_path))]
    assert [row[1:4] for row in rows] == [
        ["cifar10", "512", "abababab"],
        ["synthetic", "all", "42"],
    ]
    labels = [group.label for group in compare_runs([str(tmp_path)]).groups]
    assert labels == [
        "classic, dataset cifar10, limit 512, data abababab",
        "classic, dataset synthetic, limit all",
    ]


def test_a_single_run_has_no_standard_deviation(tmp_path: Path) -> None:
    run = make_sweep_run(tmp_path / "run", climb(0.5), seed=3)
    last = invoke(run).stdout.splitlines()[-1].split()
    assert last == ["1", "1", "48.00%", "50.00%", "50.00%", "3", "30", "s", str(run)]
    document = json.loads(invoke(run, "--json").stdout)
    assert document["groups"][0]["accuracy"] == {"mean": 0.5, "standard_deviation": None}


def near(picture: npt.NDArray[np.float32], colour: tuple[int, int, int]) -> npt.NDArray[np.bool_]:
    distance = np.abs(picture - np.array(colour, np.float32) / 255)
    return np.asarray(distance.max(axis=-1) < 0.02)


def group(label: str, accuracies: list[float]) -> Group:
    runs = [
        Run("a", 1, {}, (accuracy - 0.1, accuracy), accuracy, 1.0, 1.0, "done", None)
        for accuracy in accuracies
    ]
    return Group(label, tuple(runs))


def test_the_comparison_draws_each_group_in_its_own_colour(tmp_path: Path) -> None:
    blue, orange = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)
    counts = []
    for groups in ([group("a", [0.6, 0.62])], [group("a", [0.6, 0.62]), group("b", [0.4])]):
        save_comparison(tmp_path / "runs.png", groups)
        picture = mpl_image.imread(tmp_path / "runs.png")[..., :3]
        counts.append([int(near(picture, colour).sum()) for colour in (blue, orange)])
    assert counts[0][0] > 500
    assert counts[0][1] == 0
    assert min(counts[1]) > 500


def saved_figure(monkeypatch: pytest.MonkeyPatch, path: Path, groups: list[Group]) -> Figure:
    """Draw a comparison and keep its figure."""
    figures: list[Figure] = []

    def save(figure: Figure, target: Path, dpi: int) -> None:
        save_png(figure, target, dpi)
        figures.append(figure)

    monkeypatch.setattr(compare, "save_png", save)
    save_comparison(path, groups)
    (figure,) = figures
    # The positions depend on the resolution at which the figure was saved.
    figure.set_dpi(110)
    return figure


@pytest.mark.parametrize("accuracies", [[0.0], [1.0], [1.0, 0.999]])
def test_no_axis_extends_beyond_the_range_of_an_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accuracies: list[float]
) -> None:
    runs = tuple(
        Run("a", 1, {}, (value, value), value, 1.0, 1.0, "done", None) for value in accuracies
    )
    figure = saved_figure(monkeypatch, tmp_path / "runs.png", [Group("a", runs)])
    for low, high in (figure.axes[0].get_ylim(), figure.axes[1].get_xlim()):
        assert 0 <= low < high <= 100


def visible_texts(axis: Axes) -> list[Text]:
    """Return all texts of a plot, without the labels of ticks outside its limits."""
    (left, right), (low, high) = sorted(axis.get_xlim()), sorted(axis.get_ylim())
    return [
        *(axis.title, axis.xaxis.label, axis.yaxis.label, *axis.texts),
        *(label for label in axis.get_xticklabels() if left <= label.get_position()[0] <= right),
        *(label for label in axis.get_yticklabels() if low <= label.get_position()[1] <= high),
    ]


@pytest.mark.parametrize(("groups", "settings"), [(1, 1), (1, 14), (3, 14), (8, 1), (30, 14)])
def test_no_text_of_the_comparison_overlaps_another_or_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: int, settings: int
) -> None:
    label = r"classic, $\no$" + ", learning rate 0.0001" * settings
    accuracies = [[0.6 + 0.001 * n, 0.601 + 0.001 * n, 0.9] for n in range(groups)]
    named = [group(f"{label} {n}", values) for n, values in enumerate(accuracies)]
    figure = saved_figure(monkeypatch, tmp_path / "runs.png", named)
    left, right = figure.axes
    (legend,) = figure.legends
    assert left.get_legend() is right.get_legend() is None
    texts = [text.get_text() for text in legend.get_texts()]
    assert [" ".join(text.split()) for text in texts] == [
        f"{'' if groups == 1 else f'{n + 1}: '}{label} {n} (3 runs)" for n in range(groups)
    ]
    texts_drawn = [*legend.get_texts(), *visible_texts(left), *visible_texts(right)]
    boxes = [text.get_window_extent() for text in texts_drawn if text.get_text()]
    for box in boxes:
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1
        assert [other for other in boxes if box.overlaps(other)] == [box]
    frame = legend.get_window_extent()
    for axis in (left, right):
        occupied = axis.get_tightbbox()
        assert occupied is not None
        assert not frame.overlaps(occupied)
    assert left.get_window_extent().height > 300


def test_many_groups_and_a_single_epoch_are_drawn(tmp_path: Path) -> None:
    run = Run("a", 1, {}, (0.5,), 0.5, 1.0, 1.0, "done", None)
    groups = [Group(f"classic, batch size {number}", (run,)) for number in range(20)]
    save_comparison(tmp_path / "runs.png", groups)
    assert mpl_image.imread(tmp_path / "runs.png").shape[0] > 900
