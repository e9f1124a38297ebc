"""A network as mathematics: nodes in topological order, affine maps, activations, sums, coupled and implicit ones.

Values are vectors, one row per sample; everything is float64. A `Network` evaluates itself, states its feedback
form for the semidefinite programs, and carries a digest of its structure and exact weight bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from lipguard.network import implicit
from lipguard.network.activations import Elementwise
from lipguard.network.coupled import Coupling, Sort
from lipguard.network.operators import Conv, Dense, Diagonal, Index, Operator

__all__ = [
    "Activation", "Affine", "Conv", "Coupled", "Coupling", "Dense", "Diagonal", "Elementwise", "Feedback", "Implicit", "Index",
    "Input", "Network", "Node", "Operator", "Sum",
]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Input:
    """The network's input, always node 0."""

    size: int
    name: str = "input"


@dataclass(frozen=True, eq=False)
class Affine:
    """operator(value of `source`) + bias."""

    source: int
    operator: Operator
    bias: Tensor | None = None
    name: str = ""


@dataclass(frozen=True, eq=False)
class Activation:
    """A slope-restricted function applied to every entry of the value of `source`."""

    source: int
    function: Elementwise
    name: str = ""


@dataclass(frozen=True, eq=False)
class Sum:
    """The sum of the values of `sources`, all of one size."""

    sources: tuple[int, ...]
    name: str = ""


@dataclass(frozen=True, eq=False)
class Coupled:
    """A function of groups of entries of the value of `source`: a maximum, a sort, a reflection."""

    source: int
    function: Coupling
    name: str = ""


@dataclass(frozen=True, eq=False)
class Implicit:
    """The solution z of z = function(operator(z) + value of `source`), entry by entry; see `lipguard.network.implicit`."""

    source: int
    operator: Operator
    function: Elementwise
    name: str = ""

    @cached_property
    def slopes(self) -> tuple[Tensor, Tensor]:
        """Slope interval of every neuron, (n,) each, thin ones widened."""
        return implicit.widened(self.function, self.operator.shape[0], self.operator.device)

    @cached_property
    def scaling(self) -> Tensor:
        """T > 0, (n,), that makes the layer well posed in floating point: a proposal, which the checker proves.

        Raises:
            InvalidModel: none is found.
        """
        return implicit.diagonal_scaling(self.operator.dense().detach(), *self.slopes, self.name or "an implicit layer")

    def __call__(self, v: Tensor) -> Tensor:
        """z for inputs (..., n), in float64.

        Raises:
            InvalidModel: the layer is not known to be well posed.
        """
        _ = self.scaling
        return implicit.equilibrium(self.operator.dense(), v, self.function, *self.slopes, self.name)


Node = Input | Affine | Activation | Implicit | Sum | Coupled


@dataclass(frozen=True, eq=False)
class Feedback:
    """p = A x + B w + b, w = phi(p), y = C w + D x + c, in blocks, one row of blocks per activation node.

    Attributes:
        inputs: d, the number of inputs.
        sizes: neurons of each activation node.
        rows: for activation k, the blocks by source: -1 is x (a block of A), l >= 0 is w_l (a block of B, l < k, and l = k
            where the activation is that of an implicit layer).
        out: the blocks of y by source, likewise (D under -1, C under l).
        alpha, beta: slope interval of every neuron, concatenated, shape (sum of sizes,).
        outputs: m, the number of outputs.
        groups: index of the multiplier of each neuron, (sum of sizes,), where some must share one: the neurons of a sort,
            of which only the sum of squares is known not to grow. None for one each.
        scaling: for an implicit layer k, multipliers (n_k,) under which it alone is well posed.
    """

    inputs: int
    outputs: int
    sizes: tuple[int, ...]
    rows: tuple[Mapping[int, Tensor], ...]
    out: Mapping[int, Tensor]
    alpha: Tensor
    beta: Tensor
    groups: Tensor | None = None
    scaling: Mapping[int, Tensor] = field(default_factory=dict)

    @cached_property
    def slices(self) -> tuple[slice, ...]:
        """Place of each activation node's neurons among all neurons."""
        ends = (0, *accumulate(self.sizes))
        return tuple(slice(a, b) for a, b in pairwise(ends))

    def dense(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A (n, d), B (n, n), C (m, n), D (m, d) as dense float64 matrices."""
        n = sum(self.sizes)
        options = {"dtype": torch.float64, "device": self.alpha.device}
        q, y = torch.zeros(n, n + self.inputs, **options), torch.zeros(self.outputs, n + self.inputs, **options)
        for row, blocks in zip(self.slices, self.rows, strict=True):
            for source, block in blocks.items():
                q[row, self._columns(source)] = block
        for source, block in self.out.items():
            y[:, self._columns(source)] = block
        return q[:, n:], q[:, :n], y[:, :n], y[:, n:]

    def _columns(self, source: int) -> slice:
        n = sum(self.sizes)
        return slice(n, n + self.inputs) if source < 0 else self.slices[source]


@dataclass(frozen=True, eq=False)
class Network:
    """Nodes in topological order; node 0 is the `Input`, the last node is the output."""

    nodes: tuple[Node, ...]

    @property
    def inputs(self) -> int:
        """Number of inputs d."""
        node = self.nodes[0]
        assert isinstance(node, Input)
        return node.size

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Length of every node's value."""
        sizes: list[int] = []
        for node in self.nodes:
            match node:
                case Input(size=size):
                    sizes.append(size)
                case Affine():
                    sizes.append(node.operator.shape[0])
                case Activation() | Implicit():
                    sizes.append(sizes[node.source])
                case Sum():
                    sizes.append(sizes[node.sources[0]])
                case Coupled():
                    sizes.append(node.function.outputs)
        return tuple(sizes)

    @property
    def outputs(self) -> int:
        """Number of outputs m."""
        return self.sizes[-1]

    @cached_property
    def activations(self) -> tuple[int, ...]:
        """Indices of the activation nodes, implicit ones among them, and of tied neurons in `slope_restricted`.

        There, this is the order of the multipliers.
        """
        return tuple(i for i, node in enumerate(self.nodes) if isinstance(node, Activation | Implicit) or _tied(node) is not None)

    @property
    def neurons(self) -> int:
        """Number of neurons n of the feedback form."""
        network = self.slope_restricted
        return sum(network.sizes[i] for i in network.activations)

    @cached_property
    def elementwise(self) -> Network:
        """The same function without coupled nodes, for methods that look at one neuron at a time; itself if it has none."""
        from lipguard.network.rewriting import elementwise

        return elementwise(self)

    @cached_property
    def slope_restricted(self) -> Network:
        """The network whose feedback form LipSDP takes; itself without coupled nodes."""
        from lipguard.network.rewriting import slope_restricted

        return slope_restricted(self)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        for node in self.nodes:
            if isinstance(node, Affine | Implicit):
                return node.operator.device
        for node in self.nodes:
            if isinstance(node, Activation | Coupled) and node.function.tensors():
                return node.function.tensors()[0].device
        return torch.device("cpu")

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs (batch, m) of inputs (batch, d), in float64."""
        return self.values(x)[-1]

    def values(self, x: Tensor) -> list[Tensor]:
        """Value of every node, each (batch, size), for inputs (batch, d)."""
        values: list[Tensor] = []
        for node in self.nodes:
            match node:
                case Input():
                    values.append(x.to(self.device, torch.float64))
                case Affine():
                    y = node.operator(values[node.source])
                    values.append(y if node.bias is None else y + node.bias)
                case Activation() | Coupled():
                    values.append(node.function(values[node.source]))
                case Implicit():
                    values.append(node(values[node.source]))
                case Sum():
                    values.append(torch.stack([values[s] for s in node.sources]).sum(0))
        return values

    def with_outputs(self, matrix: Tensor) -> Network:
        """The network followed by the linear map `matrix`, shape (k, m): for class pairs and margins."""
        return Network((*self.nodes, Affine(len(self.nodes) - 1, Dense(matrix.to(self.device, torch.float64)), None, "outputs")))

    def feedback(self, slopes: tuple[Tensor, Tensor] | None = None) -> Feedback:
        """The network's feedback form, coupled nodes rewritten.

        Args:
            slopes: (alpha, beta), each (n,), in place of the activations' global slope intervals; tied neurons keep [-1, 1].
        """
        if self.slope_restricted is not self:
            return self.slope_restricted.feedback(slopes)
        # Every value is a linear combination of x (-1) and of activations' outputs; a float stands for that
        # multiple of the identity, so that no identity matrix of the input's size is ever formed.
        position = {node: k for k, node in enumerate(self.activations)}
        linear: list[dict[int, Tensor | float]] = []
        for i, node in enumerate(self.nodes):
            match node:
                case Input():
                    linear.append({-1: 1.0})
                case Affine():
                    linear.append({s: _after(node.operator, m) for s, m in linear[node.source].items()})
                case Activation() | Implicit() | Coupled():
                    linear.append({position[i]: 1.0})
                case Sum():
                    total: dict[int, Tensor | float] = {}
                    for source in node.sources:
                        for s, m in linear[source].items():
                            total[s] = _plus(total[s], m) if s in total else m
                    linear.append(total)
        alpha, beta = self.slopes()
        groups = self._groups()
        if slopes is not None:
            # What is known of a tied neuron is known of its group only: it has no slope interval of its own.
            own = torch.ones_like(alpha, dtype=torch.bool) if groups is None else torch.bincount(groups)[groups] == 1
            alpha, beta = (torch.where(own, given, known) for given, known in zip(slopes, (alpha, beta), strict=True))
        rows = tuple(self._matrices(linear[self.nodes[i].source]) for i in self.activations)  # type: ignore[union-attr]
        scaling: dict[int, Tensor] = {}
        for k, i in enumerate(self.activations):
            node = self.nodes[i]
            if isinstance(node, Implicit):
                rows[k][k], scaling[k] = node.operator.dense(), node.scaling
        sizes = tuple(self.sizes[i] for i in self.activations)
        return Feedback(self.inputs, self.outputs, sizes, rows, self._matrices(linear[-1]), alpha, beta, groups, scaling)

    def slopes(self) -> tuple[Tensor, Tensor]:
        """Slope interval of every neuron on all of R, concatenated over the activation nodes; [-1, 1] for tied neurons."""
        if self.slope_restricted is not self:
            return self.slope_restricted.slopes()
        ends: tuple[list[Tensor], list[Tensor]] = ([], [])
        one = torch.ones((), dtype=torch.float64)
        for i in self.activations:
            node = self.nodes[i]
            slopes = node.function.slopes if isinstance(node, Activation | Implicit) else (-one, one)
            for end, slope in zip(ends, slopes, strict=True):
                end.append(slope.to(self.device, torch.float64).expand(self.sizes[i]))
        empty = torch.zeros(0, dtype=torch.float64, device=self.device)
        return torch.cat([empty, *ends[0]]), torch.cat([empty, *ends[1]])

    def _groups(self) -> Tensor | None:
        if not any(_tied(node) is not None for node in self.nodes):
            return None
        parts, count = [], 0
        for i in self.activations:
            tied = _tied(self.nodes[i])
            size = self.sizes[i]
            label = torch.arange(size, device=self.device) if tied is None else tied.groups(size).to(self.device)
            parts.append(count + label)
            count += int(label.max()) + 1 if size else 0
        return torch.cat(parts)

    def _matrices(self, combination: dict[int, Tensor | float]) -> dict[int, Tensor]:
        size = {-1: self.inputs} | {k: self.sizes[i] for k, i in enumerate(self.activations)}
        eye = torch.eye
        return {
            s: m if isinstance(m, Tensor) else m * eye(size[s], dtype=torch.float64, device=self.device)
            for s, m in combination.items()
        }

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the structure and the exact bits of every weight, as hexadecimal text."""
        sha = hashlib.sha256(b"lipguard network 2\n")
        for node in self.nodes:
            match node:
                case Input():
                    sha.update(f"input {node.size}\n".encode())
                case Affine():
                    sha.update(f"affine {node.source} {_structure(node.operator)} {node.bias is not None}\n".encode())
                    for tensor in (*node.operator.tensors(), *(() if node.bias is None else (node.bias,))):
                        sha.update(_bits(tensor))
                case Activation():
                    sha.update(f"activation {node.source} {node.function.name}\n".encode())
                    for tensor in node.function.tensors():
                        sha.update(_bits(tensor))
                case Implicit():
                    sha.update(f"implicit {node.source} {_structure(node.operator)} {node.function.name}\n".encode())
                    for tensor in (*node.operator.tensors(), *node.function.tensors()):
                        sha.update(_bits(tensor))
                case Sum():
                    sha.update(f"sum {node.sources}\n".encode())
                case Coupled():
                    sha.update(f"coupled {node.source} {_structure(node.function)}\n".encode())
                    for tensor in node.function.tensors():
                        sha.update(_bits(tensor))
        return sha.hexdigest()


def _bits(tensor: Tensor) -> bytes:
    plain = tensor.detach().to("cpu", torch.float64).contiguous()
    return f"{tuple(plain.shape)}".encode() + plain.numpy().tobytes()


def _tied(node: Node) -> Sort | None:
    """The sort whose entries are neurons with one multiplier a group."""
    function = node.function if isinstance(node, Coupled) else None
    return function if isinstance(function, Sort) and function.centred else None


def _structure(operator: Operator | Coupling) -> str:
    """Everything about an operator but its coefficients: strides and paddings make another map of the same weight."""
    shape = "" if isinstance(operator, Coupling) else str(operator.shape)
    named = ((field.name, getattr(operator, field.name)) for field in fields(operator)) if is_dataclass(operator) else ()
    plain = [f"{name}={value!r}" for name, value in named if not isinstance(value, Tensor)]
    return " ".join((type(operator).__name__, shape, *plain))


def _after(operator: Operator, matrix: Tensor | float) -> Tensor | float:
    if isinstance(matrix, Tensor):
        return operator(matrix.T).T
    scalar = operator.scalar()
    return matrix * scalar if scalar is not None else matrix * operator.dense()


def _plus(a: Tensor | float, b: Tensor | float) -> Tensor | float:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a + b
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        matrix, number = (a, b) if isinstance(a, Tensor) else (b, a)
        assert isinstance(matrix, Tensor) and isinstance(number, float)
        return matrix + number * torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    return a + b
