"""Partitions of a domain by the phases of piecewise-linear neurons."""
