"""Reading a module once, and being sure of it: more readings that must give the same network, and the module's own results.

One reading follows every operation on one sample. What depends on the size of the batch, on values or on the number of calls
shows as another network when two or three samples of other sizes are read; what a reading could still mistake shows in the
module's own results, see `lipguard.capture.comparison`.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lipguard.capture.agreement import ROUNDINGS, equal
from lipguard.capture.arguments import Call, run_module
from lipguard.capture.comparison import Comparison, Maps
from lipguard.capture.frozen import in_precision, intercepted, python_numbers
from lipguard.capture.selection import choose
from lipguard.capture.simplify import simplify
from lipguard.capture.taint import Taint
from lipguard.capture.trace import BatchMoved, Trace, plain_class
from lipguard.capture.tracer import Tracer
from lipguard.errors import InvalidModel, LipguardError, UnsupportedLayer
from lipguard.network import Network, Node

_SIZES = ((1, 1.0), (2, 1e-3), (3, 1e3))
"""Samples, and the size of their noise in units of the example's, of the readings that must agree."""

_COUNTS = (1, 4, 5, 6, 7, 8, 9, 16, 17, 32, 64, 100, 128)
"""Samples of the batches whose results are compared as well, as far as memory for `_ENTRIES` numbers in a layer allows."""

_ENTRIES = 2**20

_SCALES = (1.0, 1e-3, 1e3, 1e6, 1e9, 1e12)
"""Sizes of the noise of their rows: large ones reach what is switched off near the example."""

_DRAWS = 200
"""Further calls of a module that draws numbers of Python or NumPy: they must not matter."""

_ALL = 2**24
"""Entries of the values of all nodes, for all samples, up to which each sample's result is compared."""

_MODES = (torch.enable_grad, torch.no_grad, torch.inference_mode)
"""Modes of autograd that a module may be run in."""

_INTERVAL = 100
"""Of a module that is read again and again, as in training, every so many readings are checked in full."""

_SEEN: weakref.WeakKeyDictionary[nn.Module, tuple[object, int]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Reading:
    """What one reading shows.

    Attributes:
        nodes: all that were emitted.
        output: index of the one that holds the output.
        axis: dimension along which the samples' results lie; None without a batch.
        sizes: entries of each node.
        chance: whether the forward drew numbers of Python or NumPy.
    """

    nodes: tuple[Node, ...]
    output: int
    axis: int | None
    sizes: tuple[int, ...]
    chance: bool

    @cached_property
    def network(self) -> Network:
        """The network, its affine maps folded."""
        return simplify(self.nodes, self.output)

    @cached_property
    def steps(self) -> Network:
        """The same with every step that the module takes."""
        return simplify(self.nodes, self.output, fold=False)


@dataclass(frozen=True, eq=False)
class Reader:
    """A module as a function of one tensor.

    Attributes:
        module: in evaluation mode, frozen.
        call: its arguments.
        axis: 0 where the tensor is a batch, None where it is one sample as a whole.
        root: the module's path, for messages.
        which: the output that is meant, see `choose`.
    """

    module: nn.Module
    call: Call
    axis: int | None
    root: str
    which: str | None
    _left: list[StorageWeakRef] = field(default_factory=list)
    """What the module may have kept of its calls, see `Taint`."""

    @property
    def place(self) -> str:
        """Path and class, for messages."""
        return f"{self.root} ({plain_class(self.module).__name__})"

    def read(self, x: Tensor, live: bool = False) -> Reading:
        """The network that the module's forward shows on the input x.

        Raises:
            LipguardError: see `lipguard.capture`.
        """
        size = x.numel() if self.axis is None else x[0].numel()
        trace = Trace(size, {id(p): f"{self.root}.{n}" for n, p in named_tensors(self.module)}, live, self.root)
        with torch.set_grad_enabled(live):
            x = x.clone()
            tracer = Tracer(trace, x, self.axis, self._left)

            def forward(module: nn.Module, path: str, original: Callable[..., Any]) -> Callable[..., Any]:
                path = ".".join(p for p in path.split(".") if p != "_orig_mod")

                def run(*args: Any, **kwargs: Any) -> Any:
                    with trace.inside(path, module):
                        return tracer.module(module, original, args, kwargs)

                return run

            before = python_numbers()
            try:
                with intercepted(self.module, forward), tracer.running():
                    args, kwargs = self.call.at(x)
                    output = run_module(self.module, args, kwargs, self.root)
            except LipguardError as error:
                raise tracer.refused or error from error.__cause__
        if tracer.refused is not None:
            raise tracer.refused
        value = tracer.value(choose(output, self.which, self.place))
        self._left[:] = tracer.taint.left()
        if value is None:
            raise UnsupportedLayer(
                f"{self.place}: its output was not computed from the input by torch calls that can be followed."
            )
        output = trace.settled(value.node)
        return Reading(tuple(trace.nodes), output, value.axis, tuple(trace.sizes), python_numbers() != before)

    def runs(self) -> bool:
        """Whether the module runs on the example's first sample."""
        try:
            self.results(self.call.sample, self.call.row.dtype)
        except Exception:  # told where the module is read
            return False
        return True

    def results(self, x: Tensor, dtype: torch.dtype, mode: Callable[[], Any] = torch.no_grad) -> Tensor:
        """What the module itself returns for x, computed in a precision: (rows, m), or one row for one sample.

        Args:
            mode: of autograd.
        """
        taint = Taint(lambda _: None, self._left)  # only marks what the module may keep of this call
        taint.asleep = True
        with mode():
            x = x.to(dtype, copy=True)
            if torch.is_grad_enabled():
                x = x.requires_grad_().clone()
            taint.mark(x, "the input itself")
            # Under inference_mode torch takes no note of a lazy conjugation behind a mode; no reading follows those calls.
            marks = nullcontext() if torch.is_inference_mode_enabled() else taint
            with marks, nullcontext() if dtype == self.call.row.dtype else in_precision(self.module, dtype):
                args, kwargs = self.call.at(x)
                output = self.module(*args, **kwargs)
            output = choose(output, self.which, self.root).detach()
        self._left[:] = taint.left()
        return output.reshape(1, -1) if len(self.rows(x)) == 1 else output.reshape(len(output) if output.ndim else 1, -1)

    def takes_more(self) -> bool:
        """Whether the module runs on a longer first dimension as well: that of a batch, not of one sample."""
        return self._attempt(torch.cat([self.call.row, self.call.row]), torch.no_grad) is not None

    def rows(self, x: Tensor) -> Tensor:
        """The inputs as rows, (rows, d), float64."""
        return (x.reshape(1, -1) if self.axis is None else x.flatten(1)).double()

    def check(self, reading: Reading) -> None:
        """Raise unless further readings give the network of this one, and the module's own results are its values.

        Raises:
            UnsupportedLayer: they do not.
            InvalidModel: values overflow.
        """
        generator = torch.Generator("cpu").manual_seed(0)
        network, maps = reading.network, Maps()
        dtypes = list(dict.fromkeys((self.call.row.dtype, torch.float64)))
        overflow = True
        batch = self.axis == 0  # whether several samples are computed as one is, each in its row
        sizes = (*_SIZES, *([(self.call.rows, 1.0)] if self.call.rows > len(_SIZES) else []))
        for count, scale in sizes if self.call.exactly is None else [(self.call.exactly, scale) for _, scale in _SIZES]:
            x = torch.cat([_noisy(self.call.row, scale, generator) for _ in range(count if batch else 1)])
            rows = self.rows(x)
            # Of a large network, whose batches were read to be of equal samples, the last of each is enough.
            some = slice(None if len(rows) * sum(reading.sizes) <= _ALL else -1, None)
            comparison = Comparison(network, reading.steps, rows[some], dtypes, maps)
            if not bool(comparison.values.isfinite().all()):
                continue
            overflow = False
            own = self._own(x, network)
            batch = batch and own is not None and self._same(reading, x)
            if own is not None and (batch or len(rows) == 1):
                self._compare(comparison, network, x, own, some)
        if overflow:
            raise InvalidModel(f"{self.root}: its weights are so large that its values overflow float64. Rescale the layers.")
        self._others(reading, generator, batch, maps)

    def _own(self, x: Tensor, network: Network) -> Tensor | None:
        """The module's results in its own precision; None where it is written for one sample: several are not as many rows."""
        try:
            output = self.results(x, self.call.row.dtype)
        except LipguardError:
            raise
        except Exception as error:
            if len(self.rows(x)) > 1:
                return None
            raise UnsupportedLayer(
                f"{self.place} cannot be run again: {type(error).__name__}: {error}. Look for state that forward changes."
            ) from error
        if output.shape == (len(self.rows(x)), network.outputs):
            return output
        values = network(self.rows(x))
        # Such code takes one of the samples, or returns all of them in another order.
        if len(values) == 1 or not any(_reordered(output, part) for part in (values, *values)):
            raise UnsupportedLayer(
                f"{self.place} returns {output.numel()} entries for {len(values)} samples of {values.shape[1]}, which are not "
                "theirs: a sample's result depends on the other samples, or on more than the input."
            )
        return None

    def _same(self, reading: Reading, x: Tensor) -> bool:
        """Raise unless the network is read again; whether the results of the samples lie in rows."""
        try:
            again = self.read(x)
        except BatchMoved:
            return True  # no sample was mixed with another as far as they were followed; the results are compared
        except UnsupportedLayer as error:
            if len(self.rows(x)) == 1:
                raise
            raise UnsupportedLayer(f"{error} (Read for a batch of {len(x)}: for one sample it could be read.)") from error
        # Equal steps fold to equal networks: folding once is half of the work of a reading.
        dtype = self.call.row.dtype
        if not equal(reading.steps, again.steps, dtype) and not equal(reading.network, again.network, dtype):
            raise UnsupportedLayer(
                f"{self.place} computes one function for one input and another for {_amount(self.rows(x))}: it depends on the "
                "size of the batch, on the values, or on how often it ran. Bound a submodule without that with submodule=...."
            )
        return len(self.rows(x)) == 1 or again.axis == 0

    def _others(self, reading: Reading, generator: torch.Generator, batch: bool, maps: Maps) -> None:
        """Raise unless batches of other sizes have the same results, and so have the modes of autograd, call after call."""
        dtype, most = self.call.row.dtype, _ENTRIES // max(reading.sizes)
        counts = [n for n in _COUNTS if n <= max(most, 1)] if batch else [1] * len(_MODES)
        if self.call.exactly is not None:
            counts = [self.call.exactly] * len(_MODES)
        x = torch.cat([_noisy(self.call.row, _SCALES[i % len(_SCALES)], generator) for i in range(counts[-1])])
        comparison = Comparison(reading.network, reading.steps, self.rows(x), [dtype], maps)
        for i, count in enumerate(counts + counts[:1] * _DRAWS * reading.chance):
            own = self._attempt(x[:count], _MODES[i % len(_MODES)])
            if own is not None and len(own) == count and (worst := comparison.disagreement(own, dtype)) is not None:
                self._misread(worst, f"{count} random inputs" if count > 1 else "a random input")
        if batch and (rows := self.call.exactly or 3) > 1:
            self._apart(torch.cat([_noisy(self.call.row, 1.0, generator) for _ in range(rows)]), generator)

    def _attempt(self, x: Tensor, mode: Callable[[], Any]) -> Tensor | None:
        """The module's results; None where it fails: it may need a mode of autograd, or one size of the batch."""
        try:
            return self.results(x, self.call.row.dtype, mode)
        except Exception:
            return None

    def _apart(self, x: Tensor, generator: torch.Generator) -> None:
        """Raise where a sample's result changes as another sample does.

        It is changed to nan, which reaches all that is computed of it, and to large numbers, which switch on what compares it.
        """
        clean = self._attempt(x, torch.no_grad)
        large = math.sqrt(torch.finfo(x.dtype).max)
        for change in (torch.nan, large, large, -large, -large):
            noise = torch.rand(x[0].shape, generator=generator, dtype=torch.float64, device="cpu") - 0.25
            changed = x.clone()
            changed[1] = (noise * change).to(x)
            other = self._attempt(changed, torch.no_grad)
            if clean is None or other is None or not (clean.shape == other.shape and len(clean) == len(x)):
                return
            for i in (0, *range(2, len(x))):
                if not torch.allclose(clean[i], other[i], rtol=ROUNDINGS * torch.finfo(x.dtype).eps, atol=0, equal_nan=True):
                    raise UnsupportedLayer(
                        f"{self.place} mixes the samples of a batch: the result of one changes as another sample changes."
                    )

    def _misread(self, worst: float, where: str) -> NoReturn:
        raise UnsupportedLayer(
            f"{self.place} does something that capture misreads: on {where} it differs by {worst:.3g} from the captured network. "
            "Look for randomness, for state that forward changes, or for a dependence on the size of the batch or on gradients "
            "being recorded; or bound a submodule with submodule=...."
        )

    def _compare(self, comparison: Comparison, network: Network, x: Tensor, own: Tensor, some: slice) -> None:
        dtype = self.call.row.dtype
        worst = comparison.disagreement(own[some], dtype)
        if worst is None and dtype != torch.float64:
            worst = self._in_double(comparison, network, x, some)
        if worst is not None:
            self._misread(worst, "a random input")

    def _in_double(self, comparison: Comparison, network: Network, x: Tensor, some: slice) -> float | None:
        """The same of the module's results in float64, where it is the same function there."""
        try:
            output = self.results(x, torch.float64)
        except Exception:  # in float64 a module may refuse to run; its own precision has decided
            return None
        if output.shape != (len(self.rows(x)), network.outputs):
            return None
        worst = comparison.disagreement(output[some], torch.float64)
        if worst is None:
            return None
        # Weights that the forward computes, or indices, are others in another precision. Read so, it is another network.
        with in_precision(self.module, torch.float64):
            try:
                double = self.read(x.double()).network
            except LipguardError:
                return None
        return worst if equal(network, double, torch.float64) else None


def checked(reader: Reader, reading: Reading, repeated: bool) -> Network:
    """The network of a reading after its full check, which is made now and then where a module is read again and again.

    Raises:
        LipguardError: it does not hold.
    """
    network = reading.network
    if not repeated:
        reader.check(reading)
        return network
    structure = (reader.root, reader.which, tuple(node.structure() for node in network.nodes))
    seen, count = _SEEN.get(reader.module, (None, 0))
    if seen != structure or count >= _INTERVAL:
        reader.check(reading)
        count = 0
    _SEEN[reader.module] = structure, count + 1
    return network


def named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers with their names."""
    return [*module.named_parameters(), *module.named_buffers()]


def _noisy(row: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    """The row, moved by noise of the row's own size times the scale."""
    noise = torch.randn(row.shape, generator=generator, dtype=torch.float64, device="cpu")
    return (row.double().cpu() + noise * max(float(row.abs().max()), 1.0) * scale).to(row)


def _reordered(output: Tensor, values: Tensor) -> bool:
    """Whether the entries of a result are those of the values, each as often as any other, in any order."""
    if output.numel() % values.numel():
        return False
    expected = values.flatten().repeat(output.numel() // values.numel()).sort().values
    return torch.allclose(output.flatten().double().sort().values, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))


def _amount(rows: Tensor) -> str:
    return f"{len(rows)} of them" if len(rows) > 1 else "another"
