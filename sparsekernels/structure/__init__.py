"""A model's layers, matrices, heads and neurons, and how to cut them out. No training, no data."""
