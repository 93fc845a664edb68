"""The model file: a stock Keras model in HDF5, with the optimizer's state."""

import io
import os
from pathlib import Path
from textwrap import shorten

import h5py
import keras
from keras.src.legacy.saving.legacy_h5_format import load_model_from_hdf5, save_model_to_hdf5

from job.config import UserError
from job.folders import require_model
from job.output import MODEL, OutputDir


def save_model(model: keras.Model, output: OutputDir, name: str) -> None:
    """Save architecture, weights, loss, metrics and optimizer state as HDF5.

    Raises:
        UserError: If the file cannot be written.
    """
    # HDF5 does not survive a disk that fills while it writes; so it writes to memory.
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        save_model_to_hdf5(model, file)
    output.write_bytes(name, buffer.getvalue())


def load_model(path: Path) -> keras.Model:
    """Load a model that `save_model` wrote, ready to go on training.

    Keras's own `load_model` restores the weights and drops the optimizer's moments.

    Raises:
        UserError: If the file is missing or is no such model.
    """
    require_model(path)
    if os.access(path, os.R_OK) and not h5py.is_hdf5(path):
        raise UserError(
            f"received {path}, which is no HDF5 file, expected a model file as train leaves it "
            f"({MODEL}); name such a one, or its --output-dir"
        )
    try:
        with h5py.File(path) as file:
            model = load_model_from_hdf5(file)
        # The optimizer that Keras loads was built before the network had variables.
        model.compile_from_config(model.get_compile_config())
        with h5py.File(path) as file:
            group = file["optimizer_weights"]
            names = [str(name) for name in group.attrs["weight_names"]]
            saved = [group[name][()] for name in names]
        for variable, value in zip(model.optimizer.variables, saved, strict=True):
            variable.assign(value)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} is no model of this job ({shorten(str(error), 100)}); train again, or name "
            f"another --output-dir"
        ) from error
    return model
