"""`spectral`: the logarithm of the product of the layers' norms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lipguard.network import Activation, Affine, Coupled, Input, Network, Operator, Sum, Walk
from lipguard.penalties.base import Penalty
from lipguard.penalties.norms import operator_norm
from lipguard.query import Inputs, Outputs

Vectors = dict[int, Tensor]
"""Right singular vectors by node, carried from step to step."""


def spectral(network: Network, vectors: Vectors | None = None, iterations: int = 1) -> tuple[Tensor, Vectors]:
    """Logarithm of the product of the layers' spectral norms along the network's graph.

    For a chain of 1-Lipschitz activations this is the sum of log ||W_l||; other activations add the logarithm of
    their steepest slope, and where branches meet their products are summed.

    Args:
        network: with its weights in the autograd graph (`capture(..., live=True)`).
        vectors: what an earlier call returned; None iterates every layer until it settles.
        iterations: power iterations for each layer with a vector.
    Returns:
        The penalty, 0-d, and the vectors for the next call.
    Source: the bound of Szegedy et al. 2014, section 4.3; regularised as in Yoshida, Miyato 2017, arXiv:1705.10941.
    """
    old = vectors or {}
    found: Vectors = {}

    def log_norm(index: int, operator: Operator) -> Tensor:
        norm, vector = operator_norm(operator, old.get(index), iterations)
        if vector is not None:
            found[index] = vector
        return log(norm)

    return log_product(network, log_norm), found


def log_product(network: Network, log_norm: Callable[[int, Operator], Tensor]) -> Tensor:
    """Logarithm of the product of norms along the graph, sums where branches meet, from each affine node's log norm."""
    return network.fold(_LogProduct(network, log_norm))[-1]


class _LogProduct(Walk[Tensor]):
    lacks = "no differentiable norm is known"

    def __init__(self, network: Network, log_norm: Callable[[int, Operator], Tensor]) -> None:
        self.zero = torch.zeros((), dtype=torch.float64, device=network.device)
        self.log_norm = log_norm

    def input(self, i: int, node: Input) -> Tensor:
        return self.zero

    def affine(self, i: int, node: Affine, read: Tensor) -> Tensor:
        return read + self.log_norm(i, node.operator)

    def activation(self, i: int, node: Activation, read: Tensor) -> Tensor:
        return read + log(node.function.steepest.amax().to(self.zero.device))

    def coupled(self, i: int, node: Coupled, read: Tensor) -> Tensor:
        return read + math.log(node.function.norm(2))

    def total(self, i: int, node: Sum, *read: Tensor) -> Tensor:
        return torch.logsumexp(torch.stack(read), 0)


def log(norm: Tensor) -> Tensor:
    """log of a norm; that of a layer of zeros is finite, with gradient 0."""
    return norm.clamp_min(torch.finfo(norm.dtype).tiny).log()


class Spectral(Penalty):
    """`spectral` with its singular vectors carried from call to call.

    Args:
        model, example, submodule: as for every `Penalty`.
        iterations: power iterations a call.
    """

    def __init__(
        self,
        model: nn.Module | Network,
        example: Tensor | None = None,
        submodule: str | None = None,
        iterations: int = 1,
        outputs: Outputs | None = None,
        inputs: Inputs | None = None,
    ) -> None:
        super().__init__(model, example, submodule, outputs, inputs)
        self.iterations = iterations
        self.vectors: Vectors = {}

    def __call__(self, inputs: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logarithm of the product of the layers' norms; `inputs` and `labels` are not read."""
        value, self.vectors = spectral(self.network(native=True), self.vectors, self.iterations)
        return value

    def state_dict(self) -> dict[str, Any]:
        """The singular vectors."""
        return {"vectors": {i: v.cpu() for i, v in self.vectors.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        self.vectors = dict(state["vectors"])
