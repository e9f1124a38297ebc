"""`Elementwise`: functions of one number with proven slope intervals, on all of R and on intervals."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lipguard.errors import UnsupportedLayer
from lipguard.network.activations.named import NAMED
from lipguard.network.part import Part

if TYPE_CHECKING:
    from lipguard.network.activations.formula import Formula
    from lipguard.network.activations.piecewise import PiecewiseLinear


class Elementwise(Part, ABC):
    """A function phi: R -> R applied entry by entry, with alpha <= (phi(s) - phi(t)) / (s - t) <= beta.

    Parameters may be one number for all entries or one per entry (shape (size,)).
    """

    name: str

    @abstractmethod
    def __call__(self, z: Tensor) -> Tensor:
        """phi(z), entry by entry, float64."""

    @property
    @abstractmethod
    def slopes(self) -> tuple[Tensor, Tensor]:
        """(alpha, beta) on all of R, rounded outward; 0-d or (size,)."""

    @property
    def steepest(self) -> Tensor:
        """The largest absolute slope, 0-d or (size,)."""
        alpha, beta = self.slopes
        return torch.maximum(alpha.abs(), beta.abs())

    @abstractmethod
    def slope_range(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Enclosure of every slope (generalised derivative) of phi on [lower, upper], entry by entry, rounded outward."""

    def rounding(self, z: Tensor) -> Tensor:
        """Upper bound of the rounding error of phi(z), entry by entry.

        Torch's elementary functions are accurate to a few ulps (2**-52); 2**-40 is granted, relative to phi(z) and to z.
        """
        return 2.0**-40 * (self(z).abs() + self.steepest * z.abs())

    def tensors(self) -> tuple[Tensor, ...]:
        """The parameters, for the digest."""
        return ()

    @property
    def piecewise(self) -> PiecewiseLinear | None:
        """The same function by its break points and slopes, where it is piecewise linear; else None."""
        return None

    @property
    def formula(self) -> Formula | None:
        """The same function as a formula, where it is one; else None."""
        return None

    def to(self, device: torch.device) -> Elementwise:
        """The function with its parameters on a device; itself where it has none."""
        del device
        return self

    kind: ClassVar[str] = "Elementwise"
    """How a record writes it down: by its registered name and parameters."""

    def parameters_of_record(self) -> tuple[float | Tensor, ...]:
        """What its registered constructor is called with to make it again: its tensors, unless it says otherwise."""
        return self.tensors()

    def to_record(self) -> dict[str, Any]:
        """{"kind", "name", "parameters"}, from which `activations.from_record` makes it again.

        Raises:
            UnsupportedLayer: no constructor is registered under its name, or one that makes something else.
        """
        parameters = self.parameters_of_record()
        make = NAMED.get(self.name)
        own = f"{type(self).__module__}.{type(self).__qualname__}"
        if make is None:
            raise UnsupportedLayer(
                f"the activation {self.name!r} ({own}) is under no registered name, so that no record can make it again. Put "
                f"lipguard.network.activations.register({self.name!r}, {type(self).__name__}) into the module that defines it."
            )
        if type(made := make(*parameters)) is not type(self) or made.name != self.name:
            raise UnsupportedLayer(
                f"under the name {self.name!r} another activation is registered than {own}: a name determines its function. "
                "Give it a name of its own."
            )
        return {"kind": self.kind, "name": self.name, "parameters": parameters}
