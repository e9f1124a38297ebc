"""nn.Module -> Network: run the module's forward once, lower every call, compare the result with the module itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from lipguard.capture.arguments import Arguments, Call, arguments_of, called, described, required
from lipguard.capture.frozen import frozen, intercepted
from lipguard.capture.rules.registry import load, lowers
from lipguard.capture.selection import choose, embed, parts, select
from lipguard.capture.simplify import simplify
from lipguard.capture.trace import Trace, Tracer
from lipguard.errors import InvalidExample, InvalidModel, LipguardError, UnknownName, UnsupportedLayer, UnsupportedQuery
from lipguard.network import Network
from lipguard.query import Inputs, Outputs, Query

__all__ = ["capture", "lowers", "network_of"]

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Allowed difference between network and module, relative to the largest value inside the network, by the dtype that
the module computes in. Far above the rounding of ordinary networks (some hundred units of roundoff), far below what a
dropped layer changes; half precision is compared in float64 whenever the module runs in it."""


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
    Rounding: products of constants (a folded BatchNorm) are rounded to float64 once; the network is the certified object.
    """
    if norm is not None or domain is not None:
        raise UnsupportedQuery(
            "norm and domain belong to the bound, not to the network. Give them to lipguard.bound or lipguard.exact with it."
        )
    query = Query(outputs=outputs, inputs=inputs, submodule=submodule, example=example)
    return network_of(model, query, live=live)


def network_of(model: nn.Module | Network, query: Query, *, live: bool = False) -> Network:
    """The network whose constant a query asks for: of its submodule, inputs and outputs; see `capture`.

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
        load()
        network = _capture(_unwrap(model), query, live, which, source)
    else:
        raise InvalidModel(f"model is {type(model).__name__}; an nn.Module or a lipguard.Network is needed.")
    if matrix is not None:
        network = embed(network, matrix)
    return network if functional is None else select(network, functional)


def _capture(model: nn.Module, query: Query, live: bool, which: str | None, source: int | str | None) -> Network:
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
        generator = torch.Generator("cpu").manual_seed(0)
        network = _trace(part, call, _two(call, generator), live, root, which)
        _compare(network, part, call, _two(call, generator), root, which)
    return network


def _arguments(module: nn.Module, example: Any) -> Arguments:
    if not isinstance(example, Tensor | tuple | list | Mapping):
        raise InvalidExample(
            f"example is {type(example).__name__}; a tensor of shape (B, ...) is needed, or a tuple or a mapping of several. "
            "Give torch.as_tensor(example) for an array, torch.zeros(1, 4) where only the shape (4,) of one input is known."
        )
    return arguments_of(module, example)


def _two(call: Call, generator: torch.Generator) -> Tensor:
    """Two samples: the example's first row, and that with noise."""
    return torch.cat([call.row, _perturbed(call.row, generator)])


def _trace(module: nn.Module, call: Call, batch: Tensor, live: bool, root: str, which: str | None) -> Network:
    trace = Trace(batch[0].numel(), {id(p): f"{root}.{n}" for n, p in _named_tensors(module)}, live, root)
    with torch.set_grad_enabled(live):
        batch = batch.clone()
        tracer = Tracer(trace, batch)

        def forward(module: nn.Module, path: str, original: Callable[..., Any]) -> Callable[..., Any]:
            path = ".".join(p for p in path.split(".") if p != "_orig_mod")

            def run(*args: Any, **kwargs: Any) -> Any:
                with trace.inside(path, module):
                    return tracer.module(module, original, args, kwargs)

            return run

        args, kwargs = call.at(batch)
        with intercepted(module, forward), tracer:
            output = _run(module, args, kwargs, root)
    output = choose(output, which, f"{root} ({type(module).__name__})")
    node = tracer.node(output)
    if node is None:
        raise UnsupportedLayer(
            f"{root} ({type(module).__name__}): its output was not computed from the input by torch calls that can be followed."
        )
    return simplify(trace.nodes, node)


def _compare(network: Network, module: nn.Module, call: Call, batch: Tensor, root: str, which: str | None) -> None:
    """Raise unless network and module agree on two samples, in float64 if the module runs in it, else in its own dtype."""
    with torch.no_grad():
        values = network.values(batch.detach().flatten(1))
        if not bool(values[-1].isfinite().all()):
            raise InvalidModel(f"{root}: its weights are so large that its values overflow float64. Rescale the layers.")
        scale = 1e-300 + max(float(v.abs().max()) for v in values if v.numel())
        casts = {n: t.detach().double() for n, t in _named_tensors(module) if t.is_floating_point()}

        def own() -> Any:
            args, kwargs = call.at(batch.clone())
            return module(*args, **kwargs)

        references: list[tuple[Callable[[], Any], float]] = [
            (lambda: torch.func.functional_call(module, casts, *call.at(batch.double())), _TOLERANCE[torch.float64]),
            (own, _TOLERANCE.get(batch.dtype, 1e-4)),
        ]
        failure: Exception | None = None
        worst = "it cannot be run again"
        for reference, tolerance in references:
            try:
                output = choose(reference(), which, root)
            except Exception as error:  # in float64 a module may refuse to run; its own dtype then decides
                failure = error
                continue
            if output.numel() != values[-1].numel():
                continue
            difference = float((output.flatten(1) if output.ndim > 1 else output[:, None]).sub(values[-1]).abs().max())
            if difference <= tolerance * scale:
                return
            worst = f"it differs by {difference:.3g}"
    raise UnsupportedLayer(
        f"{root} ({type(module).__name__}) does something that capture misreads: on a random input {worst} from the captured "
        "network. Look for hooks that change outputs, randomness, or state; or bound a submodule with submodule=...."
    ) from failure


def _run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], root: str) -> Any:
    try:
        return module(*args, **kwargs)
    except LipguardError:
        raise
    except Exception as error:
        missing = required(module)
        if missing and len(args) + len(kwargs) < len(missing):
            raise InvalidExample(
                f"{root} ({type(module).__name__}) takes {len(missing)} inputs ({', '.join(missing)}); a Lipschitz constant is "
                f"that of a function of one, the others being held fixed. Give example=({', '.join(missing)}), a tuple of all of "
                f"them, and choose one with inputs={missing[0]!r}."
            ) from error
        given = args[0] if len(args) == 1 and not kwargs else (*args, *kwargs.values())
        raise InvalidExample(
            f"{root} ({type(module).__name__}) fails on an example {described(given)}: {type(error).__name__}: {error}"
        ) from error


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
    for name, tensor in _named_tensors(model):
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            raise InvalidModel(f"model.{name} is not initialised yet. Run the lazy module once on an example.")
        if tensor.is_meta:
            raise InvalidModel(f"model.{name} is on the meta device and has no values. Load the weights first.")


def _perturbed(row: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(row.shape, generator=generator, dtype=torch.float64, device="cpu")
    return row + (noise * max(float(row.abs().max()), 1.0)).to(row)


def _named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]
