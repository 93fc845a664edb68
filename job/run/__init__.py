"""The files of one attempt at a run. No module of this package needs TensorFlow."""
