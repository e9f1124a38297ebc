"""Layers whose weight can be scaled down to a norm: what each layer's norm is, and the scaling."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lipguard.bounds.spectral import layer_norm
from lipguard.capture.arguments import arguments_of, described
from lipguard.capture.capture import capture
from lipguard.errors import InvalidExample, LipguardError, UnsupportedLayer
from lipguard.network import Dense, Operator

_EXACT = 4_000_000
"""Entries of a layer's matrix up to which its norm is computed in full; beyond, by subspace iteration that is carried on."""

_BLOCK = 4
"""Singular vectors carried on: the largest value converges by its ratio to the first one left out."""

_SETTLED, _LONGEST = 1e-4, 200
"""Relative change at which an iteration ends, and its steps at most."""


@dataclass
class Layer:
    """A module that computes an affine map with one weight, and the shapes of what arrives there.

    Attributes:
        name, module: as in the model.
        examples: a row of zeros of each shape that arrives, (1, ...).
        vectors: first right singular vectors by shape, (in, few), carried from step to step.
    """

    name: str
    module: nn.Module
    examples: list[Tensor]
    vectors: dict[int, Tensor] = field(default_factory=dict)

    def operators(self) -> list[Operator]:
        """The linear map for each shape of input."""
        found: list[Operator] = []
        for example in self.examples:
            network = capture(self.module, example)
            parts = [n.map for i, n in enumerate(network.nodes) if n.map is not None and n.sources == (i - 1,)]
            if not parts or len(parts) != len(network.nodes) - 1:
                raise UnsupportedLayer("it is not one affine map.")
            found.append(parts[0] if len(parts) == 1 else _composed(parts))
        return found

    def norm(self, p: float, exact: bool = True) -> float:
        """The layer's operator norm from p to p, the largest over the shapes that arrive.

        Args:
            p: 1, 2 or inf; for 1 and inf the norm is a largest sum of coefficients and always exact.
            exact: False carries a subspace iteration on, which approaches the norm from below.
        """
        operators = self._rebound() if not exact else self.operators()
        return max(self._norm(k, operator, p, exact) for k, operator in enumerate(operators))

    def scale(self, factor: float) -> None:
        """Multiply the weight by a factor, through the parametrization where there is one."""
        with torch.no_grad():
            weight = self.module.weight
            if "weight" in self.module._parameters:
                weight.mul_(factor)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue] - a parameter
            else:
                self.module.weight = weight * factor  # pyright: ignore[reportOperatorIssue, reportAttributeAccessIssue]

    _captured: list[Operator] | None = None
    _plain = False

    def _rebound(self) -> list[Operator]:
        """The operators with the weight of this moment: the map itself is read once, as its structure stays."""
        assert isinstance(self.module.weight, Tensor)
        weight = self.module.weight.detach().to(torch.float64)
        if self._captured is None:
            self._captured = self.operators()
            # Where its one tensor of coefficients is the weight itself, another weight gives the map of that one.
            self._plain = all(len(o.tensors()) == 1 and torch.equal(o.tensors()[0], weight) for o in self._captured)
        return [o.mapped(lambda _: weight) for o in self._captured] if self._plain else self.operators()

    def _norm(self, k: int, operator: Operator, p: float, exact: bool) -> float:
        rows, columns = operator.shape
        known = operator.norm(p)
        if known is not None:
            return known
        if p != 2:
            return layer_norm(operator, p)
        if exact and rows * columns <= _EXACT:
            norm, self.vectors[k] = _whole(operator.dense())
            return norm
        norm, self.vectors[k] = iterated_norm(operator, self.vectors.get(k), 1e-7 if exact else _SETTLED)
        return norm


def _composed(parts: list[Operator]) -> Operator:
    """The matrix of operators applied one after the other, as circular padding and a convolution are."""
    if max(part.shape[0] * part.shape[1] for part in parts) > _EXACT:
        raise UnsupportedLayer(f"it is {len(parts)} maps in a row, too large for their matrix. Leave it out with layers=....")
    matrix = parts[0].dense()
    for part in parts[1:]:
        matrix = part(matrix.T).T
    return Dense(matrix)


def _whole(matrix: Tensor) -> tuple[float, Tensor]:
    """The norm from 2 to 2 of a matrix, and its first right singular vectors, (in, few)."""
    wide = matrix.shape[0] <= matrix.shape[1]
    small = matrix @ matrix.T if wide else matrix.T @ matrix
    values, vectors = torch.linalg.eigh(small)
    few = vectors[:, -_BLOCK:]
    return math.sqrt(max(float(values[-1]), 0.0)), matrix.T @ few if wide else few


def iterated_norm(operator: Operator, vectors: Tensor | None, settled: float) -> tuple[float, Tensor]:
    """A norm from 2 to 2 by subspace iteration, from below, and the vectors to go on from, (in, few).

    Args:
        operator: (out, in), float64.
        vectors: of an earlier call; None for a start at random.
        settled: relative change in a step at which the iteration ends.
    """
    weight = operator.tensors()[0]
    if vectors is None:
        generator = torch.Generator().manual_seed(operator.shape[1])
        vectors = torch.randn(operator.shape[1], min(_BLOCK, operator.shape[1]), generator=generator, dtype=torch.float64)
    v = torch.linalg.qr(vectors.to(weight)).Q
    adjoint, norm = operator.transpose(), 0.0
    for step in range(_LONGEST):
        u = operator(v.T)
        previous, norm = norm, float(torch.linalg.matrix_norm(u, 2))
        if norm == 0:
            break
        v = torch.linalg.qr(adjoint(u).T).Q
        if step and norm - previous <= settled * norm:
            break
    return norm, v


def layers_of(model: nn.Module, example: Any, submodule: str | None = None) -> tuple[list[Layer], list[str]]:
    """The layers of a model that can be projected, and the names of those that have no weight to scale.

    Args:
        model: run once in evaluation mode on the example.
        example: (B, ...), or a tuple or mapping of tensors as for `lipguard.capture`.
        submodule: dotted name of the part whose layers are meant. The example is then an input of the model, or, where the model
            fails on it or does not come to that part, an input of the part.
    Raises:
        InvalidExample: the model does not run on the example.
        UnsupportedLayer: a module holds a matrix of weights and is not one affine map of them.
    """
    arrived: dict[int, list[Tensor]] = {}
    handles = []

    def hook(module: nn.Module, args: tuple[object, ...]) -> None:
        if len(args) == 1 and isinstance(args[0], Tensor) and args[0].ndim > 1:
            known = arrived.setdefault(id(module), [])
            row = torch.zeros_like(args[0][:1]).detach()
            if all(row.shape != other.shape for other in known):
                known.append(row)

    part = model.get_submodule(submodule) if submodule else model
    before = f"{submodule}." if submodule else ""
    modes = [(m, m.training) for m in model.modules()]
    handles = [m.register_forward_pre_hook(hook) for m in part.modules()]
    try:
        model.eval()
        with torch.no_grad():
            if part is not model:
                _try(model, example)
            if not arrived:
                _try(part, example, f"the submodule {submodule!r}" if submodule else "the model")
    finally:
        for handle in handles:
            handle.remove()
        for m, mode in modes:
            m.training = mode
    found: list[Layer] = []
    fixed: list[str] = []
    seen: set[int] = set()
    for own_name, module in part.named_modules():
        if "parametrizations" in own_name.split("."):
            continue
        name = f"{before}{own_name}".rstrip(".")
        parametrized = "parametrizations" in module._modules
        if any(True for n, _ in module.named_children() if n != "parametrizations"):
            loose = [n for n, p in module.named_parameters(recurse=False) if p.ndim > 1]
            if loose:
                raise UnsupportedLayer(
                    f"{name or 'the model'} ({type(module).__name__}) holds the matrix {loose[0]!r} beside its submodules: its "
                    "norm is not known to the projection. Put it into a module of its own, such as nn.Linear."
                )
            continue
        weight = getattr(module, "weight", None)
        own = [n for n, p in module.named_parameters(recurse=False) if p.ndim > 1]
        if not isinstance(weight, Tensor) or (isinstance(module, nn.PReLU)):
            if own:
                raise UnsupportedLayer(
                    f"{name} ({type(module).__name__}) holds the matrix {own[0]!r}, and is not a layer with one weight. "
                    "Replace it by such a layer, or project a submodule without it."
                )
            if id(module) in arrived and any(b.is_floating_point() for b in module.buffers(recurse=False)):
                fixed.append(name)
            continue
        if id(module) not in arrived or id(weight if not parametrized else module) in seen:
            continue
        seen.add(id(weight if not parametrized else module))
        layer = Layer(name, module, arrived[id(module)])
        try:
            layer.operators()
        except LipguardError as error:
            raise UnsupportedLayer(f"{name} ({type(module).__name__}) cannot be projected: {error}") from error
        if parametrized:
            _check_parametrized(layer)
        found.append(layer)
    return found, fixed


def _try(module: nn.Module, example: Any, name: str | None = None) -> None:
    """Run a module on an example; a failure is an error where the module has a name."""
    try:
        args, kwargs = arguments_of(module, example).first()
        module(*args, **kwargs)
    except Exception as error:
        if name is not None:
            raise InvalidExample(f"{name} fails on an example {described(example)}: {error}") from error


def _check_parametrized(layer: Layer) -> None:
    """Scaling by 1/2 and back must do what it says."""
    before = layer.norm(2)
    try:
        layer.scale(0.5)
        halved = layer.norm(2)
        layer.scale(2.0)
    except Exception as error:
        raise UnsupportedLayer(
            f"{layer.name}: its parametrization takes no weight, so that it cannot be projected: {error}"
        ) from error
    if abs(halved - 0.5 * before) > 1e-3 * before:
        raise UnsupportedLayer(
            f"{layer.name}: its parametrization fixes the weight's size, so that it cannot be projected. Leave it out, or "
            "remove the parametrization."
        )
