"""A training as it would have been without its gauge: random generators and modes kept, errors told instead of raised."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def message_of(error: Exception) -> str:
    """An error's kind and text as one sentence."""
    name, text = type(error).__name__, str(error).rstrip()
    return f"{name}: {text}" if text.endswith(".") else f"{name}: {text}."


@contextlib.contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Gradients available whatever the loop's mode, and every random generator as it was afterwards."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global generator is what must be kept
    devices = [device] if device.type in ("cuda", "xpu") else []
    try:
        with (
            torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
