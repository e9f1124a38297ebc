"""The semidefinite program of a convolutional network, split over frequencies.

    minimise rho  subject to  rho E + sum_j t_j [e_j (e_j - q_j)' + (e_j - q_j) e_j'] - C0 >= 0,  t_j = tau_g(j)

as in `SlopeProgram`, but every layer lives at the frequencies of one of several levels, and its components at one frequency
meet nothing of another one. A level's frequencies fold onto those of the next, coarser one; a vector is a wave with one
frequency. Layers come from the coarsest to the finest: the elimination from the last to the first adds up the Schur
complements of all frequencies that fold together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lipguard.errors import SolverFailed

Blocks = Mapping[int, Tensor]


@dataclass(frozen=True, eq=False)
class FrequencyProgram:
    """A LipSDP with slopes in [0, 1] over frequencies, one of each pair f, -f.

    Attributes:
        groups: by layer, the index of every component's multiplier, (n_k,).
        levels: by layer and, last, of the outputs and of the channels, the index among `counts`.
        rows: by layer and source (-1: channels), what the layer is applied to: (F, n_k, n_l) at the layer's frequencies.
        out: the outputs by source, at the outputs' frequencies; C0 = [C D]*[C D].
        counts: by level, from the finest, how many frequencies each one stands for, (F,).
        down: by level, the index of each frequency's remainder on the next level; empty for the last.
        vectors: whether the last level is that of the vectors, real.
    """

    groups: tuple[Tensor, ...]
    levels: tuple[int, ...]
    rows: tuple[Blocks, ...]
    out: Blocks
    counts: tuple[Tensor, ...]
    down: tuple[Tensor, ...]
    vectors: bool

    @cached_property
    def multipliers(self) -> int:
        """Number of multipliers."""
        return 1 + max(int(g.max()) for g in self.groups)

    def single(self, sizes: Mapping[int, float], out: float) -> FrequencyProgram:
        """The program in single precision, of the layers' values, and the outputs', divided by their sizes."""

        def cast(blocks: Blocks, own: float) -> Blocks:
            scaled = {s: b * (sizes.get(s, 1.0) / own) for s, b in blocks.items()}
            return {s: b.to(torch.complex64 if b.is_complex() else torch.float32) for s, b in scaled.items()}

        rows, counts = tuple(cast(row, sizes[k]) for k, row in enumerate(self.rows)), tuple(c.float() for c in self.counts)
        return replace(self, rows=rows, out=cast(self.out, out), counts=counts)

    def descent(self, fine: int, coarse: int) -> Tensor:
        """Index of each frequency's remainder on a coarser level."""
        index = torch.arange(len(self.counts[fine]), device=self.counts[fine].device)
        for down in self.down[fine:coarse]:
            index = down[index]
        return index

    def gathered(self, block: Tensor, fine: int, coarse: int) -> Tensor:
        """Sums over all frequencies that fold together, (F coarse, ...); a vector's are real."""
        if fine == coarse:
            return block
        counts, index = self.counts[coarse], self.descent(fine, coarse)
        if self.vectors and coarse == len(self.counts) - 1:
            return torch.einsum("f,fij->ij", self.counts[fine], block.real)[None]
        total = block.new_zeros(len(counts), *block.shape[1:]).index_add_(0, index, block)
        # g = -g gathers f and -f, whose blocks are conjugate: f alone is held, and counts twice.
        own = ((counts[index] == 1) & (self.counts[fine] == 2)).nonzero()[:, 0]
        if len(own):
            total.index_add_(0, index[own], block[own].conj())
        return total

    def rho(self, multipliers: Callable[[int, Tensor | None], Tensor]) -> float:
        """The least rho that multipliers prove, in floating point, by eliminating all layers from the last to the first.

        Args:
            multipliers: (k, S_kk) -> t of layer k's components, whose pivot is 2 T_k - S_kk; S_kk None stands for 0.
        Raises:
            SolverFailed: a pivot is not positive definite in floating point.
        """
        s: dict[tuple[int, int], Tensor] = {}

        def add(found: Blocks, level: int) -> None:
            for i, left in found.items():
                for j, right in found.items():
                    if j <= i:
                        block = self.gathered(left.mH @ right, level, self.levels[i])
                        s[i, j] = s[i, j] + block if (i, j) in s else block

        add(self.out, self.levels[-2])
        for k in reversed(range(len(self.rows))):
            own = s.pop((k, k), None)
            t = multipliers(k, own)
            if own is None:
                complexity = next((b.dtype for b in self.rows[k].values()), t.dtype)
                own = torch.zeros(1, 1, 1, dtype=complexity, device=t.device).expand(len(self.counts[self.levels[k]]), len(t), -1)
            factor, info = torch.linalg.cholesky_ex(torch.diag(2 * t) - own)
            if bool((info != 0).any()):
                raise SolverFailed("a pivot of the chain is not positive definite.")
            whitened = {}
            for j in (-1, *range(k)):
                cross = s.pop((k, j), None)
                if j in self.rows[k]:
                    coupling = t[:, None] * self.rows[k][j]
                    cross = coupling if cross is None else cross + coupling
                if cross is not None:
                    whitened[j] = torch.linalg.solve_triangular(factor, cross, upper=False)
            add(whitened, self.levels[k])
        last = s.get((-1, -1))
        if last is None:
            raise SolverFailed("the output does not feel the input.")
        if not bool(last.isfinite().all()):
            raise SolverFailed("the multipliers overflow.")
        return max(float(torch.linalg.eigvalsh(last).max()), 0.0)

    def interior(self, tau: Tensor | None = None, margin: float = 1.0) -> tuple[Tensor, float]:
        """Multipliers (one a group) inside the cone, and the least rho they prove in floating point.

        Layer k's are a multiple of the guess, enough for lambda_max(T_k^-1/2 S_kk T_k^-1/2) <= 2 / (1 + margin), and no less
        than the guess; without one they are lambda_max(S_kk), as in ECLipsE's choice for the chain.

        Raises:
            SolverFailed: a pivot is not positive definite in floating point.
        """
        like = self.counts[0]
        done = torch.ones(self.multipliers, dtype=like.dtype, device=like.device) if tau is None else tau.clone()
        largest = 0.0

        def inside(k: int, s: Tensor | None) -> Tensor:
            nonlocal largest
            index = self.groups[k]
            root = done[index].rsqrt()
            top = 0.0 if s is None else _largest_eigenvalue(s * root[:, None] * root)
            factor = max(top, 1e-8 * largest, 1e-30) if tau is None else max(1.0, top * (1 + margin) / 2)
            largest = max(largest, top)
            used = index.unique()
            done[used] = done[used] * factor
            return done[index]

        return done, self.rho(inside)


def _largest_eigenvalue(s: Tensor) -> float:
    """The largest eigenvalue of a batch of positive semidefinite matrices, within a few per cent."""
    v = s.sum(2, keepdim=True) + s.diagonal(dim1=1, dim2=2)[..., None].real.clamp_min(0).sqrt()
    value = 0.0
    for _ in range(12):
        length = torch.linalg.vector_norm(v, dim=1, keepdim=True)
        v = s @ (v / length.clamp_min(torch.finfo(length.dtype).tiny))
        value = float(torch.linalg.vector_norm(v, dim=1).max())
    # Power iteration approaches from below; 5 % cover the rest except where the top eigenvalues crowd together.
    return 1.05 * value
