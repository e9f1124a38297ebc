"""Operator norms of a matrix between 1, 2 and inf, with a direction that attains them."""

from __future__ import annotations

import itertools
import math

import numpy as np

from lipguard.errors import UnsupportedQuery
from lipguard.exact.piecewise import Matrix

_SIGNS = 14
"""Sign vectors are enumerated up to this length: 2^13 products."""


def vector_norm(v: Matrix, p: float) -> float:
    """The p-norm of a vector."""
    return float(np.linalg.norm(v, p)) if v.size else 0.0


def dual(p: float) -> float:
    """The conjugate exponent: 1 and inf exchanged, 2 kept."""
    return {1.0: math.inf, 2.0: 2.0, math.inf: 1.0}[p]


def supported(norm: tuple[float, float], outputs: int, inputs: int) -> None:
    """Nothing, where `operator_norm` is computable.

    Raises:
        UnsupportedQuery: a mixed norm that is NP-hard to compute, and the matrix too large to try every sign.
    """
    p, q = norm
    if p == 1.0 or q == math.inf or (p == 2.0 and q == 2.0) or outputs == 1 or inputs == 1:
        return
    free = {(2.0, 1.0): outputs, (math.inf, 2.0): inputs, (math.inf, 1.0): min(inputs, outputs)}[norm]
    if free > _SIGNS:
        raise UnsupportedQuery(
            f"norm=({p:g}, {q:g}): the operator norm of an {outputs} x {inputs} matrix needs 2^{free} sign vectors. "
            f"Use (1, q), (p, inf) or (2, 2), or fewer outputs through outputs=..."
        )


def operator_norm(matrix: Matrix, norm: tuple[float, float]) -> tuple[float, Matrix]:
    """max ||M v||_q over ||v||_p <= 1, and a maximiser v.

    Args:
        matrix: (m, d).
        norm: (p, q), each 1, 2 or inf.
    Returns:
        The value in float64 and v, shape (d,).
    Raises:
        UnsupportedQuery: see `supported`.
    """
    p, q = norm
    outputs, inputs = matrix.shape
    supported(norm, outputs, inputs)
    if p == 2.0 and q == 2.0:
        _, singular, right = np.linalg.svd(matrix, full_matrices=False)
        return float(singular[0]), right[0]
    if p == 1.0 or inputs == 1:
        # The unit ball of l1 is the hull of the +-e_j, and a norm is convex; in dimension 1 all balls agree.
        columns = np.linalg.norm(matrix, q, axis=0)
        j = int(columns.argmax())
        return float(columns[j]), np.eye(inputs)[j]
    if q == math.inf or outputs == 1:
        rows = np.linalg.norm(matrix, dual(p), axis=1)
        i = int(rows.argmax())
        return float(rows[i]), _attains(matrix[i], p)
    if p == math.inf and (q == 2.0 or inputs <= outputs):
        best = max(_signs(inputs), key=lambda v: vector_norm(matrix @ v, q))
        return vector_norm(matrix @ best, q), best
    # ||M v||_1 = max over signs g of g'M v, so the norm is the largest dual norm of g'M.
    best = max(_signs(outputs), key=lambda g: vector_norm(g @ matrix, dual(p)))
    return vector_norm(best @ matrix, dual(p)), _attains(best @ matrix, p)


def _attains(row: Matrix, p: float) -> Matrix:
    """v with ||v||_p = 1 and row v = ||row||_dual, p = 2 or inf."""
    if p == math.inf:
        return np.where(row >= 0, 1.0, -1.0)
    length = np.linalg.norm(row)
    return row / length if length > 0 else np.eye(len(row))[0]


def _signs(size: int) -> list[Matrix]:
    return [np.array((1.0, *rest)) for rest in itertools.product((1.0, -1.0), repeat=size - 1)]
