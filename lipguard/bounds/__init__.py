"""Bounds of a network's Lipschitz constant by one call: `bound`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from torch import Tensor, nn

from lipguard import registry
from lipguard.bounds.granularity import default_method
from lipguard.bounds.local import Local
from lipguard.certificate import Ball, Box, Certificate, Domain, Norm, Query, norm_pair
from lipguard.errors import InvalidDomain
from lipguard.network import Network
from lipguard.query import Outputs
from lipguard.solvers.threads import one_thread

__all__ = ["bound"]


LOCAL = ("lipsdp-neuron", "lipsdp-layer", "spectral")
"""Methods that use the slopes on the domain; others bound the constant on all of R^d."""


@overload
def bound(
    model: nn.Module | Network,
    example: Tensor | None = ...,
    *,
    method: str | None = ...,
    norm: Norm = ...,
    domain: Domain | None = ...,
    solver: str = ...,
    submodule: str | None = ...,
    outputs: Outputs | None = ...,
    tol: float = ...,
    time_limit: float | None = ...,
    chordal: bool = ...,
    pieces: int = ...,
    jobs: int = ...,
) -> Certificate: ...
@overload
def bound(
    model: nn.Module | Network,
    example: Tensor | None = ...,
    *,
    method: str | None = ...,
    norm: Norm = ...,
    domain: Sequence[Domain],
    solver: str = ...,
    submodule: str | None = ...,
    outputs: Outputs | None = ...,
    tol: float = ...,
    time_limit: float | None = ...,
    chordal: bool = ...,
    pieces: int = ...,
    jobs: int = ...,
) -> list[Certificate]: ...
def bound(
    model: nn.Module | Network,
    example: Tensor | None = None,
    *,
    method: str | None = None,
    norm: Norm = 2,
    domain: Domain | Sequence[Domain] | None = None,
    solver: str = "auto",
    submodule: str | None = None,
    outputs: Outputs | None = None,
    tol: float = 1e-7,
    time_limit: float | None = None,
    chordal: bool = False,
    pieces: int = 4,
    jobs: int = 1,
) -> Certificate | list[Certificate]:
    """A verified bound of the Lipschitz constant of `model` over `domain`.

    With a domain the methods of this package bound the local constant: the ranges of all pre-activations on the domain
    narrow the slopes of the neurons. Many domains are bounded together.

    Args:
        model: a module, read in eval mode and left as it is, or a captured `Network`.
        example: a batch of inputs, (batch, ...), any values; not needed for a `Network`.
        method: None chooses by norm, memory and cost among "lipsdp-neuron", "lipsdp-channel" (convolutional networks of any
            size) and "spectral". Others: "lipsdp-layer", "lipsdp-split", "toeplitz", "contraction" (absolute values: from norm
            inf or to norm 1, implicit layers too), "sampling", the only lower bound, and names registered by other packages.
        norm: 1, 2, inf, or a pair (input norm, output norm).
        domain: `Box`, `Ball` or None for all inputs; or a sequence of them; or one whose centre (whose ends) is a batch,
            of shape (B, ...) with B > 1.
        solver: of the LipSDP methods: "auto", "interior-point", "low-rank", "first-order", "scs", "clarabel", "cvxopt", "mosek".
        submodule: dotted name of a part to bound instead of the whole.
        outputs: a matrix (k, m) or a pair of classes (i, j) to bound a functional of the outputs; or which of several
            tensors that the module returns, by its place or name.
        tol: relative gap of the squared bound asked of `interior-point`.
        time_limit: seconds for the search; what is found by then is verified.
        chordal: for "scs", "clarabel", "cvxopt" and "mosek": one small matrix a layer, of the same optimum, instead of one
            of all neurons (Xue et al., arXiv:2204.00846).
        pieces, jobs: of "lipsdp-split": consecutive pieces whose bounds multiply, and processes that solve them.
    Returns:
        A `Certificate` with rigor "verified"; for a sequence or a batch of domains a list of them, one for each. The
        `note` says if a solver failed and another bound stands in.
    Raises:
        LipguardError: a bad model, example, name or query; the subclass and the message say which.
    """
    query = Query(norm_pair(norm), None)
    if method is not None:
        registry.method(method)
    if solver != "auto" and (method is None or method.startswith("lipsdp")):
        registry.solver(solver)
    network = network_of(model, example, submodule, outputs)
    domains, several = _domains(domain, network.inputs)
    names = [method or default_method(network, query.norm)]
    if method is None and domains and query.norm != (2.0, 2.0):
        # The weighted programs of other norms know no domain, the slopes on the domain no program: the better one stands.
        names.append("spectral")
    given = {"solver": solver, "tol": tol, "time_limit": time_limit, "chordal": chordal, "pieces": pieces, "jobs": jobs}
    found = []
    with one_thread():
        for name in dict.fromkeys(names):
            options = {option: given[option] for option in _OPTIONS.get(name, ())}
            if domains and name in LOCAL and (name == "spectral" or query.norm == (2.0, 2.0)):
                options.pop("chordal", None)
                found.append(Local(name, **options)(network, query, domains))
            else:
                built = registry.method(name).build(**options)
                found.append([built(network, Query(query.norm, one), None)[0] for one in domains or [None]])
    certificates = [min(each, key=lambda certificate: certificate.value) for each in zip(*found, strict=True)]
    return certificates if several else certificates[0]


_PROGRAM = ("solver", "tol", "time_limit")
_OPTIONS = {
    "lipsdp-neuron": (*_PROGRAM, "chordal"),
    "lipsdp-layer": (*_PROGRAM, "chordal"),
    "lipsdp-split": (*_PROGRAM, "chordal", "pieces", "jobs"),
    "lipsdp-channel": _PROGRAM,
    "sampling": ("time_limit",),
}
"""The options of `bound` that each method takes."""


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
            raise InvalidDomain(f"domain {i} is {type(one).__name__}; a lipguard.Box or lipguard.Ball is needed.")
        if not several:
            one.bounds(size)
            continue
        try:
            one.bounds(size)
        except InvalidDomain as error:
            raise InvalidDomain(f"domain {i}: {error}") from error
    return domains, several


def network_of(
    model: nn.Module | Network,
    example: Tensor | None,
    submodule: str | None = None,
    outputs: Outputs | None = None,
) -> Network:
    """The captured network of a module; a `Network` is taken as it is.

    Raises:
        InvalidExample: a module is given without an example.
    """
    from lipguard.capture.capture import capture

    return capture(model, example, submodule=submodule, outputs=outputs)
