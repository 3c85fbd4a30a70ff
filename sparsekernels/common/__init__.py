"""Shared ground: files, warnings, names of parameters and which of them can be used. Imports nothing of the package."""
