"""How a network follows from a checkpoint's weights, as data: nobody needs the training script to rebuild it.

While a module is captured, every tensor operation is watched. A tensor of the network is then written as the name of the
checkpoint's entry it was read from and the few exact operations in between (a cast, a BatchNorm's folding). Operations
whose last bits depend on the processor (matrix products, exponentials) are not repeated: their result is stored instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lipguard.audit.encoding import from_plain, to_plain
from lipguard.capture.capture import capture
from lipguard.capture.rules.registry import load
from lipguard.errors import LipguardError, NotCertified
from lipguard.layouts import renamings
from lipguard.network import Network
from lipguard.network.record import read_node, write_part
from lipguard.programs.rewriting import slope_restricted
from lipguard.query import Inputs, Outputs

__all__ = ["Recipe", "captured", "rebuild", "recipe_of"]

Recipe = dict[str, Any]
"""{"nodes": [...], "tensors": [...], "digest": ..., "inputs": ..., "outputs": ..., "neurons": ...}, JSON values only."""

_EXACT = frozenset({
    "_to_copy", "_unsafe_view", "abs", "add", "alias", "as_strided", "cat", "clone", "detach", "diag_embed", "div", "expand",
    "expand_copy", "full_like", "index_select", "lift_fresh", "lift_fresh_copy", "maximum", "minimum", "mul", "neg",
    "ones_like", "permute", "reciprocal", "relu", "repeat", "repeat_interleave", "rsub", "select", "slice", "sqrt", "squeeze",
    "stack", "sub", "t", "transpose", "unsqueeze", "view", "where", "zeros_like", "_reshape_alias", "unbind", "flip",
})  # fmt: skip
"""aten operations without side effects whose result IEEE 754 fixes to the bit: entrywise, one rounding, no long sums."""

_DROPPED = ("device", "layout", "pin_memory", "non_blocking", "memory_format")
_LONGEST = 64
"""A tensor behind more operations than this is stored."""

_Key = tuple[int, int, tuple[int, ...], tuple[int, ...], torch.dtype]


def captured(
    model: nn.Module,
    example: Any,
    *,
    submodule: str | None = None,
    outputs: Outputs | None = None,
    inputs: Inputs | None = None,
) -> tuple[Network, Recipe]:
    """The network of a module, as `lipguard.capture` gives it, and the recipe that rebuilds it from the module's state_dict.

    Raises:
        LipguardError: what `lipguard.capture` raises; UnsupportedLayer where no record can hold a part of the network.
    """
    weights = model.state_dict(keep_vars=True)
    watcher = _Watcher(weights)
    with watcher:
        network = capture(model, example, submodule=submodule, outputs=outputs, inputs=inputs)
    recipe = _recipe(network, watcher)
    tensors = {name: tensor for name, tensor in weights.items() if isinstance(tensor, Tensor)}
    # A module that writes into its constants while it runs could mislead the watcher: then the tensors are stored.
    return network, recipe if rebuild(recipe, tensors).digest == network.digest else recipe_of(network)


def recipe_of(network: Network) -> Recipe:
    """The recipe of a network of unknown origin: every tensor is stored."""
    return _recipe(network, _Watcher({}))


def rebuild(recipe: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Network:
    """The network that the recipe makes of the weights.

    Args:
        recipe: from `captured`.
        weights: the checkpoint's state_dict.
    Raises:
        NotCertified: an entry is missing, or the recipe is damaged. The digest is not compared here.
    """
    # What the first renaming calls by a name is meant by it before what a later one does.
    plain = {name: tensor for named in reversed(list(renamings(weights))) for name, tensor in named.items()}
    load()  # rules of other packages bring their activations
    try:
        tensors: list[Tensor] = []
        for step in recipe["tensors"]:
            tensors.append(_step(step, tensors, weights, plain))
        return Network(tuple(read_node(node, tensors.__getitem__) for node in recipe["nodes"]))
    except KeyError as error:
        raise NotCertified(f"the network cannot be rebuilt: the checkpoint or the record has no {error}.") from error
    except (LipguardError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise NotCertified(f"the network cannot be rebuilt from the record: {type(error).__name__}: {error}") from error


class _Watcher(TorchDispatchMode):
    """Remembers, for every tensor made while it is active, the operation and the tensors it was made by."""

    def __init__(self, entries: Mapping[str, object]) -> None:
        super().__init__()
        self.made: dict[_Key, tuple[Any, tuple[Any, ...], dict[str, Any], int | None]] = {}
        self.names: dict[_Key, str] = {}
        self._seen: set[_Key] = set()
        self._kept: list[object] = []  # alive, so that no address is used twice
        for name, tensor in entries.items():
            if isinstance(tensor, Tensor) and tensor.numel():
                self.names.setdefault(_key(tensor), name)
                self._seen.add(_key(tensor))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        # What is read before it was made came from elsewhere; a view of a view may later give its address again.
        self._seen.update(_key(tensor) for tensor in _tensors((args, kwargs)))
        result = func(*args, **kwargs)
        if func._schema.is_mutable:
            for tensor in _tensors((args, kwargs)):
                self._forget(tensor)
        elif func._schema.name.removeprefix("aten::") in _EXACT:
            parts = result if isinstance(result, (list, tuple)) else (result,)
            for position, part in enumerate(parts):
                if isinstance(part, Tensor) and part.numel() and _key(part) not in self._seen:
                    self.made[_key(part)] = func, args, kwargs, position if isinstance(result, (list, tuple)) else None
                    self._seen.add(_key(part))
        self._kept.append((result, args, kwargs))
        return result

    def _forget(self, tensor: Tensor) -> None:
        place = tensor.untyped_storage().data_ptr()
        for table in (self.made, self.names):
            for key in [key for key in table if key[0] == place]:
                del table[key]


def _key(tensor: Tensor) -> _Key:
    return tensor.untyped_storage().data_ptr(), int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _tensors(tree: object) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    return [t for part in tree for t in _tensors(part)] if isinstance(tree, (list, tuple)) else []


def _recipe(network: Network, watcher: _Watcher) -> Recipe:
    writer = _Writer(watcher)
    nodes = [write_part(node, writer.store) for node in network.nodes]
    return {
        "digest": network.digest,
        "inputs": network.inputs,
        "outputs": network.outputs,
        "neurons": slope_restricted(network).neurons,
        "nodes": nodes,
        "tensors": writer.steps,
    }


class _Writer:
    """Turns tensors into steps: {"entry": name}, {"op": ..., "args": ..., "kwargs": ...} or {"value": bits}."""

    def __init__(self, watcher: _Watcher) -> None:
        self.steps: list[dict[str, Any]] = []
        self._watcher = watcher
        self._written: dict[_Key, int] = {}

    def store(self, tensor: Tensor) -> int:
        """The place of the step that makes the tensor."""
        before = len(self.steps)
        try:
            place = self._trace(tensor)
            if len(self.steps) - before <= _LONGEST:
                return place
        except _Untraceable:
            pass
        self._withdraw(before)
        return self._append({"value": to_plain(tensor)}, tensor)

    def _withdraw(self, length: int) -> None:
        del self.steps[length:]
        self._written = {key: place for key, place in self._written.items() if place < length}

    def _trace(self, tensor: Tensor) -> int:
        key = _key(tensor)
        if key in self._written:
            return self._written[key]
        if key in self._watcher.names:
            return self._append({"entry": self._watcher.names[key]}, tensor)
        if key not in self._watcher.made:
            # A small constant of the module's own code, such as an eps; a large one is as well stored whole.
            if tensor.numel() > 1:
                raise _Untraceable
            return self._append({"value": to_plain(tensor)}, tensor)
        func, args, kwargs, index = self._watcher.made[key]
        step: dict[str, Any] = {
            "op": f"{func._schema.name.removeprefix('aten::')}.{func._overloadname}",
            "args": [self._argument(a) for a in args],
            "kwargs": {name: self._argument(a) for name, a in kwargs.items() if name not in _DROPPED},
        }
        return self._append(step | ({} if index is None else {"index": index}), tensor)

    def _append(self, step: dict[str, Any], tensor: Tensor) -> int:
        self.steps.append(step)
        if tensor.numel():
            self._written[_key(tensor)] = len(self.steps) - 1
        return len(self.steps) - 1

    def _argument(self, value: object) -> object:
        if isinstance(value, Tensor):
            return {"tensor": self._trace(value)}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, (list, tuple)):
            return [self._argument(item) for item in value]
        if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and abs(value) < float("inf")):
            return value
        raise _Untraceable


class _Untraceable(Exception):
    """The tensor does not follow from the weights by exact operations."""


def _step(step: Mapping[str, Any], tensors: list[Tensor], weights: Mapping[str, Tensor], plain: Mapping[str, Tensor]) -> Tensor:
    if "entry" in step:
        name = step["entry"]
        found = weights[name] if name in weights else plain[name.replace("_orig_mod.", "")]
        return found.detach()
    if "value" in step:
        return from_plain(step["value"])
    name, _, overload = step["op"].partition(".")
    if name not in _EXACT:
        raise ValueError(f"operation {name} is none that a record may hold")
    function = getattr(getattr(torch.ops.aten, name), overload)
    arguments = [_value(a, tensors) for a in step["args"]]
    result = function(*arguments, **{key: _value(a, tensors) for key, a in step["kwargs"].items()})
    return result[step["index"]] if "index" in step else result


def _value(argument: Any, tensors: list[Tensor]) -> Any:
    if isinstance(argument, dict):
        return tensors[argument["tensor"]] if "tensor" in argument else getattr(torch, argument["dtype"])
    return [_value(item, tensors) for item in argument] if isinstance(argument, list) else argument
