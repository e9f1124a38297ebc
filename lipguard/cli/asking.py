"""What the commands ask: one set of options that becomes a Query, and remedies as they are typed on a command line."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lipguard.errors import InvalidExample

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace
    from torch import nn

    from lipguard.query import Query

__all__ = ["add_query", "asked", "example_of", "module_of", "query_of", "typed_here"]

_FIELDS = ("norm", "domain", "outputs", "inputs", "submodule")


def add_query(parser: ArgumentParser, default: str = "") -> None:
    """Add the options of a `Query` to a command.

    Args:
        default: what an option that is left out means, for the help.
    """
    parser.add_argument("--norm", type=str | None, help=f"1, 2 or inf, or two of them: input,output; default: {default or '2'}")
    parser.add_argument(
        "--domain",
        type=str | None,
        help="box:LOWER,UPPER, ball:RADIUS (around 0, in the input norm) or ball:CENTRE,RADIUS, where ends and centres are "
        f"numbers or lists with one for each input, as in box:[0,0.1],[1,2]; default: {default or 'all inputs'}",
    )
    parser.add_argument(
        "--outputs",
        type=str | None,
        help="one of several tensors (policy.logits), two classes (3,5), a matrix ([[1,0]]), or both (policy:3,5); default: "
        f"{default or 'all'}",
    )
    parser.add_argument(
        "--inputs",
        type=str | None,
        help=f"one of several input tensors (x, or 0), several (x,context), or a matrix ([[1],[0]]); default: {default or 'all'}",
    )
    parser.add_argument("--submodule", type=str | None, help="dotted name of the part of the module that is meant")
    parser.add_argument(
        "--input-shape",
        type=str | None,
        help="shape with its batch dimension, such as 1,784; one number n means 1,n; of several inputs: 'x=1,4;context=1,3'",
    )
    parser.add_argument("--example", type=str | None, help="a file of torch.save with an input, or a tuple or mapping of several")


def asked(options: Namespace) -> dict[str, Any]:
    """The fields of the query that were given."""
    return {name: value for name in _FIELDS if (value := options[name]) is not None}


def module_of(options: Namespace, path: str | Path) -> nn.Module:
    """The module of a checkpoint or of an ONNX model, as the options say.

    Raises:
        LipguardError: it cannot be read; the message says what to type.
    """
    from lipguard.checkpoint import load_module

    given = options.example is not None or options.input_shape is not None
    example = example_of(options, None) if given and Path(path).suffix == ".onnx" else None
    return load_module(path, model=options.model, trust=options.trust, example=example)


def query_of(options: Namespace, module: nn.Module) -> Query:
    """The query, with an example for the module.

    Raises:
        LipguardError: an option has no meaning; the message says which, and what to type.
    """
    from lipguard.query import Query

    return Query(**asked(options), example=example_of(options, module))


def example_of(options: Namespace, module: nn.Module | None) -> Any:
    """The example input that `--example` or `--input-shape` gives, or the module's own.

    Raises:
        InvalidExample: both are given, the file holds no tensors, or nothing tells the shape.
    """
    import torch

    from lipguard.checkpoint import example_input

    if options.example is None:
        return example_input(module, shape_of(options.input_shape))
    if options.input_shape is not None:
        raise InvalidExample("--example and --input-shape are both given. Leave one of them out.")
    path = Path(options.example)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes can make the unpickler raise anything; the message names the file
        text = str(error).splitlines()[0] if str(error) else ""
        raise InvalidExample(
            f"--example {path} cannot be read ({type(error).__name__}: {text[:120]}). Write it with torch.save."
        ) from error


def shape_of(text: str | None) -> Any:
    """The sizes that text means: a tuple, or one for each name in 'x=1,4;context=1,3'; None for None.

    Raises:
        InvalidExample: they are no whole numbers of at least 1.
    """
    if text is None:
        return None
    if "=" in text:
        return {name.strip(): _sizes(sizes, text) for name, _, sizes in (part.partition("=") for part in text.split(";"))}
    return _sizes(text, text)


def _sizes(text: str, whole: str) -> tuple[int, ...]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or any(not math.isfinite(value) or value != int(value) or value < 1 for value in values):
        raise InvalidExample(f"--input-shape {whole}: expected whole numbers of at least 1 separated by commas, such as 1,784.")
    sizes = tuple(int(value) for value in values)
    return sizes if len(sizes) > 1 else (1, *sizes)


_KEYWORD = re.compile(
    r"\b(norm|domain|outputs|inputs|submodule|example|method|solver|time_limit)="
    r"(\.\.\.|'[^']*'|\([^()]*\)|lipguard\.Box\([^()]*\)|[\w.\-]+)"
)


def typed_here(text: str) -> str:
    """A message with the arguments that it names written as options of the command line."""

    def option(found: re.Match[str]) -> str:
        name, value = found[1].replace("_", "-"), found[2]
        value = value.replace("lipguard.Box(", "box:").strip("'()").replace(", ", ",")
        return f"--{name} {value}"

    return _KEYWORD.sub(option, text)
