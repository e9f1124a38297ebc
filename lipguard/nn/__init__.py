"""Trainable modules with built-in bounds."""

from lipguard.nn.relu_theta import ReLUTheta

__all__ = ["ReLUTheta"]
