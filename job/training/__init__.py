"""Computes a run."""
