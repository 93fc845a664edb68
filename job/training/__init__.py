"""The training and evaluation of a run."""
