"""One attempt at a run: its files, lease and stop. No module of this package needs TensorFlow."""
