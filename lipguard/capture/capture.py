"""nn.Module -> Network: run the module's forward, lower every call, and check the reading; see `lipguard.capture.readings`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from lipguard.capture.arguments import Arguments, arguments_of, called
from lipguard.capture.frozen import frozen
from lipguard.capture.readings import Reader, checked, named_tensors
from lipguard.capture.rules.registry import load, lowers
from lipguard.capture.selection import embed, parts, select
from lipguard.capture.ways import Model, example_of, rows_of, subject_of
from lipguard.errors import InvalidExample, InvalidModel, LipguardError, UnknownName, UnsupportedQuery
from lipguard.network import Input, Network
from lipguard.query import Inputs, Outputs, Query
from lipguard.rounding import FLUSHED, flushes_denormals

__all__ = ["capture", "lowers", "network_of"]


def capture(
    model: Model,
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

    The module is left exactly as it was: modes, gradients, buffers, attributes, hooks, random state. Its hooks run as
    they do when deployed, on a few samples, in evaluation mode: what they change is part of the function.

    Args:
        model: the module (compiled, parametrized or traced by torch.fx too), a `torch.export.ExportedProgram`, or a `Network`,
            which is taken as it is.
        example: a batch of inputs, shape (B, ...), B >= 1; only its shape and the first row matter. For a module of several
            input tensors a tuple or a mapping of them, see `inputs`. Not needed for a `Network`, nor where the model brings one:
            an exported program, a module with `example_input_array`.
        submodule: path of the submodule to bound. `example` is then an input of `model`, run once to see what arrives at
            the submodule, or, where that fails, an input of the submodule itself.
        outputs: a matrix (k, m) applied to the m outputs, or a pair (i, j) of classes, for output i minus output j. Where the
            module returns several tensors: the place, key or name of one ("policy.logits" where nested), or a pair of that
            and one of the former.
        inputs: a matrix E (d, k), for the function z -> f(E z); or, where the module takes several tensors, the place or the
            argument's name of one, or a tuple of several. The others are held at the example's values: where they are batches,
            at the first row's. None: all tensors of floating point, jointly. Of several the entries of one sample stand one
            behind the other, in the order named.
        live: keep the weights in the autograd graph, for penalties; else they are detached copies.
        norm, domain: refused: they belong to the bound of the network.
    Returns:
        A `Network` with d inputs (k where `inputs` is a matrix) and m outputs: the entries of one sample, in row-major order.
    Raises:
        InvalidExample: the example does not fit the module, or holds several tensors that are not of one batch.
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


def network_of(model: Model, query: Query, *, live: bool = False, repeated: bool = False) -> Network:
    """The network whose constant a query asks for: of its submodule, inputs and outputs; see `capture`.

    Args:
        repeated: the module is read again and again, as in training: what does not change is checked now and then only.
    Raises:
        LipguardError: as `capture`.
    """
    which, functional = parts(query.outputs)
    matrix = query.inputs if isinstance(query.inputs, Tensor) else None
    source = None if isinstance(query.inputs, Tensor) else query.inputs
    if query.example is None:
        query = replace(query, example=example_of(model))
    model = subject_of(model)
    if isinstance(model, Network):
        network = model
        for name, value in (("outputs", which), ("inputs", source), ("submodule", query.submodule)):
            if value is not None:
                raise UnsupportedQuery(
                    f"{name}={value!r} chooses among the parts of a module; a Network has one of each. Give the module and an "
                    f"example, or capture it with {name}={value!r}."
                )
    else:
        if query.example is None:
            raise InvalidExample("a module needs an example input, a batch (1, ...) of the shape it takes. Give example=...")
        if flushes_denormals():
            raise InvalidModel(FLUSHED)
        load()
        network = _capture(_unwrap(model), query, live, which, source, repeated or live)
    if matrix is not None:
        network = embed(network, matrix)
    return network if functional is None else select(network, functional)


def _capture(model: nn.Module, query: Query, live: bool, which: str | None, source: Any, repeated: bool) -> Network:
    _check(model)
    rows = rows_of(model)
    with frozen(model):
        part, root = model, "model"
        given = _arguments(model, query.example)
        if query.submodule:
            part, root = _find(model, query.submodule), f"model.{query.submodule}"
            given = _arriving(model, part, given, rows or 1) or _arguments(part, query.example)
        call = replace(given.of(source, f"{root} ({type(part).__name__})"), exactly=rows)
        reader = Reader(part, call, 0, root, which)
        try:
            reading = reader.read(call.sample, live)
        except LipguardError:
            if reader.runs():
                raise
            # Written for one vector, the example is one sample as a whole, such as a column (n, 1).
            whole = Reader(part, call.whole(given), None, root, which)
            if not whole.runs() or whole.takes_more():
                raise
            reader, reading = whole, whole.read(whole.call.row, live)
        network = checked(reader, reading, repeated)
    return Network((Input(network.inputs, call.name), *network.nodes[1:]))


def _arguments(module: nn.Module, example: Any) -> Arguments:
    if not isinstance(example, Tensor | tuple | list | Mapping):
        raise InvalidExample(
            f"example is {type(example).__name__}; a tensor of shape (B, ...) is needed, or a tuple or a mapping of several. "
            "Give torch.as_tensor(example) for an array, torch.zeros(1, 4) where only the shape (4,) of one input is known."
        )
    return arguments_of(module, example)


class _Arrived(Exception):
    """Ends a run of the whole model at the submodule."""


def _arriving(model: nn.Module, part: nn.Module, given: Arguments, rows: int) -> Arguments | None:
    """What `part` is called with when the model runs on the example's first row; None if it does not get there.

    Args:
        rows: how often the row is given. One, where the model takes that: a constant of more rows is then no batch.
    """
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise _Arrived

    handle = part.register_forward_pre_hook(record, with_kwargs=True, prepend=True)
    try:
        with torch.no_grad():
            args, kwargs = given.first(rows)
            model(*args, **kwargs)
    except Exception:  # the example is then the submodule's own input; errors are told there
        pass
    finally:
        handle.remove()
    return called(part, *seen[0], weights={id(tensor) for _, tensor in named_tensors(model)}) if seen else None


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
