"""What a backward tells of weights: Fisher information, losses, gradients of singular values. Selects nothing."""
