"""The methods: each is a module that reads like its paper's pseudo-code and returns a Selection."""

from .fish import fish
from .ird import ird
from .sift import sift

__all__ = ["fish", "ird", "sift"]
