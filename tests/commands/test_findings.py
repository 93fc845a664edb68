from job.commands.dry_run import Findings
from job.config import TrainConfig, UserError, describe_config


def found_with(config: TrainConfig, *problems: str) -> list[str]:
    found = Findings()
    found.add("config", describe_config(config))
    for problem in problems:
        with found.collecting():
            raise UserError(problem)
    found.add("data", {"name": "synthetic"}, "drawn from seed 42", "512 images")
    return found.as_text().splitlines()


def test_problems_come_first_and_options_last() -> None:
    lines = found_with(TrainConfig(epochs=3, fresh=True), "too large", "too small")
    assert lines[:-1] == [
        "Problem      too large",
        "Problem      too small",
        "Data         drawn from seed 42",
        "Data         512 images",
        "Config       --epochs            3",
        "Config       --fresh             on",
    ]
    assert lines[-1].startswith("Defaults     --dataset cifar10, --data-dir data, ")
    assert "--limit not set" in lines[-1]


def test_without_a_problem_the_outcome_comes_first() -> None:
    first = found_with(TrainConfig())[0]
    assert first == "Dry run      nothing stands in the way; nothing was written"
