"""Errors of the package: each message gives the place, the cause and the remedy."""

from __future__ import annotations


class LipguardError(Exception):
    """Base class of every error raised on purpose by lipguard."""


class InvalidModel(LipguardError):
    """The module has no meaning as a function: nan or infinite weights, or a wrong type."""


class InvalidExample(LipguardError):
    """The example input does not fit the module."""


class InvalidDomain(LipguardError):
    """The domain is empty, reversed or of another dimension than the input."""


class UnsupportedLayer(LipguardError):
    """A call inside the module has no lowering rule."""


class UnsupportedQuery(LipguardError):
    """The method cannot answer for this norm, domain or network."""


class UnknownName(LipguardError):
    """No method, solver or rule is registered under this name."""


class NotCertified(LipguardError):
    """The evidence does not prove the claimed bound."""


class SolverUnavailable(LipguardError):
    """The solver is not installed, or its licence refuses the problem."""


class SolverFailed(LipguardError):
    """The solver ran and returned nothing usable."""


class NotConverged(SolverFailed):
    """An iteration ended above its tolerance; the message says the residual."""


class SlowConvergence(UserWarning):
    """In training, an equilibrium was not reached within its iterations; the message says the residual."""


class Contradiction(LipguardError):
    """A verified lower bound exceeds a verified upper bound: always a bug."""


class UnreadableCheckpoint(LipguardError):
    """The file is missing, truncated, or needs more trust than was granted."""


class LimitExceeded(LipguardError):
    """A checkpoint's verified upper bound is above the limit that was set."""
