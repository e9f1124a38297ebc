"""`lipsdp-channel`: LipSDP of convolutional and residual networks on a torus, one multiplier a channel.

Multipliers are told by the nodes they belong to: maxima and sorts are made of neurons as the checker makes them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lipguard.bounds.cost import check_search_memory, elimination_work
from lipguard.bounds.method import Method, Pair
from lipguard.bounds.spectral import Spectral
from lipguard.certificate import Certificate, ChannelMultipliers, Query
from lipguard.errors import NotCertified, SolverFailed, UnsupportedQuery
from lipguard.network import Network
from lipguard.outward import show_upper
from lipguard.programs.frequency import FrequencyProgram
from lipguard.programs.torus import Layer, Torus
from lipguard.programs.torus_blocks import Blocks, blocks
from lipguard.solvers.frequency_spheres import FrequencySpheres
from lipguard.solvers.low_rank import Climb, LowRank, Start
from lipguard.verify import verify
from lipguard.verify.rewriting import neurons_only

_THINNEST = 1e-6
"""Slope intervals thinner than this are widened to it, as the checker does."""

_SECONDS = 120.0
"""Time for the search where none is given: what is gained later is little beside what was gained before."""

_PULLS = (1e-5, 1e-3, 1e-2, 0.1)
"""Margins by which multipliers that prove nothing are pulled inside the cone."""

_RANK = 4
"""Entries of a vector at first: few multipliers are shared by many frequencies, each of which has its own vectors."""

_TOL = 1e-4
"""The least gap asked for: single precision does not find much less."""


@dataclass(frozen=True, eq=False)
class WarmChannels:
    """What a later call can start from: the multipliers by node, the rho they proved, and the end of the ascent."""

    t: dict[int, Tensor]
    rho: float
    end: Start | None = None


@dataclass(frozen=True)
class Channel(Method):
    """LipSDP in the frequency domain, 2-norm to 2-norm.

    Attributes:
        granularity: one multiplier a channel (vectors: a neuron), or one a layer.
        solver: "auto" or "low-rank", the one there is.
        tol: relative gap of the squared bound that is asked for, at least 1e-4.
        time_limit: seconds for the search, two minutes if None; the best multipliers found by then are proved.

    Source: Fazlyab et al. 2019, arXiv:1906.04893, on the torus of `lipguard.programs.torus`.
    """

    norms: ClassVar[tuple[Pair, ...]] = ((2.0, 2.0),)

    granularity: Literal["channel", "layer"] = "channel"
    solver: str = "auto"
    tol: float = 1e-4
    time_limit: float | None = None

    def __post_init__(self) -> None:
        """Refuse options out of range, and another solver than the one there is."""
        super().__post_init__()
        if self.solver not in ("auto", "low-rank"):
            raise UnsupportedQuery(f"lipsdp-channel has one solver, 'low-rank', not {self.solver!r}. Give solver='low-rank'.")

    @property
    def name(self) -> str:
        """Name in the registry."""
        return "lipsdp-channel"

    def cost(self, network: Network, query: Query) -> float:
        """Multiplications of one elimination over all frequencies."""
        return elimination_work(network) if query.norm in self.norms else math.inf

    def pack(self, state: Any) -> dict[str, Any] | None:
        """The multipliers by node, and their rho."""
        if not isinstance(state, WarmChannels):
            return None
        return {"channels": {node: t.cpu() for node, t in state.t.items()}, "rho": state.rho}

    def unpack(self, packed: Mapping[str, Any]) -> WarmChannels | None:
        """The state, without the end of an ascent: the first measurement climbs anew."""
        if "channels" not in packed:
            return None
        t = {int(node): torch.as_tensor(values) for node, values in packed["channels"].items()}
        return WarmChannels(t, float(packed["rho"]))

    def __call__(
        self, network: Network, query: Query, state: WarmChannels | None = None
    ) -> tuple[Certificate, WarmChannels | None]:
        """The verified bound; never above the product of the layers' norms.

        Raises:
            UnsupportedQuery: a norm other than 2, a part of the network that does not treat all places alike (the message
                names it), or one too large.
        """
        began = time.perf_counter()
        if query.norm not in self.norms:
            raise self.unsupported(query)
        product, _ = Spectral()(network, query)
        torus = Torus(neurons_only(network))
        check_search_memory(torus)
        deadline = began + (_SECONDS if self.time_limit is None else self.time_limit)
        note, warm = "", None
        try:
            problem = _Problem(torus, self.granularity == "layer")
            start = None if state is None else problem.to_program(state.t, state.rho)
            climb = search(problem.program, start, self.tol, deadline, None if state is None or start is None else state.end)
            found, warm = _proved(network, query, problem, climb.t, climb.rho)
            warm = replace(warm, end=climb.end)
            found = replace(found, details={"gap": climb.gap, "iterations": climb.steps, "product": product.value})
            if found.value <= product.value:
                return replace(found, seconds=time.perf_counter() - began), warm
            note = f"lipsdp-channel proves {show_upper(found.value)} only"
        except (SolverFailed, NotCertified) as failure:
            note = f"{type(failure).__name__}: {failure}"
        note = f"{note}; the spectral product {show_upper(product.value)} stands"
        return replace(product, note=note, seconds=time.perf_counter() - began), warm


def search(
    program: FrequencyProgram,
    start: Tensor | None = None,
    tol: float = _TOL,
    deadline: float = math.inf,
    end: Start | None = None,
) -> Climb:
    """The ascent of a program's dual, in single precision, and in double where that found nothing.

    Args:
        program: the program.
        start, end: multipliers of a neighbouring program, and the end of its ascent, or None.
        tol: relative gap of rho, at least 1e-4.
        deadline: `time.perf_counter()` value after which no further step is begun.
    Raises:
        SolverFailed: no interior point exists in floating point.
    """
    with torch.no_grad():
        t, rho = program.interior() if start is None else program.interior(start, margin=0.5)
        method = LowRank(tol=max(tol, _TOL), rank=_RANK)
        found = method.climb(FrequencySpheres(program, single=True), t, rho, deadline, end)
        return found if found.rho < rho else method.climb(FrequencySpheres(program), t, rho, deadline, end)


def _proved(network: Network, query: Query, problem: _Problem, tau: Tensor, rho: float) -> tuple[Certificate, WarmChannels]:
    """The certificate of these multipliers, pulled inside the cone by as little as the proof takes.

    Raises:
        NotCertified: nothing is proved with the last pull either.
    """
    for pull in (None, *_PULLS):
        inside, least = (tau, rho) if pull is None else problem.program.interior(tau, margin=pull)
        evidence = ChannelMultipliers(problem.to_network(inside, least), least, problem.torus.sides)
        proposed = Certificate(math.sqrt(least), "upper", query.norm, query.domain, network.digest, "lipsdp-channel", evidence)
        try:
            return verify(network, proposed), WarmChannels(evidence.t, evidence.rho)
        except NotCertified:
            if pull == _PULLS[-1]:
                raise
    raise AssertionError("the last pull returns or raises.")


class _Problem:
    """The program of a torus form and the relation of its multipliers to the network's.

    Slopes [alpha, beta] become [0, 1] by w = alpha p + (beta - alpha) u. Vectors behind images make the transposed network
    the program: there they come first.
    """

    def __init__(self, torus: Torus, tied: bool) -> None:
        self.torus, self.layers = torus, torus.layers
        self.slopes = [_slopes(layer) for layer in self.layers]
        self.transposed = torus.forward
        rows, out = self._unit_slopes(*blocks(torus))
        count = len(self.layers)
        index = range(count)
        # From the coarsest level to the finest: no layer is computed from one behind it.
        self.order = list(reversed(index)) if self.transposed else list(index)
        self.order.sort(key=lambda k: -self.layers[k].level)
        place = {k: new for new, k in enumerate(self.order)} | {-1: -1, count: count}
        program: list[dict[int, Tensor]] = [{} for _ in range(count + 1)]
        for k, row in enumerate([*rows, out]):
            for source, block in row.items():
                if not self.transposed:
                    program[place[k]][place[source]] = block
                else:
                    there = -1 if k == count else place[k]
                    program[place[source] if source >= 0 else count][there] = block.mH.resolve_conj()
        groups, self.spans, end = [], [], 0
        for k in self.order:
            layer = self.layers[k]
            size = 1 if tied else layer.channels
            own = end + torch.arange(layer.channels, device=torus.network.device).clamp_max(size - 1)
            groups.append(own.repeat(layer.places))
            self.spans.append(own)
            end += size
        (first, _), (last, _) = torus.ends
        outer = (first, last) if self.transposed else (last, first)
        self.program = FrequencyProgram(
            tuple(groups),
            (*(self.layers[k].level for k in self.order), *outer),
            tuple(program[:-1]),
            program[-1],
            tuple(level.counts for level in torus.levels),
            tuple(level.down for level in torus.levels),
            not torus.levels[-1].blocks,
        )

    def to_network(self, tau: Tensor, rho: float) -> dict[int, Tensor]:
        """Multipliers of the network's own slopes by node."""
        own = rho / tau if self.transposed else tau
        return {self.layers[k].node: own[span] / self.slopes[k][1] ** 2 for k, span in zip(self.order, self.spans, strict=True)}

    def to_program(self, t: dict[int, Tensor], rho: float) -> Tensor | None:
        """The program's multipliers from the network's; None where they are of another network."""
        if {node: len(values) for node, values in t.items()} != {layer.node: layer.channels for layer in self.layers}:
            return None
        tau = torch.ones(self.program.multipliers, dtype=torch.float64, device=self.program.counts[0].device)
        for k, span in zip(self.order, self.spans, strict=True):
            tau[span] = t[self.layers[k].node].to(tau) * self.slopes[k][1] ** 2
        return rho / tau if self.transposed else tau

    def _unit_slopes(self, rows: list[Blocks], out: Blocks) -> tuple[list[Blocks], Blocks]:
        done: list[Blocks] = []

        def substitute(blocks: Blocks, here: int) -> Blocks:
            result: Blocks = {}
            for source, block in blocks.items():
                if source < 0:
                    _add(result, source, block)
                    continue
                alpha, width = (s.repeat(self.layers[source].places) for s in self.slopes[source])
                _add(result, source, block * width)
                if bool(alpha.any()):
                    for deeper, inner in done[source].items():
                        _add(result, deeper, self._product(block * alpha, source, inner, deeper, here))
            return result

        levels = [layer.level for layer in self.layers]
        for row, level in zip(rows, levels, strict=True):
            done.append(substitute(row, level))
        return done, substitute(out, self.torus.ends[1][0])

    def _product(self, left: Tensor, middle: int, right: Tensor, source: int, here: int) -> Tensor:
        """left (at the finer of the levels here and middle) times right (middle and source), at the finer of all."""
        torus = self.torus
        center = self.layers[middle].level
        end = self.layers[source].level if source >= 0 else torus.ends[0][0]
        first, second = min(here, center), min(center, end)
        finest = min(first, second)
        kind = torch.promote_types(left.dtype, right.dtype)
        return left.to(kind)[torus.descent(finest, first)] @ right.to(kind)[torus.descent(finest, second)]


def _slopes(layer: Layer) -> tuple[Tensor, Tensor]:
    """alpha and beta - alpha by channel."""
    thin = (layer.beta - layer.alpha) < _THINNEST
    alpha = torch.where(thin, layer.alpha - _THINNEST / 2, layer.alpha)
    return alpha, torch.where(thin, layer.beta + _THINNEST / 2, layer.beta) - alpha


def _add(blocks: Blocks, source: int, block: Tensor) -> None:
    blocks[source] = blocks[source] + block if source in blocks else block
