"""Limits on the threads of BLAS around a solver.

On a busy machine small dense factorisations with several spinning threads take ten to a hundred times longer than with
one, and during training the framework's own threads compete for the same cores.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def limited_threads(count: int) -> Iterator[None]:
    """Let every BLAS and OpenMP pool of the process use at most `count` threads inside the block, and restore it after."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(count):
        yield


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread inside the block; its results elsewhere keep their bits.

    Measured on two cores with another job running: a measurement of a 784-256-256-10 network took 0.05 s with one
    thread and 0.7 to 1.4 s with two. On idle cores two would save a third.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
