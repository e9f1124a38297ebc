"""`local`: each sample's Lipschitz bound on a ball around it, differentiable and batched.

Source: Huang, Zhang, Shi, Kolter, Anandkumar 2021, arXiv:2111.01395.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lipguard.errors import InvalidExample, UnsupportedQuery
from lipguard.network import Activation, Affine, Network, Operator, Sum, Walk
from lipguard.penalties.base import Penalty
from lipguard.penalties.intervals import Interval, _image, row_lengths, through
from lipguard.penalties.norms import random_unit
from lipguard.penalties.spectral import Vectors
from lipguard.query import Inputs, Outputs


@dataclass(frozen=True, eq=False)
class LocalBounds:
    """What is known of each sample's ball.

    Attributes:
        logits: (B, m).
        features: constant of the map to the last affine layer's input on the ball, (B,).
        hidden: box that holds the last affine layer's input, lower and upper (B, n).
        last: the last affine layer.
        constant: bound of the whole network's constant on the ball, (B,).
    """

    logits: Tensor
    features: Tensor
    hidden: Interval
    last: Affine
    constant: Tensor


def local(
    network: Network, inputs: Tensor, radius: float, vectors: Vectors | None = None, iterations: int = 2
) -> tuple[LocalBounds, Vectors]:
    """Local bounds on the 2-balls of a batch: prod_l ||D_l W_l D_{l-1}||, D_l the steepest slopes that the ball allows.

    Row and column of a neuron that has slope 0 on the whole ball are dropped. The intervals of pre-activations are those of
    interval arithmetic and of the ball of radius times the norms so far, whichever is smaller. The norms come from
    power iteration, which approaches them from below: for training, not for a certificate.

    Args:
        network: a chain of affine maps and activations, weights in the autograd graph.
        inputs: (B, ...), flattened to (B, d).
        radius: of the balls, in the 2-norm.
        vectors: what an earlier call returned, one for each layer; None starts at random with ten times the iterations.
        iterations: power iterations for every sample and layer.
    Raises:
        UnsupportedQuery: the network is not a chain that ends in an affine map.
    """
    steps = layers(network)
    weights = steps[0][0].operator.tensors()[0]
    x = inputs.detach().flatten(1).to(weights)
    old = vectors or {}
    found: Vectors = {}
    lower, upper = x - radius, x + radius
    constant = x.new_ones(len(x))
    mask: Tensor | None = None
    z = x
    for k, (affine, activation) in enumerate(steps):
        operator = affine.operator
        if activation is None:
            norm, found[k] = _masked_norm(operator, mask, None, old.get(k), iterations, len(x))
            z = operator(z) if affine.bias is None else operator(z) + affine.bias
            return LocalBounds(z, constant, (lower, upper), affine, constant * norm), found
        z = operator(z) if affine.bias is None else operator(z) + affine.bias
        low, high = through(operator, affine.bias, (lower, upper))
        reach = (radius * constant)[:, None] * row_lengths(operator, x)
        low, high = torch.maximum(low, z - reach), torch.minimum(high, z + reach)
        slopes = activation.function.slope_range(low, high)
        steepest = torch.maximum(slopes[0].abs(), slopes[1].abs()).to(x)
        norm, found[k] = _masked_norm(operator, mask, steepest, old.get(k), iterations, len(x))
        constant = constant * norm
        mask = (steepest.detach() > 0).to(x)
        image = _image(activation, low, high)
        z = activation.function(z).to(x)
        lower, upper = image[0].to(x), image[1].to(x)
    raise AssertionError("layers() ends with an affine map")


Steps = list[tuple[Affine, Activation | None]]


def layers(network: Network) -> Steps:
    """The affine maps of a chain, each with the activation behind it; the last has none.

    Raises:
        UnsupportedQuery: the network branches, or has two activations or affine maps in a row.
    """
    refused = "a local bound of this kind needs a chain of affine maps and activations that ends in an affine map, and {}."
    result: Steps = []
    for i, node in enumerate(network.nodes[1:], 1):
        if node.sources != (i - 1,):
            raise UnsupportedQuery(refused.format(f"{node.name or f'node {i}'} joins branches. Use the lipsdp_local penalty"))
        node.meet(_Chain(result, refused), i, None)
    if not result or result[-1][1] is not None:
        raise UnsupportedQuery(refused.format("the last one is an activation"))
    return result


class _Chain(Walk[None]):
    """Takes the next node of a chain in."""

    lacks = "no local bound is known"

    def __init__(self, steps: Steps, refused: str) -> None:
        self.steps, self.refused = steps, refused

    def affine(self, i: int, node: Affine, read: None) -> None:
        if self.steps and self.steps[-1][1] is None:
            raise UnsupportedQuery(self.refused.format(f"{node.name} follows another affine map"))
        self.steps.append((node, None))

    def activation(self, i: int, node: Activation, read: None) -> None:
        if not self.steps or self.steps[-1][1] is not None:
            raise UnsupportedQuery(self.refused.format(f"{node.name} does not follow an affine map"))
        self.steps[-1] = (self.steps[-1][0], node)

    def total(self, i: int, node: Sum, *read: None) -> None:
        """A sum of one term changes nothing."""


def _masked_norm(
    operator: Operator, before: Tensor | None, after: Tensor | None, vector: Tensor | None, iterations: int, rows: int
) -> tuple[Tensor, Tensor]:
    """||diag(after) W diag(before)|| for every row of the masks, (B,), and a right singular vector to go on from, (in,)."""

    def applied(v: Tensor) -> Tensor:
        out = operator(v if before is None else v * before)
        return out if after is None else out * after

    if before is None and after is None:
        rows = 1
    with torch.no_grad():
        like = operator.tensors()[0] if before is None else before
        start = random_unit(operator.shape[1], like) if vector is None else vector.to(like)
        v = start.expand(rows, -1)
        adjoint = operator.transpose()
        tiny = torch.finfo(like.dtype).tiny
        for _ in range(iterations if vector is not None else 10 * iterations):
            u = applied(v)
            back = adjoint(u if after is None else u * after)
            v = back if before is None else back * before
            v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp_min(tiny)
        # The signs of a singular vector are arbitrary: align them before the mean.
        signs = torch.where(v @ start < 0, -1.0, 1.0).to(v)
        mean = (signs[:, None] * v).mean(0)
        length = torch.linalg.vector_norm(mean)
        mean = mean / length if bool(length > 1e-6) else start
    # A small root keeps the derivative finite where a ball leaves no neuron of a layer any slope.
    return (applied(v).square().sum(1) + tiny).sqrt(), mean


class Local(Penalty):
    """Mean over a batch of the logarithm of each sample's local bound.

    Args:
        model, example, submodule: as for every `Penalty`.
        radius: of the balls around the samples, in the 2-norm and the units of the network's input.
        iterations: power iterations a call.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"inputs"})

    def __init__(
        self,
        model: nn.Module | Network,
        example: Tensor | None = None,
        submodule: str | None = None,
        radius: float = 0.1,
        iterations: int = 2,
        outputs: Outputs | None = None,
        inputs: Inputs | None = None,
    ) -> None:
        if not radius >= 0:
            raise UnsupportedQuery(f"Local: radius={radius!r} must be at least 0.")
        super().__init__(model, example, submodule, outputs, inputs)
        self.radius, self.iterations = radius, iterations
        self.vectors: Vectors = {}

    def bounds(self, inputs: Tensor | None) -> LocalBounds:
        """The batch's local bounds; the singular vectors move one step on.

        Raises:
            InvalidExample: no inputs are given.
        """
        if inputs is None:
            raise InvalidExample(f"the {type(self).__name__} penalty needs the batch's inputs: call penalty(inputs, labels).")
        bounds, self.vectors = local(self.network(native=True), inputs, self.radius, self.vectors, self.iterations)
        return bounds

    def __call__(self, inputs: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Mean log bound over the inputs; `labels` are not read."""
        constant = self.bounds(inputs).constant
        # A sample whose ball leaves the network constant counts 1e-6 of the largest: a logarithm of 0 has no mean.
        return constant.clamp_min(1e-6 * float(constant.detach().max()) + torch.finfo(constant.dtype).tiny).log().mean()

    def state_dict(self) -> dict[str, Any]:
        """The singular vectors."""
        return {"vectors": {i: v.cpu() for i, v in self.vectors.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        self.vectors = dict(state["vectors"])
