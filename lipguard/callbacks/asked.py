"""What a callback asks: one Query from its arguments, with an example from the module or from the first training batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lipguard.callbacks.example import inputs_and_labels
from lipguard.callbacks.seen import Seen
from lipguard.errors import InvalidExample, LipguardError, UnknownName, UnsupportedQuery
from lipguard.query import Query

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["Asked", "named", "number", "on_failure_of", "refuse", "whole"]


class Asked:
    """The Query of a callback; its example, where none is given, is the module's, or the one that the training shows.

    Args:
        who: the callback's name, for messages.
        fields: of `Query`; `example` may also be nested lists of numbers, as a YAML file gives them.
    Raises:
        LipguardError: a field has no meaning for any model; the message says where.
    """

    def __init__(self, who: str, **fields: Any) -> None:
        with named(who):
            self.query = Query(**{**fields, "example": _example(fields.get("example"))})
        self.who = who
        self._seen = Seen()

    @property
    def settled(self) -> bool:
        """Whether an example is at hand whatever the module."""
        return self.query.example is not None or bool(self._seen)

    def check(self, pl_module: LightningModule) -> None:
        """Refuse at the start of a training what the module does not have.

        Raises:
            UnknownName: there is no such submodule.
        """
        every = (name.replace("._orig_mod", "").replace("_orig_mod.", "") for name, _ in pl_module.named_modules())
        names = list(dict.fromkeys(name for name in every if name and name != "_orig_mod"))
        submodule = self.query.submodule
        if submodule and submodule not in names:
            raise UnknownName(
                f"{self.who}: the module has no submodule {submodule!r}; it has {', '.join(names) or 'none'}. Give one of these "
                "as submodule=..."
            )

    def see(self, pl_module: LightningModule, batch: object) -> None:
        """Remember the first sample of the first batch, and what forward makes of it, where no other example is at hand."""
        if not self.settled and pl_module.example_input_array is None:
            self._seen.watch(pl_module, batch)

    def forget(self) -> None:
        """Forget the sample of an earlier training."""
        self._seen.forget()

    def unpacked(self, batch: Any) -> tuple[Tensor | None, Tensor | None]:
        """The input of a batch, the one that was found to be the module's, and the labels; None where missing."""
        return inputs_and_labels(batch, self._seen.path)

    def of_batch(self, pl_module: LightningModule, batch: Any) -> tuple[Tensor | None, Tensor | None]:
        """The input of a batch, the one tensor of it that the module takes, and the labels; None where missing.

        Raises:
            InvalidExample: the batch is a mapping, and forward takes none of its tensors, or each of several.
        """
        seen = Seen()
        seen.watch(pl_module, batch)
        seen.example(pl_module, self.query.submodule, self.query.inputs, self.who)
        return inputs_and_labels(batch, seen.path)

    def find(self, trainer: Trainer, pl_module: LightningModule) -> Query | None:
        """The query with an example on the module's device; None if none is at hand yet.

        Raises:
            InvalidExample: the batch is a mapping, and forward takes none of its tensors, or each of several.
        """
        query, example = self.query, self.query.example
        if example is None:
            example = _of_module(trainer, pl_module)
        if example is None and self._seen:
            example, settled = self._seen.example(pl_module, query.submodule, query.inputs, self.who)
            query = replace(query, inputs=None) if settled else query
        return None if example is None else replace(query, example=_moved(example, lambda t: t.to(pl_module.device)))

    def at(self, trainer: Trainer, pl_module: LightningModule) -> Query:
        """The query with an example on the module's device.

        Raises:
            InvalidExample: there is none.
        """
        found = self.find(trainer, pl_module)
        if found is None:
            raise InvalidExample(
                f"{type(pl_module).__name__} has no example_input_array and its first training batch holds no floating-point "
                f"tensor. Give {self.who}(example=...)."
            )
        return found


@contextmanager
def named(who: str) -> Iterator[None]:
    """Errors of lipguard say which callback's argument they are about."""
    try:
        yield
    except LipguardError as error:
        raise type(error)(f"{who}: {error}") from error


def refuse(who: str, reason: str, **given: object) -> None:
    """Refuse arguments that a callback of this kind has no use for.

    Raises:
        UnsupportedQuery: one of them is given; the message gives the reason.
    """
    for name, value in given.items():
        if value is not None:
            shown = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise UnsupportedQuery(f"{who}: {name}={shown}: {reason}")


def whole(who: str, none: bool = False, **counts: object) -> None:
    """Refuse counts that are no whole number of at least 1, or None where that is allowed.

    Raises:
        UnsupportedQuery: one of them is none; the message says which.
    """
    for name, value in counts.items():
        if value is None and none:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UnsupportedQuery(f"{who}: {name}={value!r} must be at least 1{', or None for never' if none else ''}.")


def number(who: str, what: str, valid: Callable[[float], bool], **values: object) -> None:
    """Refuse values that are no finite number of a certain kind.

    Args:
        what: what they must be, for the message.
        valid: whether a finite number is of that kind.
    Raises:
        UnsupportedQuery: one of them is none; the message says which.
    """
    for name, value in values.items():
        real = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not real or not valid(value):  # type: ignore[arg-type]
            raise UnsupportedQuery(f"{who}: {name}={value!r} must be {what}.")


def on_failure_of(who: str, value: str) -> Literal["warn", "raise", "ignore"]:
    """What a callback does when it fails.

    Raises:
        UnsupportedQuery: there is no such behaviour.
    """
    if value not in ("warn", "raise", "ignore"):
        raise UnsupportedQuery(f"{who}: on_failure={value!r} must be 'warn', 'raise' or 'ignore'.")
    return value  # type: ignore[return-value]


def _of_module(trainer: Trainer, pl_module: LightningModule) -> Any:
    """The module's `example_input_array` in the Trainer's precision; None if it has none."""
    example = pl_module.example_input_array
    if example is None:
        return None
    if not isinstance(example, Tensor | Mapping | tuple | list):
        example = torch.as_tensor(example)
    if isinstance(example, tuple | list) and len(example) == 1:
        example = example[0]
    return trainer.precision_plugin.convert_input(_moved(example, Tensor.detach))


def _example(value: Any) -> Any:
    """Nested lists of numbers as a tensor; anything else as it is."""
    if not isinstance(value, list) or not value or not isinstance(value[0], list | float | int):
        return value
    try:
        return torch.tensor(value, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        return value


def _moved(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        return {key: _moved(part, change) for key, part in tree.items()}
    return type(tree)(_moved(part, change) for part in tree) if type(tree) in (tuple, list) else tree


def overlap(one: str | None, other: str | None) -> bool:
    """Whether two parts of a module, None for the whole, share a layer."""
    if not one or not other:
        return True
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def part_name(submodule: str | None) -> str:
    """A part of a module in words, None for the whole."""
    return f"the submodule {submodule!r}" if submodule else "the module"
