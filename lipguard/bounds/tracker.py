"""`Tracker`: bounds of a network that keeps changing, measurement after measurement, each verified.

A measurement captures the weights, hands the network to the method with what the last one left to start from, and proves a
witnessed lower bound. How far it goes depends on the seconds it may take.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from lipguard import registry
from lipguard.bounds.choice import affordable
from lipguard.bounds.cost import pass_work
from lipguard.bounds.method import Method, build, check_options, refuse_lower
from lipguard.bounds.sampling import Points, Sampling
from lipguard.bounds.spectral import Spectral
from lipguard.capture import network_of
from lipguard.certificate import Certificate, Domain, Factors, Query
from lipguard.errors import Contradiction, LipguardError
from lipguard.network import Network
from lipguard.outward import show_interval, show_lower, show_upper
from lipguard.programs.rewriting import slope_restricted
from lipguard.query import Inputs, Norm, Outputs
from lipguard.rendering import clipped, line, norm_text, table
from lipguard.solvers.threads import one_thread
from lipguard.verify.norms.factors import prove_norm

_TOL = 1e-4
"""Relative gap of the squared bound at which a full solve within a training ends."""


@dataclass(frozen=True, eq=False, repr=False)
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

    def __repr__(self) -> str:
        ends = show_interval(self.lower.value, self.upper.value)
        parts = [ends, f"gap {show_upper(self.gap, 3)}", self.upper.rigor, f"norm {norm_text(self.upper.norm)}"]
        return line("Measurement", [*parts, clipped(self.upper.method, 32), repr(self.upper.evidence)])

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        rows = [
            ("lower bound", f"{show_lower(self.lower.value)}, {self.lower.rigor}, {self.lower.method}"),
            ("upper bound", f"{show_upper(self.upper.value)}, {self.upper.rigor}, {self.upper.method}"),
            ("gap", show_upper(self.gap, 3)),
            ("norm", norm_text(self.upper.norm)),
            ("domain", "all inputs" if self.upper.domain is None else repr(self.upper.domain)),
            ("seconds", show_upper(self.seconds, 3)),
            *([("note", self.note)] if self.note else []),
        ]
        return table("Lipschitz bounds of this moment", rows)

    @cached_property
    def spectral(self) -> Certificate:
        """The verified product of the layers' norms, for comparison; computed when first asked for."""
        return Spectral()(self.network, Query(self.upper.norm, self.upper.domain))[0]

    @cached_property
    def layers(self) -> dict[str, float]:
        """Verified norm of every affine layer, by name."""
        evidence = self.spectral.evidence
        assert isinstance(evidence, Factors)
        p = self.upper.norm[0]
        return {
            node.name or f"node{i}": prove_norm(node.map, evidence.norms[i], p, node.name)
            for i, node in enumerate(self.network.nodes)
            if node.map is not None
        }


@dataclass
class Tracker:
    """Verified Lipschitz bounds of a model as it trains; for any training loop.

    Args:
        model: the module; read in eval mode, left exactly as it is.
        example: a batch of inputs that the module accepts.
        method, norm, domain, submodule, solver, outputs, inputs: as for `lipguard.bound`; but for method None a network too
            large for the neurons' semidefinite bound is measured by "lipsdp-channel", "spectral" or "toeplitz", and the note
            says so. With a domain networks of up to 400 neurons get the local bound, larger ones the global one.
        tol: relative gap of the squared bound at which a full solve ends.
    Raises:
        UnknownName: no such method or solver.
        UnsupportedQuery: a method of lower bounds, an option that the method does not take, a value out of range, or norms
            that it does not answer.

    Example:
        >>> tracker = lg.Tracker(model, torch.zeros(1, 784))
        >>> upper, lower = tracker.update()
    """

    model: nn.Module
    example: Any
    method: str | Method | None = None
    norm: Norm = 2
    domain: Domain | None = None
    submodule: str | None = None
    solver: str = "auto"
    tol: float = _TOL
    outputs: Outputs | None = None
    inputs: Inputs | None = None
    last: Measurement | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        """Check names and the query at once, so that a mistake costs no training."""
        self._query = Query(self.norm, self.domain, self.outputs, self.inputs, self.submodule, self.example)
        check_options({"tol": self.tol, "solver": self.solver}, "Tracker")
        self._chosen: Any = None if self.method is None else self._built(self.method)
        self._warm: Any = None
        self._points: Points | None = None
        self._drawn = 0  # measurements so far: the seed of their random starts

    def _built(self, method: str | Method) -> Any:
        """The method with the options given, refused if it cannot bound what is asked from above."""
        given: dict[str, object] = {} if self.solver == "auto" else {"solver": self.solver}
        if isinstance(method, str):
            if "tol" in registry.method(method).takes():
                given["tol"] = self.tol
            elif self.tol != _TOL:
                given["tol"] = self.tol  # refused: the method has no use for it
        built = build(method, given)
        refuse_lower(built, "Tracker")
        if self._query.norm not in getattr(built, "norms", (self._query.norm,)):
            raise built.unsupported(self._query)
        return built

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
        network, query = network_of(self.model, self._query, repeated=True), self._query.of_network()
        if self.domain is not None:
            self.domain.bounds(network.inputs)
        method = self._chosen if self._chosen is not None else self._choose(network)
        lower = self._lower(network, seconds)
        # What proving the last value took is kept back; methods that know it say so in their state.
        spent = time.perf_counter() - began + getattr(self._warm, "reserve", 0.0)
        left = math.inf if seconds is None else max(seconds - spent, 0.0)
        upper = self._upper(method, network, query, left, max(floor - spent, 0.0))
        if lower.value > upper.value:
            raise Contradiction(
                f"the verified lower bound {lower.value!r} exceeds the verified upper bound {upper.value!r}. Please report this."
            )
        note = "; ".join(n for n in (self._choice(network), upper.note, lower.note) if n)
        self.last = Measurement(upper, lower, time.perf_counter() - began, network, note)
        return upper.value, lower.value

    def _choose(self, network: Network) -> Any:
        """The method for a network of this size, for the whole training."""
        name = affordable(network, self._query.norm)
        self._chosen = registry.method(name).build(**self._taken(name))
        return self._chosen

    def _choice(self, network: Network) -> str:
        """What is said of a method that was chosen and is not the tightest."""
        if self.method is not None or self._query.norm != (2.0, 2.0) or (name := self._chosen.name) == "lipsdp-neuron":
            return ""
        neurons = slope_restricted(network).neurons
        return f"{name} was chosen: one multiplier for each of {neurons} neurons takes longer than measuring may"

    def _taken(self, name: str) -> dict[str, Any]:
        taken = registry.method(name).takes()
        return {option: value for option, value in (("solver", self.solver), ("tol", self.tol)) if option in taken}

    def _upper(self, method: Any, network: Network, query: Query, seconds: float, floor: float) -> Certificate:
        if isinstance(method, Method):
            upper, warm = method.measure(network, query, self._warm, seconds, floor)
        else:
            upper, warm = method(network, query, self._warm)
        self._warm = self._warm if warm is None else warm
        if self.domain is None or slope_restricted(network).neurons > _LARGEST_LOCAL:
            return upper
        # The multipliers carried on are those of all of R^d; on a domain the slopes are fewer.
        local = method if isinstance(method, Method) and query.norm in method.local else Spectral()
        return min(upper, local.on(network, query, [self.domain])[0], key=lambda certificate: certificate.value)

    def _lower(self, network: Network, seconds: float | None) -> Certificate:
        first = self._points is None
        work = pass_work(network)
        if work <= _SMALL or seconds is None:
            starts, steps = (128, 60) if first or seconds is None else (32, 12)
            limit = None if seconds is None else max(0.15 * seconds, 0.1 if first else 0.03)
        else:
            most = max(2, min(32, int(_PASSES / (work * max(network.outputs, 1)))))
            starts, steps, limit = (most, 60, 0.1) if first else (2, 2, 0.15 * seconds)
        if self._query.norm not in Sampling.norms:
            p, q = self._query.norm
            raise LipguardError(f"no lower bound is known from norm {p} to norm {q}.")
        # Fresh random starts beside the best points so far, the same in every run of the same training.
        self._drawn += 1
        sampling = Sampling(starts=starts, steps=steps, seed=self._drawn, time_limit=limit)
        certificate, points = sampling(network, self._query.of_network(), self._points)
        self._points = Points(points.inputs[:4].cpu(), points.directions[:4].cpu())
        return certificate

    def state_dict(self) -> dict[str, Any]:
        """Multipliers and points to start from, as plain tensors and numbers."""
        state: dict[str, Any] = {"method": getattr(self._chosen, "name", ""), "drawn": self._drawn}
        packed = self._chosen.pack(self._warm) if isinstance(self._chosen, Method) else None
        if packed is not None:
            state["warm"] = packed
        if self._points is not None:
            state["inputs"], state["directions"] = self._points.inputs, self._points.directions
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; another method's multipliers are left out."""
        if self._chosen is None and state.get("method") in registry.METHODS:
            name = str(state["method"])
            self._chosen = registry.method(name).build(**self._taken(name))
        if self._chosen is not None and state.get("method") == getattr(self._chosen, "name", None):
            self._warm = _unpacked(self._chosen, state)
        self._drawn = int(state.get("drawn", 0))
        if "inputs" in state:
            self._points = Points(torch.as_tensor(state["inputs"]), torch.as_tensor(state["directions"]))


def _unpacked(method: Any, state: Mapping[str, Any]) -> Any:
    packed = state.get("warm")
    return method.unpack(packed) if isinstance(method, Method) and isinstance(packed, Mapping) else None


_LARGEST_LOCAL = 400
"""Neurons up to which the local bound of a domain is found anew at every measurement: some tenths of a second."""

_SMALL = 100_000
"""Multiplications a sample up to which the ascent for the lower bound is run with many starts: about 10 ms."""

_PASSES = 4e9
"""Multiplications for the Jacobians of the first starts: a second or so."""
