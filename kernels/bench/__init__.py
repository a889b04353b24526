"""Times of the kernels against their rivals and a floor of the same run: `python -m bifrost.kernels.bench`."""
