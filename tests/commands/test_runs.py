import json
from pathlib import Path

import pytest

from job.commands.compare import compare_runs, read_run, run_folders
from job.config import UserError
from tests.run_folders import change, climb, make_sweep_run


def test_folders_are_found_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_sweep_run(tmp_path / name, climb(0.5))
    folders = [str(tmp_path / "a"), str(tmp_path), str(tmp_path / "b" / "..")]
    assert sorted(Path(folder).name for folder in run_folders(folders)) == ["a", "b"]
    # As where the tasks of an array have followed a single job.
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


def test_an_unfinished_run_tells_how_far_it_is(tmp_path: Path) -> None:
    folder = make_sweep_run(tmp_path / "run", climb(0.4)[:3], outcome="stopped")
    run = read_run(str(folder))
    assert run.problem == "stopped after 3 of 7 epochs"
    assert (run.accuracy, run.loss, len(run.curve)) == (None, None, 3)


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no run\.json, nor does a folder in it"):
        read_run(str(tmp_path))
    with pytest.raises(UserError, match="there is no such folder"):
        read_run(str(tmp_path / "nowhere"))


def shorten(folder: Path) -> None:
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:1]))


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("run.json", "{", "run.json: received '{', expected a JSON object"),
        ("run.json", '{"config": {"seed": 1}, "outcome": "done"}', "versions: received nothing"),
        ("metrics.jsonl", "nonsense\n", "metrics.jsonl, line 1: received 'nonsense'"),
        ("metrics.jsonl", None, "its metrics.jsonl has 0 lines, expected 7"),
        ("evaluation.json", None, "it holds no evaluation.json"),
        ("evaluation.json", '{"loss": 1, "accuracy": []}', "examples: received nothing"),
        ("run.json", None, "it holds no run.json"),
    ],
)
def test_damaged_runs_are_named_and_left_out(
    tmp_path: Path, name: str, content: str | None, problem: str
) -> None:
    good = make_sweep_run(tmp_path / "good", climb(0.5))
    bad = make_sweep_run(tmp_path / "bad", climb(0.5))
    (bad / name).unlink()
    if content is not None:
        (bad / name).write_text(content)
    comparison = compare_runs([str(good), str(bad)])
    assert [run.folder for group in comparison.groups for run in group.runs] == [str(good)]
    assert problem in comparison.left_out[str(bad)]


def test_a_run_whose_metrics_lack_an_epoch_is_left_out(tmp_path: Path) -> None:
    folder = make_sweep_run(tmp_path / "run", climb(0.5))
    shorten(folder)
    assert read_run(str(folder)).problem == "its metrics.jsonl has 1 lines, expected 7"


def test_a_run_json_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    folder = make_sweep_run(tmp_path / "run", climb(0.5))
    document = json.loads((folder / "run.json").read_text())
    for name in ("recipe_fingerprint", "threads"):
        document.pop(name, None)
    (folder / "run.json").write_text(json.dumps(document))
    assert read_run(str(folder)).problem is None


def test_a_setting_that_is_no_single_value_is_damage(tmp_path: Path) -> None:
    folder = make_sweep_run(tmp_path / "run", climb(0.5))
    change(folder, limit=[1, 2])
    with pytest.raises(UserError, match=r"config\.limit: received \[1, 2\], expected a whole"):
        read_run(str(folder))
