"""Reproducible comparisons: `python -m benchmarks` measures against baselines of the same run."""
