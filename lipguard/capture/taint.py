"""Which tensors depend on the input, told from below: by the storages that operations write, whoever calls them.

The tracer sees calls of torch functions. Under it lies this mode, which sees every operation that reaches the dispatcher:
those of TorchScript functions, of `vmap`, of constructors in C++, writes through views and by `out=`. A storage is *tainted*
once a tensor that depends on the input was read by an operation that wrote to it. So a tensor that depends on the input and
that the tracer does not know is never taken for a constant: the tracer asks here of every tensor that it meets.

Completeness: let t be a tensor whose entries depend on the input. They were written by an operation that read such a tensor,
or t shares its storage with one. In the first case the operation passed the dispatcher, and its results and the arguments that
its schema says it writes were marked; in the second the storage is the same. Left are ways around the dispatcher: NumPy and
Python numbers are refused where they are asked for, DLPack shares the memory, whose address range is compared, and threads,
which do not inherit the mode, may not be started.
"""

from __future__ import annotations

import threading
from bisect import bisect_right, insort
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
from torch.utils import dlpack
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
    """

    def __init__(self, refuse: Callable[[str], None]) -> None:
        super().__init__()
        self._refuse = refuse
        self.asleep = False
        """While a layer runs that is lowered as a whole: what it reads for itself is its own matter."""
        self._origins: dict[int, tuple[torch.UntypedStorage, str]] = {}  # the storage is held: its address stays its own
        self._writes: dict[int, int] = {}
        self._ranges: list[tuple[int, int, int]] = []  # first address, last address, key, in order

    def mark(self, tensor: Tensor, origin: str) -> None:
        """Taint a tensor's storage.

        Args:
            origin: the operation that wrote it, for messages.
        """
        for storage in storages(tensor):
            key = storage._cdata
            if key in self._origins:
                continue
            self._origins[key] = (storage, origin)
            begin, size = storage.data_ptr(), storage.nbytes()
            if begin and size:
                insort(self._ranges, (begin, begin + size, key))

    def origin(self, tensor: Tensor) -> str | None:
        """The operation that first made the tensor's memory depend on the input; None for a constant."""
        for storage in storages(tensor):
            known = self._origins.get(storage._cdata)
            if known is None and self._ranges and storage.nbytes():
                # Another storage of the same memory, as DLPack makes one.
                begin = storage.data_ptr()
                place = bisect_right(self._ranges, (begin + storage.nbytes(), -1, -1)) - 1
                if begin and place >= 0 and self._ranges[place][1] > begin:
                    known = self._origins[self._ranges[place][2]]
            if known is not None:
                return known[1]
        return None

    def writes(self, tensor: Tensor) -> int:
        """How often the tensor's memory was written since its first reading."""
        return sum(self._writes.get(storage._cdata, 0) for storage in storages(tensor))

    def touches(self, tree: object) -> bool:
        """Whether a tensor in a nesting of arguments depends on the input."""
        return any(self.origin(tensor) is not None for tensor in tensors_of(tree))

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, and mark what it writes where it reads what is marked."""
        kwargs = kwargs or {}
        name = func._schema.name
        touched = self.touches((args[1:], kwargs)) if name in _SHAPES else self.touches((args, kwargs))
        if touched and not self.asleep:
            self._watch(func, name, args)
        result = func(*args, **kwargs)
        written = [t for place in _written(func) for t in tensors_of(_argument(place, args, kwargs))]
        for tensor in written:
            for storage in storages(tensor):
                self._writes[storage._cdata] = self._writes.get(storage._cdata, 0) + 1
        if touched:
            for tensor in (*tensors_of(result), *written):
                self.mark(tensor, name.replace("aten::", "aten."))
        return result

    def _watch(self, func: Any, name: str, args: tuple[Any, ...]) -> None:
        """Refuse an operation whose result tells Python of the values: a number, or a shape that depends on them."""
        shaped = torch.Tag.dynamic_output_shape in func.tags
        if name in _INDEXED:  # only a mask decides how much is read or written
            shaped = any(t.dtype in (torch.bool, torch.uint8) and self.origin(t) is not None for t in tensors_of(args[1]))
        if shaped:
            self._refuse(f"has a result whose shape depends on the values ({name.replace('aten::', 'aten.')}).")
        if torch.Tag.data_dependent_output in func.tags:
            self._refuse(NUMBER)


NUMBER = (
    "lets Python read a number that depends on the input (bool, item, float): the branch it takes is known for the "
    "example only, and the function may jump where it changes. Where all inputs of a domain take one branch, bound a "
    "module that has that branch alone; else bound a submodule without it, or add a rule with @lowers."
)
_THREADS = "starts a thread or hands work to one, whose operations cannot be followed. Do the work in forward itself."
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
        (ThreadPoolExecutor, "submit", _THREADS),
        (ProcessPoolExecutor, "submit", _THREADS),
        (dlpack, "to_dlpack", _CAPSULE),
        (torch, "to_dlpack", _CAPSULE),
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


def _argument(place: tuple[int, str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    index, name = place
    return args[index] if index < len(args) else kwargs.get(name)
