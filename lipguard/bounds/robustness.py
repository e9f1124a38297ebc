"""Certified robustness: the radius around each sample in which its class is proved to stay, as a function of a batch.

Sample x of class y keeps its class on the ball of radius r where f_y - f_j > 0 for every other class j. This is proved if
f_y(x) - f_j(x) > L r for a constant L of f_y - f_j, on R^d (Tsuzuku et al. 2018, arXiv:1802.04034) or on the ball itself,
or if linear propagation bounds the difference from below by a positive number. Everything is rounded outward.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lipguard.bounds.counterexample import nearest_found
from lipguard.bounds.local import BATCHED, solve
from lipguard.bounds.pairs import functionals, pair_bounds
from lipguard.capture.capture import capture
from lipguard.certificate import Box
from lipguard.errors import InvalidDomain, InvalidExample, UnknownName, UnsupportedQuery
from lipguard.network import Implicit, Network
from lipguard.programs.rewriting import slope_restricted
from lipguard.solvers.threads import one_thread
from lipguard.verify.domain.jacobians import jacobian_magnitude, magnitude_norms
from lipguard.verify.domain.localized import chunk_size, localized, proves
from lipguard.verify.domain.ranges import Propagation, Regions, propagate
from lipguard.verify.rewriting import neurons_only

Method = Literal["local", "global", "spectral"]

_INSIDE = 1 - 2.0**-40
"""Factor that keeps a quotient below the true one, and a strict inequality strict."""

_DOUBLINGS = 30
_TURNS = 100


@dataclass(frozen=True, eq=False)
class Robustness:
    """What is proved of each sample of a batch, shape (B,) each.

    Attributes:
        predicted: class of the largest output at the sample, in float64.
        correct: whether that is the label.
        margin: lower bound of f_label - max of the others at the sample; negative or 0 where it is not correct.
        radius: 2-norm radius in which every input has the label for its class; 0 where nothing is proved.
        certified: whether that is proved for the radius `eps`. Where `complete` is False it is so only of `radius`.
        complete: whether the sample was treated in full before the time limit.
        eps, method: as asked.
        seconds: spent.
    """

    predicted: Tensor
    correct: Tensor
    margin: Tensor
    radius: Tensor
    certified: Tensor
    complete: Tensor
    eps: float
    method: Method
    seconds: float

    @property
    def accuracy(self) -> float:
        """Share of correct samples."""
        return float(self.correct.double().mean())

    @property
    def certified_accuracy(self) -> float:
        """Share of samples that are correct on their whole eps-ball: a lower bound of the accuracy under any attack there."""
        return float(self.certified.double().mean())


def certify(
    model: nn.Module | Network,
    batch: Tensor,
    labels: Tensor,
    eps: float,
    *,
    method: Method = "local",
    box: Box | None = None,
    radii: bool = True,
    largest: float = math.inf,
    tol: float = 0.02,
    submodule: str | None = None,
    time_limit: float | None = None,
) -> Robustness:
    """Prove in which 2-norm ball around each sample the label is the class of the largest output.

    Args:
        model: a classifier with m >= 2 outputs (logits), read in eval mode and left as it is, or a captured `Network`.
        batch: samples (B, ...), of the shape the model takes.
        labels: classes (B,), integers from 0 to m - 1.
        eps: radius > 0 at which `certified` is decided, in the units of the input.
        method: "local", LipSDP of every pair of classes on each ball, with linear propagation; "global", LipSDP of the
            pairs on all of R^d, quick for many samples; "spectral", the product of the norms, cheapest.
        box: the inputs there are, [0, 1] for images: a "local" radius then speaks of those alone.
        radii: find the radii as well; False decides `certified` alone, and `radius` is eps or 0.
        largest: radii beyond it are not searched.
        tol: relative accuracy of the radii of "local".
        submodule: dotted name of the part that maps samples to logits.
        time_limit: seconds; what is not proved by then counts as unproved, and `complete` says where.
    Raises:
        InvalidExample: batch or labels of another shape, or labels out of range.
        InvalidDomain: eps is not a positive number, or a sample lies outside the box.
        UnsupportedQuery: the model has one output.
        UnknownName: no such method.
        LipguardError: the model cannot be captured.
    """
    began = time.perf_counter()
    if method not in get_args(Method):
        raise UnknownName(f"method={method!r}: certify knows {', '.join(get_args(Method))}.")
    if not (isinstance(eps, (int, float)) and 0 < eps < math.inf):
        raise InvalidDomain(f"eps={eps!r} must be a positive number, a radius in the units of the input.")
    if not 0 < tol < 1:
        raise UnsupportedQuery(f"tol={tol!r} must lie between 0 and 1.")
    network = neurons_only(capture(model, batch, submodule=submodule))
    if any(isinstance(node, Implicit) for node in network.nodes):
        raise UnsupportedQuery(
            "the values of an implicit layer are not enclosed here. Bound pairs of classes: bound(outputs=(i, j))."
        )
    samples, classes = _checked(network, batch, labels, box)
    deadline = math.inf if time_limit is None else began + time_limit
    task = _Task(network, method, float(eps), box, radii, max(float(eps), largest), tol, deadline)
    step = max(1, min(64, chunk_size(network)))
    with one_thread(), torch.no_grad():
        lipschitz = _table(network, samples, classes, _first(task), deadline)
        parts = [_part(task, samples[i : i + step], classes[i : i + step], lipschitz) for i in range(0, len(samples), step)]
    predicted, correct, margin, radius, certified, complete = (torch.cat(column) for column in zip(*parts, strict=True))
    return Robustness(predicted, correct, margin, radius, certified, complete, float(eps), method, time.perf_counter() - began)


def _checked(network: Network, batch: Tensor, labels: Tensor, box: Box | None) -> tuple[Tensor, Tensor]:
    m = network.outputs
    if m < 2:
        raise UnsupportedQuery(
            "certify needs a classifier with at least 2 outputs; this model has 1. For a regression use lg.bound."
        )
    if not isinstance(batch, Tensor) or batch.ndim < 1 or not len(batch) or batch[0].numel() != network.inputs:
        raise InvalidExample(f"the batch must be a tensor (B, ...) with {network.inputs} entries for each sample.")
    if labels is None:
        raise InvalidExample("labels are missing: give the class of each sample, shape (B,).")
    labels = torch.as_tensor(labels)
    if labels.shape != (len(batch),) or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        given = f"labels have shape {tuple(labels.shape)} and dtype {labels.dtype}"
        raise InvalidExample(f"{given}; one integer for each of {len(batch)} samples is needed.")
    if bool((labels < 0).any()) or bool((labels >= m).any()):
        raise InvalidExample(f"labels are in [{int(labels.min())}, {int(labels.max())}]; the model has classes 0 to {m - 1}.")
    samples = batch.detach().reshape(len(batch), -1).to(network.device, torch.float64)
    if not bool(samples.isfinite().all()):
        raise InvalidExample("the batch contains nan or infinite entries.")
    if box is not None:
        lower, upper = (end.to(samples) for end in box.bounds(network.inputs))
        outside = ((samples < lower) | (samples > upper)).any(1)
        if bool(outside.any()):
            i = int(outside.nonzero()[0])
            raise InvalidDomain(f"sample {i} lies outside the box. Give the box in the units of the network's input.")
    return samples, labels.to(network.device, torch.long)


@dataclass(frozen=True, eq=False)
class _Task:
    network: Network
    method: Method
    eps: float
    box: Box | None
    radii: bool
    largest: float
    tol: float
    deadline: float

    @property
    def late(self) -> bool:
        return time.perf_counter() > self.deadline


_Part = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _part(task: _Task, x: Tensor, y: Tensor, lipschitz: Tensor | None) -> _Part:
    network = task.network
    rows = _differences(y, network.outputs)
    margins = -_propagated(task, x, torch.zeros_like(x[:, 0])).largest(len(network.nodes) - 1, -rows)
    margin = margins.amin(1)
    predicted = network(x).argmax(1)
    correct = predicted == y
    usable = correct & (margin > 0)
    each = torch.zeros_like(margins)
    if lipschitz is not None:
        each = margins / lipschitz[y].gather(1, _others(y, network.outputs)).clamp_min(1e-300) * _INSIDE
    radius = torch.where(usable, each.amin(1), torch.zeros_like(margin)).clamp(0.0, task.largest)
    complete = torch.ones_like(correct)
    if task.method == "local":
        radius, complete = _search(task, x, y, rows, margins, each, torch.where(usable, radius, -torch.ones_like(radius)))
    if not task.radii:
        radius = torch.where(radius >= task.eps, torch.full_like(radius, task.eps), torch.zeros_like(radius))
    return predicted, correct, margin, radius, radius >= task.eps, complete


def _first(task: _Task) -> Method | None:
    """The method of the constants on R^d: with "local" they save programs where many radii are sought."""
    if task.method != "local":
        return task.method
    return None if not task.radii else "global" if slope_restricted(task.network).neurons <= BATCHED else "spectral"


def _table(network: Network, samples: Tensor, classes: Tensor, method: Method | None, deadline: float) -> Tensor | None:
    """Bounds of the pairs that are needed, (m, m), inf elsewhere."""
    if method is None:
        return None
    m = network.outputs
    y = torch.cat([network(part).argmax(1) for part in samples.split(4096)])
    asked = torch.zeros(m, m, dtype=torch.bool, device=samples.device)
    asked[classes[classes == y]] = True
    asked = (asked | asked.T).triu(1)
    pairs = asked.nonzero()
    table = torch.full((m, m), math.inf, dtype=torch.float64, device=samples.device)
    table[pairs[:, 0], pairs[:, 1]] = pair_bounds(network, pairs, method, deadline)
    return torch.minimum(table, table.T)


def _others(y: Tensor, m: int) -> Tensor:
    """The classes other than y, (B, m - 1)."""
    every = torch.arange(m - 1, device=y.device).expand(len(y), -1)
    return every + (every >= y[:, None])


def _differences(y: Tensor, m: int) -> Tensor:
    """Rows e_y - e_j for every other class j, (B, m - 1, m)."""
    others = _others(y, m)
    pairs = torch.stack([y[:, None].expand_as(others), others], 2)
    return functionals(pairs.reshape(-1, 2), m).reshape(len(y), m - 1, m)


def _propagated(task: _Task, x: Tensor, radius: Tensor) -> Propagation:
    return propagate(task.network, Regions.around(x, radius, task.box))


def _search(
    task: _Task, x: Tensor, y: Tensor, rows: Tensor, margins: Tensor, each: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    """Proved radii by bisection between those proved already and an input of another class; and where the time sufficed.

    Args:
        task: what was asked.
        x, y, rows, margins: samples, classes, differences and their lower bounds at the samples.
        each: radii proved for each difference, (B, m - 1).
        start: the smallest of them, -1 where nothing can be proved.
    """
    low = start.clamp_min(0)
    # No proof reaches beyond an input of another class; slightly beyond it the search may still ask.
    high = torch.where(start < 0, low, nearest_found(task.network, x, y, task.box) if task.radii else math.inf)
    trial = torch.full_like(low, task.eps)
    active = (start >= 0) & (low < task.eps) & (high > task.eps)
    for turn in range(_TURNS):
        which = active.nonzero()[:, 0]
        if task.late and len(which):
            return low, ~active
        if len(which):
            holds = _holds(task, x[which], rows[which], margins[which], each[which], trial[which])
            low[which[holds]] = trial[which[holds]]
            high[which[~holds]] = trial[which[~holds]]
        if not task.radii or (turn and not len(which)):
            break
        active = (start >= 0) & (high > task.tol * task.eps) & (low < task.largest)
        active &= (high - low > task.tol * high) | (high.isinf() & (low < task.eps * 2.0**_DOUBLINGS))
        middle = torch.where(low > 0, (low + high) / 2, high / 2)
        trial = torch.where(high.isinf(), 2 * low.clamp_min(task.eps), middle).clamp_max(task.largest)
    return low, torch.ones_like(start, dtype=torch.bool)


def _holds(task: _Task, x: Tensor, rows: Tensor, margins: Tensor, each: Tensor, radius: Tensor) -> Tensor:
    """Whether every difference is proved positive on each ball, (K,)."""
    network = task.network
    found = _propagated(task, x, radius)
    quotient = margins / radius[:, None] * _INSIDE
    k, pairs = margins.shape
    slopes = magnitude_norms(jacobian_magnitude(found, rows).reshape(k * pairs, 1, -1), (2.0, 2.0)).reshape(k, pairs)
    proved = (each >= radius[:, None]) | (slopes < quotient) | (found.largest(len(network.nodes) - 1, -rows) < 0)
    if bool(proved.all()):
        return proved.all(1)
    maps = localized(network, found)

    def attempt(which: Tensor) -> None:
        """The semidefinite programs of the pairs (sample, difference), as far as the cut-off decides them."""
        if len(which):
            sample, pair = which.unbind(1)
            own = maps.pick(sample).functionals(rows[sample, pair][:, None])
            cut = (quotient[sample, pair] * _INSIDE).square()
            t, _ = solve(own, cutoff=cut, iterations=40, deadline=task.deadline)
            proved[sample, pair] = proves(own, t, cut)

    # The difference that is furthest from a proof first: mostly it decides the ball.
    need = (slopes / quotient).masked_fill(proved, -1.0)
    undecided = (~proved.all(1)).nonzero()[:, 0]
    attempt(torch.stack([undecided, need[undecided].argmax(1)], 1))
    attempted = proved.gather(1, need.argmax(1, keepdim=True))[:, 0]
    attempt((~proved & attempted[:, None]).nonzero())
    return proved.all(1)
