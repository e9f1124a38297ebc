"""Limits on the threads of BLAS around a solver.

On a busy machine small dense factorisations with several spinning threads take ten to a hundred times longer than with
one, and during training the framework's own threads compete for the same cores.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def limited_threads(count: int) -> Iterator[None]:
    """Let every BLAS and OpenMP pool of the process use at most `count` threads inside the block, and restore it after."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(count):
        yield
