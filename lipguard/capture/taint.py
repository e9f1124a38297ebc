"""Which tensors depend on the input, told from below: by the storages that operations write, whoever calls them.

The tracer sees calls of torch functions. Under it lies this mode, which sees every operation that reaches the dispatcher:
those of TorchScript functions, of `vmap`, of constructors in C++, writes through views and by `out=`. A storage is *tainted*
once a tensor that depends on the input was read by an operation that wrote to it. So a tensor that depends on the input and
that the tracer does not know is never taken for a constant: the tracer asks here of every tensor that it meets.

A second mark follows numbers drawn from torch's generators, which make of a module no function.

Completeness: let t be a tensor whose entries depend on the input. They were written by an operation that read such a tensor,
or t shares its storage with one. In the first case the operation passed the dispatcher, and its results and the arguments that
its schema says it writes were marked; in the second the storage is the same. Left are ways around the dispatcher: NumPy and
Python numbers are refused where they are asked for, DLPack shares the memory, whose address range is compared, and threads,
which do not inherit the mode, may neither be started nor be handed work. A tensor with operations of its own
(`__torch_dispatch__`) is taken apart by itself first: the mode sees the operations on what it is made of. What is left of one
call on the module, such as a result that it keeps, stays marked in the next.
"""

from __future__ import annotations

import _thread
import threading
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.jit._fuser import optimized_execution
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _python_dispatch, dlpack
from torch.utils._python_dispatch import TorchDispatchMode

# Operations that read only shape, type and place of a tensor: their result is a constant, unless another argument is tainted.
_SHAPES = frozenset({
    "aten::empty_like", "aten::zeros_like", "aten::ones_like", "aten::full_like", "aten::rand_like", "aten::randn_like",
    "aten::new_empty", "aten::new_empty_strided", "aten::new_zeros", "aten::new_ones", "aten::new_full",
})  # fmt: skip
_INDEXED = frozenset({"aten::index"})


class Taint(TorchDispatchMode):
    """Marks the storages that depend on the input, and counts the writes to each.

    Args:
        refuse: called with a reason where a number that depends on the input would leave the tensors.
        earlier: what is left of earlier calls, see `left`.
    """

    def __init__(self, refuse: Callable[[str], None], earlier: Sequence[StorageWeakRef] = ()) -> None:
        super().__init__()
        self._refuse = refuse
        self.asleep = False
        """While a layer runs that is lowered as a whole: what it reads for itself is its own matter."""
        # A weak reference frees the memory, but not the storage itself: its key stays its own.
        self._origins: dict[int, tuple[StorageWeakRef, str]] = {}
        self._writes: dict[int, list[tuple[object, ...]]] = {}  # the places that each write went to
        self._ranges: list[tuple[int, int, int]] = []  # first address, last address, key, in order
        self._earlier = {reference.cdata: reference for reference in earlier}
        self._drawn: dict[int, torch.UntypedStorage] = {}
        self._seed = torch.default_generator.initial_seed()

    def mark(self, tensor: Tensor, origin: str) -> None:
        """Taint a tensor's storage.

        Args:
            origin: the operation that wrote it, for messages.
        """
        for storage in storages(tensor):
            key = storage._cdata
            if key in self._origins:
                continue
            self._origins[key] = (StorageWeakRef(storage), origin)
            begin, size = storage.data_ptr(), storage.nbytes()
            if begin and size:
                self._forget(begin, begin + size)
                insort(self._ranges, (begin, begin + size, key))

    def _forget(self, begin: int, end: int) -> None:
        """Drop the ranges of freed memory that lies between two addresses: it is another tensor's now."""
        last = bisect_left(self._ranges, (end, -1, -1))
        first = last
        while first and self._ranges[first - 1][1] > begin:
            first -= 1
        self._ranges[first:last] = [r for r in self._ranges[first:last] if not self._origins[r[2]][0].expired()]

    def origin(self, tensor: Tensor) -> str | None:
        """The operation that first made the tensor's memory depend on the input; None for a constant."""
        for storage in storages(tensor):
            key = storage._cdata
            known = self._origins.get(key)
            if known is None and self._ranges and storage.nbytes():
                # Another storage of the same memory, as DLPack makes one.
                begin = storage.data_ptr()
                place = bisect_right(self._ranges, (begin + storage.nbytes(), -1, -1)) - 1
                if begin and place >= 0 and self._ranges[place][1] > begin:
                    reference, where = self._origins[self._ranges[place][2]]
                    known = None if reference.expired() else (reference, where)
            if known is not None:
                return known[1]
            if key in self._earlier and not self._earlier[key].expired():
                return "an earlier call, of which the module keeps it"
        return None

    def left(self) -> list[StorageWeakRef]:
        """What outlives this: references to the storages that depend on the input, of this call and of earlier ones."""
        references = [*self._earlier.values(), *(reference for reference, _ in self._origins.values())]
        self._origins.clear()
        self._ranges.clear()
        return [reference for reference in references if not reference.expired()]

    def drawn(self, tensor: Tensor) -> bool:
        """Whether the tensor was computed from random numbers."""
        return bool(self._drawn) and any(storage._cdata in self._drawn for storage in storages(tensor))

    def writes(self, tensor: Tensor) -> int:
        """How often the tensor's memory was written since its first reading."""
        return sum(len(self._writes.get(storage._cdata, ())) for storage in storages(tensor))

    def only_through(self, view: Tensor, since: int) -> bool:
        """Whether all writes to the memory of a tensor after the first so many went to its own places."""
        places = [place for storage in storages(view) for place in self._writes.get(storage._cdata, ())]
        return all(place == place_of(view) for place in places[since:])

    def touches(self, tree: object) -> bool:
        """Whether a tensor in a nesting of arguments depends on the input."""
        return any(self.origin(tensor) is not None for tensor in tensors_of(tree))

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, and mark what it writes where it reads what is marked."""
        kwargs = kwargs or {}
        if any(opaque(kind) for kind in types):
            return NotImplemented
        name = func._schema.name
        touched = self.touches((args[1:], kwargs)) if name in _SHAPES else self.touches((args, kwargs))
        drawn = self._draws(func, args, kwargs)
        written = [t for place in _written(func) for t in tensors_of(_argument(place, args, kwargs))]
        if (touched or drawn) and not self.asleep:
            self._watch(func, name, args, drawn)
            if any(ambiguous(t, (args, kwargs)) for t in written):
                self._refuse(OVERLAP)
        result = func(*args, **kwargs)
        for tensor in written:
            for storage in storages(tensor):
                self._writes.setdefault(storage._cdata, []).append(place_of(tensor))
        if touched or drawn:
            for tensor in (*tensors_of(result), *written):
                if touched:
                    self.mark(tensor, name.replace("aten::", "aten."))
                if drawn:
                    self._drawn |= {storage._cdata: storage for storage in storages(tensor)}
        return result

    def _draws(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the operation draws random numbers, or reads such: from no generator of the module's own, none it seeded."""
        if any(self.drawn(t) for t in tensors_of((args, kwargs))):
            return True
        if torch.Tag.nondeterministic_seeded not in func.tags or kwargs.get("generator") is not None:
            return False
        training = _named(func, "training", args, kwargs)
        return training is not False and torch.default_generator.initial_seed() == self._seed

    def _watch(self, func: Any, name: str, args: tuple[Any, ...], drawn: bool) -> None:
        """Refuse an operation whose result tells Python of the values: a number, or a shape that depends on them."""
        shaped = torch.Tag.dynamic_output_shape in func.tags
        if name in _INDEXED:  # only a mask decides how much is read or written
            masks = [t for t in tensors_of(args[1]) if t.dtype in (torch.bool, torch.uint8)]
            shaped = any(self.drawn(t) if drawn else self.origin(t) is not None for t in masks)
        if shaped:
            self._refuse(f"has a result whose shape depends on the values ({name.replace('aten::', 'aten.')}).")
        if torch.Tag.data_dependent_output in func.tags:
            self._refuse(DRAWN if drawn else NUMBER)


NUMBER = (
    "lets Python read a number that depends on the input (bool, item, float): the branch it takes is known for the "
    "example only, and the function may jump where it changes. Where all inputs of a domain take one branch, bound a "
    "module that has that branch alone; else bound a submodule without it, or add a rule with @lowers."
)
DRAWN = (
    "uses random numbers: it is not a function. Draw them once, in __init__, or from a torch.Generator that forward seeds; where "
    "they belong to training, draw them if self.training."
)
OVERLAP = (
    "writes to memory where several entries share a place, or of which it reads other entries: what is written last is "
    "undefined. Modify a clone."
)
_THREADS = "starts a thread or hands work to one, whose operations cannot be followed. Do the work in forward itself."
_UNSEEN = "computes where no mode of torch sees it, which cannot be followed. Leave the modes on."
_CAPSULE = "hands its memory to another library, whose computations cannot be followed. Compute with torch."


@contextmanager
def no_hidden_ways(refuse: Callable[[str], None]) -> Iterator[None]:
    """While a module is read: its thread may neither start another, nor give a tensor's memory away by a DLPack capsule."""
    reader = threading.get_ident()

    def guarded(function: Callable[..., Any], reason: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == reader:
                refuse(reason)
            return function(*args, **kwargs)

        return call

    ways: list[tuple[Any, str, str]] = [
        (threading.Thread, "start", _THREADS),
        (threading.Condition, "notify", _THREADS),  # queues and events wake a waiting thread by it
        (_thread, "start_new_thread", _THREADS),
        (ThreadPoolExecutor, "submit", _THREADS),
        (ProcessPoolExecutor, "submit", _THREADS),
        (dlpack, "to_dlpack", _CAPSULE),
        (torch, "to_dlpack", _CAPSULE),
        (_python_dispatch, "_disable_current_modes", _UNSEEN),
    ]
    with ExitStack() as stack:
        for home, name, reason in ways:
            stack.enter_context(patch.object(home, name, guarded(getattr(home, name), reason)))
        # A compiled executor may fuse operations into one that passes no dispatcher.
        stack.enter_context(optimized_execution(False))
        yield


def storages(tensor: Tensor) -> list[torch.UntypedStorage]:
    """The storages that hold a tensor's entries, whatever wraps them."""
    with torch._C.DisableTorchFunction():
        return _storages(tensor)


def opaque(kind: type) -> bool:
    """Whether tensors of a class do their operations themselves, and hold other tensors."""
    return getattr(kind, "__torch_dispatch__", _PLAIN) is not _PLAIN


_PLAIN = torch._C._disabled_torch_dispatch_impl  # pyright: ignore[reportAttributeAccessIssue]


def overrides(kind: type) -> bool:
    """Whether a class of tensors has its own say in calls of torch functions."""
    own = getattr(kind, "__torch_function__", _SILENT)
    return own is not _SILENT and getattr(own, "__func__", own) is not _FOLLOWED


_SILENT = torch._C._disabled_torch_function_impl
_FOLLOWED = Tensor.__torch_function__.__func__  # type: ignore[attr-defined]


def ambiguous(written: Tensor, tree: object) -> bool:
    """Whether writing to a tensor depends on the order: places shared by its own entries, or by others that are read."""
    if written.layout != torch.strided or _functorch.is_functorch_wrapped_tensor(written):
        return False
    reach = 0
    for stride, size in sorted((abs(s), n) for s, n in zip(written.stride(), written.shape, strict=True) if n > 1):
        if stride <= reach:  # not larger than the span of the finer dimensions
            return True
        reach += stride * (size - 1)
    key = storages(written)[0]._cdata
    for other in tensors_of(tree):
        if other is written or other.layout != torch.strided or storages(other)[0]._cdata != key:
            continue
        if _geometry(other) != _geometry(written) and bool(torch.isin(_addresses(other), _addresses(written)).any()):
            return True
    return False


def place_of(tensor: Tensor) -> tuple[object, ...]:
    """Where a tensor's entries lie: another place is another tensor, whatever object holds it."""
    with torch._C.DisableTorchFunction():
        strided = tensor.layout == torch.strided and not _functorch.is_functorch_wrapped_tensor(tensor)
        return (*(s._cdata for s in storages(tensor)), *(_geometry(tensor) if strided else ()))


def _geometry(tensor: Tensor) -> tuple[object, ...]:
    return tensor.storage_offset(), *tensor.shape, *tensor.stride(), tensor.dtype


def _addresses(tensor: Tensor) -> Tensor:
    """Byte addresses of the entries."""
    places = torch.tensor(int(tensor.storage_offset()))
    for stride, size in zip(tensor.stride(), tensor.shape, strict=True):
        places = places[..., None] + stride * torch.arange(size)
    return places.flatten() * tensor.element_size()


def _storages(tensor: Tensor) -> list[torch.UntypedStorage]:
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    if tensor.layout == torch.strided:
        return [tensor.untyped_storage()]
    if tensor.layout == torch.sparse_coo:
        return [tensor._values().untyped_storage(), tensor._indices().untyped_storage()]
    return [tensor.values().untyped_storage()]


def tensors_of(tree: object) -> Iterator[Tensor]:
    """Every tensor in a nesting of tuples, lists and mappings."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple | list):
        for part in tree:
            yield from tensors_of(part)
    elif isinstance(tree, Mapping):
        for part in tree.values():
            yield from tensors_of(part)


@cache
def _written(func: Any) -> tuple[tuple[int, str], ...]:
    """Places and names of the arguments that the operation's schema says it writes."""
    arguments = func._schema.arguments
    return tuple((i, a.name) for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write)


def _named(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The argument of a name, also of one that begins like it (`train`)."""
    places = [(i, a.name) for i, a in enumerate(func._schema.arguments) if a.name in (name, name[:5])]
    return _argument(places[0], args, kwargs) if places else None


def _argument(place: tuple[int, str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    index, name = place
    return args[index] if index < len(args) else kwargs.get(name)
