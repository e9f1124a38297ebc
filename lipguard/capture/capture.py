"""nn.Module -> Network: run the module's forward, lower every call, and check the reading; see `lipguard.capture.readings`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from lipguard.capture.arguments import Arguments, arguments_of, called
from lipguard.capture.frozen import frozen
from lipguard.capture.readings import Reader, checked, named_tensors
from lipguard.capture.rules.registry import load, lowers
from lipguard.capture.selection import embed, parts, select
from lipguard.errors import InvalidExample, InvalidModel, LipguardError, UnknownName, UnsupportedLayer, UnsupportedQuery
from lipguard.network import Network
from lipguard.query import Inputs, Outputs, Query
from lipguard.rounding import FLUSHED, flushes_denormals

__all__ = ["capture", "lowers", "network_of"]


def capture(
    model: nn.Module | Network,
    example: Any = None,
    *,
    submodule: str | None = None,
    outputs: Outputs | None = None,
    inputs: Inputs | None = None,
    live: bool = False,
    norm: None = None,
    domain: None = None,
) -> Network:
    """The network that a module computes in evaluation mode, in float64 arithmetic on its stored weights.

    The module is left exactly as it was: modes, gradients, buffers, attributes, hooks, random state. Its hooks see
    ordinary passes over two samples, in evaluation mode, never the tracer.

    Args:
        model: the module (compiled or parametrized ones too), or a `Network`, which is taken as it is.
        example: a batch of inputs, shape (B, ...), B >= 1; only its shape and the first row matter. For a module of several
            input tensors a tuple or a mapping of them, see `inputs`. Not needed for a `Network`.
        submodule: path of the submodule to bound. `example` is then an input of `model`, run once to see what arrives at
            the submodule, or, where that fails, an input of the submodule itself.
        outputs: a matrix (k, m) applied to the m outputs, or a pair (i, j) of classes, for output i minus output j. Where the
            module returns several tensors: the place, key or name of one ("policy.logits" where nested), or a pair of that
            and one of the former.
        inputs: a matrix E (d, k), for the function z -> f(E z); or, where the module takes several tensors, the place or the
            argument's name of one. The others are held at the example's values: where they are batches, at the first row's.
        live: keep the weights in the autograd graph, for penalties; else they are detached copies.
        norm, domain: refused: they belong to the bound of the network.
    Returns:
        A `Network` with d inputs (k where `inputs` is a matrix) and m outputs: the entries of one sample, in row-major order.
    Raises:
        InvalidExample: the example does not fit the module, or holds several tensors of which none is chosen.
        InvalidModel: weights are nan, infinite or not initialised yet.
        UnsupportedLayer: a call has no rule, or the module does something that capture would misread.
        UnknownName: there is no such submodule.
        UnsupportedQuery: `outputs` or `inputs` does not fit the network.
    Rounding: what the module computes from weights alone is taken bit for bit. Constants folded along the data path (BatchNorm,
    x / 3, a bias behind a scaling) are enclosed: `Operator.rho` and `Affine.bias_radius` bound what they round.
    """
    if norm is not None or domain is not None:
        raise UnsupportedQuery(
            "norm and domain belong to the bound, not to the network. Give them to lipguard.bound or lipguard.exact with it."
        )
    query = Query(outputs=outputs, inputs=inputs, submodule=submodule, example=example)
    return network_of(model, query, live=live)


def network_of(model: nn.Module | Network, query: Query, *, live: bool = False, repeated: bool = False) -> Network:
    """The network whose constant a query asks for: of its submodule, inputs and outputs; see `capture`.

    Args:
        repeated: the module is read again and again, as in training: what does not change is checked now and then only.
    Raises:
        LipguardError: as `capture`.
    """
    which, functional = parts(query.outputs)
    matrix = query.inputs if isinstance(query.inputs, Tensor) else None
    source = None if isinstance(query.inputs, Tensor) else query.inputs
    if isinstance(model, Network):
        network = model
        for name, value in (("outputs", which), ("inputs", source), ("submodule", query.submodule)):
            if value is not None:
                raise UnsupportedQuery(
                    f"{name}={value!r} chooses among the parts of a module; a Network has one of each. Give the module and an "
                    f"example, or capture it with {name}={value!r}."
                )
    elif isinstance(model, nn.Module):
        if query.example is None:
            raise InvalidExample("a module needs an example input, a batch (1, ...) of the shape it takes. Give example=...")
        if flushes_denormals():
            raise InvalidModel(FLUSHED)
        load()
        network = _capture(_unwrap(model), query, live, which, source, repeated or live)
    else:
        raise InvalidModel(f"model is {type(model).__name__}; an nn.Module or a lipguard.Network is needed.")
    if matrix is not None:
        network = embed(network, matrix)
    return network if functional is None else select(network, functional)


def _capture(model: nn.Module, query: Query, live: bool, which: str | None, source: int | str | None, repeated: bool) -> Network:
    _check(model)
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            place = f"model.{name}" if name else "model"
            raise UnsupportedLayer(f"{place} is a scripted module, which hides its calls. Capture the module it was made from.")
    with frozen(model):
        part, root = model, "model"
        given = _arguments(model, query.example)
        if query.submodule:
            part, root = _find(model, query.submodule), f"model.{query.submodule}"
            given = _arriving(model, part, given) or _arguments(part, query.example)
        call = given.of(source, f"{root} ({type(part).__name__})")
        reader = Reader(part, call, 0, root, which)
        try:
            reading = reader.read(call.row, live)
        except LipguardError:
            if reader.runs():
                raise
            # Written for one vector, the example is one sample as a whole, such as a column (n, 1).
            whole = Reader(part, call.whole(given), None, root, which)
            if not whole.runs():
                raise
            reader, reading = whole, whole.read(whole.call.row, live)
        return checked(reader, reading, repeated)


def _arguments(module: nn.Module, example: Any) -> Arguments:
    if not isinstance(example, Tensor | tuple | list | Mapping):
        raise InvalidExample(
            f"example is {type(example).__name__}; a tensor of shape (B, ...) is needed, or a tuple or a mapping of several. "
            "Give torch.as_tensor(example) for an array, torch.zeros(1, 4) where only the shape (4,) of one input is known."
        )
    return arguments_of(module, example)


class _Arrived(Exception):
    """Ends a run of the whole model at the submodule."""


def _arriving(model: nn.Module, part: nn.Module, given: Arguments) -> Arguments | None:
    """What `part` is called with when the model runs on the example's first row; None if it does not get there."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise _Arrived

    handle = part.register_forward_pre_hook(record, with_kwargs=True, prepend=True)
    try:
        with torch.no_grad():
            args, kwargs = given.first()
            model(*args, **kwargs)
    except Exception:  # the example is then the submodule's own input; errors are told there
        pass
    finally:
        handle.remove()
    return called(part, *seen[0]) if seen else None


def _find(model: nn.Module, path: str) -> nn.Module:
    module = model
    for name in path.split("."):
        children = dict(module.named_children())
        if name not in children:
            known = [n.replace("_orig_mod.", "") for n, _ in model.named_modules() if n]
            raise UnknownName(f"the model has no submodule {path!r}; it has {', '.join(known) or 'none'}.")
        module = _unwrap(children[name])
    return module


def _unwrap(module: nn.Module) -> nn.Module:
    while "_orig_mod" in module._modules:
        module = cast("nn.Module", module._modules["_orig_mod"])
    return module


def _check(model: nn.Module) -> None:
    for name, tensor in named_tensors(model):
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            raise InvalidModel(f"model.{name} is not initialised yet. Run the lazy module once on an example.")
        if tensor.is_meta:
            raise InvalidModel(f"model.{name} is on the meta device and has no values. Load the weights first.")
