"""Bounds of a network's Lipschitz constant by one call: `bound`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lipguard import registry
from lipguard.certificate import Certificate, Domain, Norm, Query, norm_pair
from lipguard.network import Network
from lipguard.solvers.threads import one_thread

__all__ = ["bound"]


def bound(
    model: nn.Module | Network,
    example: Tensor | None = None,
    *,
    method: str | None = None,
    norm: Norm = 2,
    domain: Domain | None = None,
    solver: str = "auto",
    submodule: str | None = None,
    outputs: Tensor | tuple[int, int] | None = None,
    tol: float = 1e-7,
    time_limit: float | None = None,
    chordal: bool = False,
    pieces: int = 4,
    jobs: int = 1,
) -> Certificate:
    """A verified bound of the Lipschitz constant of `model` over `domain`.

    Args:
        model: a module, read in eval mode and left as it is, or a captured `Network`.
        example: a batch of inputs, (batch, ...), any values; not needed for a `Network`.
        method: "lipsdp-neuron" (the default for norm 2), "lipsdp-layer", "lipsdp-split", "spectral" (the default else),
            or "sampling", the only lower bound; or a name registered by another package.
        norm: 1, 2, inf, or a pair (input norm, output norm).
        domain: `Box`, `Ball` or None for all inputs. Upper bounds hold for all inputs, and so for every domain.
        solver: of the LipSDP methods: "auto", "interior-point", "newton", "first-order", "scs", "clarabel", "cvxopt", "mosek".
        submodule: dotted name of a part to bound instead of the whole.
        outputs: a matrix (k, m) or a pair of classes (i, j) to bound a functional of the outputs.
        tol: relative gap of the squared bound asked of `interior-point`.
        time_limit: seconds for the search; what is found by then is verified.
        chordal: for "scs", "clarabel", "cvxopt" and "mosek": one small matrix a layer, of the same optimum, instead of one
            of all neurons (Xue et al., arXiv:2204.00846).
        pieces, jobs: of "lipsdp-split": consecutive pieces whose bounds multiply, and processes that solve them.
    Returns:
        A certificate with rigor "verified". Its `note` says if a solver failed and another bound stands in.
    Raises:
        LipguardError: a bad model, example, name or query; the subclass and the message say which.
    """
    query = Query(norm_pair(norm), domain)
    name = method or ("lipsdp-neuron" if query.norm == (2.0, 2.0) else "spectral")
    entry = registry.method(name)
    options: dict[str, Any] = {}
    if name.startswith("lipsdp"):
        options = {"solver": solver, "tol": tol, "time_limit": time_limit, "chordal": chordal}
        if name == "lipsdp-split":
            options |= {"pieces": pieces, "jobs": jobs}
        if solver != "auto":
            registry.solver(solver)
    elif name == "sampling":
        options = {"time_limit": time_limit}
    network = network_of(model, example, submodule, outputs)
    if domain is not None:
        domain.bounds(network.inputs)
    with one_thread():
        certificate, _ = entry.build(**options)(network, query, None)
    return certificate


def network_of(
    model: nn.Module | Network,
    example: Tensor | None,
    submodule: str | None = None,
    outputs: Tensor | tuple[int, int] | None = None,
) -> Network:
    """The captured network of a module; a `Network` is taken as it is.

    Raises:
        InvalidExample: a module is given without an example.
    """
    from lipguard.network.capture import capture

    return capture(model, example, submodule=submodule, outputs=outputs)
