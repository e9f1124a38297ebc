"""Following a module's own forward: every torch call on values that depend on the input is lowered by its rule.

The forward runs on plain tensors, concretely, under a `TorchFunctionMode`. The tracer keeps a table of the tensors that
depend on the input; a call that touches none of them just runs, so that shapes, parametrized weights and whatever
Python computes from them need no rule, and `isinstance(x, torch.Tensor)` holds. (torch.fx was tried on paper first:
its proxies are not tensors, and it stores free tensors on the user's module.)

Below it `Taint` tells of every tensor whether it depends on the input at all. One that does, and that the table does not
hold as it now is, is refused; so is the result of a call without a rule. A refusal is an entry of the table: it is raised
when Python reads the value, and otherwise only if the chosen output was computed from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from lipguard.capture.calls import FACTORIES, METADATA, READS, TEXTS
from lipguard.capture.frozen import hooked
from lipguard.capture.rules.registry import (
    COLUMNS,
    Rule,
    called_as,
    canonical,
    complex_rule,
    function_rule,
    module_rule,
    spoken,
    takes_whole,
)  # fmt: skip
from lipguard.capture.taint import (
    DRAWN,
    NUMBER,
    OVERLAP,
    Taint,
    ambiguous,
    no_hidden_ways,
    opaque,
    overrides,
    place_of,
    tensors_of,
)
from lipguard.capture.trace import UNKNOWN, BatchMoved, Placed, Trace, Value, for_people, parts, plain_class
from lipguard.capture.unbatched import translated
from lipguard.capture.vmapped import followed
from lipguard.errors import UnsupportedLayer

_UNSEEN = (
    "uses a tensor that depends on the input by {origin}, which was not called where it can be followed. In forward, compute "
    "with torch functions on the tensors themselves: no TorchScript, no nn.Parameter(x), no writes through a view."
)
_STALE = "reads a tensor that was modified in place through another view of it. Modify a clone."
_TEXT = (
    "writes a number that depends on the input into a text, which a branch may read. Print or log it by a statement of its own, "
    "print(x), or leave it out."
)
_OPAQUE = "is given a tensor of a class that does its operations itself, which cannot be followed. Use plain tensors."


@dataclass
class _Known:
    held: int | UnsupportedLayer  # the node, or why there is none
    tensor: Tensor  # held, so that its id stays its own
    writes: int
    place: tuple[object, ...]
    axis: int | None


class Tracer(TorchFunctionMode):
    """Keeps the table of tensors that depend on the input, and lowers the calls that touch one.

    Args:
        trace: gets the nodes.
        example: the input.
        axis: dimension of its samples; None for one sample.
        earlier: what is left of earlier calls, see `Taint`.
    """

    def __init__(self, trace: Trace, example: Tensor, axis: int | None = 0, earlier: Sequence[StorageWeakRef] = ()) -> None:
        super().__init__()
        self.trace = trace
        self.taint = Taint(self._refuse, earlier)
        trace.origin = self.taint.origin
        self.refused: UnsupportedLayer | None = None
        """The first refusal that was raised in the forward: a forward that catches it goes another way than it does."""
        self._answering = False
        self.rows = 1 if axis is None else example.shape[axis]
        self._known: dict[int, _Known] = {}
        trace.device, trace.unit = example.device, torch.finfo(example.dtype).eps
        self.taint.mark(example, "the input itself")
        self.learn(example, 0, axis)

    @contextmanager
    def running(self) -> Iterator[None]:
        """While the forward runs."""
        with no_hidden_ways(self._refuse), followed(self), self.taint, self:
            yield

    def _refuse(self, reason: str) -> None:
        """Refuse what is seen below the calls."""
        with nullcontext() if self._answering else self._answer():
            self.trace.refuse(reason)

    @contextmanager
    def _answer(self) -> Iterator[None]:
        """While a call of the forward is answered: a refusal that leaves it stays."""
        before, self._answering = self._answering, True
        try:
            yield
        except UnsupportedLayer as error:
            self.refused = self.refused or error
            raise
        finally:
            self._answering = before

    def value(self, tensor: Tensor) -> Value | None:
        """The tensor's value, None for a constant.

        Raises:
            UnsupportedLayer: it depends on the input, and no node holds it.
        """
        known = self._known.get(id(tensor))
        if known is None:
            origin = self.taint.origin(tensor)
            if origin is not None:
                self.trace.refuse(_UNSEEN.format(origin=origin))
            if self.taint.drawn(tensor):
                self.trace.refuse(DRAWN)
            return None
        if isinstance(known.held, UnsupportedLayer):
            raise known.held
        if known.writes != self.taint.writes(tensor) or known.place != place_of(tensor):
            self.trace.refuse(_STALE)
        return Value(known.held, tensor, known.axis)

    def learn(self, tensor: Tensor, held: int | UnsupportedLayer, axis: int | None = 0) -> None:
        """Enter a tensor into the table."""
        self._known[id(tensor)] = _Known(held, tensor, self.taint.writes(tensor), place_of(tensor), axis)

    def learn_batch(self, batch: Tensor, sample: Tensor, axis: int) -> None:
        """Enter a tensor whose samples along a dimension are all what the table knows of one of them."""
        try:
            value = self.value(sample)
        except UnsupportedLayer as error:
            self.learn(batch, error)
            return
        if value is not None:
            self.learn(batch, value.node, axis)

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """While calls are not followed: they belong to a layer that is lowered as a whole."""
        before, self.taint.asleep = self.taint.asleep, True
        try:
            yield
        finally:
            self.taint.asleep = before

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Lower the call if it touches a tensor that depends on the input, and run it."""
        kwargs = kwargs or {}
        if any(overrides(kind) for kind in types):
            return NotImplemented  # the code of such a tensor is part of the forward: its own calls are followed
        if self.taint.asleep or not self._touches((args, kwargs)):
            return func(*args, **kwargs)
        with self._answer():
            return self._call(func, args, kwargs)

    def _call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Lower a call that touches a tensor that depends on the input, and run it."""
        key = canonical(func)
        if key in TEXTS:
            if not for_people():
                self.trace.refuse(_TEXT)
            return f"<{self.trace.path}: a value that depends on the input>"
        if any(opaque(type(t)) for t in tensors_of((args, kwargs))):
            self.trace.refuse(_OPAQUE)
        if key in METADATA or getattr(func, "__name__", "") == "__get__":
            result = func(*args, **kwargs)
            if not isinstance(result, Tensor):
                return result
        previous, self.trace.call = self.trace.call, called_as(func, key)
        try:
            return self._lower(func, key, args, kwargs)
        finally:
            self.trace.call = previous

    def module(self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A module's forward: by the rule for its class, or call by call."""
        own = "forward" in module.__dict__ and getattr(forward, "__func__", None) is not type(module).forward
        rule = None if self.taint.asleep or own else module_rule(plain_class(module))
        if rule is None or not self._touches((args, kwargs)):
            return forward(*args, **kwargs)
        with self._answer():
            return self._as_whole(rule, module, forward, args, kwargs)

    def _as_whole(
        self, rule: Rule, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        try:
            if any(hooked(part) for part in module.modules() if part is not module):
                self.trace.refuse("is read as a whole, and a hook on one of its parts would not be seen. Remove the hook.")
            node = rule(self.trace, module, *self._values(args, rule), **self._values(kwargs, rule))
        except UnsupportedLayer as error:
            node = error
        with self.asleep():
            result = forward(*args, **kwargs)
        return self._finish(result, node, self._axis((args, kwargs)))

    def _lower(self, func: Callable[..., Any], key: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        trace = self.trace
        if key in READS:
            trace.refuse(NUMBER)
        if key in FACTORIES and not self._touches((args[1:], {k: v for k, v in kwargs.items() if k not in ("input", "self")})):
            return func(*args, **kwargs)
        if key in ("__setitem__", "setitem"):
            self._written_back(*args)
        node: Any
        try:
            axis = self._axis((args, kwargs))
            if key in FACTORIES:
                trace.refuse("fills a tensor by a value that depends on the input, which has no rule. Use expand or where.")
            node = self._ruled(key, args, kwargs)
        except UnsupportedLayer as error:
            node, axis = error, 0
        try:
            result = func(*args, **kwargs)
        except Exception as error:
            if isinstance(node, UnsupportedLayer):
                raise node from error
            raise
        if key in ("__setitem__", "setitem"):
            result = args[0]
            if ambiguous(result, ()):  # what is written shows at other places as well
                trace.refuse(OVERLAP)
        return self._finish(result, node, axis)

    def _written_back(self, target: Tensor, place: Any, value: Any) -> None:
        """y[place] += z writes to a view of y, which is then put into y: until then y is what it was, but for these entries."""
        known = self._known.get(id(target))
        if known is None or not isinstance(value, Tensor) or known.writes == self.taint.writes(target):
            return
        with torch._C.DisableTorchFunction():
            view = target[place]
        if place_of(view) == place_of(value) and self.taint.only_through(value, known.writes):
            known.writes = self.taint.writes(target)

    def _ruled(self, key: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the rule makes of the call."""
        trace = self.trace
        key, args, kwargs = translated(*spoken(key, args, kwargs), self._unbatched, self._axis((args, kwargs)))
        rule = complex_rule(key) if _complex((args, kwargs)) else function_rule(key)
        if rule is None:
            module = trace.module
            kind = None if module is None else plain_class(module)
            of_torch = kind is not None and kind.__module__.startswith("torch.nn.modules")
            what = f"nn.{kind.__name__}" if kind is not None and of_torch else trace.call
            trace.refuse(f"has no rule. Bound a submodule with submodule=..., or add one with @lowers({what}).")
        axis = self._axis((args, kwargs))
        elsewhere = BatchMoved(
            f"{trace.place} is given a value whose samples lie along dimension {axis}. Move them to the first dimension, "
            f"x.movedim({axis}, 0)."
        )
        try:
            node = rule(trace, *self._values(args, rule), **self._values(kwargs, rule))
        except TypeError as error:
            raise UnsupportedLayer(f"{trace.place} is called with arguments that its rule does not know: {error}") from error
        except UnsupportedLayer as error:
            if axis and not takes_whole(rule):  # the rule met them elsewhere than they lie
                raise elsewhere from error
            raise
        if axis and not takes_whole(rule) and not self._follows(key, node, args, kwargs):
            raise elsewhere
        return node

    def _follows(self, key: object, node: Any, args: Any, kwargs: Any) -> bool:
        """Whether what a rule made of values with the samples moved to the front holds where they lie.

        It does for what acts on every entry alone, with the same numbers, and for a matrix on the last dimension.
        """
        tensors = list(tensors_of((args, kwargs)))
        values = [v for t in tensors if (v := self.value(t)) is not None]
        if key == COLUMNS or (key == "linear" and values[0].axis != values[0].tensor.ndim - 1):
            return True
        same = len({(v.axis, v.tensor.shape) for v in values}) == 1 and all(not t.ndim for t in tensors if self.value(t) is None)
        return same and isinstance(node, int) and node >= 0 and self.trace.nodes[node].in_place

    def _finish(self, result: Any, node: Any, axis: int | None) -> Any:
        """Enter what a call returned into the table: its node, or why there is none."""
        trace = self.trace
        if isinstance(node, UnsupportedLayer):
            tensors = list(tensors_of(result))
            if not tensors or (not isinstance(result, Tensor | tuple | list | dict)):
                raise node  # Python got something that is no tensor
            for tensor in tensors:
                self.learn(tensor, node)
            return result
        try:
            if node is None:  # the result is a constant, as the storages tell where it is used
                return result
            if isinstance(node, tuple):
                if not isinstance(result, list | tuple) or len(result) != len(node):
                    trace.refuse(f"returns {type(result).__name__} where its rule gives {len(node)} values.")
                for part, one in zip(result, node, strict=True):
                    self._finish(part, one, axis)
                return result
            if not isinstance(result, Tensor):
                raise UnsupportedLayer(f"{trace.place} returns {type(result).__name__}, not a tensor.")
            self.learn(result, *self._placed(result, node, axis))
        except UnsupportedLayer as error:
            return self._finish(result, error, axis)
        return result

    def _placed(self, result: Tensor, node: int | Placed, axis: int | None) -> tuple[int, int | None]:
        """The node of a result, and the dimension of its samples."""
        trace = self.trace
        if isinstance(node, Placed):
            node, axis = node.node, node.axis
        if node == UNKNOWN:
            trace.refuse(
                f"uses the result of {trace.call}, which has no rule. Bound a submodule with submodule=..., or add one with "
                f"@lowers({trace.call})."
            )
        rows, size = 1 if axis is None else self.rows, trace.sizes[node]
        entries = result.numel() * parts(result)
        if rows == 1 and entries == size:
            axis = 0 if result.ndim and result.shape[0] == 1 else None
        elif axis is None or not result.ndim or result.shape[axis] != rows or entries != rows * size:
            raise BatchMoved(
                f"{trace.place} gives shape {tuple(result.shape)} where {rows} samples of {size} entries are held: the batch "
                "dimension must stay first, as in x.flatten(1) or x.view(x.shape[0], -1)."
            )
        mask = result.dtype == torch.bool and node in trace.pending and bool(trace.pending[node].mask)
        if not (result.is_floating_point() or result.is_complex() or mask):
            trace.refuse(f"casts to {result.dtype}: a step function has no Lipschitz constant.")
        return node, axis

    def _axis(self, tree: Any) -> int | None:
        """The dimension of the samples of the values in a call; values of one sample among a batch have none."""
        axes = {v.axis for t in tensors_of(tree) if (v := self.value(t)) is not None}
        if len(axes) > 1 and self.rows > 1:
            raise BatchMoved(f"{self.trace.place} is given values whose samples lie along different dimensions.")
        return next(iter(axes)) if len(axes) == 1 else 0 if 0 in axes else None

    def _unbatched(self, tensor: object) -> bool:
        """Whether a tensor is the value of one sample, without a batch dimension."""
        value = self.value(tensor) if isinstance(tensor, Tensor) else None
        return value is not None and value.axis is None

    def _values(self, tree: Any, rule: Rule) -> Any:
        if isinstance(tree, Tensor):
            value = self.value(tree)
            if value is None:
                return tree
            return value if takes_whole(rule) else value.batched()
        if isinstance(tree, tuple | list):
            return (list if isinstance(tree, list) else tuple)(self._values(t, rule) for t in tree)
        return {k: self._values(v, rule) for k, v in tree.items()} if isinstance(tree, dict) else tree

    def _touches(self, tree: Any) -> bool:
        return any(id(t) in self._known or (not opaque(type(t)) and self.taint.origin(t) is not None) for t in tensors_of(tree))


def _complex(tree: Any) -> bool:
    """Whether a complex number takes part in a call."""
    if isinstance(tree, tuple | list):
        return any(_complex(t) for t in tree)
    if isinstance(tree, dict):
        return any(_complex(t) for t in tree.values())
    return tree.is_complex() if isinstance(tree, Tensor) else isinstance(tree, complex)
