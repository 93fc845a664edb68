import json
from pathlib import Path

from job.commands.compare import compare_runs
from tests.run_folders import change, climb, make_sweep_run
from tests.test_compare import invoke


def test_the_tables_have_every_run_and_the_means(sweep: Path) -> None:
    result = invoke(sweep)
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0][:6] == ["Every", "run:", "recipe", "classic,", "dataset", "cifar10,"]
    assert "learning" not in lines[0]
    rows = {Path(line[0]).name: line[1:] for line in lines if line and line[0].startswith("/")}
    assert [*rows] == ["seed-7", "seed-10", "seed-42", "fast-1", "fast-2", "stopped"]
    cells = ["0.0001", "7", "67.00%", "65.00%", "66.00%", "1.0000", "70", "s", "done"]
    assert rows["seed-7"] == cells
    assert rows["stopped"][-3:] == ["stopped,", "3", "epochs"]
    assert lines[-2][:8] == ["0.0001", "3", "3", "62.67%", "2.52%", "63.67%", "2.52%", "66.00%"]
    assert lines[-1][:7] == ["0.001", "2", "2", "48.00%", "0.00%", "50.00%", "0.00%"]
    stderr = f"cifar10-job: left out: {sweep}/stopped: stopped after 3 of 7 epochs\n"
    assert result.stderr == stderr
    assert "\x1b" not in result.output


def test_settings_that_are_none_are_told_in_words(tmp_path: Path) -> None:
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


def test_one_run_has_no_deviation(tmp_path: Path) -> None:
    run = make_sweep_run(tmp_path / "run", climb(0.5), seed=3)
    last = invoke(run).stdout.splitlines()[-1].split()
    assert last == ["1", "1", "48.00%", "50.00%", "50.00%", "3", "30", "s", str(run)]
    document = json.loads(invoke(run, "--json").stdout)
    assert document["groups"][0]["accuracy"] == {"mean": 0.5, "standard_deviation": None}
