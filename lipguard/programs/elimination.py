"""Block elimination of a program's neurons: the pattern that fills in, and what is left."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def fill(rows: Sequence[Iterable[int]], out: Iterable[int]) -> tuple[list[tuple[int, list[int]]], set[tuple[int, int]]]:
    """The pattern of the elimination from the sources that every layer and the output read.

    Returns:
        For every layer from the last to the first the sources it meets, and all blocks (i, j), j <= i, that fill in.
    """
    met = list(out)
    pairs = {(i, j) for i in met for j in met if j <= i}
    shapes = []
    for k in reversed(range(len(rows))):
        sources = sorted({j for j in rows[k] if j < k} | {j for i, j in pairs if i == k and j < k})
        pairs |= {(i, j) for i in sources for j in sources if j <= i}
        shapes.append((k, sources))
    return shapes, pairs


@dataclass(frozen=True, eq=False)
class Elimination:
    """What is left of Z when the neurons are eliminated, and the way back.

    Attributes:
        schur: S, (r, r), with Z(rho, t) >= 0 iff rho I >= S; None if no channel has an effect.
        factors: Cholesky factor of each layer's pivot.
        solved: by layer k and earlier source j, factor_k^-1 times the coupling of k to j.
    """

    schur: Tensor | None
    factors: dict[int, Tensor]
    solved: dict[int, dict[int, Tensor]]

    def responses(self, channels: Tensor) -> Tensor:
        """The neurons w that attain x'Sx = max_w (x, w)'(C0 - sum_j t_j S_j)(x, w), for each column x of `channels`.

        Returns:
            (x, w) stacked as in the program's coordinates, shape (N, columns).
        """
        found = {-1: channels}
        for k in sorted(self.factors):
            terms = [block @ found[j] for j, block in self.solved[k].items()]
            if not terms:
                found[k] = channels.new_zeros(self.factors[k].shape[0], channels.shape[1])
                continue
            found[k] = torch.linalg.solve_triangular(self.factors[k].T, torch.stack(terms).sum(0), upper=True)
        return torch.cat([*(found[k] for k in sorted(self.factors)), channels])
