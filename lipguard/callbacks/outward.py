"""Verified values on their way into a log, which may hold float32."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def outward(value: float, name: str) -> Tensor:
    """`value` as a float64 tensor that float32 holds exactly, moved up, or down for a lower bound, where it had to move."""
    exact = torch.tensor(value, dtype=torch.float64, device="cpu")
    narrow = exact.to(torch.float32)
    end = torch.tensor(-math.inf if name == "lower" else math.inf, device="cpu")
    if (narrow.double() > exact) if name == "lower" else (narrow.double() < exact):
        narrow = torch.nextafter(narrow, end)
    # Beyond float32's largest number the float64 value stands: an upper bound may overflow to inf in a float32 sink.
    return narrow.double() if narrow.isfinite() else exact
