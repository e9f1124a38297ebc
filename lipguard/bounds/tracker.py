"""`Tracker`: bounds of a network that keeps changing, measurement after measurement, each verified.

A measurement captures the weights, improves the last measurement's multipliers, or climbs on from its dual point, proves the
upper bound found and a witnessed lower bound. How far it goes depends on the seconds it may take: small networks are solved
in full; large ones take as many steps as the time allows, in single precision, since the checker settles the value in any
case.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lipguard import registry
from lipguard.bounds import LOCAL, network_of
from lipguard.bounds.channel import WarmChannels
from lipguard.bounds.granularity import elimination
from lipguard.bounds.local import Local
from lipguard.bounds.refine import climb, refine
from lipguard.bounds.sampling import Points, Sampling
from lipguard.bounds.semidefinite import Warm, certify, check_query, deep, not_above_product, propose, solved
from lipguard.bounds.spectral import Spectral
from lipguard.bounds.weighted import cubes
from lipguard.certificate import Certificate, Domain, Factors, Norm, Query, norm_pair
from lipguard.errors import Contradiction, LipguardError, SolverFailed
from lipguard.network import Affine, Conv, Network, Operator
from lipguard.programs.feedback import feedback_of
from lipguard.programs.lipsdp import lipsdp
from lipguard.programs.rewriting import slope_restricted
from lipguard.solvers.low_rank import Start
from lipguard.solvers.threads import one_thread
from lipguard.verify.norms.factors import LARGEST_UNROLLED


@dataclass(frozen=True, eq=False)
class Measurement:
    """One measurement: verified bounds on both sides, and what they cost."""

    upper: Certificate
    lower: Certificate
    seconds: float
    network: Network
    note: str = ""

    @property
    def gap(self) -> float:
        """upper / lower - 1; inf where the lower bound is 0."""
        return self.upper.value / self.lower.value - 1 if self.lower.value > 0 else math.inf

    @cached_property
    def spectral(self) -> Certificate:
        """The verified product of the layers' norms, for comparison; computed when first asked for."""
        return Spectral()(self.network, Query(self.upper.norm, self.upper.domain))[0]

    @cached_property
    def layers(self) -> dict[str, float]:
        """Verified norm of every affine layer, by name."""
        evidence = self.spectral.evidence
        assert isinstance(evidence, Factors)
        from lipguard.verify.norms.factors import prove_norm

        p = self.upper.norm[0]
        nodes = {i: n for i, n in enumerate(self.network.nodes) if isinstance(n, Affine)}
        return {n.name or f"node{i}": prove_norm(n.operator, evidence.norms[i], p, n.name) for i, n in nodes.items()}


@dataclass
class Tracker:
    """Verified Lipschitz bounds of a model as it trains; for any training loop.

    Args:
        model: the module; read in eval mode, left exactly as it is.
        example: a batch of inputs that the module accepts.
        method, norm, domain, solver, submodule: as for `lipguard.bound`; but for method None a network too large for the
            neurons' semidefinite bound is measured by "lipsdp-channel", "spectral" or "toeplitz", and the note says so. With a
            domain networks of up to 400 neurons get the local bound, larger ones the global one.
        tol: relative gap of the squared bound at which a full solve ends.

    Example:
        >>> tracker = lg.Tracker(model, torch.zeros(1, 784))
        >>> upper, lower = tracker.update()
    """

    model: nn.Module
    example: Tensor | None
    method: str | None = None
    norm: Norm = 2
    domain: Domain | None = None
    submodule: str | None = None
    solver: str = "auto"
    tol: float = 1e-4
    last: Measurement | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        """Check names and the query at once, so that a mistake costs no training."""
        self._query = Query(norm_pair(self.norm), self.domain)
        self._name = self.method or ""  # "": by the network's size
        if self._name:
            registry.method(self._name)
        if self.solver != "auto":
            registry.solver(self.solver)
        self._warm: Any = None
        self._balance: Tensor | None = None  # of the network that the last multipliers are of
        self._end: Start | None = None  # of the last ascent
        self._points: Points | None = None
        self._drawn = 0  # measurements so far: the seed of their random starts
        self._reserve = 0.0  # seconds that proving the last value took
        self._pace = 0.0  # seconds of a full solve, divided by the cube of its order

    def update(self, seconds: float | None = None, floor: float = 0.5) -> tuple[float, float]:
        """Measure now.

        Args:
            seconds: time this measurement should take at most; None for no limit. It is a target: capture and
                verification are always done.
            floor: time it may take all the same while the value is still visibly improving.
        Returns:
            (upper, lower): verified bounds, upper rounded up and lower rounded down. `last` has the certificates.
        Raises:
            LipguardError: the model cannot be captured (nan weights, unsupported layer), or the domain does not fit.
            Contradiction: a verified lower bound exceeds a verified upper bound, which would be a bug.
        """
        with one_thread():
            return self._measure(seconds, floor)

    def _measure(self, seconds: float | None, floor: float) -> tuple[float, float]:
        began = time.perf_counter()
        network = network_of(self.model, self.example, self.submodule)
        if self.domain is not None:
            self.domain.bounds(network.inputs)
        if not self._name:
            self._name = affordable(network, self._query.norm)
        lower = self._lower(network, seconds)
        spent = time.perf_counter() - began
        left = None if seconds is None else max(seconds - spent - self._reserve, 0.0)
        upper = self._upper(network, left, max(floor - spent - self._reserve, 0.0))
        if self.domain is not None and slope_restricted(network).neurons <= _LARGEST_LOCAL:
            # The multipliers carried on are those of all of R^d; on a domain the slopes are fewer.
            name = self._name if self._name in LOCAL and self._query.norm == (2.0, 2.0) else "spectral"
            (local,) = Local(name, tol=self.tol)(network, self._query, [self.domain])
            upper = min(upper, local, key=lambda certificate: certificate.value)
        if lower.value > upper.value:
            raise Contradiction(
                f"the verified lower bound {lower.value!r} exceeds the verified upper bound {upper.value!r}. Please report this."
            )
        chosen = (
            ""
            if self.method or self._name == "lipsdp-neuron" or self._query.norm != (2.0, 2.0)
            else _SAID.format(method=self._name, neurons=slope_restricted(network).neurons)
        )
        note = "; ".join(n for n in (chosen, upper.note, lower.note) if n)
        self.last = Measurement(upper, lower, time.perf_counter() - began, network, note)
        return upper.value, lower.value

    def _upper(self, network: Network, seconds: float | None, floor: float) -> Certificate:
        began = time.perf_counter()
        allowed = math.inf if seconds is None else max(seconds, floor / 4)
        if self._name not in ("lipsdp-neuron", "lipsdp-layer") or self._query.norm != (2.0, 2.0):
            limit = None if seconds is None else allowed
            solves = self._name.startswith("lipsdp")
            options: dict[str, Any] = {"solver": self.solver, "tol": self.tol, "time_limit": limit} if solves else {}
            certificate, warm = registry.method(self._name).build(**options)(network, self._query, self._warm)
            self._warm = self._warm if warm is None else warm
            return certificate
        check_query(network, self._query, self._name)
        tied = self._name == "lipsdp-layer"
        problem = lipsdp(feedback_of(network), tied)
        program = problem.program
        if not program.sizes or not any(-1 in row for row in (*program.rows, program.out)):
            return Spectral()(network, self._query)[0]
        warm = self._warm if isinstance(self._warm, Warm) and self._warm.t.numel() == program.neurons else None
        expected = self._pace * program.order**3
        in_full = program.order <= _LARGEST_FULL if self._pace == 0 else expected <= allowed
        notes: list[str] = []
        try:
            start = None
            if warm is not None:
                before = problem.balance if self._balance is None else self._balance.to(problem.balance)
                grown = problem.balance / before
                start = problem.to_program(warm.t.to(grown) * grown, warm.rho)
            if self.solver != "auto" or seconds is None:
                proposal = solved(self.solver, program, start, self.tol, seconds)[1]
            elif in_full:
                proposal = propose("interior-point", program, None, self.tol, None)
                self._pace = (time.perf_counter() - began) / program.order**3
            elif program.scaling:  # implicit layers
                proposal = propose("first-order", program, start, self.tol, allowed)
            elif program.order <= _LARGEST_REFINED and not deep(program):
                proposal = refine(program, start, began + seconds, began + max(seconds, floor))
            else:
                proposal, self._end = climb(
                    program, None if warm is None else self._end, began + seconds, began + max(seconds, floor)
                )
        except SolverFailed as failure:
            notes.append(str(failure))
            proposal = None
        proposed = time.perf_counter()
        certificate = certify(network, self._query, problem, proposal, self._name, notes)
        self._reserve = time.perf_counter() - proposed
        if hasattr(certificate.evidence, "t"):
            self._warm = Warm(certificate.evidence.t, certificate.evidence.rho)  # type: ignore[union-attr]
            self._balance = problem.balance
        if proposal is not None and not (proposal.inside and warm is not None):
            # What was refined from the last measurement's multipliers needs no comparison.
            certificate = not_above_product(network, self._query, certificate, proposal, notes)
        return replace(certificate, seconds=time.perf_counter() - began)

    def _lower(self, network: Network, seconds: float | None) -> Certificate:
        first = self._points is None
        pass_cost = sum(multiplications(n.operator) for n in network.nodes if isinstance(n, Affine))
        if pass_cost <= _SMALL or seconds is None:
            starts, steps = (128, 60) if first or seconds is None else (32, 12)
            limit = None if seconds is None else max(0.15 * seconds, 0.1 if first else 0.03)
        else:
            most = max(2, min(32, int(_PASSES / (pass_cost * max(network.outputs, 1)))))
            starts, steps, limit = (most, 60, 0.1) if first else (2, 2, 0.15 * seconds)
        norm = self._query.norm
        if norm != (2.0, 2.0) and norm[0] != 1 and norm[1] != math.inf:
            raise LipguardError(f"no lower bound is known from norm {norm[0]} to norm {norm[1]}.")
        # Fresh random starts beside the best points so far, the same in every run of the same training.
        self._drawn += 1
        sampling = Sampling(starts=starts, steps=steps, seed=self._drawn, time_limit=limit)
        certificate, points = sampling(network, self._query, self._points)
        self._points = Points(points.inputs[:4].cpu(), points.directions[:4].cpu())
        return certificate

    def state_dict(self) -> dict[str, Any]:
        """Multipliers and points to start from, as plain tensors and numbers."""
        state: dict[str, Any] = {"method": self._name, "pace": self._pace, "drawn": self._drawn}
        if isinstance(self._warm, Warm):
            state["multipliers"], state["rho"] = self._warm.t.cpu(), self._warm.rho
            state["balance"] = None if self._balance is None else self._balance.cpu()
        elif isinstance(self._warm, WarmChannels):
            state["channels"] = {node: t.cpu() for node, t in self._warm.t.items()}
            state["rho"] = self._warm.rho
        if self._points is not None:
            state["inputs"], state["directions"] = self._points.inputs, self._points.directions
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; another method's multipliers are left out."""
        if not self._name and isinstance(state.get("method"), str):
            self._name = state["method"]
        if state.get("method") == self._name and "multipliers" in state:
            self._warm = Warm(torch.as_tensor(state["multipliers"]), float(state["rho"]))
            self._balance = state.get("balance")
            self._pace = float(state.get("pace", 0.0))
        elif state.get("method") == self._name and "channels" in state:
            t = {int(node): torch.as_tensor(values) for node, values in state["channels"].items()}
            self._warm = WarmChannels(t, float(state["rho"]))
        self._drawn = int(state.get("drawn", 0))
        if "inputs" in state:
            self._points = Points(torch.as_tensor(state["inputs"]), torch.as_tensor(state["directions"]))


def affordable(network: Network, norm: tuple[float, float] = (2.0, 2.0)) -> str:
    """The method that measures a network between two epochs, where none is asked for: the tightest of its cost.

    The same for all networks of one structure, so that a training is measured by one method.
    """
    if norm != (2.0, 2.0):
        return "lipsdp-neuron" if cubes(network, norm) <= _LARGEST_WEIGHTED else "spectral"
    convolutions = [n.operator for n in network.nodes if isinstance(n, Affine) and isinstance(n.operator, Conv)]
    if slope_restricted(network).neurons <= (_LARGEST_CONVOLUTIONAL if convolutions else _LARGEST_MEASURED):
        return "lipsdp-neuron"
    if convolutions and elimination(network) <= _LARGEST_ELIMINATION:
        return "lipsdp-channel"
    return "spectral" if sum(map(_norm_work, convolutions)) <= _NORM_WORK else "toeplitz"


def multiplications(operator: Operator) -> int:
    """Multiplications of one application."""
    count = sum(t.numel() for t in operator.tensors())
    return count * math.prod(operator.small) if isinstance(operator, Conv) else count


def _norm_work(conv: Conv) -> float:
    """Multiplications to find and prove a convolution's norm, roughly: of its matrix, or of its frequencies' symbols."""
    few, many = sorted(conv.shape)
    if few * many <= LARGEST_UNROLLED:
        return 4.0 * few * few * many
    few, many = sorted(n // conv.groups for n in conv.channels)
    return (
        32.0 * math.prod(n + k for n, k in zip(conv.large, conv.weight.shape[2:], strict=True)) * few * few * many * conv.groups
    )


_SAID = "{method} was chosen: one multiplier for each of {neurons} neurons takes longer than measuring may"

_LARGEST_LOCAL = 400
"""Neurons up to which the local bound of a domain is found anew at every measurement: some tenths of a second."""

_LARGEST_CONVOLUTIONAL, _LARGEST_MEASURED = 1000, 4000
"""Neurons up to which the dense semidefinite program is refined within a second or so: of convolutions, whose matrices are
large beside their weights, and of matrices."""

_LARGEST_WEIGHTED = 3e8
"""Cubes of weighted programs up to which other norms are measured by them: a second or so."""

_LARGEST_ELIMINATION = 4e9
"""Multiplications of one elimination over all frequencies up to which channels are measured: some tenths of a second, and
as much again for the proof."""

_NORM_WORK = 2e11
"""Multiplications for norms of convolutions beyond which the Toeplitz bound is taken: about ten seconds."""

_SMALL = 100_000
"""Multiplications a sample up to which the ascent for the lower bound is run with many starts: about 10 ms."""

_PASSES = 4e9
"""Multiplications for the Jacobians of the first starts: a second or so."""

_LARGEST_REFINED = 800
"""Order up to which a shallow program's multipliers are refined, at some milliseconds a factorisation."""

_LARGEST_FULL = 320
"""Order up to which the first measurement is a full solve: about a fifth of a second."""
