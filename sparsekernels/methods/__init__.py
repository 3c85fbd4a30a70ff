"""The methods: each is a module that reads like its paper's pseudo-code and returns a Selection."""

from .sift import sift

__all__ = ["sift"]
