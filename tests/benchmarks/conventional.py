"""The conventional Keras script that the job is measured against, timed epoch by epoch.

These are its sections on network, data, augmentation and training: `model.fit` with
`ImageDataGenerator`. The original then saves the model, evaluates it and shows one test image.
Prints one JSON line per epoch: the training seconds without the validation, and the accuracies.
"""

import json
import pickle
import sys
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.layers import BatchNormalization, Conv2D, Dense, Dropout, Flatten, MaxPooling2D
from keras.src.legacy.preprocessing.image import ImageDataGenerator
from keras.utils import to_categorical


class Timer(keras.callbacks.Callback):  # type: ignore[misc]
    """Times the training of an epoch from its start to the end of its last batch."""

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.seconds = time.perf_counter() - self.start

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        print(json.dumps({"epoch": epoch + 1, "seconds": self.seconds, **logs}), flush=True)


def load(folder: Path, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    batches = [pickle.loads((folder / name).read_bytes(), encoding="latin1") for name in names]
    images = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
    return images.transpose(0, 2, 3, 1), np.concatenate([batch["labels"] for batch in batches])


def main(data_dir: Path, epochs: int) -> None:
    keras.utils.set_random_seed(42)
    strategy = tf.distribute.MirroredStrategy()
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input((32, 32, 3)),
                Conv2D(32, (3, 3), activation="relu"),
                MaxPooling2D((2, 2)),
                BatchNormalization(),
                Conv2D(64, (3, 3), activation="relu"),
                MaxPooling2D((2, 2)),
                BatchNormalization(),
                Conv2D(128, (3, 3), activation="relu"),
                MaxPooling2D((2, 2)),
                BatchNormalization(),
                Flatten(),
                Dense(512, activation="relu"),
                Dropout(0.5, seed=42),
                Dense(128, activation="relu"),
                Dense(10, activation="softmax"),
            ]
        )
        model.compile(
            optimizer=keras.optimizers.Adam(learning_rate=0.0001),
            loss="categorical_crossentropy",
            metrics=["accuracy"],
        )
    folder = data_dir / "cifar-10-batches-py"
    x_train, y_train = load(folder, [f"data_batch_{number}" for number in range(1, 6)])
    x_test, y_test = load(folder, ["test_batch"])
    x_train, x_test = x_train / 255.0, x_test / 255.0
    y_train, y_test = to_categorical(y_train), to_categorical(y_test)
    datagen = ImageDataGenerator(
        rotation_range=20,
        width_shift_range=0.2,
        height_shift_range=0.2,
        shear_range=0.2,
        zoom_range=0.2,
        horizontal_flip=True,
        fill_mode="nearest",
    )
    datagen.fit(x_train)
    model.fit(
        datagen.flow(x_train, y_train, batch_size=256),
        epochs=epochs,
        validation_data=(x_test, y_test),
        verbose=0,
        callbacks=[Timer()],
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
