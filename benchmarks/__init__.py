"""The benchmarks; see `python -m benchmarks`."""
