"""`Penalty`: a differentiable scalar of a module's weights that remembers from step to step where it was."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn

from lipguard.network import Network
from lipguard.penalties.live import LiveNetwork
from lipguard.query import Inputs, Outputs


class Penalty(ABC):
    """A penalty with explicit state, to be added to any loss: `loss = ce + weight * penalty(x, y)`.

    Args:
        model: the module, or a `Network` whose weights are in the autograd graph.
        example: a batch of inputs that the module accepts, as for `lipguard.bound`.
        submodule: dotted name of the part to penalise; None for the whole.
        outputs, inputs: what of the outputs, and with respect to what, as for `lipguard.bound`.

    Attributes:
        needs: what a call must be given: "inputs", "labels".
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self,
        model: nn.Module | Network,
        example: Any = None,
        submodule: str | None = None,
        outputs: Outputs | None = None,
        inputs: Inputs | None = None,
    ) -> None:
        self.network = LiveNetwork(model, example, submodule, outputs, inputs)

    @abstractmethod
    def __call__(self, inputs: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """The penalty at the weights of this moment, 0-d, attached to them; its state moves one step on.

        Raises:
            LipguardError: the network has no such penalty, or the multipliers failed; the message says which.
        """

    def log_bound(self, value: float) -> float:
        """Logarithm of the Lipschitz constant, bound or estimate, that a value of the penalty stands for."""
        return value

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs, as plain tensors and numbers."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        del state  # nothing to restore
