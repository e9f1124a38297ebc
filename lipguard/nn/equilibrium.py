"""Equilibrium layers z = phi(W z + U x + b), y = G z + c, well posed and Lipschitz by parametrisation."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lipguard.capture.rules.registry import lowers
from lipguard.capture.trace import Trace, Value
from lipguard.errors import InvalidExample, InvalidModel
from lipguard.network.operators import Dense
from lipguard.nn.fixed_point import Averaging, Budget, Method, Report, Splitting, activation, fixed_point

__all__ = ["ContractiveEquilibrium", "LipschitzEquilibrium"]

_ACCURACY = {torch.float32: 1e-6, torch.float64: 1e-12}
"""Relative residual at which the iteration ends in evaluation; in training `tol` may be larger."""

_REQUIRED = {torch.float32: 1e-5, torch.float64: 1e-9}
"""Relative residual above which it has failed, unless `tol` is larger."""


class Matrices(NamedTuple):
    """z = phi(weight z + inward x + bias), y = outward z + shift."""

    weight: Tensor
    inward: Tensor
    bias: Tensor | None
    outward: Tensor
    shift: Tensor | None


class Equilibrium(nn.Module):
    """Base of the equilibrium layers: their input and output maps, the solve and its report.

    Attributes:
        residual: relative residual of the last forward pass: the largest |z - phi(W z + v)| of a sample over max(|z|, |v|).
        iterations: of the last forward pass.
    """

    method: Method

    def __init__(
        self,
        inputs: int,
        hidden: int,
        outputs: int,
        phi: str,
        negative_slope: float,
        bias: bool,
        tol: float | None,
        max_iterations: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        if min(inputs, hidden, outputs) < 1:
            raise InvalidModel(f"{type(self).__name__}({inputs}, {hidden}, {outputs}): every size must be at least 1.")
        if max_iterations < 1 or (tol is not None and not 0 < tol < 1):
            raise InvalidModel(
                f"max_iterations={max_iterations}, tol={tol}: at least one iteration, and 0 < tol < 1, are needed."
            )
        self.inputs, self.hidden, self.outputs = inputs, hidden, outputs
        self.activation, self.negative_slope, self.phi = phi, negative_slope, activation(phi, negative_slope)
        self.tol, self.max_iterations = tol, max_iterations
        self._report = Report()

        def normal(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(rows, columns, device=device, dtype=dtype) / math.sqrt(columns))

        self.inward, self.outward = normal(hidden, inputs), normal(outputs, hidden)
        self.bias = nn.Parameter(torch.zeros(hidden, device=device, dtype=dtype)) if bias else None
        self.shift = nn.Parameter(torch.zeros(outputs, device=device, dtype=dtype)) if bias else None

    @property
    def residual(self) -> float:
        """Relative residual of the last forward pass."""
        return self._report.residual

    @property
    def iterations(self) -> int:
        """Iterations of the last forward pass."""
        return self._report.iterations

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """W, (hidden, hidden), computed from the parameters in `dtype` (theirs, float32 at least)."""
        raise NotImplementedError

    def matrices(self, dtype: torch.dtype | None = None) -> Matrices:
        """The layer's maps in `dtype`; differentiable in the parameters."""
        dtype = self._computes(dtype)
        bias, shift = (None if p is None else p.to(dtype) for p in (self.bias, self.shift))
        return Matrices(self.weight(dtype), self.inward.to(dtype), bias, self.outward.to(dtype), shift)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (..., outputs) of inputs (..., inputs).

        Raises:
            InvalidExample: another number of features.
            NotConverged: in evaluation mode, the equilibrium is not reached within `max_iterations`; in training a
                `SlowConvergence` warning. Both say the residual.
        """
        z, outward, shift = self._hidden(x)
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.linear(z, outward, shift).to(self.inward.dtype)

    def equilibrium(self, x: Tensor) -> Tensor:
        """z, (..., hidden), for inputs (..., inputs)."""
        return self._hidden(x)[0]

    def _hidden(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        if x.ndim < 1 or x.shape[-1] != self.inputs:
            raise InvalidExample(f"{type(self).__name__} takes {self.inputs} features, not a tensor of shape {tuple(x.shape)}.")
        dtype = self._computes(None)
        with torch.autocast(x.device.type, enabled=False):
            weight, inward, bias, outward, shift = self.matrices(dtype)
            v = nn.functional.linear(x.to(dtype), inward, bias)
            asked = self.tol or _ACCURACY[dtype]
            tol = asked if self.training else min(asked, _ACCURACY[dtype])
            budget = Budget(tol, max(asked, _REQUIRED[dtype]), self.max_iterations, self.training, type(self).__name__)
            rows, self._report = v.reshape(-1, self.hidden), Report()
            z = fixed_point(weight, rows, self.phi, self.method, budget, self._report)  # type: ignore[call-arg]
            return z.reshape(v.shape), outward, shift

    def _computes(self, dtype: torch.dtype | None) -> torch.dtype:
        return dtype or torch.promote_types(self.inward.dtype, torch.float32)

    def extra_repr(self) -> str:
        """Sizes and options for `print`."""
        return f"{self.inputs}, {self.hidden}, {self.outputs}, activation={self.activation!r}"


class LipschitzEquilibrium(Equilibrium):
    """An equilibrium network whose constant from 2-norm to 2-norm is at most `gamma`, whatever its parameters.

    z = phi(W z + U x + b), y = G z + c, with Psi = diag(e^psi), Lambda = Psi^-1 and

        W = I - Psi (G'G / (2 gamma) + Lambda U U' Lambda / (2 gamma) + V'V + m I + S' - S).

    Then 2 Lambda - Lambda W - W'Lambda - (G'G + Lambda U U' Lambda) / gamma = 2 (V'V + m I) > 0, which implies that z exists,
    is unique, and that ||y(x) - y(x')||_2 <= gamma ||x - x'||_2. Psi, U, V, S, G are free.

    Args:
        inputs, hidden, outputs: sizes of x, z and y.
        gamma: the bound; None for a network that is well posed only (the terms in gamma are left out).
        margin: m > 0; smaller ones leave more freedom and make the equilibrium slower to find.
        activation: "relu", "leaky_relu" or "tanh".
        negative_slope: of leaky_relu, 0 to 1.
        bias: whether b and c exist.
        alpha: step of the splitting; None chooses one for each neuron. For tanh it is 1.
        tol: relative residual at which the iteration ends in training, by default and in evaluation 1e-6 in float32 and 1e-12
            in float64. One that ends above max(tol, 1e-5 or 1e-9) has failed.
        max_iterations: of the splitting, forward and backward.
        device, dtype: of the parameters. Half precision is solved in float32.
    Shape:
        (..., inputs) to (..., outputs).

    Source: Revay, Wang, Manchester 2020, arXiv:2010.01732, Theorem 2 and equation (20).
    """

    def __init__(
        self,
        inputs: int,
        hidden: int,
        outputs: int,
        gamma: float | None = 1.0,
        *,
        margin: float = 0.1,
        activation: str = "relu",
        negative_slope: float = 0.01,
        bias: bool = True,
        alpha: float | None = None,
        tol: float | None = None,
        max_iterations: int = 2000,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(inputs, hidden, outputs, activation, negative_slope, bias, tol, max_iterations, device, dtype)
        if gamma is not None and not 0 < gamma < math.inf:
            raise InvalidModel(f"gamma={gamma!r}: a positive number is needed, or None for no bound.")
        if not 0 < margin < math.inf or not (alpha is None or 0 < alpha < math.inf):
            raise InvalidModel(f"margin={margin!r}, alpha={alpha!r}: positive numbers are needed.")
        if activation == "tanh" and alpha not in (None, 1):
            raise InvalidModel(f"alpha={alpha!r}: tanh splits with alpha = 1 only.")
        self.gamma, self.margin = gamma, margin
        self.method = Splitting(1.0 if activation == "tanh" else alpha)
        self.log_psi = nn.Parameter(torch.zeros(hidden, device=device, dtype=dtype))
        self.factor = nn.Parameter(torch.randn(hidden, hidden, device=device, dtype=dtype) / math.sqrt(2 * hidden))
        self.skew = nn.Parameter(torch.randn(hidden, hidden, device=device, dtype=dtype) / math.sqrt(2 * hidden))

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """W, (hidden, hidden)."""
        dtype = self._computes(dtype)
        psi, factor, skew = self.log_psi.to(dtype).exp(), self.factor.to(dtype), self.skew.to(dtype)
        eye = torch.eye(self.hidden, dtype=dtype, device=psi.device)
        inner = factor.T @ factor + self.margin * eye + skew.T - skew
        if self.gamma is not None:
            outward, scaled = self.outward.to(dtype), self.inward.to(dtype) / psi[:, None]
            inner = inner + (outward.T @ outward + scaled @ scaled.T) / (2 * self.gamma)
        return eye - psi[:, None] * inner

    def certificate_matrix(self) -> Tensor:
        """2 Lambda - Lambda W - W'Lambda - (G'G + Lambda U U'Lambda) / gamma, float64: positive definite, from the W in use."""
        weight, inward, _, outward, _ = self.matrices(torch.float64)
        multipliers = torch.diag((-self.log_psi.to(torch.float64)).exp())
        form = 2 * multipliers - multipliers @ weight - weight.T @ multipliers
        if self.gamma is None:
            return form
        scaled = multipliers @ inward
        return form - (outward.T @ outward + scaled @ scaled.T) / self.gamma

    def extra_repr(self) -> str:
        """Sizes and options for `print`."""
        return f"{super().extra_repr()}, gamma={self.gamma}, margin={self.margin}"


class ContractiveEquilibrium(Equilibrium):
    """An equilibrium network that contracts in a weighted maximum norm, whatever its parameters.

    z = phi(A z + U x + b), y = C z + c, with eta = e^log_eta and A = m I + [eta]^-1 T [eta] - diag(|T| 1), m < 1. The matrix
    measure of A in the norm ||[eta] z||_inf is then at most m, z exists and is unique, the averaged iteration finds it, and

        ||y(x) - y(x')||_inf <= ||[eta] U||_inf ||C [eta]^-1||_inf / (1 - max(m, 0)) ||x - x'||_inf.

    Args:
        inputs, hidden, outputs: sizes of x, z and y.
        measure: m < 1; the nearer to 1, the slower the iteration.
        activation, negative_slope, bias, tol, max_iterations, device, dtype: as for `LipschitzEquilibrium`.
    Shape:
        (..., inputs) to (..., outputs).

    Source: Jafarpour, Davydov, Proskurnikov, Bullo 2021, arXiv:2106.03194, Theorems 5 and 6, section 5.
    """

    def __init__(
        self,
        inputs: int,
        hidden: int,
        outputs: int,
        measure: float = 0.5,
        *,
        activation: str = "relu",
        negative_slope: float = 0.01,
        bias: bool = True,
        tol: float | None = None,
        max_iterations: int = 5000,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(inputs, hidden, outputs, activation, negative_slope, bias, tol, max_iterations, device, dtype)
        if not -math.inf < measure < 1:
            raise InvalidModel(f"measure={measure!r}: a number below 1 is needed.")
        self.measure, self.method = measure, Averaging()
        self.coupling = nn.Parameter(torch.randn(hidden, hidden, device=device, dtype=dtype) / hidden)
        self.log_eta = nn.Parameter(torch.zeros(hidden, device=device, dtype=dtype))

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """A, (hidden, hidden)."""
        dtype = self._computes(dtype)
        eta, coupling = self.log_eta.to(dtype).exp(), self.coupling.to(dtype)
        return coupling * eta / eta[:, None] + torch.diag(self.measure - coupling.abs().sum(1))

    def lipschitz_bound(self) -> Tensor:
        """The bound of the constant from inf-norm to inf-norm above, 0-d, differentiable; float arithmetic, not verified.

        The weights eta stand on both sides, as the theorem has them. `lipguard.bound(..., norm=math.inf,
        method="contraction")` is verified and never larger, but for rounding.
        """
        dtype = self._computes(None)
        eta = self.log_eta.to(dtype).exp()
        inward, outward = self.inward.to(dtype) * eta[:, None], self.outward.to(dtype) / eta
        return inward.abs().sum(1).max() * outward.abs().sum(1).max() / (1 - max(self.measure, 0.0))

    def extra_repr(self) -> str:
        """Sizes and options for `print`."""
        return f"{super().extra_repr()}, measure={self.measure}"


@lowers(LipschitzEquilibrium, ContractiveEquilibrium)
def equilibrium(trace: Trace, module: Equilibrium, x: Value) -> int:
    """Input map, implicit layer, output map; the weight is computed from the stored parameters in float64."""
    if x.tensor.ndim != 2:
        trace.refuse(f"is given a value of shape {tuple(x.tensor.shape)}; its rule takes (batch, features). Flatten it first.")
    weight, inward, bias, outward, shift = module.matrices(torch.float64)
    v = trace.affine(x, Dense(trace.constant(inward, "inward")), None if bias is None else trace.constant(bias, "bias"))
    hidden = trace.value(v, x.tensor.new_zeros(len(x.tensor), module.hidden))
    z = trace.value(trace.implicit(hidden, Dense(trace.constant(weight, "weight")), module.phi.elementwise()), hidden.tensor)
    return trace.affine(z, Dense(trace.constant(outward, "outward")), None if shift is None else trace.constant(shift, "shift"))
