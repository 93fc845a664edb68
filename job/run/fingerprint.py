"""Fingerprints: whether two attempts belong to one run, and whether they compute the same bits."""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import json
import os
from typing import TYPE_CHECKING, Any

import msgspec

from job.cluster import Environment
from job.config import TrainConfig, UserError, option_name, run_options
from job.run.manifest import git_commit, versions

if TYPE_CHECKING:  # this module is used before TensorFlow is imported
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import keras

    from job.cluster.devices import Devices
    from job.data import Dataset
    from job.recipes import Recipe, Weights

ONEDNN = "TF_ENABLE_ONEDNN_OPTS"
"""The environment variable that makes TensorFlow use oneDNN on CPUs: "1" or "0"."""

# Environment variables that change the bits that TensorFlow computes.
_VARIABLES = (
    "NVIDIA_TF32_OVERRIDE",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
    "TF_CUDNN_DETERMINISTIC",
    "TF_CUDNN_USE_AUTOTUNE",
    "TF_DETERMINISTIC_OPS",
    ONEDNN,
    "TF_XLA_FLAGS",
    "XLA_FLAGS",
)
_CONTENTS = {
    "data": "the images and labels are not those that it was trained on",
    "network": "the recipe's network or loss has changed",
    "label_smoothing": "the recipe's label smoothing has changed",
    "loss_reduction": "the recipe's loss reduction has changed",
    "fixed_weights": "the weights that the recipe computes from the training images have changed",
    "early_variables": "the recipe's early variables have changed, or the number of their epochs, "
    "which depends on --epochs",
    "steps_per_execution": "the recipe's steps per execution have changed",
}
_OPTIMIZER = "optimizer."

Json = None | bool | int | float | str | list[Any] | dict[str, Any]


class Fingerprint(msgspec.Struct, frozen=True):
    """Everything that changes the result of a run.

    Attributes:
        run: Options, data and network. If one of them changes, it is another run.
        environment: How a run is computed, and on which devices. After a change the run resumes,
            but is no longer bit-identical.
        recipe: SHA-256 of what the recipe computes, which its name and the options do not show.
            A change does not prevent a run from resuming, because it can also result from an edit
            that makes no difference.
    """

    run: dict[str, Json]
    environment: Environment
    recipe: str = ""

    def changes_since(self, earlier: Environment) -> list[str]:
        """What is computed differently than in an earlier environment, one phrase each."""
        current, before = (
            {name.replace("_", " "): value for name, value in msgspec.structs.asdict(one).items()}
            for one in (self.environment, earlier)
        )
        return [
            f"{name}: {_shown(old)} -> {_shown(new)}"
            for name, new, old in _differing(current, before)
        ]


def take_fingerprint(
    config: TrainConfig,
    devices: Devices,
    dataset: Dataset,
    model: keras.Model,
    recipe: Recipe,
    fixed_weights: Weights,
) -> Fingerprint:
    """Take the fingerprint of a run that is about to train.

    Args:
        config: Its configuration.
        devices: The devices that it trains on.
        dataset: The data set that it trains on.
        model: The recipe's network, compiled.
        recipe: The recipe.
        fixed_weights: The weights that the recipe has computed from the training images.
    """
    network = {
        "layers": [type(layer).__name__ for layer in model.layers],
        "variables": [[list(v.shape), str(v.dtype)] for v in model.variables],
        "loss": model.loss,
    }
    # The same as after reading it from JSON. Keys that only one version of Keras has are not
    # compared.
    optimizer = json.loads(json.dumps(model.optimizer.get_config(), default=str))
    optimizer["name"] = type(model.optimizer).__name__
    return Fingerprint(
        run={
            **run_options(config),
            "data": dataset.fingerprint,
            "network": hashlib.sha256(json.dumps(network).encode()).hexdigest(),
            "label_smoothing": recipe.label_smoothing,
            "loss_reduction": recipe.loss_reduction,
            "fixed_weights": _digest(fixed_weights),
            "early_variables": [
                f"{name} {epochs}" for name, epochs in recipe.early_epochs(config.epochs).items()
            ],
            "steps_per_execution": recipe.steps_per_execution,
            **{f"{_OPTIMIZER}{key}": value for key, value in optimizer.items()},
        },
        environment=Environment(
            device_kind=devices.kind,
            device_models=sorted({str(device.model) for device in devices.descriptions}),
            workers=devices.workers.count,
            replicas=devices.replicas,
            threads=devices.threads,
            precision=devices.precision,
            jit=devices.jit,
            deterministic=devices.deterministic,
            versions=versions(),
            git_commit=git_commit(),
            variables=computing_variables(),
        ),
        recipe=_recipe_digest(config.recipe, model),
    )


def _digest(weights: Weights) -> str:
    """SHA-256 of names, shapes and values."""
    digest = hashlib.sha256()
    for name, values in sorted(weights.items()):
        digest.update(f"{name} {values.shape} {values.dtype}".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def computing_variables() -> dict[str, str]:
    """The environment variables that change TensorFlow's bits, and their values."""
    return {name: os.environ[name] for name in _VARIABLES if name in os.environ}


def _recipe_digest(name: str, model: keras.Model) -> str:
    """SHA-256 of network, optimizer and loss as Keras describes them, and of the recipe's code.

    The code covers augmentation and views. Seeds and names of layers do not count: Keras numbers
    layers without a name.
    """
    network, optimizer = model.get_config(), model.optimizer
    layers = [layer["config"]["name"] for layer in network["layers"]]
    names = {layer: f"layer {number}" for number, layer in enumerate(layers)}
    names |= {model.name: "network", optimizer.name: "optimizer"}
    content = {
        "network": _without_seeds(network, names),
        "optimizer": _without_seeds(optimizer.get_config(), names),
        "optimizer_class": type(optimizer).__name__,
        "loss": model.loss,
        "code": _code(inspect.getsource(importlib.import_module(f"job.recipes.{name}"))),
    }
    text = json.dumps(content, sort_keys=True, default=lambda other: type(other).__name__)
    return hashlib.sha256(text.encode()).hexdigest()


def _without_seeds(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _without_seeds(item, names) for key, item in value.items() if key != "seed"}
    if isinstance(value, list | tuple):
        return [_without_seeds(item, names) for item in value]
    return names.get(value, value) if isinstance(value, str) else value


def _code(source: str) -> str:
    """Python code without the parts that do nothing: comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        match node:
            case ast.Module() | ast.ClassDef() | ast.FunctionDef() if ast.get_docstring(node):
                del node.body[0]
    return ast.unparse(tree)


def _differing(
    received: Mapping[str, Json], expected: Mapping[str, Json], name: str = ""
) -> Iterator[tuple[str, Json, Json]]:
    """Name and both values of each difference, down to single settings of nested values."""
    for key in {**expected, **received}:
        new, old = received.get(key), expected.get(key)
        # Keras stores the settings of a schedule under this key.
        path = name if key == "config" else f"{name} {key}".lstrip()
        if isinstance(new, dict) and isinstance(old, dict):
            yield from _differing(new, old, path)
        elif new != old:
            yield path, new, old


def _shown(value: Json) -> Json:
    if isinstance(value, dict):
        return str(value.get("class_name", "other settings"))
    if isinstance(value, list):
        return ", ".join(str(_shown(one)) for one in value)
    return "none" if value is None else value


def require_same_run(
    saved: Mapping[str, Json], current: Mapping[str, Json], output_dir: Path
) -> None:
    """Refuse to resume from the files of another run.

    Args:
        saved: Values of the folder's run, as in `Fingerprint.run`.
        current: Values of this run; names that only one of them has are not compared.
        output_dir: The folder.

    Raises:
        UserError: If they differ. It names each difference.
    """
    differences = []
    expected_values = {name: saved[name] for name in current if name in saved}
    received_values = {name: current[name] for name in expected_values}
    for name, received, expected in _differing(received_values, expected_values):
        option = option_name(name)
        if name.startswith(_OPTIMIZER):
            key = name.removeprefix(_OPTIMIZER)
            option = f"the optimizer's {key} (--epochs can set its schedule)"
        problem = f"{option} received {_shown(received)}, expected {_shown(expected)}"
        differences.append(_CONTENTS.get(name, problem))
    if differences:
        raise UserError(
            f"{output_dir} contains another run: {'; '.join(differences)}; resume that run with "
            f"its own settings, start over with --fresh, or use another --output-dir"
        )
