"""Benches of models that see an image as tiles."""
