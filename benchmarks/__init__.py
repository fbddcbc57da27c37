"""Reproducible comparisons: `python -m benchmarks` measures step times and memory against baselines of the same run."""
