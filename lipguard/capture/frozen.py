"""Running a module without leaving a trace: modes, attributes, tensors and random state return to what they were."""

from __future__ import annotations

import copy
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

_STORES = ("_parameters", "_buffers", "_modules")


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module, parameter, buffer, gradient and random generator is as before.

    Restored are the attributes of every module (the mode of each, weights that old-style parametrizations recompute),
    its stores of parameters, buffers and modules, the values of parameters and buffers, requires_grad and .grad, and the
    generators of torch on every device in use, of Python and of NumPy.
    """
    modules = list(model.modules())
    attributes = [(m, dict(m.__dict__), [dict(m.__dict__[s]) for s in _STORES]) for m in modules]
    containers: dict[int, tuple[Any, Any]] = {}
    loose: dict[int, Tensor] = {}
    for module in modules:
        _collect({k: v for k, v in module.__dict__.items() if k not in _STORES}, containers, loose)
    plain = [t for t in loose.values() if t.grad_fn is None and not t.is_meta]
    tensors = [(t, t.detach().clone(), t.requires_grad, t.grad) for t in (*model.parameters(), *model.buffers(), *plain)]
    grads = [None if g is None else g.detach().clone() for *_, g in tensors]
    with ExitStack() as stack:
        stack.callback(_restore_tensors, tensors, grads)
        stack.callback(_restore_attributes, attributes)
        stack.callback(_restore_containers, list(containers.values()))
        stack.callback(_generators())
        stack.enter_context(torch.inference_mode(False))
        for kind in {t.device.type for t, *_ in tensors} | {"cpu"}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if any(module.training for module in modules):
            with suppress(NotImplementedError):  # of an exported program, which has one mode
                model.eval()  # a class may do more than set its mode: merge weights, or forget those it kept
        for module in modules:
            module.__dict__["training"] = False
        yield


@contextmanager
def intercepted(model: nn.Module, forward: Callable[[nn.Module, str, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Every submodule's forward replaced by forward(module, path, original); call it inside `frozen`, which undoes it.

    Forward hooks and pre-hooks stay: they run when deployed, and what they change is part of the function. Backward hooks
    are left out: they change gradients alone.
    """
    saved = [(m, dict(m.__dict__)) for m in model.modules()]
    try:
        for path, module in model.named_modules():
            state = module.__dict__
            for hooks in ("_backward_hooks", "_backward_pre_hooks"):
                if state.get(hooks):
                    state[hooks] = OrderedDict()
            state["_compiled_call_impl"] = None
            original = module.__dict__.get("_orig_mod") or module._modules.get("_orig_mod") or module.forward
            state["forward"] = forward(module, path, original)
        yield
    finally:
        _restore_attributes([(m, attributes, None) for m, attributes in saved])


def hooked(module: nn.Module) -> bool:
    """Whether hooks run around a module's forward."""
    everywhere = torch.nn.modules.module
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or everywhere._global_forward_hooks
        or everywhere._global_forward_pre_hooks
    )


@contextmanager
def in_precision(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Every floating parameter and buffer in another precision; call it inside `frozen`.

    `torch.func.functional_call` leaves a module that stands at two places in the other precision: it swaps it twice.
    """
    stores: list[dict[str, Any]] = [store for m in model.modules() for store in (m._parameters, m._buffers)]
    saved = [dict(store) for store in stores]
    casts: dict[int, Tensor] = {}
    try:
        for store in stores:
            for name, tensor in store.items():
                if tensor is not None and tensor.is_floating_point():
                    store[name] = casts.setdefault(id(tensor), tensor.detach().to(dtype))
        yield
    finally:
        for store, before in zip(stores, saved, strict=True):
            _restore(store, before)


def _restore_attributes(attributes: list[tuple[nn.Module, dict[str, Any], Any]]) -> None:
    for module, saved, stores in attributes:
        _restore(module.__dict__, saved)
        for name, store in zip(_STORES, stores or (), strict=False):
            _restore(module.__dict__[name], store)


def _collect(tree: Any, containers: dict[int, tuple[Any, Any]], tensors: dict[int, Tensor]) -> None:
    """Copies of the lists, dicts and sets in a nesting, and its tensors."""
    if isinstance(tree, Tensor):
        tensors[id(tree)] = tree
    elif isinstance(tree, dict | list | set | deque) and id(tree) not in containers:
        containers[id(tree)] = tree, copy.copy(tree)
        for part in tree.values() if isinstance(tree, dict) else tree:
            _collect(part, containers, tensors)
    elif isinstance(tree, tuple):
        for part in tree:
            _collect(part, containers, tensors)


def _restore_containers(containers: list[tuple[Any, Any]]) -> None:
    for container, saved in containers:
        if len(container) == len(saved) and all(a is b for a, b in zip(_parts(container), _parts(saved), strict=True)):
            continue
        container.clear()
        container.extend(saved) if isinstance(container, list | deque) else container.update(saved)


def _parts(container: Any) -> list[Any]:
    return [part for pair in container.items() for part in pair] if isinstance(container, dict) else list(container)


def _restore(state: dict[str, Any], saved: dict[str, Any]) -> None:
    if len(state) == len(saved) and all(k in state and state[k] is v for k, v in saved.items()):
        return
    state.clear()
    state.update(saved)


def _restore_tensors(tensors: list[tuple[Tensor, Tensor, bool, Tensor | None]], grads: list[Tensor | None]) -> None:
    with torch.no_grad():
        for (tensor, value, requires_grad, grad), grad_value in zip(tensors, grads, strict=True):
            if not _same(tensor, value):
                tensor.copy_(value)
            if tensor.is_leaf and tensor.requires_grad != requires_grad:
                tensor.requires_grad_(requires_grad)
            if tensor.is_leaf and tensor.grad is not grad:
                tensor.grad = grad
            if grad is not None and grad_value is not None and not _same(grad, grad_value):
                grad.copy_(grad_value)


def _same(a: Tensor, b: Tensor) -> bool:
    # Bit for bit where it matters: nan is unequal to itself, and then is compared as nan.
    return torch.equal(a, b) or (a.is_floating_point() and bool(((a == b) | (a.isnan() & b.isnan())).all()))


def python_numbers() -> tuple[object, ...]:
    """The states of Python's and of NumPy's random numbers: another one after a call that drew some."""
    numpy = sys.modules.get("numpy")
    kind, keys, *rest = numpy.random.get_state() if numpy is not None and hasattr(numpy, "random") else ("", b"")
    return random.getstate(), kind, bytes(keys), *rest


def _generators() -> Callable[[], None]:
    states: list[Callable[[], object]] = []
    cpu, python = torch.get_rng_state(), random.getstate()
    states += [lambda: torch.set_rng_state(cpu), lambda: random.setstate(python)]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        cuda = torch.cuda.get_rng_state_all()
        states.append(lambda: torch.cuda.set_rng_state_all(cuda))
    numpy = sys.modules.get("numpy")
    if numpy is not None and hasattr(numpy, "random"):
        numbers = numpy.random.get_state()
        states.append(lambda: numpy.random.set_state(numbers))

    def restore() -> None:
        for state in states:
            state()

    return restore
