"""Bounds of a network's Lipschitz constant by one call: `bound`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, overload

from lipguard import registry
from lipguard.bounds.choice import default_method
from lipguard.bounds.method import Method, build, check_options
from lipguard.capture import Model, network_of
from lipguard.certificate import Ball, Box, Certificate, Domain, Query
from lipguard.domain import domain_from
from lipguard.errors import InvalidDomain
from lipguard.network import Network
from lipguard.query import Inputs, Norm, Outputs
from lipguard.solvers.threads import one_thread

__all__ = ["Method", "bound"]


@overload
def bound(
    model: Model,
    example: Any = ...,
    *,
    method: str | Method | None = ...,
    norm: Norm = ...,
    domain: Domain | None = ...,
    outputs: Outputs | None = ...,
    inputs: Inputs | None = ...,
    submodule: str | None = ...,
    solver: str = ...,
    tol: float | None = ...,
    time_limit: float | None = ...,
    chordal: bool | None = ...,
    pieces: int | None = ...,
    jobs: int | None = ...,
    **options: object,
) -> Certificate: ...
@overload
def bound(
    model: Model,
    example: Any = ...,
    *,
    method: str | Method | None = ...,
    norm: Norm = ...,
    domain: Sequence[Domain],
    outputs: Outputs | None = ...,
    inputs: Inputs | None = ...,
    submodule: str | None = ...,
    solver: str = ...,
    tol: float | None = ...,
    time_limit: float | None = ...,
    chordal: bool | None = ...,
    pieces: int | None = ...,
    jobs: int | None = ...,
    **options: object,
) -> list[Certificate]: ...
def bound(
    model: Model,
    example: Any = None,
    *,
    method: str | Method | None = None,
    norm: Norm = 2,
    domain: Domain | Sequence[Domain] | None = None,
    outputs: Outputs | None = None,
    inputs: Inputs | None = None,
    submodule: str | None = None,
    solver: str = "auto",
    tol: float | None = None,
    time_limit: float | None = None,
    chordal: bool | None = None,
    pieces: int | None = None,
    jobs: int | None = None,
    **options: object,
) -> Certificate | list[Certificate]:
    """A verified bound of the Lipschitz constant of `model` over `domain`.

    With a domain the methods of this package bound the local constant: the ranges of all pre-activations on the domain
    narrow the slopes of the neurons. Many domains are bounded together.

    Args:
        model: a module, read in eval mode and left as it is, a `torch.export.ExportedProgram`, or a captured `Network`.
        example: a batch of inputs, (batch, ...), any values; not needed for a `Network`, an exported program, or a module with
            `example_input_array`.
        method: None chooses by norm, memory and cost among "lipsdp-neuron", "lipsdp-channel" (convolutional networks of any
            size) and "spectral". Others: "lipsdp-layer", "lipsdp-split", "toeplitz", "contraction" (absolute values: from norm
            inf or to norm 1, implicit layers too), "sampling", the only lower bound, and names registered by other packages;
            or a method object, which states its own options.
        norm: 1, 2, inf, or a pair (input norm, output norm).
        domain: `Box`, `Ball` or None for all inputs; or a sequence of them; or one whose centre (whose ends) is a batch,
            of shape (B, ...) with B > 1.
        outputs: a matrix (k, m) or a pair of classes (i, j) to bound a functional of the outputs; or which of several
            tensors that the module returns, by its place or name.
        inputs: with respect to what: a matrix (d, k), or which of several input tensors, by its place or name, or a tuple of
            several. None: all of them of floating point, jointly. Others are held at the example's values; the `note` says which.
        submodule: dotted name of a part to bound instead of the whole.
        solver: of the LipSDP methods: "auto", "interior-point", "low-rank", "first-order", "scs", "clarabel", "cvxopt", "mosek".
        tol: relative gap of the squared bound asked of the solver.
        time_limit: seconds for the search; what is found by then is verified.
        chordal: for "scs", "clarabel", "cvxopt" and "mosek": one small matrix a layer, of the same optimum, instead of one
            of all neurons (Xue et al., arXiv:2204.00846).
        pieces, jobs: of "lipsdp-split": consecutive pieces whose bounds multiply, and processes that solve them.
        options: further options of the method.
    Returns:
        A `Certificate` with rigor "verified"; for a sequence or a batch of domains a list of them, one for each. The
        `note` says if a solver failed and another bound stands in, or if the method that was chosen has no use for an option.
    Raises:
        UnsupportedQuery: an option that the method does not take, or a value out of range.
        LipguardError: a bad model, example, name or query; the subclass and the message say which.
    """
    named = {"tol": tol, "time_limit": time_limit, "chordal": chordal, "pieces": pieces, "jobs": jobs}
    given = {name: value for name, value in named.items() if value is not None} | options
    if solver != "auto":
        given["solver"] = solver
    check_options(given, "bound")
    query = Query(norm, None, outputs, inputs, submodule, example)
    chosen = None if method is None else [build(method, given)]
    network = network_of(model, query)
    if isinstance(domain, str | Mapping):
        domain = domain_from(domain, query.norm[0])
    domains, several = _domains(domain, network.inputs)
    if chosen is None:
        chosen = _chosen(network, query, bool(domains), given)
    found = []
    asked = query.of_network()
    with one_thread():
        for one, note in ((pair if isinstance(pair, tuple) else (pair, "")) for pair in chosen):
            certificates = on_domains(one, network, asked, domains) if domains else [one(network, asked, None)[0]]
            found.append([_noted(certificate, "; ".join(filter(None, (note, network.respect)))) for certificate in certificates])
    certificates = [min(each, key=lambda certificate: certificate.value) for each in zip(*found, strict=True)]
    return certificates if several else certificates[0]


def on_domains(method: Any, network: Network, query: Query, domains: Sequence[Domain]) -> list[Certificate]:
    """A certificate for each domain: together, where the method can."""
    if isinstance(method, Method):
        return method.on(network, query, domains)
    return [method(network, dataclasses.replace(query, domain=domain), None)[0] for domain in domains]


def _chosen(network: Network, query: Query, local: bool, given: dict[str, object]) -> list[tuple[Any, str]]:
    """The methods of the package for this network, and what each has to say of options that it has no use for."""
    names = [default_method(network, query.norm)]
    if local and query.norm != (2.0, 2.0):
        # The weighted programs of other norms know no domain, the slopes on the domain no program: the better one stands.
        names.append("spectral")
    chosen = []
    for name in dict.fromkeys(names):
        entry = registry.method(name)
        taken = entry.takes()
        unused = [f"{option}={value!r}" for option, value in given.items() if option not in taken and option != "time_limit"]
        note = f"{name} was chosen, which has no use for {', '.join(unused)}" if unused else ""
        chosen.append((entry.build(**{option: value for option, value in given.items() if option in taken}), note))
    return chosen


def _noted(certificate: Certificate, note: str) -> Certificate:
    return dataclasses.replace(certificate, note="; ".join(n for n in (note, certificate.note) if n)) if note else certificate


def _domains(domain: Domain | Sequence[Domain] | None, size: int) -> tuple[list[Domain], bool]:
    """The domains, checked, and whether they are several by their form."""
    if domain is None:
        return [], False
    if isinstance(domain, Box | Ball):
        batch = domain.each(size)
        domains, several = ([domain], False) if batch is None else (list(batch), True)
    else:
        domains, several = list(domain), True
        if not domains:
            raise InvalidDomain("the sequence of domains is empty. Give at least one Box or Ball.")
    for i, one in enumerate(domains):
        if not isinstance(one, Box | Ball):
            raise InvalidDomain(f"domain {i} is {type(one).__name__}; give lipguard.Box(0, 1) or lipguard.Ball(centre, radius).")
        if not several:
            one.bounds(size)
            continue
        try:
            one.bounds(size)
        except InvalidDomain as error:
            raise InvalidDomain(f"domain {i}: {error}") from error
    return domains, several
