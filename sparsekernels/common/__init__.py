"""Shared by all rooms: files, warnings, parameter names, and which parameters are supported. Imports no other room."""
