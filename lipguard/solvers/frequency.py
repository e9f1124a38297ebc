"""The semidefinite program of a convolutional network, split over frequencies, and the search for its multipliers.

    minimise rho  subject to  rho E + sum_j t_j [e_j (e_j - q_j)' + (e_j - q_j) e_j'] - C0 >= 0,  t_j = tau_g(j)

as in `SlopeProgram`, but every layer lives at the frequencies of one of several levels, and its components at one frequency
meet nothing of another one. A level's frequencies fold onto those of the next, coarser one; a vector is a wave with one
frequency. Layers come from the coarsest to the finest: the elimination from the last to the first adds up the Schur
complements of all frequencies that fold together.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from lipguard.errors import SolverFailed
from lipguard.solvers.lbfgs import lbfgs
from lipguard.solvers.relative import Relative

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

    def single(self) -> FrequencyProgram:
        """The program in single precision."""

        def cast(blocks: Blocks) -> Blocks:
            return {s: b.to(torch.complex64 if b.is_complex() else torch.float32) for s, b in blocks.items()}

        rows, counts = tuple(cast(row) for row in self.rows), tuple(c.float() for c in self.counts)
        return replace(self, rows=rows, out=cast(self.out), counts=counts)

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

    def eliminate(self, multipliers: Callable[[int, Tensor | None], Tensor]) -> Elimination:
        """Eliminate all layers from C0 - sum_j t_j S_j, from the last to the first.

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
        factors: dict[int, Tensor] = {}
        solved: dict[int, dict[int, Tensor]] = {}
        for k in reversed(range(len(self.rows))):
            own = s.pop((k, k), None)
            t = multipliers(k, own)
            if own is None:
                complexity = next((b.dtype for b in self.rows[k].values()), t.dtype)
                own = torch.zeros(1, 1, 1, dtype=complexity, device=t.device).expand(len(self.counts[self.levels[k]]), len(t), -1)
            factors[k], info = torch.linalg.cholesky_ex(torch.diag(2 * t) - own)
            if bool((info != 0).any()):
                raise SolverFailed("a pivot of the chain is not positive definite.")
            felt = solved[k] = {}
            for j in (-1, *range(k)):
                cross = s.pop((k, j), None)
                if j in self.rows[k]:
                    coupling = t[:, None] * self.rows[k][j]
                    cross = coupling if cross is None else cross + coupling
                if cross is not None:
                    felt[j] = torch.linalg.solve_triangular(factors[k], cross, upper=False)
            add(felt, self.levels[k])
        last = s.get((-1, -1))
        if last is None:
            raise SolverFailed("the output does not feel the input.")
        return Elimination(self, last, factors, solved)

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

        return done, self.eliminate(inside).rho()

    def least_rho(self, tau: Tensor) -> float:
        """The least rho the multipliers prove, in floating point; inf outside the cone."""
        try:
            return self.eliminate(lambda k, _: tau[self.groups[k]]).rho()
        except SolverFailed:
            return math.inf

    def smoothed(self, x: Tensor, p: float) -> Relative | None:
        """The Schatten-p norm of S at the multipliers exp(x), its gradient and curvature; None outside the cone.

        Derivatives by the envelope theorem, as in `first_order.smoothed`, summed over frequencies.
        """
        tau = x.exp()
        try:
            eliminated = self.eliminate(lambda k, _: tau[self.groups[k]])
        except SolverFailed:
            return None
        values, vectors = torch.linalg.eigh(eliminated.schur)
        top = values.max()
        if not bool(top > 0) or not bool(top.isfinite()):
            return None
        counts = self.counts[self.levels[-1]]
        ratios = (values / top).clamp_min(0)
        total = (counts[:, None] * ratios**p).sum()
        weights = ratios ** (p - 1) / (total * top)
        found = eliminated.responses(vectors)
        gradient, curvature = torch.zeros_like(tau), torch.zeros_like(tau)
        for k, row in enumerate(self.rows):
            w, level = found[k], self.levels[k]
            # Every frequency's response belongs to eigenvectors at its own remainder.
            share = weights[self.descent(level, self.levels[-1])] * self.counts[level][:, None]
            pre = eliminated.applied(row, found, level, w)
            for target, other in ((gradient, pre - w), (curvature, w)):
                target.index_add_(0, self.groups[k], 2 * ((w.conj() * other).real * share[:, None, :]).sum((0, 2)))
        gradient, curvature = gradient * tau, curvature * tau
        value = float(top.log() + total.log() / p)
        return Relative(value, gradient, curvature, float(top), tau) if bool(gradient.isfinite().all()) else None


@dataclass(frozen=True, eq=False)
class Elimination:
    """What is left of the program when its layers are eliminated, and the way back.

    Attributes:
        program: the program.
        schur: S, (F, r, r) at the channels' frequencies: rho must be its largest eigenvalue.
        factors: Cholesky factor of each layer's pivot.
        solved: by layer and earlier source, factor^-1 times the coupling.
    """

    program: FrequencyProgram
    schur: Tensor
    factors: dict[int, Tensor]
    solved: dict[int, dict[int, Tensor]]

    def rho(self) -> float:
        """The least rho."""
        return max(float(torch.linalg.eigvalsh(self.schur).max()), 0.0)

    def responses(self, channels: Tensor) -> dict[int, Tensor]:
        """By layer, the values that attain x*Sx for each column x of `channels`, (F, r, columns), at every finer frequency."""
        found = {-1: channels}
        for k in sorted(self.factors):
            factor = self.factors[k]
            total = self.applied(self.solved[k], found, self.program.levels[k], factor[..., :1])
            found[k] = torch.linalg.solve_triangular(factor.mH, total.to(factor.dtype), upper=True)
        return found

    def applied(self, blocks: Blocks, found: dict[int, Tensor], level: int, like: Tensor) -> Tensor:
        """The sum of blocks of a layer at this level times the values found."""
        total = like.new_zeros(*like.shape[:2], found[-1].shape[-1])
        for source, block in blocks.items():
            values = found[source][self.program.descent(level, self.program.levels[source])]
            total = total + block @ values.to(block.dtype)
        return total


@dataclass(frozen=True)
class Search:
    """Options of the search.

    Attributes:
        tol: a stage ends when five steps lower log rho by less than this.
        memory: pairs kept by L-BFGS.
        max_iterations: steps at most, over all stages.
        stages: Schatten exponents, and the share of all steps used up when each stage ends.
    """

    tol: float = 2e-3
    memory: int = 60
    max_iterations: int = 250
    stages: Mapping[float, float] = field(default_factory=lambda: {8.0: 0.8, 64.0: 1.0})

    def __call__(
        self, program: FrequencyProgram, start: Tensor | None = None, deadline: float = math.inf
    ) -> tuple[Tensor, float, int]:
        """Multipliers inside the cone, the least rho they prove in floating point, and the number of steps.

        Args:
            program: the program.
            start: multipliers of a neighbouring program, or None.
            deadline: `time.perf_counter()` value after which no further step is begun.
        Raises:
            SolverFailed: no interior point exists in floating point.
        """
        with torch.no_grad():
            best, rho = program.interior() if start is None else program.interior(start, margin=0.5)
            part, x = program.single(), best.log().float()
            trial = part.smoothed(x, min(self.stages))
            if trial is None or not 0.99 * rho < trial.largest < 1.01 * rho:  # beyond the range of single precision
                part, x = program, best.log()
            used, found = 0, {math.inf: x}
            for p, share in self.stages.items():

                def function(y: Tensor, p: float = p) -> Relative | None:
                    value = part.smoothed(y, p)
                    if value is not None and value.largest < min(found):
                        found.clear()
                        found[value.largest] = y
                    return value

                def ends(values: list[float], limit: float = share * self.max_iterations - used) -> bool:
                    late = time.perf_counter() > deadline or len(values) > limit
                    return late or (len(values) > 5 and values[-6] - values[-1] < self.tol)

                x, steps = lbfgs(function, x, self.memory, ends, preconditioned=used > 0)
                used += steps
            # What single precision believes inside the cone may be outside by as little.
            tau = next(iter(found.values())).to(best).exp()
            for scale in (1.0, 1 + 1e-6, 1 + 1e-4):
                value = program.least_rho(tau * scale)
                if value < rho:
                    return tau * scale, value, used
            pulled, value = program.interior(tau, margin=1e-3)
            return (pulled, value, used) if value < rho else (best, rho, used)


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
