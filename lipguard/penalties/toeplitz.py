"""`toeplitz`: the logarithm of the product of layer bounds, with a closed formula for convolutions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lipguard.errors import UnsupportedQuery
from lipguard.network import Conv, Network, Operator
from lipguard.penalties.base import Penalty
from lipguard.penalties.norms import operator_norm
from lipguard.penalties.spectral import Vectors, log, log_product
from lipguard.query import Inputs, Outputs


def convolution_bound(conv: Conv, samples: int = 10) -> Tensor:
    """Bound of a convolution's norm from 2 to 2, 0-d and differentiable.

    sqrt(sum_i max_w sum_j |f_ij(w)|^2), f_ij the kernel's trigonometric polynomials, i over the side with fewer channels,
    the maximum over a grid of `samples` points in each dimension. sum_j |f_ij|^2 has degree k - 1: between the points it
    exceeds the grid's maximum by at most prod (1 - 2 (k - 1) / samples)^(-1/2) over the dimensions, whose square root is
    multiplied in. Strides only leave outputs out; dilation only rearranges frequencies; zero padding restricts the input.

    Args:
        conv: a convolution or its adjoint, weight (o, i / groups, *kernel).
        samples: S; raised to 4 (k - 1) where it is smaller, so that the correction is at most sqrt(2) for two dimensions.
    Source: Araujo et al. 2021, arXiv:2006.08391, Theorem 2; correction of Pfister, Bresler 2018.
    Rounding: none is accounted for; a penalty, never a proof.
    """
    kernel = conv.weight.shape[2:]
    grid = [max(samples, 4 * (k - 1), 1) for k in kernel]
    parts = conv.weight.reshape(conv.groups, -1, *conv.weight.shape[1:])
    symbol = torch.fft.fftn(parts, s=grid, dim=tuple(range(3, 3 + len(kernel))))
    power = (symbol.real.square() + symbol.imag.square()).flatten(3)
    rows, columns = power.shape[1:3]
    # (groups, o / groups, i / groups, grid): the sum over the larger side inside, over the smaller one outside.
    square = power.sum(2 if rows <= columns else 1).amax(-1).sum(-1).amax()
    correction = math.prod((1 - 2 * (k - 1) / s) ** -0.25 for k, s in zip(kernel, grid, strict=True))
    return correction * square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()


def toeplitz(network: Network, vectors: Vectors | None = None, iterations: int = 1, samples: int = 10) -> tuple[Tensor, Vectors]:
    """Logarithm of the product of layer bounds: `convolution_bound` for convolutions, power iteration for matrices.

    Args:
        network: with its weights in the autograd graph.
        vectors, iterations: for matrices, as for `spectral`.
        samples: grid points in each dimension.
    Returns:
        The penalty, 0-d, and the vectors for the next call.
    Source: Araujo et al. 2021, arXiv:2006.08391, section 5: there with weight 0.008 and S = 10 on CIFAR.
    """
    old = vectors or {}
    found: Vectors = {}

    def log_norm(index: int, operator: Operator) -> Tensor:
        conv = operator.convolution
        if conv is not None:
            return log(convolution_bound(conv, samples))
        norm, vector = operator_norm(operator, old.get(index), iterations)
        if vector is not None:
            found[index] = vector
        return log(norm)

    return log_product(network, log_norm), found


class Toeplitz(Penalty):
    """`toeplitz` with the singular vectors of the matrices carried from call to call.

    Args:
        model, example, submodule: as for every `Penalty`.
        iterations: power iterations a call.
        samples: grid points in each dimension, at least 1.
    """

    def __init__(
        self,
        model: nn.Module | Network,
        example: Tensor | None = None,
        submodule: str | None = None,
        iterations: int = 1,
        samples: int = 10,
        outputs: Outputs | None = None,
        inputs: Inputs | None = None,
    ) -> None:
        if samples < 1:
            raise UnsupportedQuery(f"Toeplitz: samples={samples!r} must be at least 1.")
        super().__init__(model, example, submodule, outputs, inputs)
        self.iterations, self.samples = iterations, samples
        self.vectors: Vectors = {}

    def __call__(self, inputs: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logarithm of the product of layer bounds; `inputs` and `labels` are not read."""
        value, self.vectors = toeplitz(self.network(native=True), self.vectors, self.iterations, self.samples)
        return value

    def state_dict(self) -> dict[str, Any]:
        """The singular vectors."""
        return {"vectors": {i: v.cpu() for i, v in self.vectors.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        self.vectors = dict(state["vectors"])
