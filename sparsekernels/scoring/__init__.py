"""Scores of weights from a backward: Fisher information, losses, gradients of singular values. Selects nothing."""
