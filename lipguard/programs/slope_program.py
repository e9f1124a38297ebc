"""The structured semidefinite program every LipSDP solver is given: `SlopeProgram`, and the `Proposal` it returns.

    minimise rho  subject to  Z(rho, t) = rho E + sum_j t_j [e_j (e_j - q_j)' + (e_j - q_j) e_j'] - C0 >= 0,  t_j = s_j tau_g(j)

over N = n + r coordinates: n neurons, then r channels (inputs, or outputs of the transposed network). q_j is row j of
Q = [B A], B lower block triangular, with blocks on the diagonal where a layer is implicit; E selects the channels;
C0 = [C D]'[C D]. Z >= 0 implies t >= 0 where B has no diagonal blocks.

With slopes [alpha, beta] the bracket is S_j = a_j b_j' + b_j a_j', a_j = e_j - alpha_j q_j, b_j = e_j - beta_j q_j. A change of
variables would make them [0, 1], but would let every layer see all that lie before it.

With `free` channels rho E becomes diag(rho_1, ..., rho_r) on the channels, and sum_k rho_k is minimised: the square of a bound
from the inf-norm, since ||y||^2 <= sum_k rho_k x_k^2.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lipguard.errors import SolverFailed
from lipguard.programs.elimination import Elimination, fill


@dataclass(frozen=True, eq=False)
class SlopeProgram:
    """A LipSDP.

    Attributes:
        sizes: neurons of each layer.
        channels: r.
        rows: Q by layer and source: `rows[k][l]` (n_k, n_l) for l < k, `rows[k][-1]` (n_k, r), and `rows[k][k]` of an
            implicit layer.
        out: [C D] by source: `out[l]` (m, n_l) and `out[-1]` (m, r); C0 = [C D]'[C D].
        groups: index of the multiplier of each neuron, (n,); None for one each. A group lies within one layer.
        weights: s, the fixed factor between a neuron's multiplier and its group's, (n,); None for ones.
        scaling: for an implicit layer k, T > 0 (n_k,) with 2T - T B_kk - B_kk'T > 0; ones where none is given.
        free: one rho for each channel.
        slopes: alpha and beta, each (n,); None for 0 and 1, as they are where a layer is implicit.
    """

    sizes: tuple[int, ...]
    channels: int
    rows: tuple[Mapping[int, Tensor], ...]
    out: Mapping[int, Tensor]
    groups: Tensor | None = None
    weights: Tensor | None = None
    scaling: Mapping[int, Tensor] = field(default_factory=dict)
    free: bool = False
    slopes: tuple[Tensor, Tensor] | None = None

    @property
    def neurons(self) -> int:
        """n."""
        return sum(self.sizes)

    @property
    def order(self) -> int:
        """N = n + r, the size of the matrix inequality."""
        return self.neurons + self.channels

    @cached_property
    def slices(self) -> dict[int, slice]:
        """Place of each layer (and of the channels, -1) among the N coordinates."""
        ends = [0]
        for size in self.sizes:
            ends.append(ends[-1] + size)
        places = {k: slice(a, b) for k, (a, b) in enumerate(itertools.pairwise(ends))}
        return places | {-1: slice(ends[-1], ends[-1] + self.channels)}

    @cached_property
    def fronts(self) -> list[tuple[int, int]]:
        """(n, m) of every layer's front, from the last layer to the first: its neurons and the coordinates they meet."""
        size = dict(enumerate(self.sizes)) | {-1: self.channels}
        shapes, _ = fill(self.rows, self.out)
        return [(size[k], sum(size[j] for j in front)) for k, front in shapes]

    def to(self, dtype: torch.dtype) -> SlopeProgram:
        """The same program in another precision."""
        rows = tuple({s: b.to(dtype) for s, b in row.items()} for row in self.rows)
        out = {s: b.to(dtype) for s, b in self.out.items()}
        weights = None if self.weights is None else self.weights.to(dtype)
        scaling = {k: t.to(dtype) for k, t in self.scaling.items()}
        slopes = None if self.slopes is None else (self.slopes[0].to(dtype), self.slopes[1].to(dtype))
        return SlopeProgram(self.sizes, self.channels, rows, out, self.groups, weights, scaling, self.free, slopes)

    @cached_property
    def options(self) -> dict[str, torch.dtype | torch.device]:
        """dtype and device of the program's tensors."""
        block = next(b for row in (*self.rows, self.out) for b in row.values())
        return {"dtype": block.dtype, "device": block.device}

    @cached_property
    def gram(self) -> dict[tuple[int, int], Tensor]:
        """The blocks (i, j), j <= i, of C0."""
        return {(i, j): left.T @ right for i, left in self.out.items() for j, right in self.out.items() if j <= i}

    @cached_property
    def constant(self) -> Tensor:
        """C0, (N, N), dense."""
        c0 = torch.zeros(self.order, self.order, **self.options)  # type: ignore[arg-type]
        for (i, j), block in self.gram.items():
            c0[self.slices[i], self.slices[j]] = block
            c0[self.slices[j], self.slices[i]] = block.T
        return c0

    @cached_property
    def middle(self) -> Tensor | None:
        """alpha + beta, the factor of e q' + q e' in -S_j; None for 1."""
        return None if self.slopes is None else self.slopes[0] + self.slopes[1]

    @cached_property
    def bends(self) -> Tensor | None:
        """2 alpha beta, the factor of q q' in S_j; None where all are 0."""
        if self.slopes is None:
            return None
        product = 2 * self.slopes[0] * self.slopes[1]
        return product if bool(product.any()) else None

    def coupled(self, t: Tensor, k: int) -> Tensor:
        """t (alpha + beta) of layer k from t of layer k."""
        return t if self.middle is None else t * self.middle[self.slices[k]]

    def bent(self, t: Tensor, k: int) -> dict[tuple[int, int], Tensor]:
        """The blocks (i, j), j <= i, of sum_j t_j 2 alpha_j beta_j q_j q_j' over layer k, from t of layer k."""
        if self.bends is None:
            return {}
        weights = (t * self.bends[self.slices[k]])[:, None]
        row = self.rows[k]
        return {(i, j): left.T @ (weights * right) for i, left in row.items() for j, right in row.items() if j <= i}

    def spread(self, tau: Tensor) -> Tensor:
        """Multipliers of the neurons from those of the groups."""
        t = tau if self.groups is None else tau[self.groups]
        return t if self.weights is None else t * self.weights

    def gather(self, g: Tensor) -> Tensor:
        """Adjoint of `spread`, along the first dimension."""
        if self.weights is not None:
            g = g * (self.weights if g.ndim == 1 else self.weights[:, None])
        if self.groups is None:
            return g
        out = g.new_zeros((int(self.groups.max()) + 1, *g.shape[1:]))
        return out.index_add_(0, self.groups, g)

    def group(self, t: Tensor) -> Tensor:
        """Group multipliers of t, the mean where rounding or a guess made them differ."""
        if self.weights is not None:
            t = t / self.weights
        if self.groups is None:
            return t
        tau = t.new_zeros(int(self.groups.max()) + 1)
        return tau.scatter_reduce_(0, self.groups, t, "mean", include_self=False)

    def q(self, x: Tensor) -> Tensor:
        """Q x for x of shape (N, k)."""
        out = x.new_zeros(self.neurons, x.shape[1])
        for k, row in enumerate(self.rows):
            for source, block in row.items():
                out[self.slices[k]].addmm_(block, x[self.slices[source]])
        return out

    def linear(self, rho: float | Tensor, t: Tensor) -> Tensor:
        """Z(rho, t) + C0: the part that is linear in (rho, t); rho is a number, or (1,), or (r,) where channels are free."""
        z = torch.zeros_like(self.constant)
        for k, row in enumerate(self.rows):
            here = self.slices[k]
            for source, block in row.items():
                there = self.slices[source]
                part = self.coupled(t[here], k)[:, None] * block
                z[here, there] -= part
                z[there, here] -= part.T
            for (i, j), part in self.bent(t[here], k).items():
                z[self.slices[i], self.slices[j]] += part
                if i != j:
                    z[self.slices[j], self.slices[i]] += part.T
        diagonal = z.diagonal()
        diagonal[: self.neurons] += 2 * t
        diagonal[self.neurons :] += rho
        return z

    def z(self, rho: float | Tensor, t: Tensor) -> Tensor:
        """The matrix that must be positive semidefinite."""
        return self.linear(rho, t) - self.constant

    def adjoint(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """(<S_j, Y>)_j and <E, Y>, (1,) or with free channels (r,), where Z = rho E + sum_j t_j S_j - C0, Y symmetric."""
        s = y.diagonal()[: self.neurons].clone()
        for k, row in enumerate(self.rows):
            here = self.slices[k]
            for source, block in row.items():
                s[here] -= self.coupled((block * y[here, self.slices[source]]).sum(1), k)
        if self.bends is not None:
            rest = self.q(y.T)
            for k, row in enumerate(self.rows):
                here = self.slices[k]
                for source, block in row.items():
                    s[here] += self.bends[here] / 2 * (block * rest[here, self.slices[source]]).sum(1)
        e = y.diagonal()[self.neurons :]
        return 2 * s, e if self.free else e.sum(0, keepdim=True)

    def interior(self, t: Tensor | None = None, margin: float = 1.0) -> tuple[Tensor, float]:
        """Multipliers for which Z(rho, t) > 0 at every rho above the returned one.

        Backward block elimination of Z: with S the sum of C0 and the Schur complements of the layers behind, layer
        k's pivot is 2 T_k - S_kk, and T_k enters nothing that was eliminated before it. T_k is scaled up, never down,
        until lambda_max(T_k^-1/2 S_kk T_k^-1/2) <= 2 / (1 + margin). Without a guess this is the choice
        T_k = lambda_max(S_kk) I of the chain; the last Schur complement's largest eigenvalue is the least rho.
        An implicit layer has P(T_k) = 2 T_k - T_k B_kk - B_kk'T_k for 2 T_k; enough of its `scaling` is added.

        Args:
            t: a guess, (n,), kept as it is where it is inside by the margin; or None.
            margin: 1 for a start far inside.
        Raises:
            SolverFailed: a pivot is not positive definite in floating point.
        """
        ones = torch.ones(self.neurons, **self.options)  # type: ignore[arg-type]
        done = (ones if self.weights is None else self.weights.clone()) if t is None else t.clone()
        largest = 0.0

        def inside(k: int, s: Tensor | None) -> Tensor:
            nonlocal largest
            here = self.slices[k]
            guess = done[here]
            if k in self.rows[k]:
                done[here] = self._implicit(k, s, None if t is None else guess, margin, 1e-8 * largest)
                return done[here]
            root = guess.rsqrt()
            top = 0.0 if s is None else _largest_eigenvalue(s * root[:, None] * root)
            # A layer that the output does not feel (S = 0) still needs a positive multiplier.
            factor = max(top, 1e-8 * largest, 1e-30) if t is None else max(1.0, top * (1 + margin) / 2)
            largest = max(largest, top)
            done[here] = guess * factor
            return done[here]

        last = self.eliminate(inside).schur
        rho = 0.0 if last is None else max(float(torch.linalg.eigvalsh(last)[-1]), 0.0)
        if not math.isfinite(rho):
            raise SolverFailed("no interior point: the multipliers overflow.")
        return done, rho

    def _implicit(self, k: int, s: Tensor | None, guess: Tensor | None, margin: float, least: float) -> Tensor:
        """Multipliers of the implicit layer k with P(T) >= (1 + margin) S_kk: the guess, and as much scaling as it takes.

        Raises:
            SolverFailed: P of the scaling itself is not positive definite.
        """
        here, own = self.slices[k], self.rows[k][k]
        scaling = self.scaling.get(k)
        if scaling is None or self.groups is not None:
            # One multiplier for the whole layer: its own direction is all there is.
            scaling = torch.ones_like(own[0]) if self.weights is None else self.weights[here]

        def p(t: Tensor) -> Tensor:
            half = torch.diag(t) - t[:, None] * own
            return half + half.T

        factor, info = torch.linalg.cholesky_ex(p(scaling))
        if int(info) != 0:
            raise SolverFailed("an implicit layer is not well posed under its scaling.")
        wanted = torch.zeros_like(factor) if s is None else (1 + margin) * s
        if guess is not None:
            wanted = wanted - p(guess)
        # The largest eigenvalue of L^-1 (wanted) L^-T: how much of the scaling makes up for what is wanted.
        inner = torch.linalg.solve_triangular(factor, wanted, upper=False)
        inner = torch.linalg.solve_triangular(factor, inner.T, upper=False)
        missing = max(float(torch.linalg.eigvalsh((inner + inner.T) / 2)[-1]), 0.0)
        if guess is not None:
            return guess if missing == 0 else guess + (1 + 1e-6) * missing * scaling
        return max(missing, least, 1e-30) * scaling

    def eliminate(self, multipliers: Callable[[int, Tensor | None], Tensor]) -> Elimination:
        """Eliminate the neurons from C0 - sum_j t_j S_j, layer by layer from the last to the first.

        Block by block, so that a chain costs the sum of its layers' cubes; only blocks that fill in are formed.
        Differentiable.

        Args:
            multipliers: (k, S_kk) -> t of layer k, whose pivot is 2 T_k - S_kk (2 T_k - T_k B_kk - B_kk'T_k - S_kk for an
                implicit layer); S_kk None stands for 0.
        Raises:
            SolverFailed: a pivot is not positive definite in floating point.
        """
        s: dict[tuple[int, int], Tensor] = {}

        def add(i: int, j: int, block: Tensor) -> None:
            s[i, j] = s[i, j] + block if (i, j) in s else block

        s.update(self.gram)
        factors: dict[int, Tensor] = {}
        solved: dict[int, dict[int, Tensor]] = {}
        for k in reversed(range(len(self.sizes))):
            own = s.get((k, k))
            t = multipliers(k, own)
            pivot = torch.diag(2 * t) if own is None else torch.diag(2 * t) - own
            if k in self.rows[k]:
                loop = t[:, None] * self.rows[k][k]
                pivot = pivot - loop - loop.T
            factors[k], info = torch.linalg.cholesky_ex(pivot)
            if int(info) != 0:
                raise SolverFailed("a pivot of the chain is not positive definite.")
            whitened = solved[k] = {}
            for j in (-1, *range(k)):
                cross = s.get((k, j))
                if j in self.rows[k]:
                    coupling = self.coupled(t, k)[:, None] * self.rows[k][j]
                    cross = coupling if cross is None else cross + coupling
                if cross is not None:
                    # L^-1 X as (X' L^-T)': LAPACK's layout without a copy, at half the time.
                    whitened[j] = torch.linalg.solve_triangular(factors[k].mT, cross.mT, upper=True, left=False).mT
            for i, left in whitened.items():
                for j, right in whitened.items():
                    if j <= i:
                        add(i, j, left.T @ right)
            for (i, j), block in self.bent(t, k).items():
                add(i, j, -block)
        return Elimination(s.get((-1, -1)), factors, solved)


def _largest_eigenvalue(s: Tensor) -> float:
    """The largest eigenvalue of a positive semidefinite matrix, within a few per cent; never less by more than that."""
    start = s.sum(1) + s.diagonal().sqrt()
    value = _iterated(s, start)
    # On symmetric networks the row sums are orthogonal to the top eigenvector; a start of uneven signs is not.
    other = _iterated(s, start * torch.arange(1, len(s) + 1, dtype=s.dtype, device=s.device).square().sin())
    # Power iteration approaches from below; 5 % cover the rest except where the top eigenvalues crowd together.
    return 1.05 * (other if other > 1.05 * value else value)


def _iterated(s: Tensor, v: Tensor) -> float:
    value = 0.0
    for _ in range(12):
        length = float(torch.linalg.vector_norm(v))
        if not length > 0:
            break
        v = s @ (v / length)
        value = float(torch.linalg.vector_norm(v))
    return value


@dataclass(frozen=True, eq=False)
class Proposal:
    """What a solver returns: multipliers and the rho they should prove, with what it believes of them.

    `gap` is the relative distance (rho - dual value) / rho by the solver's own account; nan where it has none.
    `rho` is believed by the checker only after its own proof; a solver that keeps to the cone sets `inside`, and then
    this rho is tried as it is, else the least rho of the multipliers is found first. With free channels `rho` is the sum of
    `weights`, (r,).
    """

    t: Tensor
    rho: float
    gap: float
    iterations: int
    message: str = ""
    inside: bool = False
    weights: Tensor | None = None
