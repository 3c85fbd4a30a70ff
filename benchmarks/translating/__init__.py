"""The parts of benchmarks/ks_lottery.py."""
