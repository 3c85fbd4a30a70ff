"""Times of single ops."""
