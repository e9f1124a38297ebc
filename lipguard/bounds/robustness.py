"""Certified robustness: the radius around each sample in which its class is proved to stay, as a function of a batch.

Radii are proposed here, by bisection, and proved by `lipguard.verify.domain.radii`; what proves each is kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor

from lipguard.bounds.counterexample import nearest_found
from lipguard.bounds.local import BATCHED, solve
from lipguard.bounds.pairs import pair_bounds
from lipguard.bounds.radii import Constants, Method, Proofs, Robustness
from lipguard.capture import Model, network_of
from lipguard.certificate import Ball, Box
from lipguard.domain import Domain, domain_from
from lipguard.errors import InvalidDomain, InvalidExample, UnknownName, UnsupportedQuery
from lipguard.network import Network
from lipguard.programs.rewriting import slope_restricted
from lipguard.query import Inputs, Norm, Outputs, Query, norm_pair
from lipguard.solvers.threads import one_thread
from lipguard.verify.domain.localized import chunk_size
from lipguard.verify.domain.radii import Balls, Samples
from lipguard.verify.rewriting import neurons_only

_RESERVE = 2.0**-34
"""Share of a radius or a constant that is left over, so that the proof succeeds again in any order of summation."""

_DOUBLINGS = 30
_TURNS = 100


def certify(
    model: Model,
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
    norm: Norm = 2,
    domain: Domain | str | Mapping[str, Any] | None = None,
    outputs: Outputs | None = None,
    inputs: Inputs | None = None,
    example: Any = None,
) -> Robustness:
    """Prove in which 2-norm ball around each sample the label is the class of the largest output.

    Args:
        model: a classifier with m >= 2 outputs (logits), read in eval mode and left as it is, or a captured `Network`.
        batch: samples (B, ...), of the shape the model takes.
        labels: classes (B,), integers from 0 to m - 1.
        eps: radius > 0 at which `certified` is decided, in the units of the input.
        method: "local", LipSDP of every pair of classes on each ball, with linear propagation; "global", LipSDP of the
            pairs on all of R^d, quick for many samples; "spectral", the product of the norms, cheapest.
        box: every input that can occur, [0, 1] for images: a "local" radius then speaks of those alone.
        radii: find the radii as well; False decides `certified` alone, and `radius` is eps or 0.
        largest: radii beyond it are not searched.
        tol: relative accuracy of the radii of "local".
        submodule: dotted name of the part that maps samples to logits.
        time_limit: seconds; what is not proved by then counts as unproved, and `complete` says where.
        norm: 2, the norm of the balls; others are refused.
        domain: the same as `box`; a `Ball` is refused, as `eps` is the radius of the balls.
        outputs: which of several tensors are the logits, or a matrix (k, m) applied to them, as for `lipguard.bound`.
        inputs: of which of several tensors the batch holds samples, or a matrix (d, k) in front of samples (B, k).
        example: an input of the model, where it is more than the batch: all of several tensors, or d entries before a matrix.
    Raises:
        InvalidExample: batch or labels of another shape, or labels out of range.
        InvalidDomain: eps is not a positive number, or a sample lies outside the box.
        UnsupportedQuery: the model has one output, or another norm than 2 is asked for.
        UnknownName: no such method.
        LipguardError: the model cannot be captured.
    """
    began = time.perf_counter()
    if method not in get_args(Method):
        raise UnknownName(f"method={method!r}: certify knows {', '.join(get_args(Method))}.")
    for name, value in {"tol": tol, "largest": largest, "time_limit": 0.0 if time_limit is None else time_limit}.items():
        if not (isinstance(value, int | float) and value >= 0):
            raise UnsupportedQuery(f"{name}={value!r} must be a number, 0 or more.")
    if not (isinstance(eps, (int, float)) and 0 < eps < math.inf):
        raise InvalidDomain(f"eps={eps!r} must be a positive number, a radius in the units of the input.")
    if not 0 < tol < 1:
        raise UnsupportedQuery(f"tol={tol!r} must lie between 0 and 1.")
    box = one_box(norm, domain, box)
    query = Query(outputs=outputs, inputs=inputs, submodule=submodule, example=batch if example is None else example)
    if isinstance(query.inputs, Tensor) and example is None and not isinstance(model, Network):
        raise UnsupportedQuery("inputs is a matrix, the batch what is in front of it. Give an input of the model, example=...")
    captured = network_of(model, query)
    network = neurons_only(captured)
    if any(node.loop is not None for node in network.nodes):
        raise UnsupportedQuery(
            "the values of an implicit layer are not enclosed here. Bound pairs of classes: bound(outputs=(i, j))."
        )
    x, y = _checked(network, batch, labels, box)
    deadline = math.inf if time_limit is None else began + time_limit
    step = max(1, min(64, chunk_size(network)))
    with one_thread(), torch.no_grad():
        first = _first(method, radii, network)
        constants = None if first is None else _constants(captured, network, x, y, first, deadline)
        task = _Task(network, method, float(eps), radii, max(float(eps), largest), tol, deadline, constants)
        parts = [_part(task, Samples.of(network, x[i : i + step], y[i : i + step], box)) for i in range(0, len(x), step)]
    predicted, correct, margin, radius, complete, reached = (torch.cat(column) for column in zip(*parts, strict=True))
    proofs = Proofs(captured.digest, x, y, box, constants, reached, task.multipliers)
    seconds = time.perf_counter() - began
    return Robustness(predicted, correct, margin, radius, radius >= eps, complete, float(eps), method, seconds, proofs)


def one_box(norm: Norm, domain: object, box: Box | None) -> Box | None:
    """The inputs there are, given as a domain or as a box.

    Raises:
        UnsupportedQuery: another norm than 2.
        InvalidDomain: a ball, or a box beside another domain.
    """
    if norm_pair(norm)[0] != 2.0:
        raise UnsupportedQuery(f"norm={norm!r}: balls in the 2-norm are proved. Leave norm out.")
    if box is not None and domain is not None:
        raise InvalidDomain("domain and box both say which inputs there are. Leave box out.")
    given = domain_from(domain if box is None else box)
    if isinstance(given, Ball):
        raise InvalidDomain(
            "domain is a Ball; eps=... is the radius of the balls. Give a Box of the inputs there are, domain=lipguard.Box(0, 1)."
        )
    return given


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
    try:
        labels = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidExample(f"labels are no integers ({type(labels).__name__}): give the class of each sample.") from error
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
    """What is asked, with what is known on R^d; `multipliers` collects those of each sample by the other class."""

    network: Network
    method: Method
    eps: float
    radii: bool
    largest: float
    tol: float
    deadline: float
    constants: Constants | None
    multipliers: list[dict[int, Tensor]] = field(default_factory=list)

    @property
    def late(self) -> bool:
        return time.perf_counter() > self.deadline

    def at(self, samples: Samples) -> Tensor:
        """The constants of the samples' differences on R^d, (K, m - 1); inf where none is known."""
        if self.constants is None:
            return torch.full_like(samples.margins, math.inf)
        return self.constants.values[samples.y].gather(1, samples.others)


_Part = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _part(task: _Task, samples: Samples) -> _Part:
    margin = samples.margins.amin(1)
    predicted = task.network(samples.x).argmax(1)
    correct = predicted == samples.y
    usable = correct & (margin > 0)
    # The margins as the checker may find them another time: other orders of summation differ by far less than what is
    # granted for all roundings.
    margins = samples.margins - samples.spread / 8
    reached = (margins / task.at(samples).clamp_min(1e-300) * (1 - _RESERVE)).clamp(0.0, task.largest)
    radius = torch.where(usable, reached.amin(1), torch.zeros_like(margin))
    balls = Balls(samples, radius)
    balls.by_constants(task.at(samples))
    radius = torch.where(balls.proved.all(1), radius, torch.zeros_like(radius))
    complete = torch.ones_like(correct)
    found: list[dict[int, Tensor]] = [{} for _ in samples.y]
    if task.method == "local":
        radius, complete = _search(task, samples, torch.where(usable, radius, -torch.ones_like(radius)), found)
    if not task.radii:
        radius = torch.where(radius >= task.eps, torch.full_like(radius, task.eps), torch.zeros_like(radius))
    task.multipliers.extend(found)
    return predicted, correct, margin, radius, complete, reached


def _first(method: Method, radii: bool, network: Network) -> Method | None:
    """The method of the constants on R^d: with "local" they save programs where many radii are sought."""
    if method != "local":
        return method
    return None if not radii else "global" if slope_restricted(network).neurons <= BATCHED else "spectral"


def _constants(captured: Network, network: Network, x: Tensor, y: Tensor, method: Method, deadline: float) -> Constants:
    """Constants of the pairs that are needed: those of classes that some sample has rightly."""
    m = network.outputs
    predicted = torch.cat([network(part).argmax(1) for part in x.split(4096)])
    asked = torch.zeros(m, m, dtype=torch.bool, device=x.device)
    asked[y[predicted == y]] = True
    asked = (asked | asked.T).triu(1)
    pairs = asked.nonzero()
    values = torch.full((m, m), math.inf, dtype=torch.float64, device=x.device)
    evidence, proved = pair_bounds(captured, pairs, method, deadline)
    values[pairs[:, 0], pairs[:, 1]] = proved
    return Constants(torch.minimum(values, values.T), {(i, j): e for (i, j), e in zip(pairs.tolist(), evidence, strict=True)})


def _search(task: _Task, samples: Samples, start: Tensor, found: list[dict[int, Tensor]]) -> tuple[Tensor, Tensor]:
    """Proved radii by bisection between those proved already and an input of another class; and where the time sufficed.

    Args:
        task: what was asked.
        samples: the checker's.
        start: radii that the constants prove, -1 where nothing can be proved.
        found: by sample, takes the multipliers of the largest radius that was proved with any.
    """
    # No proof reaches beyond an input of another class; slightly beyond it the search may still ask.
    nearest = nearest_found(task.network, samples.x, samples.y, samples.box) if task.radii else math.inf
    low = start.clamp_min(0)
    high = torch.where(start < 0, low, nearest)
    trial = torch.full_like(low, task.eps)
    active = (start >= 0) & (low < task.eps) & (high > task.eps)
    for turn in range(_TURNS):
        which = active.nonzero()[:, 0]
        if task.late and len(which):
            return low, ~active
        if len(which):
            holds, multipliers = _holds(task, samples.pick(which), trial[which])
            low[which[holds]] = trial[which[holds]]
            high[which[~holds]] = trial[which[~holds]]
            for i, good, own in zip(which.tolist(), holds.tolist(), multipliers, strict=True):
                found[i] = own if good else found[i]
        if not task.radii or (turn and not len(which)):
            break
        active = (start >= 0) & (high > task.tol * task.eps) & (low < task.largest)
        active &= (high - low > task.tol * high) | (high.isinf() & (low < task.eps * 2.0**_DOUBLINGS))
        middle = torch.where(low > 0, (low + high) / 2, high / 2)
        trial = torch.where(high.isinf(), 2 * low.clamp_min(task.eps), middle).clamp_max(task.largest)
    return low, torch.ones_like(start, dtype=torch.bool)


def _holds(task: _Task, samples: Samples, radius: Tensor) -> tuple[Tensor, list[dict[int, Tensor]]]:
    """Whether every difference is proved positive on each ball, (K,), and by which multipliers, where it took any."""
    balls = Balls(samples, radius)
    balls.by_constants(task.at(samples))
    balls.by_themselves()
    multipliers: list[dict[int, Tensor]] = [{} for _ in samples.y]

    def attempt(which: Tensor) -> None:
        """The semidefinite programs of the chosen differences, as far as the cut-off decides them."""
        if not len(which):
            return
        maps = balls.local_maps(which)
        cut = (balls.needed[which[:, 0], which[:, 1]] * (1 - 2 * _RESERVE)).square()
        t, _ = solve(maps, cutoff=cut, iterations=40, deadline=task.deadline)
        proved = balls.by_multipliers(which, maps, t, _RESERVE)
        full = torch.ones(len(t), task.network.neurons, dtype=torch.float64, device=t.device)
        full.scatter_(1, torch.where(maps.present, maps.index, maps.index[:, :1]), torch.where(maps.present, t, t[:, :1]))
        for (k, pair), good, own in zip(which.tolist(), proved.tolist(), full, strict=True):
            if good:
                multipliers[k][int(samples.others[k, pair])] = own

    if not bool(balls.proved.all()):
        # The difference that is furthest from a proof first: mostly it decides the ball.
        need = (balls.slopes / balls.needed).masked_fill(balls.proved, -1.0)
        undecided = (~balls.proved.all(1)).nonzero()[:, 0]
        attempt(torch.stack([undecided, need[undecided].argmax(1)], 1))
        attempted = balls.proved.gather(1, need.argmax(1, keepdim=True))[:, 0]
        attempt((~balls.proved & attempted[:, None]).nonzero())
    return balls.proved.all(1), multipliers
