"""Modules that stand in for a layer of a model: low-rank, pruned, gated. They know ops, and no model around them."""
