"""Norms of layers and their products along a network."""
