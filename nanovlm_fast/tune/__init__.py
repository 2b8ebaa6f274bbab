"""Finds by measuring, on the device at hand, how the model computes fastest."""
