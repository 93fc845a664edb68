import inspect
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import msgspec
import numpy as np
import pytest

from job.config import TrainConfig, UserError, run_options
from job.data import Dataset
from job.recipes import classic
from job.run.fingerprint import Fingerprint, require_same_run, take_fingerprint
from tests.conftest import MakeDevices

CONFIG = TrainConfig(dataset="synthetic")


@pytest.fixture
def take(make_devices: MakeDevices, small_dataset: Dataset) -> Any:
    def take(
        dataset: Dataset = small_dataset,
        model: keras.Model | None = None,
        **changes: Any,
    ) -> Fingerprint:
        if model is None:
            model = classic.RECIPE.build_model(CONFIG.seed, 10)
            classic.RECIPE.compile(model, CONFIG.learning_rate, 100)
        settings = {"recipe": classic.RECIPE, "fixed_weights": {}, **changes}
        return take_fingerprint(CONFIG, make_devices(1), dataset, model, **settings)

    return take


def test_the_same_command_has_the_same_fingerprint(take: Any) -> None:
    assert take() == take()
    require_same_run(take().run, take().run, Path("output"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 43}, "--seed received 43, expected 42;"),
        ({"batch_size": 128}, "--batch-size received 128, expected 256;"),
        ({"learning_rate": 0.1}, "--learning-rate received 0.1, expected 0.0001;"),
        ({"recipe": "modern"}, "--recipe received modern, expected classic;"),
        ({"dataset": "cifar10"}, "--dataset received cifar10, expected synthetic"),
        ({"limit": 9}, "--limit received 9, expected none"),
        (
            {"seed": 43, "batch_size": 128},
            "--seed received 43, expected 42; --batch-size received 128, expected 256;",
        ),
    ],
)
def test_the_refusal_of_another_run_names_the_options_that_differ(
    change: dict[str, Any], message: str
) -> None:
    other = replace(CONFIG, **change)
    with pytest.raises(UserError, match="out contains another run: ") as error:
        require_same_run(run_options(CONFIG), run_options(other), Path("out"))
    assert message in str(error.value)


def test_other_images_and_another_network_are_refused(take: Any, small_dataset: Dataset) -> None:
    other_data = replace(small_dataset, train_images=small_dataset.train_images[::-1].copy())
    with pytest.raises(
        UserError, match="the images and labels are not those that it was trained on"
    ):
        require_same_run(take().run, take(dataset=other_data).run, Path("out"))
    other_network = {**take().run, "network": "0" * 64}
    with pytest.raises(UserError, match="the recipe's network or loss has changed"):
        require_same_run(take().run, other_network, Path("out"))


KERNEL = np.ones((2, 2), np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"fixed_weights": {"conv1/kernel": KERNEL * 2}},
            "the weights that the recipe computes from the training images have changed",
        ),
        (
            {"fixed_weights": {}},
            "the weights that the recipe computes from the training images have changed",
        ),
        (
            {"recipe": replace(classic.RECIPE, early_variables={"conv1/bias": 0.1})},
            "the recipe's early variables have changed, or the number of their epochs",
        ),
        (
            {"recipe": replace(classic.RECIPE, steps_per_execution=5)},
            "the recipe's steps per execution have changed",
        ),
        (
            {"recipe": replace(classic.RECIPE, label_smoothing=0.1)},
            "the recipe's label smoothing has changed",
        ),
        (
            {"recipe": replace(classic.RECIPE, loss_reduction="sum")},
            "the recipe's loss reduction has changed",
        ),
    ],
)
def test_the_settings_of_a_recipe_outside_its_network_identify_the_run(
    take: Any, changes: dict[str, Any], message: str
) -> None:
    settings = {"fixed_weights": {"conv1/kernel": KERNEL}}
    saved = take(**settings).run
    require_same_run(saved, take(**settings).run, Path("out"))
    other = take(**{**settings, **changes}).run
    with pytest.raises(UserError, match=re.escape(message)):
        require_same_run(saved, other, Path("out"))
    # Earlier versions did not record these.
    names = ["label_smoothing", "loss_reduction", "fixed_weights", "early_variables"]
    names.append("steps_per_execution")
    require_same_run({k: v for k, v in saved.items() if k not in names}, other, Path("out"))


def test_the_refusal_of_another_optimizer_names_the_difference(take: Any) -> None:
    current = take().run
    other = {**current, "optimizer.beta_1": 0.5}
    with pytest.raises(UserError, match=r"the optimizer's beta_1 .* received 0.5, expected 0.9"):
        require_same_run(current, other, Path("out"))
    # A key that another version of Keras adds is not a difference.
    require_same_run(current, {**current, "optimizer.new": 1}, Path("out"))


def compiled(
    seed: int = 1, layer: Any = None, rate: float = 1e-3, optimizer: Any = keras.optimizers.Adam
) -> keras.Model:
    layers = keras.layers
    middle = layer or layers.Dense(4, activation="relu")
    drop = layers.Dropout(0.5, seed=seed)
    model = keras.Sequential([keras.Input((8,)), middle, drop, layers.Dense(2, "softmax")])
    model.compile(optimizer=optimizer(learning_rate=rate), loss="categorical_crossentropy")
    return model


def test_the_recipes_fingerprint_does_not_depend_on_seeds_or_keras_numbering(take: Any) -> None:
    assert take(model=compiled()).recipe == take(model=compiled(seed=2)).recipe


def test_another_network_or_optimizer_is_another_recipe(take: Any) -> None:
    """All models have the same layers and variables."""
    dense = keras.layers.Dense
    models = [
        compiled(),
        compiled(layer=dense(4, activation="tanh")),
        compiled(layer=dense(4, activation="relu", kernel_initializer="he_normal")),
        compiled(rate=1e-2),
        compiled(optimizer=keras.optimizers.SGD),
    ]
    assert len({take(model=model).recipe for model in models}) == len(models)


def test_the_recipes_code_counts_but_not_its_comments_and_layout(
    take: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, digest = inspect.getsource(classic), take(model=compiled()).recipe

    def digest_of(changed: str) -> str:
        assert changed != source
        monkeypatch.setattr(inspect, "getsource", lambda module: changed)
        recipe: str = take(model=compiled()).recipe
        return recipe

    assert digest_of("# By hand.\n" + source.replace('"""Apply', '"""Do apply')) == digest
    assert digest_of(source.replace("rotation_range=20", "rotation_range=30")) != digest


def test_a_schedule_for_other_epochs_is_refused_with_the_settings_that_differ(take: Any) -> None:
    def run_of(steps: int) -> Any:
        schedule: Any = keras.optimizers.schedules.CosineDecay(0.1, steps)
        return take(model=compiled(rate=schedule)).run

    with pytest.raises(UserError) as error:
        require_same_run(run_of(100), run_of(300), Path("out"))
    assert str(error.value).startswith(
        "out contains another run: the optimizer's learning_rate decay_steps (--epochs can set its "
        "schedule) received 300, expected 100; resume"
    )
    constant = {**run_of(100), "optimizer.learning_rate": 0.1}
    with pytest.raises(UserError, match=r"received CosineDecay, expected 0\.1; resume"):
        require_same_run(constant, run_of(100), Path("out"))


def test_other_epochs_are_the_same_run() -> None:
    assert run_options(CONFIG) == run_options(replace(CONFIG, epochs=99))


def test_changes_of_the_environment_are_listed(take: Any) -> None:
    current = take()
    assert current.changes_since(current.environment) == []
    change = msgspec.structs.replace
    variables = {**current.environment.variables, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    other_variables = change(current.environment, variables=variables)
    assert current.changes_since(other_variables) == ["variables ONEDNN_MAX_CPU_ISA: AVX2 -> none"]
    earlier = change(current.environment, replicas=4, threads=16)
    assert current.changes_since(earlier) == ["replicas: 4 -> 1", "threads: 16 -> 2"]
