"""nn.Module -> Network: run the module's forward once, lower every call, compare the result with the module itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from lipguard.capture.frozen import frozen, intercepted
from lipguard.capture.rules.registry import load, lowers
from lipguard.capture.selection import choose, parts, select
from lipguard.capture.simplify import simplify
from lipguard.capture.trace import Trace, Tracer
from lipguard.errors import InvalidExample, InvalidModel, LipguardError, UnknownName, UnsupportedLayer, UnsupportedQuery
from lipguard.network import Network
from lipguard.query import Outputs

__all__ = ["capture", "lowers"]

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Allowed difference between network and module, relative to the largest value inside the network, by the dtype that
the module computes in. Far above the rounding of ordinary networks (some hundred units of roundoff), far below what a
dropped layer changes; half precision is compared in float64 whenever the module runs in it."""


def capture(
    model: nn.Module | Network,
    example: Tensor | None = None,
    *,
    submodule: str | None = None,
    outputs: Outputs | None = None,
    live: bool = False,
) -> Network:
    """The network that a module computes in evaluation mode, in float64 arithmetic on its stored weights.

    The module is left exactly as it was: modes, gradients, buffers, attributes, hooks, random state. Its hooks see
    ordinary passes over two samples, in evaluation mode, never the tracer.

    Args:
        model: the module (compiled or parametrized ones too), or a `Network`, which is returned as it is.
        example: a batch of inputs, shape (B, ...), B >= 1; only its shape and the first row matter. Not needed for a
            `Network`.
        submodule: path of the submodule to bound. `example` is then an input of `model`, run once to see what arrives at
            the submodule, or, where that fails, an input of the submodule itself.
        outputs: a matrix (k, m) applied to the m outputs, or a pair (i, j) of classes, for output i minus output j. Where the
            module returns several tensors: the place, key or name of one ("policy.logits" where nested), or a pair of that
            and one of the former.
        live: keep the weights in the autograd graph, for penalties; else they are detached copies.
    Returns:
        A `Network` with d inputs and m outputs: the entries of one sample, in row-major order.
    Raises:
        InvalidExample: the example does not fit the module.
        InvalidModel: weights are nan, infinite or not initialised yet.
        UnsupportedLayer: a call has no rule, or the module does something that capture would misread.
        UnknownName: there is no such submodule.
        UnsupportedQuery: `outputs` does not fit the network.
    Rounding: products of constants (a folded BatchNorm) are rounded to float64 once; the network is the certified object.
    """
    which, functional = parts(outputs)
    if isinstance(model, Network):
        network = model
        if which is not None:
            raise UnsupportedQuery(f"outputs={which!r} chooses among a module's outputs; a Network has one.")
    elif isinstance(model, nn.Module):
        if example is None:
            raise InvalidExample("a module needs an example input, a batch (1, ...) of the shape it takes. Give example=...")
        load()
        network = _capture(_unwrap(model), example, submodule, live, which)
    else:
        raise InvalidModel(f"model is {type(model).__name__}; an nn.Module or a lipguard.Network is needed.")
    return network if functional is None else select(network, functional)


def _capture(model: nn.Module, example: Tensor, submodule: str | None, live: bool, which: str | None) -> Network:
    _check(model, example)
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            place = f"model.{name}" if name else "model"
            raise UnsupportedLayer(f"{place} is a scripted module, which hides its calls. Capture the module it was made from.")
    with frozen(model):
        part, root, sample = model, "model", _rows(model, example)
        if submodule:
            part, root = _find(model, submodule), f"model.{submodule}"
            sample = _arriving(model, part, sample, example)
        generator = torch.Generator("cpu").manual_seed(0)
        network = _trace(part, torch.cat([sample, _perturbed(sample, generator)]), live, root, which)
        _compare(network, part, torch.cat([sample, _perturbed(sample, generator)]), root, which)
    return network


def _trace(module: nn.Module, batch: Tensor, live: bool, root: str, which: str | None) -> Network:
    trace = Trace(batch[0].numel(), {id(p): f"{root}.{n}" for n, p in _named_tensors(module)}, live, root)
    with torch.set_grad_enabled(live):
        batch = batch.clone()
        tracer = Tracer(trace, batch)

        def forward(module: nn.Module, path: str, original: Callable[..., Any]) -> Callable[..., Any]:
            path = ".".join(p for p in path.split(".") if p != "_orig_mod")

            def call(*args: Any, **kwargs: Any) -> Any:
                with trace.inside(path, module):
                    return tracer.module(module, original, args, kwargs)

            return call

        with intercepted(module, forward), tracer:
            output = _run(module, batch, root)
    output = choose(output, which, f"{root} ({type(module).__name__})")
    node = tracer.node(output)
    if node is None:
        raise UnsupportedLayer(
            f"{root} ({type(module).__name__}): its output was not computed from the input by torch calls that can be followed."
        )
    return simplify(trace.nodes, node)


def _compare(network: Network, module: nn.Module, batch: Tensor, root: str, which: str | None) -> None:
    """Raise unless network and module agree on two samples, in float64 if the module runs in it, else in its own dtype."""
    with torch.no_grad():
        values = network.values(batch.detach().flatten(1))
        if not bool(values[-1].isfinite().all()):
            raise InvalidModel(f"{root}: its weights are so large that its values overflow float64. Rescale the layers.")
        scale = 1e-300 + max(float(v.abs().max()) for v in values if v.numel())
        casts = {n: t.detach().double() for n, t in _named_tensors(module) if t.is_floating_point()}
        references: list[tuple[Callable[[], Any], float]] = [
            (lambda: torch.func.functional_call(module, casts, (batch.double(),)), _TOLERANCE[torch.float64]),
            (lambda: module(batch.clone()), _TOLERANCE.get(batch.dtype, 1e-4)),
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


def _run(module: nn.Module, batch: Tensor, root: str) -> Any:
    try:
        return module(batch)
    except LipguardError:
        raise
    except Exception as error:
        several = _several(module)
        if several:
            raise InvalidExample(
                f"{root} ({type(module).__name__}) takes {len(several)} inputs ({', '.join(several)}); a Lipschitz constant is "
                "that of a function of one. Wrap it in a module that holds the others fixed, or that takes all of them joined in "
                "one tensor and splits it; or bound a submodule with submodule=...."
            ) from error
        raise InvalidExample(
            f"{root} ({type(module).__name__}) fails on an example of shape {('B', *batch.shape[1:])}, {batch.dtype}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _several(module: nn.Module) -> list[str]:
    """Names of the arguments without defaults that a forward takes, where it takes more than one."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    names = [p.name for p in parameters if p.kind in kinds and p.default is inspect.Parameter.empty]
    return names if len(names) > 1 else []


class _Arrived(Exception):
    """Ends a run of the whole model at the submodule."""


def _arriving(model: nn.Module, part: nn.Module, sample: Tensor, example: Tensor) -> Tensor:
    """The first row of what arrives at `part` when the model runs on the example; else the example's own first row."""
    seen: list[tuple[Any, ...]] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((*args, *kwargs.values()))
        raise _Arrived

    handle = part.register_forward_pre_hook(record, with_kwargs=True, prepend=True)
    try:
        with torch.no_grad():
            model(sample.clone())
    except Exception:  # the example is then the submodule's own input; errors are told there
        pass
    finally:
        handle.remove()
    if not seen:
        return _rows(part, example)
    tensors = [a for a in seen[0] if isinstance(a, Tensor)]
    if len(seen[0]) != 1 or len(tensors) != 1:
        raise UnsupportedLayer(f"the submodule is called with {len(seen[0])} arguments; one tensor is needed. Bound another one.")
    return tensors[0][:1].detach()


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


def _check(model: nn.Module, example: Tensor) -> None:
    if not isinstance(example, Tensor):
        raise InvalidExample(f"example is {type(example).__name__}; a tensor of shape (B, ...) is needed.")
    if example.ndim < 2 or example.numel() == 0:
        raise InvalidExample(f"example has shape {tuple(example.shape)}; a batch of shape (B, ...) with B >= 1 is needed.")
    if not example.is_floating_point():
        raise InvalidExample(f"example is {example.dtype}; a bound needs real-valued inputs, as in example.float().")
    if not bool(example[0].isfinite().all()):
        raise InvalidExample("example has nan or infinite entries.")
    for name, tensor in _named_tensors(model):
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            raise InvalidModel(f"model.{name} is not initialised yet. Run the lazy module once on an example.")
        if tensor.is_meta:
            raise InvalidModel(f"model.{name} is on the meta device and has no values. Load the weights first.")


def _rows(model: nn.Module, example: Tensor) -> Tensor:
    """The example's first row, (1, ...), with the dtype and device of the model's weights."""
    row = example[:1].detach()
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    return row.clone() if parameter is None else row.to(parameter.device, parameter.dtype, copy=True)


def _perturbed(row: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(row.shape, generator=generator, dtype=torch.float64, device="cpu")
    return row + (noise * max(float(row.abs().max()), 1.0)).to(row)


def _named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]
