"""What gpu_train.py is made of."""
