"""Output folders like those of real trainings, written by the program but without a training."""

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from job.cluster import Device
from job.cluster.scheduler import RunIdentity
from job.config import TrainConfig
from job.run.checkpoint import History
from job.run.folder import OutputDir
from job.run.manifest import RunManifest
from job.run.predictions import Predictions, confusion_matrix, most_confident_mistakes
from job.run.record import DataRecord, EpochRecord, Outcome, TrainingRecord, encode
from job.training.evaluate import Evaluation

EXAMPLES = 200
DATA = DataRecord("cifar10", "ab" * 32, "cd" * 32, train_examples=2560)
TRAINING = TrainingRecord(
    devices=[Device("CPU:0", "a processor", 23.5)],
    replicas=1,
    threads=2,
    precision="float32",
    xla=False,
    deterministic=True,
    data=DATA,
    recipe_fingerprint="ef" * 32,
)


def lines(epochs: int) -> list[EpochRecord]:
    return [
        EpochRecord(
            epoch=n,
            step=10 * n,
            loss=2 / n,
            accuracy=0.5 - 0.2 / n,
            val_loss=1.9 / n,
            val_accuracy=0.6 - 0.3 / n,
            learning_rate=1e-3,
            seconds=5.0,
            images_per_second=500.0 + n,
            elapsed_seconds=6.0 * n,
        )
        for n in range(1, epochs + 1)
    ]


def make_run(
    folder: Path,
    config: TrainConfig | None = None,
    ends: tuple[tuple[Outcome, str | None], ...] = (("done", None),),
    epochs: int = 3,
) -> OutputDir:
    """Write the files of a run with several attempts, each 15 steps longer than the previous."""
    folder.mkdir(exist_ok=True)
    output = OutputDir(folder)
    config = config or TrainConfig(output_dir=Path("out"), epochs=3)
    for number, (outcome, reason) in enumerate(ends):
        manifest = RunManifest(output, RunIdentity(None))
        manifest.begin(config)
        manifest.start_training(config, TRAINING, 15 * number, [])
        manifest.progress(15 * number + 15, None, 9.0 * (number + 1))
        manifest.finish(outcome, reason)
    History(lines(epochs)).write_metrics(output)
    return output


def add_evaluation(output: OutputDir, names: tuple[str, ...] = ("cat", "dog", "eel")) -> None:
    """Add the evaluation of a model that is right about half of the time."""
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
    record = evaluation.record(names, "cifar10_model.h5", "0" * 64)
    output.write_bytes("evaluation.json", encode(record, indent=True))


def make_whole_run(folder: Path) -> OutputDir:
    """Write a finished run with all its files, interrupted twice before."""
    output = make_run(
        folder, ends=(("stopped", "SIGTERM"), ("failed", "a broken GPU"), ("done", None))
    )
    add_evaluation(output)
    return output


SWEEP_EPOCHS = 7


def make_sweep_run(
    folder: Path,
    accuracies: list[float],
    saved: float = 0.5,
    outcome: Outcome = "done",
    dataset: str = "cifar10",
    training: TrainingRecord = TRAINING,
    **options: Any,
) -> Path:
    """Write the files of a run of a sweep, with these validation accuracies, one per epoch."""
    folder.mkdir(parents=True)
    output = OutputDir(folder)
    config = TrainConfig(folder, dataset=dataset, epochs=SWEEP_EPOCHS, **options)
    epochs = [
        msgspec.structs.replace(line, val_accuracy=accuracy)
        for line, accuracy in zip(lines(len(accuracies)), accuracies, strict=True)
    ]
    history = History(epochs)
    manifest = RunManifest(output, RunIdentity(None))
    manifest.begin(config)
    manifest.start_training(config, training, 0, [])
    manifest.progress(len(accuracies), history.best, 10.0 * config.seed)
    manifest.finish(outcome)
    history.write_metrics(output)
    if outcome == "done":
        right = round(100 * saved)
        confusion = np.array([[right, 100 - right], [0, 0]])
        evaluation = Evaluation(1.0, confusion).record(("cat", "dog"), "cifar10_model.h5", "0" * 64)
        output.write_bytes("evaluation.json", encode(evaluation))
    return folder


def climb(last: float) -> list[float]:
    """Return accuracies that rise by one percentage point per epoch to the last one."""
    return [last - 0.01 * (SWEEP_EPOCHS - 1 - number) for number in range(SWEEP_EPOCHS)]


def change(folder: Path, **entries: Any) -> None:
    """Change entries of a run.json; an option is changed in its ``config``."""
    document = json.loads((folder / "run.json").read_text())
    for name, value in entries.items():
        (document["config"] if name in document["config"] else document)[name] = value
    (folder / "run.json").write_text(json.dumps(document))
