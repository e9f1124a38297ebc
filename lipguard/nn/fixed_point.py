"""z = phi(W z + v), solved for a batch by operator splitting or averaging, and differentiated implicitly.

With u' = dphi at the solution and D = diag(u'), (I - D W) dz = D (dW z + dv). The gradient g of a loss in z therefore meets
a = D (I - W'D)^-1 g, the solution of a = D (W'a + g): the same fixed point with the transposed weight and the linear
response D, solved by the same method; then dloss/dv = a and dloss/dW = sum over the batch of a z'.

Sources: Winston, Kolter 2020, arXiv:2006.08591 (splitting, implicit gradient); Jafarpour et al. 2021, arXiv:2106.03194
(averaging).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lipguard.errors import InvalidModel, NotConverged, SlowConvergence
from lipguard.network import Elementwise, activations, smooth


class Response(Protocol):
    """An activation with slopes in [0, 1]: the proximal operator of a convex function f."""

    def __call__(self, p: Tensor) -> Tensor:
        """phi(p) = prox_f(p), entry by entry."""
        ...

    def prox(self, u: Tensor, alpha: Tensor) -> Tensor:
        """prox of alpha_j f, entry by entry."""
        ...


@dataclass(frozen=True)
class Linear:
    """p -> slope p with slopes in [0, 1] by sample and neuron: f(z) = (1 / slope - 1) z^2 / 2."""

    slope: Tensor

    def __call__(self, p: Tensor) -> Tensor:
        """Slope times p."""
        return self.slope * p

    def prox(self, u: Tensor, alpha: Tensor) -> Tensor:
        """u / (1 + alpha (1 / slope - 1)), and 0 where the slope is 0."""
        return self.slope * u / (self.slope + alpha * (1 - self.slope))


@dataclass(frozen=True)
class Rectifier:
    """max(p, slope p), 0 <= slope <= 1: ReLU and LeakyReLU."""

    slope: float = 0.0

    def __call__(self, p: Tensor) -> Tensor:
        """The activation."""
        return torch.where(p > 0, p, self.slope * p)

    def prox(self, u: Tensor, alpha: Tensor) -> Tensor:
        """Nothing is paid for positive values, (1 / slope - 1) z^2 / 2 for negative ones."""
        return torch.where(u > 0, u, self.slope / (self.slope + alpha * (1 - self.slope)) * u)

    def derivative(self, p: Tensor) -> Tensor:
        """The slope at p; the left one at the kink."""
        return torch.where(p > 0, 1.0, self.slope).to(p.dtype)

    def elementwise(self) -> Elementwise:
        """The activation as captured networks hold it."""
        return activations.leaky_relu(self.slope) if self.slope else activations.relu()


@dataclass(frozen=True)
class Tanh:
    """tanh: the prox of alpha f has a closed form for alpha = 1 only, the step it is split with."""

    def __call__(self, p: Tensor) -> Tensor:
        """The activation."""
        return p.tanh()

    def prox(self, u: Tensor, alpha: Tensor) -> Tensor:
        """tanh itself for alpha = 1."""
        return u.tanh()

    def derivative(self, p: Tensor) -> Tensor:
        """1 - tanh^2."""
        return 1 - p.tanh() ** 2

    def elementwise(self) -> Elementwise:
        """The activation as captured networks hold it."""
        return smooth.tanh()


Activation = Rectifier | Tanh


def activation(name: str, slope: float = 0.01) -> Activation:
    """The activation of a name: "relu", "leaky_relu", "tanh".

    Raises:
        InvalidModel: another name, or a slope outside [0, 1].
    """
    if not 0 <= slope <= 1:
        raise InvalidModel(f"negative_slope={slope!r}: the splitting needs slopes from 0 to 1.")
    known: dict[str, Activation] = {"relu": Rectifier(), "leaky_relu": Rectifier(slope), "tanh": Tanh()}
    if name not in known:
        raise InvalidModel(f"activation={name!r}: an equilibrium takes {', '.join(known)}.")
    return known[name]


class Solution(NamedTuple):
    """z, p = W z + v, the relative residual of z, and the iterations it took."""

    z: Tensor
    p: Tensor
    residual: float
    iterations: int


@dataclass(frozen=True)
class Splitting:
    """Peaceman-Rachford splitting: converges for every alpha > 0 where T (I - W) + (I - W)'T > 0 for a diagonal T > 0.

    Steps alpha_j may differ by neuron: in the metric of T / alpha, alpha (I - W) is strongly monotone and the activation,
    being diagonal, is still a prox; the iteration itself does not contain T.

    Attributes:
        alpha: step of every neuron; the speed depends on it, not the solution. None takes 2 over the length of the neuron's
            row of I - W: with random weights of all scales about a tenth of the iterations that alpha = 1 needs.
    """

    alpha: float | None = None

    def __call__(self, weight: Tensor, v: Tensor, response: Response, tol: float, limit: int) -> Solution:
        """Iterate until the residual of every sample is at most tol relative to its largest entry, `limit` times at most."""
        eye = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        if self.alpha is None:
            alpha = 2 / torch.linalg.vector_norm(eye - weight, dim=1).clamp_min(1e-6)
        else:
            alpha = torch.full_like(weight[0], self.alpha)
        inverse = torch.linalg.inv(eye + alpha[:, None] * (eye - weight)).T
        progress = _Progress(tol, _floor(weight))
        z = u = torch.zeros_like(v)
        for iteration in range(1, limit + 1):
            reflected = 2 * z - u
            half = (reflected + alpha * v) @ inverse
            # (1 + alpha) half - alpha W half = reflected + alpha v: the pre-activation of `half` costs no product.
            p = ((1 + alpha) * half - reflected) / alpha
            residual = _residual(half, half - response(p), v)
            if progress.ends(residual) or iteration == limit:
                return Solution(half, p, residual, iteration)
            u = 2 * half - reflected
            z = response.prox(u, alpha)
        raise InvalidModel(f"max_iterations={limit}: at least one is needed.")


@dataclass(frozen=True)
class Averaging:
    """z <- (1 - s) z + s phi(W z + v): contracts by 1 - s (1 - m) where the linf measure of W, weighted, is m in [0, 1).

    s = 1 / (1 - min_i min(W_ii, 0)) makes every diagonal entry of (1 - s) I + s D W nonnegative, so that its weighted
    norm is its weighted measure: 1 - s + s m. The same holds for the 1-norm of the transposed map.
    """

    def __call__(self, weight: Tensor, v: Tensor, response: Response, tol: float, limit: int) -> Solution:
        """As for `Splitting`."""
        step = 1 / (1 - weight.diagonal().amin().clamp_max(0))
        progress = _Progress(tol, _floor(weight))
        z = torch.zeros_like(v)
        for iteration in range(1, limit + 1):
            p = z @ weight.T + v
            error = z - response(p)
            residual = _residual(z, error, v)
            if progress.ends(residual) or iteration == limit:
                return Solution(z, p, residual, iteration)
            z = z - step * error
        raise InvalidModel(f"max_iterations={limit}: at least one is needed.")


Method = Splitting | Averaging


def _residual(z: Tensor, error: Tensor, v: Tensor) -> float:
    """The largest over the samples of |error| relative to |z| and |v|, in the maximum norm; nan counts as inf."""
    if not z.numel():
        return 0.0
    scale = torch.maximum(z.abs().amax(1), v.abs().amax(1)).clamp_min(torch.finfo(z.dtype).tiny)
    worst = float((error.abs().amax(1) / scale).max())
    return worst if worst == worst else float("inf")


@dataclass
class _Progress:
    """When to stop: at the tolerance, or where rounding has made an end of progress, `_PATIENCE` iterations without any."""

    tol: float
    floor: float
    best: float = float("inf")
    waited: int = 0

    def ends(self, residual: float) -> bool:
        self.waited = 0 if residual < self.best else self.waited + 1
        self.best = min(self.best, residual)
        return residual <= self.tol or (residual <= self.floor and self.waited >= _PATIENCE)


_PATIENCE = 10


def _floor(weight: Tensor) -> float:
    """A residual that rounding may leave: sums of independent errors, as rows' 2-norms have them, with room for a few."""
    return 8 * torch.finfo(weight.dtype).eps * (1 + float(torch.linalg.vector_norm(weight.detach(), dim=1).max()))


@dataclass
class Report:
    """Residual and iterations of the last solve of a module."""

    residual: float = 0.0
    iterations: int = 0


@dataclass(frozen=True)
class Budget:
    """How far to iterate, and what to do where that fails: raise, or in training warn.

    Attributes:
        tol: relative residual at which the iteration ends.
        required: relative residual above which it has failed, >= tol.
        limit: iterations at most.
        training: whether a failure is a warning.
        place: the module, for the message.
    """

    tol: float
    required: float
    limit: int
    training: bool
    place: str

    def judge(self, found: Solution, floor: float, what: str) -> None:
        """Say the residual if it is above the tolerance.

        Raises:
            NotConverged: outside of training.
        """
        if found.residual <= max(self.required, floor):
            return
        text = (
            f"{self.place}: the {what} is not reached: the relative residual is {found.residual:.3g} after {found.iterations} "
            f"iterations, {self.required:.3g} is asked for. Raise max_iterations or tol."
        )
        if not self.training:
            raise NotConverged(text)
        warnings.warn(text, SlowConvergence, stacklevel=2)


class _Equilibrium(torch.autograd.Function):
    """(W, v) -> z with the implicit gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, v: Tensor, phi: Activation, method: Method, budget: Budget, report: Report) -> Tensor:
        found = method(weight, v, phi, budget.tol, budget.limit)
        report.residual, report.iterations = found.residual, found.iterations
        budget.judge(found, _floor(weight), "equilibrium")
        ctx.save_for_backward(weight, found.z, phi.derivative(found.p))
        ctx.method, ctx.budget = method, budget
        return found.z

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        (gradient,) = gradients
        weight, z, slope = ctx.saved_tensors
        budget: Budget = ctx.budget
        with torch.autocast(weight.device.type, enabled=False):
            # W'a + g at the solution, times the slope: exact where the slope is 0.
            found = ctx.method(weight.T, gradient, Linear(slope), budget.tol, budget.limit)
            budget.judge(found, _floor(weight.T), "gradient")
            a = slope * found.p
            return a.T @ z if ctx.needs_input_grad[0] else None, a, None, None, None, None


@torch.compiler.disable
def fixed_point(weight: Tensor, v: Tensor, phi: Activation, method: Method, budget: Budget, report: Report) -> Tensor:
    """z = phi(W z + v) for every row of v, differentiable once in W and v.

    Args:
        weight: W, (n, n), float32 or float64.
        v: (batch, n), of the same type.
        phi: the activation.
        method: splitting or averaging; it must converge for this W.
        budget: tolerance, iterations, and whether to warn or raise beyond them.
        report: filled with the residual and the iterations of this solve.
    Raises:
        NotConverged: the residual stays above the tolerance, outside of training.
    """
    return _Equilibrium.apply(weight, v, phi, method, budget, report)  # type: ignore[no-any-return]
