"""Walks through a network: what an algorithm makes of each kind of node, and the order in which nodes are met.

A node calls the method of the walk that is its own, so that no algorithm asks what a node is, and a kind that an algorithm
does not know is refused by its name in one place.

Forwards, `fold` hands a node what was made of the nodes it reads. Backwards, `pull` hands a node what its readers hand back,
added up, and what the walk makes of it goes to every node that it reads: that is the derivative's way, through sums too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor

from lipguard.errors import UnsupportedQuery

if TYPE_CHECKING:
    from lipguard.network.nodes import Activation, Affine, Coupled, Implicit, Input, Node, Sum
    from lipguard.network.operators import Operator
    from lipguard.network.vertex import Vertex

T = TypeVar("T")


class Walk(Generic[T]):
    """One method for each kind of node; `i` is the node's index, `read` what was made of what it reads (or hands back).

    Kinds without a method of their own go to `other`, which refuses them: an algorithm states what it knows and no more.
    """

    lacks = "nothing is known"
    """Begins the refusal: "{place}: {lacks} of a ... layer"."""

    remedy = ""
    """Ends the refusal: what to do about such a layer."""

    def input(self, i: int, node: Input) -> T:
        """The input; backwards it is not asked."""
        return self.other(i, node)

    def affine(self, i: int, node: Affine, read: T) -> T:
        """operator(x) + bias."""
        return self.other(i, node, read)

    def activation(self, i: int, node: Activation, read: T) -> T:
        """A function of each entry."""
        return self.other(i, node, read)

    def implicit(self, i: int, node: Implicit, read: T) -> T:
        """The solution of an equation."""
        return self.other(i, node, read)

    def coupled(self, i: int, node: Coupled, read: T) -> T:
        """A function of groups of entries."""
        return self.other(i, node, read)

    def total(self, i: int, node: Sum, *read: T) -> T:
        """A sum; forwards all its terms, backwards the one value that each term is handed."""
        return self.other(i, node, *read)

    def other(self, i: int, node: Vertex, *read: T) -> T:
        """A kind that the walk does not know.

        Raises:
            UnsupportedQuery: always, unless a walk says otherwise.
        """
        del read
        kind = type(node).__name__.lower()
        raise UnsupportedQuery(f"{node.name or f'node {i}'}: {self.lacks} of a {kind} layer. {self.remedy}".rstrip())


class Linear(Walk[Tensor]):
    """Rows through the linear maps: biases left out, terms added; what else happens is the subclass's matter."""

    def affine(self, i: int, node: Affine, read: Tensor) -> Tensor:
        """operator(x)."""
        return node.operator(read)

    def total(self, i: int, node: Sum, *read: Tensor) -> Tensor:
        """The terms added."""
        return torch.stack(read).sum(0)


class Adjoint(Walk[Tensor]):
    """Rows backwards through the linear maps, for `pull`."""

    def affine(self, i: int, node: Affine, read: Tensor) -> Tensor:
        """operator'(x)."""
        return node.operator.transpose()(read)

    def total(self, i: int, node: Sum, *read: Tensor) -> Tensor:
        """Every term is handed the same."""
        return read[0]


def fold(nodes: Sequence[Node], walk: Walk[T]) -> list[T]:
    """What the walk makes of every node, in order."""
    made: list[T] = []
    for i, node in enumerate(nodes):
        made.append(node.meet(walk, i, *(made[s] for s in node.sources)))
    return made


def last(nodes: Sequence[Node], make: Callable[..., T]) -> T:
    """What `make(i, node, *read)` gives for the last node; what no later node reads is let go."""
    end = {s: i for i, node in enumerate(nodes) for s in node.sources}
    made: dict[int, T] = {}
    for i, node in enumerate(nodes):
        made[i] = make(i, node, *(made[s] for s in node.sources))
        for s in {s for s in node.sources if end[s] == i}:
            del made[s]
    return made[len(nodes) - 1]


def pull(nodes: Sequence[Node], walk: Walk[T], last: T, plus: Callable[[T, T], T]) -> dict[int, T]:
    """What arrives at every node from behind: `last` at the last one; nodes that do not reach it are left out.

    Args:
        nodes: in topological order, the input first.
        walk: called with the sum of what a node's readers hand back.
        last: what the last node is handed.
        plus: adds what two readers hand back, the one met first on the left.
    """
    arrived: dict[int, T] = {len(nodes) - 1: last}
    for i in range(len(nodes) - 1, -1, -1):
        node = nodes[i]
        if i not in arrived or not node.sources:
            continue
        handed = node.meet(walk, i, arrived[i])
        for s in node.sources:
            arrived[s] = plus(arrived[s], handed) if s in arrived else handed
    return arrived


def combinations(
    nodes: Sequence[Node], one: Callable[[int], T], through: Callable[[Operator, T], T], plus: Callable[[T, T], T]
) -> list[dict[int, T]]:
    """Every node's value as a linear combination of variables: the input and the values of nodes that are not linear.

    Args:
        nodes: in topological order.
        one: the coefficient of the variable at a node's index: an identity.
        through: a coefficient behind an operator.
        plus: adds two coefficients of one variable.
    Returns:
        For each node, coefficients by the index of the node that is the variable; biases are left out.
    """
    made: list[dict[int, T]] = []
    for i, node in enumerate(nodes):
        total: dict[int, T] = {}
        if node.variable:
            total[i] = one(i)
        else:
            for source in node.sources:
                for s, coefficient in made[source].items():
                    own = coefficient if node.map is None else through(node.map, coefficient)
                    total[s] = plus(total[s], own) if s in total else own
        made.append(total)
    return made
