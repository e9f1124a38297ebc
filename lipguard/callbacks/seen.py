"""The example that a training shows: what `forward` is called with, else that of a batch which `forward` takes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lipguard.callbacks.example import described, first_row, leaves
from lipguard.capture.frozen import frozen
from lipguard.errors import InvalidExample

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

__all__ = ["Seen"]

Path = tuple[Any, ...]
"""Keys and places that lead to a tensor in a batch."""


class Seen:
    """One sample of a training's first batch, and how it reaches `forward`.

    A training step that calls the module shows what forward is given: that is the example. A step that calls a part of it shows
    nothing; forward is then tried, in evaluation mode and without a trace, on what the batch holds: on the entries that have the
    names of its arguments, on the batch as a whole, on as many parts of a tuple as it has arguments, and on one tensor after the
    other. The batch's order alone says nothing: a weight for each sample may stand before the input.

    Attributes:
        path: where the one input stands in the batch; None where forward takes more than one tensor of it.
    """

    def __init__(self) -> None:
        self._batch: Any = None
        self._call: Any = None
        self._handle: RemovableHandle | None = None
        self.path: Path | None = None

    def watch(self, module: nn.Module, batch: Any) -> None:
        """Keep the batch's first sample, and look at the next call of the module's forward."""
        self._batch = first_row(batch)
        paths = [(path, id(tensor)) for path, tensor in leaves(batch)]

        def look(called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # Some strategies send the training step through the module's own __call__, in place of its forward.
            if getattr(called.forward, "__func__", None) is not type(called).forward or torch.compiler.is_compiling():
                return
            self._release()
            tensor = args[0] if len(args) == 1 and not kwargs else None
            self.path = next((path for path, one in paths if one == id(tensor)), None)
            with torch.inference_mode(False):
                self._call = first_row(_arguments(called, args, kwargs))

        self._release()
        self._handle = module.register_forward_pre_hook(look, with_kwargs=True)

    def forget(self) -> None:
        """Forget the sample of an earlier training."""
        self._release()
        self._batch = self._call = self.path = None

    def __bool__(self) -> bool:
        return self._batch is not None

    def example(self, module: nn.Module, submodule: str | None, inputs: Any, who: str) -> tuple[Any, bool]:
        """The example: what forward was given, else what of the batch it takes; None if the batch holds nothing for it.

        Args:
            inputs: the query's; of a batch that is a mapping it may be the key of the one tensor that forward takes.
        Returns:
            The example, and whether `inputs` was such a key, and is settled by it.
        Raises:
            InvalidExample: forward takes several of a mapping's tensors, or none of them; the message names the keys.
        """
        self._release()
        mapped = isinstance(self._batch, Mapping)
        keyed = mapped and isinstance(inputs, str) and inputs in self._batch and inputs not in _names(module)[0]
        if self._call is not None and not (keyed and isinstance(self._call, Tensor)):
            return self._call, False
        with frozen(module), torch.no_grad():
            if keyed and not _runs(module, submodule, (self._batch,)):
                self.path, self._call = (inputs,), self._batch[inputs]
                return self._call, True
            candidates = list(_candidates(module, self._batch))
            taken = [(path, value) for path, value in candidates if _runs(module, submodule, value)]
        single = [path for path, _ in taken if path]
        if mapped and candidates and (not taken or (taken[0][0] is not None and len(single) > 1)):
            raise InvalidExample(self._unsettled(module, single, who))
        if taken:
            self.path, self._call = taken[0]
            return self._call, False
        # Forward takes none: what is wrong is told where it is read.
        return next((value for path, value in candidates if path), None), False

    def _unsettled(self, module: nn.Module, single: list[Path], who: str) -> str:
        keys = [".".join(map(str, path)) for path in single or [path for path, _ in leaves(self._batch)]]
        what = f"takes each of {', '.join(map(repr, keys))}" if single else "takes none"
        return (
            f"{type(module).__name__}.forward {what} of the batch's tensors ({described(self._batch)}). Say which is the input: "
            f"{who}(inputs={keys[0]!r}) by its key, or {who}(example=...)."
        )

    def _release(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def _arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call as an example: a tensor, a tuple of all arguments, or a mapping by name."""
    if kwargs:
        return dict(zip(_names(module)[0], args, strict=False)) | kwargs
    return args[0] if len(args) == 1 and isinstance(args[0], Tensor) else args


def _names(module: nn.Module) -> tuple[list[str], list[str]]:
    """The names of the arguments of a module's forward, and of those without a default."""
    try:
        parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    except (TypeError, ValueError):  # compiled code
        return [], []
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return [p.name for p in named], [p.name for p in named if p.default is p.empty]


def _candidates(module: nn.Module, batch: Any) -> Iterator[tuple[Path | None, Any]]:
    """What of a batch forward may take, the most telling first, and where it stands if that is one tensor."""
    names, required = _names(module)
    if isinstance(batch, Mapping):
        if required and all(name in batch for name in required):
            by_name = {name: batch[name] for name in names if name in batch}
            one = len(by_name) == 1
            yield (tuple(by_name) if one else None), (next(iter(by_name.values())) if one else by_name)
            return
        yield None, (batch,)
    elif isinstance(batch, tuple | list) and len(required) > 1 and len(batch) >= len(required):
        yield None, tuple(batch[: len(required)])
    for path, tensor in leaves(batch):
        if tensor.is_floating_point() and tensor.ndim > 1:
            yield path, tensor
    if isinstance(batch, tuple | list):
        yield None, (batch,)


def _runs(module: nn.Module, submodule: str | None, value: Any) -> bool:
    """Whether the module, or else its part, takes an example; called where it is frozen."""
    args = value if isinstance(value, tuple) else ()
    kwargs = dict(value) if isinstance(value, Mapping) else {}
    if not args and not kwargs:
        args = (value,)
    parts = [module, *([module.get_submodule(submodule)] if submodule else [])]
    for part in parts:
        try:
            part(*args, **kwargs)
        except Exception:  # a forward may raise anything on what is not its input
            continue
        return True
    return False
