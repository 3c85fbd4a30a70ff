"""The parts of benchmarks/finetune.py and benchmarks/accuracy.py."""
