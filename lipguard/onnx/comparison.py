"""The module that was made of an ONNX graph, compared with onnxruntime."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from lipguard.errors import InvalidModel

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["compare"]

_SCALES = (0.1, 1.0, 10.0)
"""Of the random inputs, one draw each."""

_UNITS = 64
"""Units of roundoff, of the largest number inside the graph, that the order of a sum may change in a result."""

_OWN = 16
"""How many times our own rounding error, which is measured, onnxruntime's may be."""


def compare(proto: ModelProto, module: fx.GraphModule, names: Sequence[str], examples: Sequence[Tensor], free: bool) -> None:
    """Raise unless the module and onnxruntime agree on random inputs; warn where onnxruntime is not installed.

    Two sums of the same numbers in another order differ by some units of roundoff of the largest number, times what the layers
    behind make of that. The second factor is measured: it is in the difference of the module in its own precision and in float64.

    Args:
        names: of the graph's inputs.
        examples: an input for each.
        free: the graph takes any number of samples; three are given to it.
    Raises:
        InvalidModel: they differ by more, or onnxruntime does not run the graph.
    """
    _recorded(module, examples)  # what has no reading is told first
    if importlib.util.find_spec("onnxruntime") is None:
        warnings.warn(
            "the ONNX graph was not compared with onnxruntime, which is not installed: that it is read as meant rests on the "
            "table of operators alone. Run pip install 'lipguard[onnx]'.",
            stacklevel=3,
        )
        return
    session = _session(proto)
    generator = torch.Generator().manual_seed(0)
    for scale in _SCALES:
        inputs = [_random(one, scale, 3 if free else None, generator) for one in examples]
        theirs = _run(session, {name: one.numpy() for name, one in zip(names, inputs, strict=True)})
        ours, largest = _recorded(module, inputs)
        exact = _in_double(module, inputs)
        for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            _check(mine, other, None if exact is None else exact[i], largest, proto.graph.output[i].name)


def _check(mine: Tensor, other: Tensor, exact: Tensor | None, largest: float, name: str) -> None:
    if mine.shape != other.shape:
        raise InvalidModel(
            f"the graph is misread: its output {name!r} has the shape {tuple(mine.shape)}, {tuple(other.shape)} in onnxruntime. "
            "Please report this model."
        )
    finite = mine.isfinite() & other.isfinite()
    if not bool(finite.any()) or not mine.is_floating_point():
        return
    unit = torch.finfo(mine.dtype).eps / 2
    own = 0.0 if exact is None else float((mine.double() - exact)[finite].abs().max())
    difference = float((mine.double() - other.double())[finite].abs().max())
    allowed = _UNITS * unit * largest + _OWN * own
    if difference > allowed or bool((mine.isfinite() != other.isfinite()).any()):
        raise InvalidModel(
            f"the graph is misread: its output {name!r} differs from onnxruntime's by {difference:.3g} on a random input, where "
            f"{allowed:.3g} is what rounding explains. Please report this model."
        )


def _session(proto: ModelProto) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own exceptions have no common class of their own
        raise InvalidModel(f"onnxruntime does not take the graph: {' '.join(str(error).split())[:300]}") from error


def _run(session: Any, feed: dict[str, Any]) -> list[Tensor]:
    try:
        return [torch.as_tensor(result) for result in session.run(None, feed)]
    except Exception as error:
        raise InvalidModel(f"onnxruntime does not run the graph: {' '.join(str(error).split())[:300]}") from error


def _random(like: Tensor, scale: float, rows: int | None, generator: torch.Generator) -> Tensor:
    if not like.is_floating_point():
        return like if rows is None else like[:1].repeat(rows, *(1 for _ in like.shape[1:]))
    shape = like.shape if rows is None else (rows, *like.shape[1:])
    return (scale * torch.randn(shape, generator=generator)).to(like.dtype)


class _Recorder(fx.Interpreter):
    """Runs the graph and remembers the largest number in it."""

    largest = 0.0

    def run_node(self, n: fx.Node) -> Any:
        """One node's value."""
        result = super().run_node(n)
        if isinstance(result, Tensor) and result.is_floating_point() and result.numel() and n.op != "get_attr":
            self.largest = max(self.largest, float(result.abs().nan_to_num(0.0, 0.0, 0.0).max()))
        return result


def _recorded(module: fx.GraphModule, inputs: Sequence[Tensor]) -> tuple[list[Tensor], float]:
    recorder = _Recorder(module)
    with torch.no_grad():
        return _outputs(recorder.run(*inputs)), recorder.largest


def _in_double(module: fx.GraphModule, inputs: Sequence[Tensor]) -> list[Tensor] | None:
    """The outputs in float64; None where the graph casts between types."""
    weights = {name: weight.double() for name, weight in module.named_parameters()}
    doubled = tuple(one.double() if one.is_floating_point() else one for one in inputs)
    try:
        with torch.no_grad():
            return [one.double() for one in _outputs(torch.func.functional_call(module, weights, doubled))]
    except RuntimeError:
        return None


def _outputs(result: Any) -> list[Tensor]:
    return list(result.values()) if isinstance(result, Mapping) else [result]
