"""Trainable modules with built-in Lipschitz bounds."""

from lipguard.nn.activations import GroupSort, Householder, MaxMin

__all__ = ["GroupSort", "Householder", "MaxMin"]
