"""How a module is called: its arguments, of which some tensors vary and the others are held at the example's values."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lipguard.errors import InvalidExample, LipguardError, UnsupportedQuery

__all__ = ["Arguments", "Call", "arguments_of", "called", "described", "required", "run_module"]

Path = tuple[Any, ...]
"""Where a tensor stands in (args, kwargs): the keys and places that lead to it."""


@dataclass(frozen=True, eq=False)
class Call:
    """A call of a module as a function of one or several of its tensors, one behind the other.

    Attributes:
        args, kwargs: the arguments, each tensor that has a batch dimension cut to its first row.
        varying: where the tensors that vary stand, in the order in which their entries are joined.
        batched: where the held tensors stand whose first row is repeated for every sample.
        name: what the tensors that vary are called, "input" for the only one.
        rows: samples of the example.
        exactly: samples that the module is made for; None for any number.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    varying: tuple[Path, ...]
    batched: frozenset[Path]
    name: str
    rows: int = 1
    exactly: int | None = None

    def whole(self, given: Arguments) -> Call:
        """The same call as a function of the whole example, which is one sample: no tensor is cut to its first row."""
        return Call(given.args, given.kwargs, self.varying, frozenset(), self.name)

    @property
    def sample(self) -> Tensor:
        """The example's first row, as often as the module takes it at least."""
        return self.row.repeat(self.exactly or 1, *(1 for _ in self.row.shape[1:]))

    @property
    def row(self) -> Tensor:
        """The example's first row of the tensor that varies, (1, ...); of several the entries one behind the other, (1, d)."""
        parts = self._parts()
        return parts[0] if self._whole else torch.cat([part.reshape(1, -1) for part in parts], 1)

    def at(self, x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments (args, kwargs) where what varies is x, (B, ...); held ones of floating point in the precision of x.

        Called while x is followed, so that the parts it is cut into are followed as well.
        """
        parts = self._parts()
        pieces: Sequence[Tensor] = [x]
        if not self._whole:
            cut = x.split([part.numel() for part in parts], 1)
            pairs = zip(cut, parts, strict=True)
            pieces = [piece.reshape(part.shape if len(x) == 1 else (len(x), *part.shape[1:])) for piece, part in pairs]
        placed = dict(zip(self.varying, pieces, strict=True))

        def put(path: Path, tensor: Tensor) -> Tensor:
            if path in placed:
                return placed[path]
            held = tensor.to(x.dtype) if tensor.is_floating_point() else tensor
            return held.repeat(len(x), *(1 for _ in held.shape[1:])) if path in self.batched else held.clone()

        return _mapped((self.args, self.kwargs), put)

    @property
    def _whole(self) -> bool:
        """Whether x is the one tensor that varies, as it is; else it is cut into them, also into one of shape (B,)."""
        return len(self.varying) == 1 and self._parts()[0].ndim > 1

    def _parts(self) -> list[Tensor]:
        tensors = dict(_tensors((self.args, self.kwargs)))
        return [tensors[path] for path in self.varying]


@dataclass(frozen=True, eq=False)
class Arguments:
    """The arguments (args, kwargs) of a call, and what its tensors are called.

    Attributes:
        names: of every tensor, the path of it: by its argument's name and key, and by its place.
        listed: the names that messages list.
        constant: the tensors that are weights of the model: they are of no batch, and vary only where they are named.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    names: dict[str, Path]
    listed: tuple[str, ...]
    constant: frozenset[Path] = frozenset()

    def of(self, inputs: int | str | tuple[int | str, ...] | None, place: str) -> Call:
        """The call as a function of the tensors that `inputs` names; where it is None, of all of floating point jointly.

        Args:
            inputs: place or name, or several.
            place: of the module, for messages.
        Raises:
            InvalidExample: there is none, one is no batch of real numbers, or they are not of one batch.
            UnsupportedQuery: there is no such tensor, or one is named twice.
        """
        tensors = dict(_tensors((self.args, self.kwargs)))
        chosen = self._named(inputs, place) if inputs is not None else self._floating(tensors)
        paths = tuple(self.names[name] for name in chosen)
        only = len(self.listed) == 1
        for name, path in zip(chosen, paths, strict=True):
            _check(tensors[path], "example" if only else f"the example's input {name!r}", least=2 if only else 1)
        rows = len(tensors[paths[0]])
        for name, path in zip(chosen, paths, strict=True):
            if len(tensors[path]) != rows:
                raise InvalidExample(
                    f"{place} takes {len(self.listed)} input tensors ({', '.join(self.listed)}), and a constant with respect to "
                    f"several needs one batch of them: {chosen[0]!r} has {rows} rows, {name!r} has {len(tensors[path])}. Choose "
                    f"with inputs=..., of {self._spoken()}; the others are held at the example's values."
                )
        # A tensor of as many rows is a batch like the chosen ones: (B,) times, (B, n) contexts. Others are of no batch.
        free = (path for path in tensors if path not in paths and path not in self.constant)
        batched = frozenset(path for path in free if tensors[path].ndim and len(tensors[path]) == rows)
        args, kwargs = _mapped((self.args, self.kwargs), lambda p, t: t[:1] if p in paths or p in batched else t)
        return Call(args, kwargs, paths, batched, "input" if only else ", ".join(chosen), rows)

    def first(self, rows: int = 1) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments (args, kwargs), every tensor of a batch cut to its first row, which is given `rows` times."""
        tensors = [t for _, t in _tensors((self.args, self.kwargs)) if t.ndim]
        held = len(next((t for t in tensors if t.is_floating_point()), tensors[0])) if tensors else 0

        def cut(_: Path, t: Tensor) -> Tensor:
            return t[:1].repeat(rows, *(1 for _ in t.shape[1:])) if t.ndim and len(t) == held else t.clone()

        return _mapped((self.args, self.kwargs), cut)

    def _named(self, inputs: int | str | tuple[int | str, ...], place: str) -> list[str]:
        given = inputs if isinstance(inputs, tuple) else (inputs,)
        for one in given:
            if str(one) not in self.names:
                raise UnsupportedQuery(
                    f"{place} has no input {one!r}; it has {self._spoken()}. Choose one of these with inputs=..."
                )
        chosen = [str(one) for one in given]
        if len({self.names[name] for name in chosen}) < len(chosen):
            raise UnsupportedQuery(f"inputs={inputs!r} names one input twice. Name each once, of {self._spoken()}.")
        return chosen

    def _floating(self, tensors: dict[Path, Tensor]) -> list[str]:
        """The names of all tensors of floating point, of the first where there are none, for the message that says so."""
        paths = {name: self.names[name] for name in self.listed if self.names[name] not in self.constant}
        return [name for name, path in paths.items() if tensors[path].is_floating_point()] or [self.listed[0]]

    def _spoken(self) -> str:
        return ", ".join(repr(int(name) if name.isdigit() else name) for name in self.listed)


def arguments_of(module: nn.Module, example: Any) -> Arguments:
    """The call that an example means: a tensor, or a tuple, list or mapping of tensors and other values.

    A sequence is spread over the arguments of the module's forward if they are as many, a mapping if its keys are their
    names; otherwise either is the one argument. Tensors get the device of the module's weights, those of floating point their
    precision as well.

    Raises:
        InvalidExample: there is no tensor in it.
    """
    example = _like_weights(module, example)
    if isinstance(example, Mapping) and _binds(module, (), dict(example)):
        return called(module, (), dict(example))
    if isinstance(example, tuple | list) and not hasattr(example, "_fields") and _binds(module, tuple(example), {}):
        return called(module, tuple(example), {})
    return called(module, (example,), {}, bare=not isinstance(example, Tensor))


def called(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], bare: bool = False, weights: Collection[int] = ()
) -> Arguments:
    """The arguments of a call with their names.

    Args:
        bare: the one argument holds several tensors, which are called by their own keys and places alone.
        weights: the `id` of each tensor that is a weight of the model around the module.
    """
    parameters = _parameters(module)
    names: dict[str, Path] = {}
    listed: list[str] = []
    for path, _ in _tensors((args, kwargs)):
        side, first, *rest = path
        inner = ".".join(map(str, rest))
        if bare:
            mine = [inner]
        else:
            spoken = str(first) if side == 1 or first >= len(parameters) else parameters[first]
            mine = [f"{head}.{inner}" if inner else head for head in dict.fromkeys((spoken, str(first)))]
        listed.append(mine[0])
        names |= {name: path for name in mine if name not in names}
    if not listed:
        raise InvalidExample("example holds no tensor; a batch of shape (B, ...) is needed, such as torch.zeros(1, 4).")
    constant = frozenset(path for path, tensor in _tensors((args, kwargs)) if id(tensor) in weights)
    return Arguments(args, kwargs, names, tuple(listed), constant)


def required(module: nn.Module) -> list[str]:
    """Names of the arguments without defaults that a forward takes, where it takes more than one."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    signature = _signature(module)
    parameters = [] if signature is None else list(signature.parameters.values())
    names = [p.name for p in parameters if p.kind in kinds and p.default is inspect.Parameter.empty]
    return names if len(names) > 1 else []


def described(example: Any) -> str:
    """The tensors of an example, for messages: names, shapes with B for the batch, and types."""
    if isinstance(example, Tensor):
        return f"of shape {('B', *example.shape[1:])}, {example.dtype}"
    parts = [f"{'.'.join(map(str, path))}: {tuple(t.shape)}, {t.dtype}" for path, t in _tensors(example)]
    return f"of {len(parts)} tensors ({'; '.join(parts)})"


def run_module(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], root: str) -> Any:
    """The module's result.

    Raises:
        InvalidExample: it fails on the example.
        LipguardError: as it is raised inside.
    """
    try:
        return module(*args, **kwargs)
    except LipguardError:
        raise
    except Exception as error:
        missing = required(module)
        if missing and len(args) + len(kwargs) < len(missing):
            raise InvalidExample(
                f"{root} ({type(module).__name__}) takes {len(missing)} inputs ({', '.join(missing)}). Give "
                f"example=({', '.join(missing)}), a tuple of all of them. The constant is then with respect to all of them "
                f"jointly; with inputs={missing[0]!r} it is with respect to one, the others being held at the example's values."
            ) from error
        given = args[0] if len(args) == 1 and not kwargs else (*args, *kwargs.values())
        raise InvalidExample(
            f"{root} ({type(module).__name__}) fails on an example {described(given)}: {type(error).__name__}: {error}"
        ) from error


def _check(tensor: Tensor, what: str, least: int) -> None:
    if tensor.ndim < least or tensor.numel() == 0:
        raise InvalidExample(f"{what} has shape {tuple(tensor.shape)}; a batch of shape (B, ...) with B >= 1 is needed.")
    if not tensor.is_floating_point():
        raise InvalidExample(f"{what} is {tensor.dtype}; a bound needs real-valued inputs, as in example.float().")
    if tensor.layout != torch.strided or tensor.is_meta:
        raise InvalidExample(f"{what} is a {tensor.layout} tensor on {tensor.device}; give a dense one with values.")
    if not bool(tensor[0].isfinite().all()):
        raise InvalidExample(f"{what} has nan or infinite entries.")


def _like_weights(module: nn.Module, example: Any) -> Any:
    weight = next((p for p in module.parameters() if p.is_floating_point()), None)

    def moved(_: Path, tensor: Tensor) -> Tensor:
        plain = tensor.detach()
        if weight is None or plain.is_meta:
            return plain
        return plain.to(weight.device, weight.dtype) if plain.is_floating_point() else plain.to(weight.device)

    return _mapped(example, moved)


def _signature(module: nn.Module) -> inspect.Signature | None:
    try:
        # That of the class: while a module is read, its own `forward` is the tracer's.
        signature = inspect.signature(type(module).forward)
    except (TypeError, ValueError):  # a forward of compiled code
        return None
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _parameters(module: nn.Module) -> list[str]:
    """Names of the positional parameters of a module's forward; none behind *args."""
    signature = _signature(module)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [] if signature is None else [p.name for p in signature.parameters.values() if p.kind in kinds]


def _binds(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    signature = _signature(module)
    try:
        return signature is not None and bool(signature.bind(*args, **kwargs).arguments)
    except TypeError:
        return False


def _tensors(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, Mapping):
        for key, part in tree.items():
            yield from _tensors(part, (*path, key))
    elif isinstance(tree, tuple | list):
        for i, part in enumerate(tree):
            yield from _tensors(part, (*path, i))


def _mapped(tree: Any, change: Callable[[Path, Tensor], Tensor], path: Path = ()) -> Any:
    if isinstance(tree, Tensor):
        return change(path, tree)
    if isinstance(tree, Mapping):
        made = copy.copy(tree) if isinstance(tree, dict) else dict(tree)
        made.update({key: _mapped(part, change, (*path, key)) for key, part in tree.items()})
        return made
    if isinstance(tree, tuple | list):
        parts = [_mapped(part, change, (*path, i)) for i, part in enumerate(tree)]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return tree
