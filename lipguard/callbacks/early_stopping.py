"""LipschitzEarlyStopping: the training ends when the verified bound stays above a limit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lipguard.callbacks.asked import number, refuse
from lipguard.callbacks.base import Callback
from lipguard.callbacks.monitor import LipschitzMonitor
from lipguard.errors import UnsupportedQuery
from lipguard.query import Norm

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["LipschitzEarlyStopping"]


class LipschitzEarlyStopping(Callback):
    """Stops when a `LipschitzMonitor`'s verified upper bound was above a limit in more than `patience` measurements in a row.

    Only fresh measurements count: Lightning keeps the last value of a metric for ever, so that its own EarlyStopping takes an
    epoch without a measurement, or with a failed one, for one without improvement. The decision falls in the hook in
    which the monitor measures, wherever the two stand in the list of callbacks, and on all ranks alike. `min_epochs` and
    `min_steps` of the Trainer are respected.

    Lightning's `EarlyStopping("lipschitz/upper", ...)` works too, if the monitor measures every epoch.

    Args:
        limit: largest bound allowed.
        patience: measurements above the limit, in a row, that are still forgiven.
        prefix: that of the monitor.
        norm, domain, submodule, example, outputs, inputs: refused, as the monitor says what is bounded.

    Attributes:
        stopped_step: optimizer steps taken when the training was stopped; None while it was not.
    """

    def __init__(
        self,
        limit: float,
        patience: int = 0,
        prefix: str = "lipschitz",
        norm: Norm | None = None,
        domain: object = None,
        submodule: str | None = None,
        example: object = None,
        outputs: object = None,
        inputs: object = None,
    ) -> None:
        super().__init__()
        who = "LipschitzEarlyStopping"
        asked = {"norm": norm, "domain": domain, "submodule": submodule, "example": example, "outputs": outputs, "inputs": inputs}
        refuse(who, "the bound compared is the monitor's. Give it to LipschitzMonitor, and its prefix=... here.", **asked)
        number(who, "a finite number >= 0", lambda value: value >= 0, limit=limit)
        number(who, "at least 0, a whole number", lambda value: value >= 0 and value == int(value), patience=patience)
        self.limit, self.patience, self.prefix = limit, patience, prefix
        self.above = 0
        self.stopped_step: int | None = None

    @property
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint."""
        return self._generate_state_key(prefix=self.prefix, limit=self.limit)

    def state_dict(self) -> dict[str, Any]:
        """Measurements above the limit so far."""
        return {"above": self.above}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        self.above = state_dict["above"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listens to the monitor.

        Raises:
            UnsupportedQuery: the Trainer has no monitor of this prefix.
        """
        if stage != "fit" or trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue] - set outside __init__
            return
        callbacks: list[object] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue] - set outside __init__
        monitors = [c for c in callbacks if isinstance(c, LipschitzMonitor)]
        own = next((monitor for monitor in monitors if monitor.prefix == self.prefix), None)
        if own is None:
            there = f" There are: {', '.join(m.prefix for m in monitors)}." if monitors else ""
            raise UnsupportedQuery(
                f"LipschitzEarlyStopping finds no LipschitzMonitor with prefix={self.prefix!r} to listen to. Add one to the "
                f"Trainer's callbacks.{there}"
            )
        self.stopped_step = None
        own.listeners[id(self)] = self._measured

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listens no longer."""
        callbacks: list[object] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue] - set outside __init__
        for callback in callbacks:
            if isinstance(callback, LipschitzMonitor):
                callback.listeners.pop(id(self), None)

    def _measured(self, trainer: Trainer, upper: float) -> None:
        """A fresh measurement, on every rank at once."""
        self.above = self.above + 1 if upper > self.limit else 0
        # Rank 0 measured and broadcast its value, so that the ranks agree; they are asked all the same.
        if trainer.strategy.reduce_boolean_decision(self.above > self.patience, all=False):
            trainer.should_stop = True
            if self.stopped_step is None:
                self.stopped_step = trainer.global_step
