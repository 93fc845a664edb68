"""Train an image classifier data-parallel on every visible GPU, as a batch job."""

__version__ = "0.1.0"
