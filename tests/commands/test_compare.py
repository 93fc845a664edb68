import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from job.cluster.scheduler import RunIdentity
from job.commands.cli import cli
from job.commands.compare import compare_runs
from job.config import TrainConfig, UserError
from job.run.folder import OutputDir
from job.run.manifest import RunManifest
from tests.run_folders import DATA, DETAILS, SWEEP_EPOCHS, change, climb, make_sweep_run


def data_of(fingerprint: str) -> dict[str, Any]:
    return DATA | {"fingerprint": fingerprint}


def invoke(*arguments: str | Path, **env: str) -> Any:
    return CliRunner().invoke(cli, ["compare", *map(str, arguments)], env=env)


def test_runs_that_differ_in_their_seed_alone_are_grouped(sweep: Path) -> None:
    comparison = compare_runs([str(sweep)])
    assert comparison.varying == ("learning_rate",)
    slow, fast = comparison.groups
    assert [run.seed for run in slow.runs] == [7, 10, 42]
    assert slow.accuracy.mean == pytest.approx((0.61 + 0.66 + 0.64) / 3)
    assert slow.accuracy.deviation == pytest.approx(statistics.stdev([0.61, 0.66, 0.64]))
    assert slow.last_mean.mean == pytest.approx(slow.accuracy.mean + 0.01 - 0.02)
    assert slow.elapsed_seconds == pytest.approx(10 * (7 + 10 + 42) / 3)
    assert (slow.best.seed, slow.best.folder) == (7, f"{sweep}/seed-7")
    assert (fast.label, fast.best.seed) == ("classic, learning rate 0.001", 1)
    assert comparison.left_out == {f"{sweep}/stopped": "stopped after 3 of 7 epochs"}


@pytest.mark.parametrize(
    "other",
    [
        {"learning_rate": 1e-3},
        {"global_batch_size": 128},
        {"details": {"precision": "bfloat16"}},
        {"details": {"data": data_of("other images")}},
    ],
)
def test_different_settings_are_never_averaged(tmp_path: Path, other: dict[str, Any]) -> None:
    make_sweep_run(tmp_path / "a", climb(0.5))
    make_sweep_run(tmp_path / "b", climb(0.6), **other)
    comparison = compare_runs([str(tmp_path)])
    assert [len(group.runs) for group in comparison.groups] == [1, 1]
    assert [group.accuracy.deviation for group in comparison.groups] == [None, None]
    assert len({group.label for group in comparison.groups}) == 2


def test_two_networks_under_one_name_are_never_averaged(tmp_path: Path) -> None:
    for name, digit in (("a", "1"), ("b", "2"), ("c", "2")):
        details = {"recipe_fingerprint": 64 * digit}
        seed = 42 + ord(name)
        make_sweep_run(tmp_path / name, climb(0.5), details=details, seed=seed)
    make_sweep_run(tmp_path / "earlier version", climb(0.5))
    change(tmp_path / "earlier version", recipe_fingerprint=None)
    comparison = compare_runs([str(tmp_path)])
    assert [(group.label, len(group.runs)) for group in comparison.groups] == [
        ("classic", 1),
        ("classic, recipe fingerprint 11111111", 1),
        ("classic, recipe fingerprint 22222222", 2),
    ]


def test_a_fingerprint_that_follows_from_other_settings_is_not_told(tmp_path: Path) -> None:
    for rate, digit in ((1e-3, "1"), (1e-4, "2")):
        details = {"recipe_fingerprint": 64 * digit}
        make_sweep_run(tmp_path / digit, climb(0.5), details=details, learning_rate=rate)
    assert compare_runs([str(tmp_path)]).varying == ("learning_rate",)
    result = invoke(tmp_path)
    assert "recipe fingerprint" not in result.stdout
    assert "11111111" not in result.stdout


def test_a_copied_folder_is_no_second_run(tmp_path: Path) -> None:
    make_sweep_run(tmp_path / "a", climb(0.5))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    # As another attempt leaves it that has drawn the report alone.
    manifest = RunManifest(OutputDir(tmp_path / "b"), RunIdentity(None))
    manifest.begin(TrainConfig(epochs=SWEEP_EPOCHS))
    manifest.start_training(TrainConfig(tmp_path / "a", epochs=SWEEP_EPOCHS), DETAILS, 7, [])
    manifest.finish("done")
    change(tmp_path / "b", elapsed_seconds=420.0)
    comparison = compare_runs([str(tmp_path)])
    (group,) = comparison.groups
    assert [run.folder for run in group.runs] == [f"{tmp_path}/a"]
    assert comparison.left_out == {f"{tmp_path}/b": f"a copy of {tmp_path}/a"}
    assert "repeated" not in invoke(tmp_path).stdout


def test_a_repeated_seed_is_another_run_and_told(tmp_path: Path) -> None:
    make_sweep_run(tmp_path / "a", climb(0.5))
    time.sleep(0.002)  # attempts begin in different milliseconds
    make_sweep_run(tmp_path / "b", climb(0.5))
    (group,) = compare_runs([str(tmp_path)]).groups
    assert (len(group.runs), group.repeats) == (2, 1)
    lines = invoke(tmp_path).stdout.splitlines()
    assert lines[-3].split()[:2] == ["2", "1"]
    assert "More runs than seeds: a seed was repeated." in lines[-1]


def test_options_that_do_not_change_the_result_do_not_part_runs(tmp_path: Path) -> None:
    make_sweep_run(tmp_path / "a", climb(0.5), seed=1)
    make_sweep_run(
        tmp_path / "b", climb(0.6), seed=2, jit="off", stall_timeout_seconds=5.0, fresh=True
    )
    (group,) = compare_runs([str(tmp_path)]).groups
    assert len(group.runs) == 2


def test_synthetic_images_differ_by_the_seed_alone(tmp_path: Path) -> None:
    for seed in (1, 2):
        details = {"data": data_of(f"images of seed {seed}")}
        folder = tmp_path / f"seed-{seed}"
        make_sweep_run(folder, climb(0.5), dataset="synthetic", details=details, seed=seed)
    (group,) = compare_runs([str(tmp_path)]).groups
    assert len(group.runs) == 2


def test_nothing_to_compare_is_exit_code_2(tmp_path: Path) -> None:
    stopped = make_sweep_run(tmp_path / "stopped", climb(0.4)[:3], outcome="stopped")
    with pytest.raises(UserError) as error:
        compare_runs([str(stopped), str(tmp_path / "nowhere"), "x" * 300])
    assert "stopped after 3 of 7 epochs" in str(error.value)
    assert "nowhere: there is no such folder" in str(error.value)


def test_no_text_of_a_run_can_command_a_terminal(tmp_path: Path) -> None:
    escape = "\x1b[2J\n\ud800"
    for name in ("common", "varying", "outcome"):
        make_sweep_run(tmp_path / name, climb(0.5))
        change(tmp_path / name, recipe=escape)
    change(tmp_path / "varying", dataset=f"other{escape}")
    change(tmp_path / "outcome", outcome=f"ended{escape}")
    result = invoke(tmp_path, "--png", tmp_path / "runs.png")
    assert result.exit_code == 0
    assert "\x1b" not in result.output
    escaped = r"\x1b[2J\n\ud800"
    assert f"Every run: recipe {escaped}" in result.stdout
    assert f" other{escaped} " in result.stdout
    assert f"outcome: received 'ended{escaped}'" in result.stderr
    with pytest.raises(UserError) as error:
        compare_runs([str(tmp_path / "outcome")])
    assert f"'ended{escaped}'" in str(error.value)


def test_json_tells_the_same(sweep: Path) -> None:
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


def test_the_picture_is_drawn_and_a_bad_place_for_it_refused(sweep: Path) -> None:
    assert invoke(sweep, "--png", sweep / "runs.png").exit_code == 0
    with Image.open(sweep / "runs.png") as picture:
        assert picture.format == "PNG"
    assert invoke(sweep, "--png", sweep / "runs.png").exit_code == 0  # again, over its own
    for name in ("runs.jpg", "nowhere/runs.png"):
        result = invoke(sweep, "--png", sweep / name)
        assert isinstance(result.exception, UserError), name
        assert result.stdout == ""


def test_no_file_but_an_earlier_such_picture_is_replaced(sweep: Path) -> None:
    (sweep / "mine.png").write_text("mine")
    result = invoke(sweep, "--png", sweep / "mine.png")
    assert result.exit_code == 2
    assert "expected a new name or an earlier such picture" in " ".join(result.output.split())
    assert (sweep / "mine.png").read_text() == "mine"
