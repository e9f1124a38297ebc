"""Witnesses: a Jacobian at a point, enclosed."""
