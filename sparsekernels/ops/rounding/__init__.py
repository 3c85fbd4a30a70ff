"""Stochastic rounding with counter-based random bits; part of the ops that narrow what they store, no op itself."""
