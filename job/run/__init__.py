"""One attempt at a run, on disk. Nothing in here needs TensorFlow."""
