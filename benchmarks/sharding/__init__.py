"""What benchmarks/sharded.py measures and computes of models under fully_shard."""
