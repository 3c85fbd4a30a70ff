"""Modules that replace a layer of a model: low-rank, pruned, gated. They use ops, and know nothing of the model."""
