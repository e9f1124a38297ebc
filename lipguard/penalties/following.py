"""Multipliers that follow the weights from step to step: in proportion to their scale, with counted refinements."""

from __future__ import annotations

import torch
from torch import Tensor

from lipguard.errors import SolverFailed
from lipguard.programs.slope_program import SlopeProgram
from lipguard.solvers.first_order import Smoothed, derivatives, smoothed
from lipguard.solvers.lbfgs import lbfgs

SMOOTHING = 16.0
"""Schatten norm of the refinements' objective."""

START, AGAIN = 60, 6
"""Factorisations spent on new multipliers, and on some that the weights have left far behind."""

_UNFELT = 1e-6
"""Least scale of a neuron's multiplier relative to that of the neuron with the largest effect in its layer."""

_FAR, _LOST = 0.25, 4.0
"""Decrease of log rho promised by single-coordinate steps from which these no longer follow, and from which the weights count
as new: loaded, or jumped."""

Followed = tuple[Tensor, Tensor, Smoothed]
"""log t of the program, the logarithm of its scale neuron by neuron, both (n,), and the program's derivatives there."""


def carried(program: SlopeProgram, relative: Tensor) -> Followed | None:
    """Multipliers in the proportion exp(relative) to their scale; None outside the cone.

    With S_k what the layers behind leave on layer k, the pivot is 2 T_k - S_k: diag S_k is the scale of T_k, and the
    proportion stays what it is when a layer's weights, or all, grow.
    """
    relative = relative.to(**program.options)  # type: ignore[arg-type]
    x, scale = torch.empty_like(relative), torch.empty_like(relative)

    def multipliers(k: int, own: Tensor | None) -> Tensor:
        here = program.slices[k]
        scale[here] = _scale(own, scale[here])
        x[here] = relative[here] + scale[here]
        return x[here].exp()

    try:
        eliminated = program.eliminate(multipliers)
    except SolverFailed:
        return None
    found = derivatives(program, x.exp(), eliminated, SMOOTHING)
    return None if found is None else (x, scale, found)


def effort(found: Smoothed) -> int:
    """Factorisations to spend on multipliers before they are used: 0 where the single-coordinate steps follow."""
    promised = -float(found.gradient @ found.step())
    return 0 if promised < _FAR else AGAIN if promised < _LOST else START


def _scale(own: Tensor | None, like: Tensor) -> Tensor:
    if own is None:
        return torch.zeros_like(like)
    diagonal = own.diagonal()
    # A neuron that the output hardly feels has a multiplier all the same.
    return diagonal.clamp_min(_UNFELT * float(diagonal.max())).clamp_min(torch.finfo(own.dtype).tiny).log()


def refined(program: SlopeProgram, x: Tensor, evaluations: int) -> Followed:
    """The best of some quasi-Newton steps, their cost counted and not timed: every run of a training takes the same."""
    best: tuple[Tensor, Smoothed] | None = None
    used = 0

    def value(x: Tensor) -> Smoothed | None:
        nonlocal best, used
        used += 1
        if used > evaluations:
            return None  # a line search takes this for a point outside the cone, and ends
        found = smoothed(program, x, SMOOTHING)
        if found is not None and (best is None or found.largest < best[1].largest):
            best = x, found
        return found

    def ends(values: list[float]) -> bool:
        return used >= evaluations or (len(values) > 10 and values[-11] - values[-1] < 1e-3)

    if program.neurons:
        lbfgs(value, x, 30, ends, floor=0.1)
    else:
        value(x)
    if best is None:
        raise SolverFailed("the output does not feel the input, or no multipliers lie in the cone in floating point.")
    x, scale = best[0], torch.empty_like(best[0])

    def multipliers(k: int, own: Tensor | None) -> Tensor:
        here = program.slices[k]
        scale[here] = _scale(own, scale[here])
        return x[here].exp()

    program.eliminate(multipliers)
    return x, scale, best[1]
