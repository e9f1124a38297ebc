"""`Network`: the certified object, nodes in topological order, and its digest."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from lipguard.network.nodes import Affine, Input, Node
from lipguard.network.operators import Dense
from lipguard.network.walk import Walk, fold, last, pull
from lipguard.rendering import line

T = TypeVar("T")


@dataclass(frozen=True, eq=False, repr=False)
class Network:
    """Nodes in topological order; node 0 is the `Input`, the last node is the output."""

    nodes: tuple[Node, ...]

    def __repr__(self) -> str:
        counts = {"inputs": self.inputs, "outputs": self.outputs, "nodes": len(self.nodes), "neurons": self.neurons}
        return line("Network", [f"{count} {name}" for name, count in counts.items()])

    @property
    def inputs(self) -> int:
        """Number of inputs d."""
        return self.sizes[0]

    @property
    def respect(self) -> str:
        """With respect to what the constant is, in words, where the inputs are some of several tensors; else nothing."""
        name = self.nodes[0].name
        return "" if name == "input" else f"with respect to {name}{' jointly' if ', ' in name else ''}"

    @property
    def outputs(self) -> int:
        """Number of outputs m."""
        return self.sizes[-1]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Length of every node's value."""
        sizes: list[int] = []
        for node in self.nodes:
            sizes.append(node.length([sizes[s] for s in node.sources]))
        return tuple(sizes)

    @cached_property
    def activations(self) -> tuple[int, ...]:
        """Indices of the nodes of neurons: activations, implicit layers, and groups of tied neurons.

        In `lipguard.programs.slope_restricted` this is the order of the multipliers.
        """
        return tuple(i for i, node in enumerate(self.nodes) if node.slopes is not None or node.tied is not None)

    @property
    def neurons(self) -> int:
        """Number of neurons: the lengths of the nodes of `activations`, added up."""
        return sum(self.sizes[i] for i in self.activations)

    def slopes(self) -> tuple[Tensor, Tensor]:
        """Slope interval of every neuron on all of R, in the order of `activations`; [-1, 1] for tied neurons. (n,) each."""
        one = torch.ones((), dtype=torch.float64)
        ends = [self.nodes[i].slopes or (-one, one) for i in self.activations]
        empty = torch.zeros(0, dtype=torch.float64, device=self.device)
        alpha, beta = (
            torch.cat([empty, *(end.to(empty).expand(self.sizes[i]) for i, end in zip(self.activations, side, strict=True))])
            for side in (zip(*ends, strict=True) if ends else ((), ()))
        )
        return alpha, beta

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next((tensor.device for node in self.nodes for tensor in node.tensors()), torch.device("cpu"))

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs (batch, m) of inputs (batch, d), in float64."""
        x = x.to(self.device, torch.float64)
        return last(self.nodes, lambda i, node, *read: node.value(*read) if i else x)

    def values(self, x: Tensor) -> list[Tensor]:
        """Value of every node, each (batch, size), for inputs (batch, d)."""
        values = [x.to(self.device, torch.float64)]
        for node in self.nodes[1:]:
            values.append(node.value(*(values[s] for s in node.sources)))
        return values

    def fold(self, walk: Walk[T]) -> list[T]:
        """What a walk makes of every node, from the input on."""
        return fold(self.nodes, walk)

    def conclude(self, walk: Walk[T]) -> T:
        """What a walk makes of the output, in no more memory than that of what is still to be read."""
        return last(self.nodes, lambda i, node, *read: node.meet(walk, i, *read))

    def pull(self, walk: Walk[T], last: T, plus: Callable[[Any, Any], Any] = operator.add) -> dict[int, T]:
        """What arrives at every node from behind, where `last` is handed to the output; see `lipguard.network.walk`."""
        return pull(self.nodes, walk, last, plus)

    def with_outputs(self, matrix: Tensor) -> Network:
        """The network followed by the linear map `matrix`, shape (k, m): for class pairs and margins."""
        return Network((*self.nodes, Affine(len(self.nodes) - 1, Dense(matrix.to(self.device, torch.float64)), None, "outputs")))

    def with_inputs(self, matrix: Tensor) -> Network:
        """The network behind the linear map `matrix`, shape (d, k): for directions, parameters and designs of inputs."""
        first = Affine(0, Dense(matrix.to(self.device, torch.float64)), None, "inputs")
        moved = (node.moved(lambda source: source + 1) for node in self.nodes[1:])
        return Network((Input(matrix.shape[1]), first, *moved))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the structure and the exact bits of every weight, as hexadecimal text.

        Injective: every part is written with its length before it, so that no text inside a part can stand for another.
        """
        sha = hashlib.sha256(b"lipguard network 3\n")
        for node in self.nodes:
            parts = [node.structure().encode(), *map(_bits, node.tensors())]
            sha.update(len(parts).to_bytes(8, "little"))
            for part in parts:
                sha.update(len(part).to_bytes(8, "little"))
                sha.update(part)
        return sha.hexdigest()


def _bits(tensor: Tensor) -> bytes:
    plain = tensor.detach().to("cpu", torch.float64).contiguous()
    return f"{tuple(plain.shape)}".encode() + plain.numpy().tobytes()
