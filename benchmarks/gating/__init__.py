"""What gates.py is made of."""
