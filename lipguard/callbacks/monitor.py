"""LipschitzMonitor: the verified bound of the network in training, logged beside the loss."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lipguard.bounds.tracker import Measurement, Tracker
from lipguard.callbacks.asked import Asked, named, number, on_failure_of, whole
from lipguard.callbacks.base import Callback
from lipguard.callbacks.undisturbed import message_of, undisturbed
from lipguard.certificate import Ball, Box
from lipguard.errors import Contradiction, LipguardError, UnsupportedQuery
from lipguard.outward import for_bar, narrowed
from lipguard.query import Inputs, Norm, Outputs, Query

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["LipschitzMonitor"]

_FLOOR = 0.5
"""Seconds that a measurement may always take: small models are measured in full."""

_EVALUATION = 30.0
"""Seconds that the one measurement of `trainer.validate` or `trainer.test` may take."""

_SHARDED = ("FSDPStrategy", "ModelParallelStrategy")
"""Strategies under which no rank holds the whole network."""

_REDUCE: dict[str, str] = {"lower": "min"}
"""Lightning averages repeated logs by default, which is no bound; everything but the lower bound takes the maximum."""


class LipschitzMonitor(Callback):
    """Logs a verified upper and a witnessed lower bound of the Lipschitz constant while a network trains.

    Logged: `{prefix}/upper`, `{prefix}/lower`, `{prefix}/gap` (upper / lower - 1, left out while the lower bound is 0),
    `{prefix}/seconds` and `{prefix}/failed` (measurements failed so far); with `log_per_layer` also `{prefix}/layer/<name>`,
    a bound of each layer's norm. Every bound is verified, and rounded outward so that it stays one in a float32 sink. The
    weights, the gradients, the modes and the state of every random generator are left as they were.

    A measurement that fails logs no bound. The last value then stands in `trainer.callback_metrics`, as Lightning never
    clears it, and `{prefix}/failed` counts up.

    Args:
        method: method of the upper bound, as for `lipguard.bound`; None chooses the tightest affordable for the norm and the
            network's size, and warns once where that is not one multiplier a neuron.
        norm: 1, 2 or inf, or a pair (input, output) of them.
        domain: a `Box` or a `Ball` of inputs, or text such as "box:0,1"; None means all inputs. Networks of up to 400 neurons
            get the local bound, larger ones the global one, which holds on every domain.
        every_n_epochs: measure at the end of every n-th epoch; None for never.
        every_n_train_steps: measure after every n-th optimizer step; None for never.
        submodule: dotted name of the submodule to bound; None for the whole module's `forward`.
        max_overhead: share of the training's wall time that measuring may take. Half a second a measurement is always
            allowed; a measurement beyond both is stopped at the best bound verified so far.
        log_per_layer: log a bound of each layer's norm as well.
        prog_bar: show the upper and lower bound in the progress bar.
        prefix: first part of the names logged, unique among the monitors of one Trainer. The slash behind it makes a
            directory in a checkpoint's filename: give ModelCheckpoint `auto_insert_metric_name=False`.
        on_failure: "warn" (once), "ignore" or "raise" when a measurement fails. Training goes on in the first two.
        example: an input of the network, or of the submodule; None takes the module's `example_input_array`, or else what
            `forward` is called with in training.
        solver: solver that proposes the bound, as for `lipguard.bound`.
        outputs, inputs: what of the outputs, and with respect to what, as for `lipguard.bound`: outputs="policy.logits" for one
            of several tensors that the network returns.

    Raises:
        LipguardError: an argument that no module could make valid; the message says which, and what to write.

    Example::

        trainer = Trainer(callbacks=[LipschitzMonitor(every_n_epochs=1, prog_bar=True)])

    `trainer.validate` and `trainer.test` log the bound of the weights that they evaluate, measured once at their end.

    If another callback monitors one of the names logged (`EarlyStopping(monitor="lipschitz/upper")`), measurements are also
    taken at the end of validation, where that callback may look.
    """

    def __init__(
        self,
        method: str | None = None,
        norm: Norm = 2,
        domain: Box | Ball | str | dict[str, Any] | None = None,
        every_n_epochs: int | None = 1,
        every_n_train_steps: int | None = None,
        submodule: str | None = None,
        max_overhead: float = 0.02,
        log_per_layer: bool = False,
        prog_bar: bool = False,
        prefix: str = "lipschitz",
        on_failure: Literal["warn", "raise", "ignore"] = "warn",
        example: Any = None,
        solver: str = "auto",
        outputs: Outputs | list[Any] | None = None,
        inputs: Inputs | list[Any] | None = None,
    ) -> None:
        super().__init__()
        who = "LipschitzMonitor"
        self.asked = Asked(who, norm=norm, domain=domain, submodule=submodule, outputs=outputs, inputs=inputs, example=example)
        self.method, self.norm, self.domain, self.solver = method, norm, self.asked.query.domain, solver
        with named(who):
            self._tracking(None, self.asked.query)  # names, options and norms that no module could make valid
        whole(who, none=True, every_n_epochs=every_n_epochs, every_n_train_steps=every_n_train_steps)
        if every_n_epochs is None and every_n_train_steps is None:
            raise UnsupportedQuery("LipschitzMonitor would never measure: give every_n_epochs or every_n_train_steps.")
        number(who, "a share >= 0, such as 0.02", lambda share: share >= 0, max_overhead=max_overhead)
        self.every_n_epochs, self.every_n_train_steps = every_n_epochs, every_n_train_steps
        self.max_overhead, self.on_failure = max_overhead, on_failure_of(who, on_failure)
        self.log_per_layer, self.prog_bar, self.prefix = log_per_layer, prog_bar, prefix
        self.failed = 0
        self.measuring_seconds, self.training_seconds = 0.0, 0.0
        self._tracker: Tracker | None = None
        self._tracked: LightningModule | None = None
        self._tracker_state: dict[str, Any] | None = None
        self._mark: float | None = None
        self._measured_step, self._triggered_step = -1, 0
        self._measured_in_fit, self._warned, self._told_choice = False, False, False
        self.listeners: dict[int, Callable[[Trainer, float], None]] = {}  # told of every fresh upper bound, on every rank

    @property
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint: two monitors with one prefix would mix their values and are refused."""
        return self._generate_state_key(prefix=self.prefix)

    @property
    def last(self) -> Measurement | None:
        """The last successful measurement with its certificates; None before the first, and on ranks other than 0."""
        return None if self._tracker is None else self._tracker.last

    @property
    def overhead(self) -> float:
        """Time spent measuring as a share of the training's wall time without it."""
        return self.measuring_seconds / self.training_seconds if self.training_seconds > 0 else 0.0

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs: the multipliers to start from, the counts, and the steps measured at."""
        return {
            "tracker": self._tracker_state if self._tracker is None else self._tracker.state_dict(),
            "failed": self.failed,
            "measured_step": self._measured_step,
            "triggered_step": self._triggered_step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores `state_dict`; the multipliers are used at the next measurement."""
        self._tracker, self._tracked = None, None
        self._tracker_state = state_dict["tracker"]
        self.failed = state_dict["failed"]
        self._measured_step, self._triggered_step = state_dict["measured_step"], state_dict["triggered_step"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses a submodule that the module does not have.

        Raises:
            UnknownName: there is no such submodule.
        """
        self.asked.check(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock and forgets the network of an earlier training."""
        if self._tracked is not pl_module:
            self._tracker, self._tracked = None, None
            self.asked.forget()
        if trainer.global_step == 0:
            self._measured_step, self._triggered_step = -1, 0
        self._measured_in_fit = False
        self._mark = time.perf_counter()
        if trainer.barebones:
            warnings.warn("LipschitzMonitor measures nothing: Trainer(barebones=True) forbids logging.", stacklevel=2)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remembers the first sample of the first batch."""
        self.asked.see(pl_module, batch)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Measures after every `every_n_train_steps` optimizer steps."""
        every = self.every_n_train_steps
        if every is None or _is_dry_run(trainer) or trainer.global_step // every <= self._triggered_step // every:
            return
        self._triggered_step = trainer.global_step
        metrics = self._measure(trainer, pl_module)
        self._log(pl_module, metrics, on_step=True, on_epoch=False, logger=False)
        # Lightning passes step values to its loggers only every `log_every_n_steps` batches; a measurement is never dropped.
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in trainer.loggers if trainer.is_global_zero and metrics else ():
            logger.log_metrics(
                {name: float(value) for name, value in metrics.items()} | {"epoch": trainer.current_epoch}, step=step
            )

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures for the callbacks that decide at the end of validation on a value logged here, and in `trainer.validate`."""
        if trainer.state.fn == "validate":
            self._evaluate(trainer, pl_module)
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self._watched(trainer) and self._epoch_due(trainer):
            self._log(pl_module, self._measure(trainer, pl_module))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures at the end of every `every_n_epochs` epochs, unless this optimizer step has been measured."""
        if self._epoch_due(trainer):
            self._log(pl_module, self._measure(trainer, pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock."""
        if self._mark is not None:
            self.training_seconds += time.perf_counter() - self._mark
            self._mark = None

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Remembers the first sample where no training came before."""
        if trainer.state.fn != "fit" and batch_idx == 0 and dataloader_idx == 0:
            with torch.inference_mode(False):
                self.on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Remembers the first sample where no training came before."""
        self.on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the weights that are tested."""
        self._evaluate(trainer, pl_module)

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """One measurement outside a training; what a training counts stays as it was."""
        kept = self._measured_step, self._measured_in_fit, self._mark, self.measuring_seconds
        try:
            self._log(pl_module, self._measure(trainer, pl_module))
        finally:
            self._measured_step, self._measured_in_fit, self._mark, self.measuring_seconds = kept

    def _watched(self, trainer: Trainer) -> bool:
        callbacks: list[object] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue] - set outside __init__
        return any(str(getattr(callback, "monitor", "")).startswith(f"{self.prefix}/") for callback in callbacks)

    def _epoch_due(self, trainer: Trainer) -> bool:
        if self.every_n_epochs is None or trainer.global_step == self._measured_step:
            return False
        # A callback that monitors a value must find one from the start: `callback_metrics` is empty at first and after a resume.
        missing = self._watched(trainer) and not self._measured_in_fit
        return missing or _is_dry_run(trainer) or (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor]:
        """One measurement on rank 0, as values to log on every rank; empty under `barebones`."""
        if trainer.barebones:
            return {}
        self._measured_step = trainer.global_step
        started = time.perf_counter()
        trained = 0.0 if self._mark is None else started - self._mark
        outcome: dict[str, Any] = {}
        if trainer.is_global_zero:
            try:
                with undisturbed(pl_module.device):
                    outcome["values"] = self._values(trainer, pl_module, self.max_overhead * trained)
            except Exception as error:  # a training of days must survive any trouble of its gauge, LAPACK's included
                outcome["error"] = error
        seconds = time.perf_counter() - started
        if trainer.world_size > 1:
            error = outcome.get("error")
            shared = {"values": outcome.get("values"), "error": None if error is None else LipguardError(message_of(error))}
            outcome = trainer.strategy.broadcast(shared)
        self._mark = time.perf_counter()
        self.training_seconds += trained
        self.measuring_seconds += self._mark - started
        error = outcome.get("error")
        if error is None:
            self._measured_in_fit = True
        else:
            self._fail(error)
        values: dict[str, float] = outcome.get("values") or {}
        for listener in list(self.listeners.values()) if "upper" in values else ():
            listener(trainer, values["upper"])
        values |= {"seconds": seconds, "failed": float(self.failed)}
        return {f"{self.prefix}/{name}": narrowed(value, name) for name, value in values.items()}

    def _values(self, trainer: Trainer, pl_module: LightningModule, share: float) -> dict[str, float]:
        strategy = type(trainer.strategy).__name__
        if strategy in _SHARDED or getattr(trainer.strategy, "zero_stage_3", False):
            raise UnsupportedQuery(
                f"{strategy} shards the network, so that no rank can measure it. Bound its checkpoints instead."
            )
        tracker = self._tracker
        if tracker is None or self._tracked is not pl_module:
            tracker = self._tracking(pl_module, self.asked.at(trainer, pl_module))
            if self._tracker_state is not None:
                tracker.load_state_dict(self._tracker_state)
            self._tracker, self._tracked, self._tracker_state = tracker, pl_module, None
        upper, lower = tracker.update(share, floor=_FLOOR if trainer.state.fn == "fit" else _EVALUATION)
        if not (math.isfinite(upper) and math.isfinite(lower)):
            raise LipguardError(f"the measured bounds [{lower:g}, {upper:g}] are not finite; nothing is logged.")
        if lower > upper:
            raise Contradiction(f"verified lower bound {lower!r} > verified upper bound {upper!r}. Please report this model.")
        if self.method is None and tracker.last is not None and tracker.last.note.startswith(f"{tracker.last.upper.method} was"):
            self._tell(tracker.last.note)
        values = {"upper": upper, "lower": lower}
        if lower > 0:
            values["gap"] = upper / lower - 1
        if self.log_per_layer and tracker.last is not None:
            values |= {f"layer/{name}": norm for name, norm in tracker.last.layers.items() if math.isfinite(norm)}
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def _tracking(self, module: Any, query: Query) -> Tracker:
        return Tracker(
            module,
            query.example,
            method=self.method,
            norm=query.norm,
            domain=query.domain,
            submodule=query.submodule,
            solver=self.solver,
            outputs=query.outputs,
            inputs=query.inputs,
        )

    def _fail(self, error: Exception) -> None:
        self.failed += 1
        if self.on_failure == "raise":
            raise error
        if self.on_failure == "warn" and not self._warned:
            self._warned = True
            warnings.warn(
                f"LipschitzMonitor logged no bound: {message_of(error)} Training goes on; {self.prefix}/failed counts failures.",
                stacklevel=3,
            )

    def _tell(self, note: str) -> None:
        """Say once which method was chosen for a network that is too large for the tightest."""
        if not self._told_choice:
            self._told_choice = True
            warnings.warn(f"LipschitzMonitor: {note}. Give method=... to choose another, or submodule=....", stacklevel=3)

    def _log(
        self,
        pl_module: LightningModule,
        metrics: dict[str, Tensor],
        on_step: bool = False,
        on_epoch: bool = True,
        logger: bool | None = None,
    ) -> None:
        for name, value in metrics.items():
            kind = name.removeprefix(f"{self.prefix}/")
            pl_module.log(
                name,
                value,
                prog_bar=self.prog_bar
                and kind in ("upper", "lower")
                and not _in_bar(pl_module.trainer, name, float(value), kind),
                on_step=on_step,
                on_epoch=on_epoch,
                logger=logger,
                reduce_fx=_REDUCE.get(kind, "max"),
                batch_size=1,
            )


def _in_bar(trainer: Trainer, name: str, value: float, kind: str) -> bool:
    """Put a bound into the progress bar as a number that both of Lightning's bars print outward; False where they have no place.

    Logged with `prog_bar=True` it would be printed to nearest, at three digits.
    """
    shown = getattr(trainer._logger_connector, "_progress_bar_metrics", None)
    if not isinstance(shown, dict):
        return False
    shown[name] = for_bar(value, "lower" if kind == "lower" else "upper")
    return True


def _is_dry_run(trainer: Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # pyright: ignore[reportAttributeAccessIssue] - set outside __init__
