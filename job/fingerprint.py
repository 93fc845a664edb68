"""What makes a run this run, and what merely makes its bits."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from job.config import TrainConfig, UserError
from job.manifest import describe_config, git_commit, versions

if TYPE_CHECKING:  # this module is used before TensorFlow is imported
    from pathlib import Path

    import keras

    from job.dataset import Dataset
    from job.devices import Devices

_OPTIONS = ("recipe", "dataset", "limit", "seed", "batch_size", "learning_rate")
_CONTENTS = {
    "data": "the images and labels are not those that it was trained with",
    "network": "the recipe's network, optimizer or loss has changed (a schedule does by --epochs)",
}


@dataclass(frozen=True)
class Fingerprint:
    """Everything that changes the result of a run.

    Attributes:
        run: Options, data and network: another value of one of them is another run.
        environment: How and on what it is computed: a difference costs the identical bits alone.
    """

    run: dict[str, Any]
    environment: dict[str, Any]

    def changes_since(self, environment: dict[str, Any]) -> list[str]:
        """What is computed differently than in an earlier environment, a phrase each."""
        return [
            f"{name.replace('_', ' ')}: {environment.get(name)} -> {value}"
            for name, value in self.environment.items()
            if environment.get(name) != value
        ]


def run_options(config: TrainConfig) -> dict[str, Any]:
    """The options that all attempts of a run have in common, by name."""
    described = describe_config(config)
    return {name: described[name] for name in _OPTIONS}


def take_fingerprint(
    config: TrainConfig, devices: Devices, dataset: Dataset, model: keras.Model
) -> Fingerprint:
    """Take the fingerprint of a run that is about to train.

    Args:
        config: Its configuration.
        devices: What it trains on.
        dataset: What it trains with.
        model: The recipe's network, compiled.
    """
    network = {
        "layers": [type(layer).__name__ for layer in model.layers],
        "variables": [[list(v.shape), str(v.dtype)] for v in model.variables],
        "optimizer": {**model.optimizer.get_config(), "name": type(model.optimizer).__name__},
        "loss": model.loss,
    }
    text = json.dumps(network, sort_keys=True, default=str)
    return Fingerprint(
        run={
            **run_options(config),
            "data": dataset.fingerprint,
            "network": hashlib.sha256(text.encode()).hexdigest(),
        },
        environment={
            "device_kind": devices.kind,
            "device_models": sorted({str(device.get("model")) for device in devices.descriptions}),
            "replicas": devices.replicas,
            "threads": devices.threads,
            "precision": devices.precision,
            "jit": devices.jit,
            "deterministic": devices.deterministic,
            "versions": versions(),
            "git_commit": git_commit(),
        },
    )


def require_same_run(saved: dict[str, Any], current: dict[str, Any], output_dir: Path) -> None:
    """Refuse to go on from what another run has left.

    Args:
        saved: What the folder's run has, as in `Fingerprint.run`.
        current: What this run has; names that only one of them has are not compared.
        output_dir: The folder.

    Raises:
        UserError: If they differ, naming each difference.
    """
    differences = []
    for name, received in current.items():
        expected = saved.get(name, received)
        if received == expected:
            continue
        option = f"--{name.replace('_', '-')}"
        differences.append(
            _CONTENTS.get(name) or f"{option} received {received}, expected {expected}"
        )
    if differences:
        raise UserError(
            f"{output_dir} holds another run: {'; '.join(differences)}; go on with its settings, "
            f"start over with --fresh, or name another --output-dir"
        )
