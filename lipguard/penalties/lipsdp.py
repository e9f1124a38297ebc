"""`lipsdp`: the logarithm of the semidefinite bound itself, at multipliers that are carried from step to step.

At multipliers T the least rho is rho(W; T) = max over |x| = 1 and all w of the quadratic form h(x, w) = |y|^2 + 2 sum_j t_j
w_j (p_j - w_j), with p and y linear in (x, w): a chain of Cholesky factors and one largest eigenvalue. Its derivative
in the weights is that of h at the maximiser, at the cost of one sample's forward and backward pass; by the envelope
theorem it is, at the optimal T, the derivative of the optimal bound. T itself follows the weights: every factorisation
also gives the derivative in T and the curvature along single multipliers, and one preconditioned step is taken with them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lipguard.bounds.cost import check_footprint
from lipguard.bounds.solving import LARGEST_DENSE, propose, proved
from lipguard.bounds.spectral import Spectral
from lipguard.certificate import Certificate, Query
from lipguard.errors import SolverFailed, UnsupportedQuery
from lipguard.network import Network
from lipguard.penalties.base import Penalty
from lipguard.penalties.following import START, Followed, carried, effort, refined
from lipguard.penalties.live import detached, linear_parts
from lipguard.programs.feedback import feedback_of
from lipguard.programs.lipsdp import LipSDP as Problem
from lipguard.programs.lipsdp import lipsdp as problem_of
from lipguard.programs.rewriting import slope_restricted
from lipguard.programs.slope_program import Proposal, SlopeProgram
from lipguard.query import Inputs, Outputs
from lipguard.solvers.first_order import Smoothed
from lipguard.solvers.threads import one_thread

_SINGLE = 256
"""Neurons beyond which single precision is the default."""

_EVERY = (5, 8)
"""Calls for one factorisation, up to that many neurons and beyond."""

_LONGEST = 0.3
"""Change of log t_j at most by the step that a factorisation gives."""

_SHRINK, _GROW, _SLOWEST = 0.5, 1.2, 0.02
"""Factors of a coordinate's share of its step after one too long and after one that was not, and the smallest share."""

_WORSE = 1.1
"""Growth of rho since the last factorisation from which the step between is doubted."""

_TIED = 1e-5
"""Relative distance from the largest eigenvalue within which another one counts as equal to it."""

_FELT = 1e-4
"""Eigenvectors whose part in the derivative is smaller than this are left out."""

Slopes = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Contact:
    """Where a program's quadratic form attains its maximum, as pairs a, b of the network's linear map L: (x, u) -> (p, y).

    The derivative of log sqrt(rho) in the weights is the sum of <b, dL(a)> over the pairs: one for each eigenvector that
    takes part, scaled by the square root of its share. At optimal multipliers the largest eigenvalue is often multiple.

    Attributes:
        rho: the least rho of the multipliers.
        a: (x, u of every activation node), each (rows, size).
        b: (p of every activation node, y), each (rows, size).
    """

    rho: float
    a: tuple[Tensor, ...]
    b: tuple[Tensor, ...]


def contact(problem: Problem, network: Network, slopes: Slopes, t: Tensor, levels: Tensor, responses: Tensor) -> Contact:
    """The maximisers in terms of the network.

    Args:
        problem: the network's program.
        network: detached.
        slopes: (alpha, beta) of the program.
        t: the program's multipliers, (n,).
        levels: eigenvalues, (rows,), the largest last.
        responses: (w, x) of their eigenvectors, (N, rows), scaled so that the sum of levels times |x|^2 is 1.
    """
    program = problem.program
    w = responses[: program.neurons]
    sizes = [network.sizes[i] for i in network.activations]

    def split(own: Tensor) -> tuple[Tensor, ...]:
        ordered = torch.empty_like(own)
        ordered[problem.order] = own
        return ordered.T.split(sizes, 1) if sizes else ()

    if problem.transposed:
        # The program's channels are the outputs and its p is the adjoint of L: h = |L_x'b|^2 + ..., with b = (w, x).
        u, b = split(t[:, None] * w), (*split(w), responses[program.neurons :].T)
    else:
        y = torch.stack([block @ responses[program.slices[source]] for source, block in program.out.items()]).sum(0)
        u, b = split(w), (*split(t[:, None] * w), y.T)
    with torch.enable_grad():
        dtype = _dtype(network)
        u, b = tuple(v.to(dtype) for v in u), tuple(v.to(dtype) for v in b)
        probe = b[-1].new_zeros(len(b[-1]), network.inputs, requires_grad=True)
        # <b, L(x, u)> is linear in x. For the plain program stationarity in x says that L_x'b is x times its level.
        (x,) = torch.autograd.grad(_paired(network, slopes, (probe, *u), b), probe)
    return Contact(float(levels[-1]), (x if problem.transposed else x / levels[:, None].to(dtype), *u), b)


def _paired(network: Network, slopes: Slopes, a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> Tensor:
    """The sum of <b, L(a)>, for a network and vectors of one precision."""
    sizes = [network.sizes[i] for i in network.activations]
    alpha, width = (s.to(a[0].dtype).split(sizes) if sizes else () for s in (slopes[0], slopes[1] - slopes[0]))
    p, y = linear_parts(network, a[0], a[1:], alpha, width)
    return torch.stack([(left * right).sum() for left, right in zip(b, (*p, y), strict=True)]).sum()


def along(network: Network, found: Contact, slopes: Slopes) -> Tensor:
    """A scalar whose derivative in the network's weights is that of log sqrt(rho): the sum of <b, L(a)>, attached.

    Args:
        network: with its weights in the autograd graph, of any precision.
        found: of this network, or of one some steps away.
        slopes: (alpha, beta), each (n,); attached where they depend on the weights.
    """
    dtype = _dtype(network)
    return _paired(network, slopes, tuple(v.to(dtype) for v in found.a), tuple(v.to(dtype) for v in found.b))


def _dtype(network: Network) -> torch.dtype:
    tensors = [t for node in network.nodes if node.map is not None for t in node.map.tensors()]
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.float64)


def check(network: Network) -> None:
    """Refuse what has no semidefinite bound of affordable size.

    Raises:
        UnsupportedQuery: the network has too many neurons.
    """
    check_footprint(network, "the lipsdp penalty")


def lipsdp(network: Network, t: Tensor | None = None, slopes: Slopes | None = None) -> tuple[Tensor, Tensor]:
    """Logarithm of the LipSDP bound at given multipliers, in float64, with its exact derivative.

    Args:
        network: with its weights in the autograd graph (`capture(..., live=True)`).
        t: multipliers of the program of this network (`lipguard.programs.lipsdp`), (n,), inside the cone; None solves for
            the optimal ones, at which the derivative is that of the optimal bound.
        slopes: (alpha, beta), each (n,), instead of the global ones: for a bound on a domain.
    Returns:
        The penalty, 0-d float64, and the multipliers used.
    Raises:
        SolverFailed: t lies outside the cone.
        UnsupportedQuery: the network has too many neurons.
    Source: Fazlyab et al. 2019, arXiv:1906.04893, Theorem 2; the recursion and its derivative are ours.
    """
    check(network)
    own = slope_restricted(network).slopes() if slopes is None else slopes
    with torch.no_grad():
        plain = detached(network)
        fixed = own[0].detach(), own[1].detach()
        problem = problem_of(feedback_of(plain, fixed))
        if t is None:
            # The derivative is that of the optimal bound only as far as t is optimal.
            name = "interior-point" if problem.program.order <= LARGEST_DENSE else "low-rank"
            t = propose(name, problem.program, None, 1e-10, None).t
        t = t.to(torch.float64)
        found = contact(problem, plain, fixed, t, *_maximum(problem.program, t))
    slope = along(network, found, own)
    return 0.5 * math.log(found.rho) + slope - slope.detach(), t


def _maximum(program: SlopeProgram, t: Tensor) -> tuple[Tensor, Tensor]:
    """The least rho of multipliers, once for each response, and the responses that carry its derivative, as for `contact`.

    Where the largest eigenvalue is multiple, the bound of the best multipliers moves by the mixture of eigenvectors, a
    density M on their span, that leaves no derivative in the multipliers (the dual solution): linear equations for M.
    """
    eliminated = program.eliminate(lambda k, _: t[program.slices[k]])
    if eliminated.schur is None:
        raise SolverFailed("the output does not feel the input: the bound is 0 and has no logarithm.")
    values, vectors = torch.linalg.eigh(eliminated.schur)
    rho = float(values[-1])
    if not (math.isfinite(rho) and rho > 0):
        raise SolverFailed(f"the multipliers give rho = {rho:g}, which has no logarithm.")
    top = vectors[:, values >= (1 - _TIED) * rho]
    responses = eliminated.responses(top)
    r = top.shape[1]
    if r > 1:
        w = responses[: program.neurons]
        slack = t[:, None] * (program.q(responses) - w)
        i, j = torch.triu_indices(r, r)
        # g_k(M) = sum_ij M_ij t_k w_ki (p - w)_kj = 0 for every neuron k, and trace M = 1.
        half = torch.where(i == j, 0.5, 1.0).to(t)
        equations = (w[:, i] * slack[:, j] + w[:, j] * slack[:, i]) * half
        scale = equations.abs().max().clamp_min(torch.finfo(t.dtype).tiny)
        system = torch.cat([equations / scale, (i == j).to(t)[None] * program.neurons])
        right = torch.zeros(len(system), 1, dtype=t.dtype, device=t.device)
        right[-1] = program.neurons
        solution = torch.linalg.lstsq(system, right).solution[:, 0]
        density = torch.zeros(r, r, dtype=t.dtype, device=t.device)
        density[i, j] = solution
        density[j, i] = solution
        shares, mixed = torch.linalg.eigh(density)
        shares = shares.clamp_min(0)
        if bool(shares.isfinite().all()) and float(shares.sum()) > 0:
            responses = responses @ (mixed * (shares / shares.sum()).sqrt())
        else:
            responses = responses[:, -1:]
    return values[-1].expand(responses.shape[1]), responses / math.sqrt(rho)


class LipSDP(Penalty):
    """`lipsdp` with multipliers that follow the weights.

    Every `every`-th call factorises at the current weights and moves the multipliers one step on, at no further
    factorisation. The calls between repeat the last value, with the derivative at its maximiser for the weights of the moment.
    Multipliers that the weights have left outside the cone are pulled inside and refined, or found anew.

    Measured on 64-64-64-10 under Adam (lr 1e-3), the bound at these multipliers is 0.1 % above the optimum, and 1 % early on,
    where the weights change fastest.

    Args:
        model, example, submodule: as for every `Penalty`.
        every: calls for one factorisation, at least 1; None takes 5, or 8 for networks of more than 256 neurons.
        dtype: of the factorisations; None takes float32, which is twice as fast, for networks of more than 256 neurons. Where
            float32 fails, float64 is used.

    Attributes:
        rho: squared bound of the multipliers at the last factorisation.
        fresh: whether the last call factorised.
    """

    def __init__(
        self,
        model: nn.Module | Network,
        example: Tensor | None = None,
        submodule: str | None = None,
        every: int | None = None,
        dtype: torch.dtype | None = None,
        outputs: Outputs | None = None,
        inputs: Inputs | None = None,
    ) -> None:
        if every is not None and every < 1:
            raise UnsupportedQuery(f"LipSDP: every={every!r} must be at least 1.")
        super().__init__(model, example, submodule, outputs, inputs)
        self.every, self.dtype = every, dtype
        self.calls = 0
        self._next: Tensor | None = None  # log of t over its scale: for the next factorisation
        self._last: Tensor | None = None  # and at the last one
        self._moved: Tensor | None = None  # the step between them
        self._rate: Tensor | None = None  # share of the single-coordinate step that is taken
        self.rho = math.nan
        self._contact: Contact | None = None
        self.fresh = False

    def __call__(self, inputs: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logarithm of the bound; `inputs` and `labels` are not read."""
        network = self.network(native=True)
        slopes = self._slopes(network)
        every = self.every or _EVERY[slope_restricted(network).neurons > _SINGLE]
        self.fresh = self._contact is None or self.calls % every == 0
        if self.fresh:
            self._contact = None  # should this fail, the next call tries again
            self._contact = self._factorise(network, slopes)
        assert self._contact is not None
        self.calls += 1
        self.rho = self._contact.rho
        slope = along(network, self._contact, slopes)
        return slope - slope.detach() + 0.5 * math.log(self.rho)

    def certificate(self) -> Certificate:
        """The proven bound of the module at the weights of this moment, from the multipliers carried, refined by counted steps.

        The multipliers found stay for the next call. Where they prove nothing, the product of the layers' norms stands in.

        Raises:
            LipguardError: the module cannot be captured, or has no such bound.
        """
        with one_thread(), torch.no_grad():
            network, query = detached(self.network()), Query((2.0, 2.0), None)
            check(network)
            problem = problem_of(feedback_of(network))
            if not problem.program.sizes or not any(-1 in row for row in (*problem.program.rows, problem.program.out)):
                return Spectral()(network, query)[0]
            program = problem.program.to(self._precision(network))
            notes: list[str] = []
            proposal = None
            try:
                kept = None if self._next is None or self._next.numel() != program.neurons else carried(program, self._next)
                x, scale, found = refined(program, program.interior()[0].log() if kept is None else kept[0], START)
                self._next, self._last, self._moved, self._rate = x - scale, None, None, None
                # As for the Tracker's refinement: single precision finds rho to a few units of 1e-6.
                proposal = Proposal(x.exp().double(), found.largest * (1 + 3e-5), math.nan, 0, inside=True)
            except SolverFailed as failure:
                notes.append(str(failure))
            return proved(network, query, problem, proposal, "lipsdp-neuron", notes)

    def _slopes(self, network: Network) -> Slopes:
        return slope_restricted(network).slopes()

    def _factorise(self, network: Network, slopes: Slopes) -> Contact:
        with torch.no_grad():
            if self._next is None:
                check(network)
            reason = ""
            for dtype in dict.fromkeys((self._precision(network), torch.float64)):
                # Matrices are copied once, in the precision they are used in; operators that are unrolled give float64.
                dense = all(n.map is None or n.map.stored is not None for n in network.nodes)
                plain = detached(network, dtype if dense else torch.float64)
                fixed = slopes[0].detach(), slopes[1].detach()
                problem = problem_of(feedback_of(plain, (fixed[0].to(dtype), fixed[1].to(dtype)) if dense else fixed))
                problem = replace(problem, program=problem.program.to(dtype))
                program = problem.program
                try:
                    x, scale, found = self._follow(program)
                except SolverFailed as failure:
                    reason = str(failure)
                    continue
                self._last = x - scale
                self._next = self._last + self._step(found)
                sizes = found.responses.abs().amax(0)
                felt = sizes > _FELT * sizes.max()
                felt[-1] = True
                t = program.spread(x.exp())
                return contact(problem, plain, fixed, t, found.eigenvalues[felt], found.responses[:, felt])
        self._next = None
        raise SolverFailed(f"the lipsdp penalty has no value at these weights: {reason or 'no multipliers lie in the cone.'}")

    def _precision(self, network: Network) -> torch.dtype:
        return self.dtype or (torch.float32 if slope_restricted(network).neurons > _SINGLE else torch.float64)

    def _step(self, found: Smoothed) -> Tensor:
        """The step that follows a factorisation, coordinate by coordinate shorter where the last one went too far."""
        step = found.step()
        if self._rate is None or self._rate.numel() != step.numel():
            self._rate = torch.ones_like(step)
        elif self._moved is not None:
            # The gradient points back along the last step: it passed the minimum of its coordinate.
            past = self._moved.to(step) * found.gradient > 0
            rate = self._rate.to(step)
            self._rate = torch.where(past, _SHRINK * rate, _GROW * rate).clamp(_SLOWEST, 1.0)
        self._moved = (self._rate * step).clamp(-_LONGEST, _LONGEST)
        return self._moved

    def _follow(self, program: SlopeProgram) -> Followed:
        """Multipliers inside the cone for these weights, and the program there: the last ones carried on, or new ones."""
        if self._next is not None and self._next.numel() == program.neurons:
            found = carried(program, self._next)
            if found is not None and not found[2].largest > _WORSE * self.rho and not effort(found[2]):
                return found
            # Either the weights grew, or the step was too long: the multipliers before it decide.
            before = None if self._last is None else carried(program, self._last)
            if before is not None and (found is None or before[2].largest < found[2].largest):
                self._rate = None if self._rate is None else (_SHRINK * self._rate).clamp_min(_SLOWEST)
                self._moved, found = None, before
            if found is not None and not effort(found[2]):
                return found
            if found is not None:
                self._rate = None
                return refined(program, found[0], effort(found[2]))
        self._rate = None
        return refined(program, program.interior()[0].log(), START)

    def state_dict(self) -> dict[str, Any]:
        """Multipliers, the last maximiser and the count of calls."""
        last = self._contact
        return {
            "calls": self.calls,
            "multipliers": [None if t is None else t.cpu() for t in (self._next, self._last, self._moved, self._rate)],
            "contact": None
            if last is None
            else {"rho": last.rho, "a": [t.cpu() for t in last.a], "b": [t.cpu() for t in last.b]},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        self.calls = state["calls"]
        self._next, self._last, self._moved, self._rate = state["multipliers"]
        last = state["contact"]
        self.rho = math.nan if last is None else last["rho"]
        self._contact = None if last is None else Contact(last["rho"], tuple(last["a"]), tuple(last["b"]))
