"""Layers cut into stages that are even, or as even as the memory allows."""
