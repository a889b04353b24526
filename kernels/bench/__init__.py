"""Times of the kernels against their baselines and a floor of the same run: `python -m bifrost.kernels.bench`."""
