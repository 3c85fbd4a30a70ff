"""The parts of laser.py."""
