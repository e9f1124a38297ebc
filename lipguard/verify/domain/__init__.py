"""Domains: ranges, relaxations, Jacobians and radii on boxes and balls."""
