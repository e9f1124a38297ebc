"""State of one branch-and-bound search: open nodes, finished ones, and the leaves that cover the domain at any time."""

from __future__ import annotations

import heapq
import itertools
import time
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lipguard.certificate import Leaf
from lipguard.exact.node_bounds import Effort
from lipguard.exact.problem import Problem
from lipguard.verify.phases.phase_form import PhaseForm

BATCH = 64
"""Nodes that are branched at once."""
FINE = 1e-9
"""Gap to which a search that ended soon goes on: near what float64 can prove."""
_ITERATIONS = 12
_CAREFUL = 40
"""Iterations of the semidefinite programs of ordinary nodes; of roots and fine searches."""

Known = tuple[np.ndarray, np.ndarray] | None
"""An input of the phase form with its pattern, if one is known."""


@dataclass(eq=False)
class Node:
    """An assignment with a bound of the constant over its regions.

    Attributes:
        decisions: phases that were branched on, -1 elsewhere, (n,).
        phases: those and the phases that follow.
        bound: upper bound of the norm over the node's regions.
        t: multipliers that prove it, (n,); only for the 2-norm.
        branch: the neuron to branch on next; -1 if none is free.
        points: an input with these phases and one on another side of the branching neuron's break, where they are known.
        part: the part of the domain.
    """

    decisions: Tensor
    phases: Tensor
    bound: float
    t: Tensor
    branch: int
    points: tuple[Known, Known] = (None, None)
    part: int = 0

    @property
    def leaf(self) -> Leaf:
        """The node as evidence."""
        return Leaf(self.decisions.to(torch.int8), self.t, part=self.part)


Child = tuple[Node, Tensor, Known]
"""A parent, its child's decisions, and a point of the child if one is known."""


@dataclass(eq=False)
class Search:
    """State of one search; times are the thread's processor time, so that a busy machine changes no decision."""

    form: PhaseForm
    task: Problem
    gap: float
    deadline: float
    heap: list[tuple[float, int, Node]] = field(default_factory=list)
    leaves: list[Leaf] = field(default_factory=list)
    done: list[Node] = field(default_factory=list)
    proved: float = 0.0
    batch: int = BATCH
    nodes: int = 0
    refuted: int = 0
    flat: int = 0
    closed: float = 0.0
    began: float = field(default_factory=time.thread_time)
    climbed: float = 0.0
    starts: int = 0
    counter: itertools.count[int] = field(default_factory=itertools.count)
    seen: set[bytes] = field(default_factory=set)

    @property
    def target(self) -> float:
        """A node bounded by this is done."""
        return self.task.lower * (1 + self.gap / 2)

    @property
    def upper(self) -> float:
        """Upper bound of the constant over all leaves and open nodes."""
        return max(self.proved, -self.heap[0][0] if self.heap else 0.0)

    @property
    def fine(self) -> bool:
        """Whether the gap is near what float64 can prove."""
        return self.gap <= FINE

    @property
    def effort(self) -> Effort:
        """How well the next semidefinite programs are to be solved: the roots with care, fine searches to the end."""
        return Effort(self.target, _CAREFUL if self.fine or not self.heap else _ITERATIONS, FINE / 4 if self.fine else 1e-7)

    @property
    def evidence(self) -> tuple[Leaf, ...]:
        """Leaves that cover the domain, whenever the search is stopped."""
        return (*self.leaves, *(node.leaf for node in self.done), *(node.leaf for _, _, node in self.heap))

    def own(self, pattern: np.ndarray) -> np.ndarray:
        """A pattern of phases in the pieces of `task.form`, which joins neighbouring pieces of one slope (PReLU of slope 1)."""
        return self._joined[pattern, np.arange(len(pattern))]

    @cached_property
    def _joined(self) -> np.ndarray:
        """For each piece of each neuron, the number of kinks before it, (K, n)."""
        pieces, breaks = self.form.pieces.numpy(), self.form.breaks.numpy()
        kinks = (pieces[1:] != pieces[:-1]) & np.isfinite(breaks)
        return np.concatenate([np.zeros((1, pieces.shape[1]), dtype=np.intp), kinks.cumsum(0)])

    def push(self, node: Node) -> None:
        """Keep an open node."""
        heapq.heappush(self.heap, (-node.bound, next(self.counter), node))

    def finish(self, node: Node) -> None:
        """Make a bounded node a leaf."""
        self.done.append(node)
        self.proved = max(self.proved, node.bound)
