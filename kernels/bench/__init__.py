"""Benchmark of the kernels against baselines and a measured floor: `python -m bifrost.kernels.bench`."""
