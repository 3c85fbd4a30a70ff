"""What a model is made of: its layers, matrices, heads and neurons, and how they are cut out. No training, no data."""
