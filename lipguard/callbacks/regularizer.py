"""LipschitzRegularizer: a penalty's gradient beside the loss's, with a weight that is fixed or led by a target."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lipguard.callbacks.asked import Asked, number, on_failure_of, overlap, part_name
from lipguard.callbacks.base import Callback
from lipguard.callbacks.checkpoint_saves import bypassed
from lipguard.callbacks.example import described
from lipguard.callbacks.penalty_options import check_goal, penalty_options
from lipguard.capture.selection import selected
from lipguard.certificate import Ball, Box
from lipguard.errors import InvalidExample, LipguardError, UnsupportedQuery
from lipguard.outward import narrowed
from lipguard.penalties import NAMES, Penalty, build
from lipguard.penalties.clip import evaluating
from lipguard.penalties.control import Controller, Discrepancy, Fixed, Target
from lipguard.penalties.gauge import Gauge, check_target, check_trial
from lipguard.query import Inputs, Norm, Outputs, Query

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["LipschitzRegularizer"]

_STUCK = 100
"""Steps with the largest weight and a bound that does not fall after which a target is said to be out of reach."""

Unpack = Callable[[Any], tuple[Tensor | None, Tensor | None]]


class LipschitzRegularizer(Callback):
    """Adds the gradient of a Lipschitz penalty to that of the loss before every optimizer step.

    `training_step` stays as it is. The gradient is added after a mixed-precision scaler has unscaled the loss's and before
    clipping, once for every real optimizer step, whatever `accumulate_grad_batches` is; with several optimizers each
    gets the part of its own parameters. Give exactly one of `weight`, `target` and `goal_accuracy`.

    With `target` the weight follows log bound - log target, where the bound is the verified LipSDP bound: it is proved after
    every epoch, and in between carried on by multipliers that follow the weights. For "local" and "lipsdp-local" it is
    the penalty's own local bound, which is not proved here. A target is a limit: a network whose bound stays below it by
    itself is left alone. Give training the time to come there: some hundred steps.

    Logged: `{prefix}/weight`, `{prefix}/penalty`, `{prefix}/failed` (steps without a penalty because it failed) and, with
    `target`, `{prefix}/proved`, the bound of the last proof, and `{prefix}/estimate`, what is carried on from it to the step:
    no bound, but what the weight follows.

    Args:
        penalty: "lipsdp", "lipsdp-local", "spectral", "toeplitz", "local", "certified", "clip", or a function that
            builds a `lipguard.penalties.Penalty` from (module, example, submodule).
        weight: fixed weight of the penalty.
        target: bound to lead to.
        goal_accuracy: training accuracy to keep (CLIP's rule): the weight grows while the accuracy is above it.
        options: further arguments of the penalty, such as {"domain": Box(0, 1)} or {"radius": 0.1}.
        controller: further arguments of the rule for the weight: those of `lipguard.penalties.control.Target` or `Discrepancy`.
        warmup_steps: optimizer steps at the beginning during which the weight is 0.
        submodule: dotted name of the part to regularise; None for the whole module's `forward`.
        example: an input of the network; None takes the module's `example_input_array`, or else what
            `forward` takes of the first training batch.
            A tuple or a mapping of tensors, where it takes several.
        unpack: batch -> (inputs, labels), for penalties that need them; None takes the tensor that was found to be the input,
            else the first of floating point, and the first integer tensor of the same length.
        prefix: first part of the names logged.
        on_failure: "warn" (once), "ignore" or "raise" when a penalty fails in a step; the step is then taken without it.
        outputs, inputs: what of the outputs, and with respect to what, as for `lipguard.bound`: outputs="policy.logits" for one
            of several tensors that the network returns.
        norm: 2, as the penalties bound the constant in the 2-norm; others are refused.
        domain: a `Box` or a `Ball` of inputs, or text such as "box:0,1", for the penalty "lipsdp-local".

    Wrong settings raise before the first step: a penalty that cannot be computed for the module, a target that no weights
    can reach, labels that are missing, a second regularizer of the same module.

    Example::

        trainer = Trainer(callbacks=[LipschitzRegularizer(target=10.0), LipschitzMonitor()])
    """

    def __init__(
        self,
        penalty: str | Callable[..., Penalty] = "lipsdp",
        weight: float | None = None,
        target: float | None = None,
        goal_accuracy: float | None = None,
        options: dict[str, Any] | None = None,
        controller: dict[str, Any] | None = None,
        warmup_steps: int = 0,
        submodule: str | None = None,
        example: Any = None,
        unpack: Unpack | None = None,
        prefix: str = "lipschitz/reg",
        on_failure: Literal["warn", "raise", "ignore"] = "warn",
        outputs: Outputs | list[Any] | None = None,
        inputs: Inputs | list[Any] | None = None,
        norm: Norm = 2,
        domain: Box | Ball | str | dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        who = "LipschitzRegularizer"
        self.asked = Asked(who, norm=norm, domain=domain, submodule=submodule, outputs=outputs, inputs=inputs, example=example)
        given = {"weight": weight, "target": target, "goal_accuracy": goal_accuracy}
        chosen = [name for name, value in given.items() if value is not None]
        if len(chosen) != 1:
            raise UnsupportedQuery(
                "LipschitzRegularizer: give exactly one of weight, target and goal_accuracy, "
                f"not {' and '.join(chosen) or 'none'}."
            )
        if isinstance(penalty, str) and penalty.replace("_", "-") not in NAMES:
            raise UnsupportedQuery(f"LipschitzRegularizer: penalty={penalty!r} is unknown. There are: {', '.join(NAMES)}.")
        number(who, "a whole number, at least 0", lambda value: value >= 0 and value == int(value), warmup_steps=warmup_steps)
        if target is not None and penalty == "certified":
            raise UnsupportedQuery("LipschitzRegularizer: the certified penalty stands for no bound and cannot lead to a target.")
        rule: dict[str, Callable[..., Controller]] = {"weight": Fixed, "target": Target, "goal_accuracy": Discrepancy}
        try:
            self.controller = rule[chosen[0]](given[chosen[0]], **(controller or {}))
        except TypeError as error:
            raise UnsupportedQuery(f"LipschitzRegularizer: controller={controller!r}: {error}.") from error
        self.penalty, self.options = penalty, penalty_options(penalty, dict(options or {}), self.asked.query)
        check_goal(goal_accuracy, self.asked.query)
        self.target, self.goal_accuracy = target, goal_accuracy
        self.warmup_steps, self.submodule, self.unpack = warmup_steps, submodule, unpack
        self.prefix, self.on_failure = prefix, on_failure_of(who, on_failure)
        self.steps, self.failed = 0, 0
        self._penalty: Penalty | None = None
        self._gauge: Gauge | None = None
        self._module: LightningModule | None = None
        self._saved: dict[str, Any] | None = None
        self._batch: Any = None
        self._values: dict[str, float] = {}
        self._warned: set[str] = set()
        self._tried = False

    @property
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint: two regularizers of one prefix would mix their values and are refused."""
        return self._generate_state_key(prefix=self.prefix)

    @property
    def weight(self) -> float:
        """Weight of the penalty in the next step."""
        return 0.0 if self.steps < self.warmup_steps else self.controller.weight

    def state_dict(self) -> dict[str, Any]:
        """The weight's and the penalty's state: a resumed training takes the same steps."""
        if self._penalty is None and self._saved is not None:
            return self._saved
        return {
            "steps": self.steps,
            "failed": self.failed,
            "controller": self.controller.state_dict(),
            "penalty": None if self._penalty is None else self._penalty.state_dict(),
            "gauge": None if self._gauge is None else self._gauge.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores `state_dict`; the penalty takes its part up when training starts."""
        self.steps, self.failed = state_dict["steps"], state_dict["failed"]
        self.controller.load_state_dict(state_dict["controller"])
        self._penalty, self._gauge, self._module, self._saved = None, None, None, state_dict

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses what cannot work.

        Raises:
            UnsupportedQuery: two regularizers of one module, or a strategy that shards it.
        """
        if stage != "fit":
            return
        sharding = bypassed(trainer)
        if sharding is not None:
            raise UnsupportedQuery(f"LipschitzRegularizer: {sharding} shards the network, so that no rank can regularise it.")
        callbacks: list[object] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue] - set outside __init__
        for other in callbacks:
            if isinstance(other, LipschitzRegularizer) and other is not self and overlap(self.submodule, other.submodule):
                raise UnsupportedQuery(
                    f"two LipschitzRegularizers act on {part_name(self.submodule)} and {part_name(other.submodule)}: their "
                    "weights would work against each other. Keep one, or give each a submodule of its own."
                )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses a submodule that the module does not have.

        Raises:
            UnknownName: there is no such submodule.
        """
        self.asked.check(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Builds the penalty, if an example is at hand, and tries it once."""
        self._tried = False
        if self._module is not pl_module:
            self._penalty, self._gauge, self._module = None, None, pl_module
            self.asked.forget()
        if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in trainer.optimizers):
            raise UnsupportedQuery(
                "LipschitzRegularizer: LBFGS judges its steps by the loss that training_step returns, which lacks the penalty. "
                "Add lipguard.penalties to the loss by hand, or use another optimizer."
            )
        query = self.asked.find(trainer, pl_module)
        if self._penalty is None and query is not None:
            self._build(trainer, pl_module, query)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keeps the batch for penalties that need it, and builds the penalty if no other example was at hand."""
        self._batch = batch
        if self._penalty is None:
            self.asked.see(pl_module, batch)
            self._build(trainer, pl_module, self.asked.at(trainer, pl_module))
        if not self._tried:
            self._tried = True
            self._try_batch(pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Adds weight times the penalty's gradient to the gradients of this optimizer's parameters."""
        own = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        # A step whose training_step returned None has no gradients, and an optimizer of another part none of these.
        if self._penalty is None or not any(p.grad is not None for p in own):
            return
        part = {id(p) for p in self._part(pl_module).parameters()}
        parameters = [p for p in own if id(p) in part]
        if not parameters:
            return
        error: Exception | None = None
        value, hits, total = math.nan, 0.0, 0.0
        gradients: list[Tensor] = []
        log_bound = math.nan
        try:
            value, gradients = self._differentiate(pl_module, parameters)
            log_bound = self._penalty.log_bound(value)
            if self._gauge is not None:
                log_bound = self._gauge.corrected(log_bound)
            if self.goal_accuracy is not None:
                hits, total = self._accuracy(pl_module)
        except Exception as failure:  # a training of days must survive any trouble of its penalty, LAPACK's included
            error = failure
        if trainer.world_size > 1:
            error, (value, log_bound, hits, total) = self._together(trainer, error, gradients, (value, log_bound, hits, total))
        if error is not None:
            self._fail(error)
            return
        if self.steps >= self.warmup_steps:
            self.controller.update(log_bound, hits, total)
        weight = self.weight
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if weight == 0:
                break
            if parameter.grad is None:
                parameter.grad = (weight * gradient).to(parameter.dtype)
            else:
                parameter.grad.add_(gradient.to(parameter.grad.dtype), alpha=weight)
        self._values = {"weight": weight, "penalty": value, "failed": float(self.failed)}
        if self.target is not None:
            self._values["estimate"] = math.exp(min(log_bound, 700.0))
            if self._gauge is not None and math.isfinite(self._gauge.proved):
                self._values["proved"] = float(narrowed(self._gauge.proved, "upper"))
        self.steps += 1
        if isinstance(self.controller, Target) and self.controller.saturated >= _STUCK:
            self._warn_stuck(self._values["estimate"])

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Logs what the last step used."""
        self._batch = None
        # A call of `log` costs as much as a small network's step: only where a logger takes the value, and at an epoch's end.
        due = trainer._logger_connector.should_update_logs or trainer.is_last_batch
        for name, value in self._values.items():
            if due and not trainer.barebones:
                pl_module.log(f"{self.prefix}/{name}", torch.tensor(value, dtype=torch.float64), batch_size=1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Has the bound that the target is compared with proved at the next step."""
        if self._gauge is not None:
            self._gauge.due = self._gauge.proves

    def _build(self, trainer: Trainer, pl_module: LightningModule, query: Query) -> None:
        trial = self._make(pl_module, query)
        if not trial.needs:
            self._check(trainer, pl_module, trial)
        self._penalty = self._make(pl_module, query)
        if self.target is not None:
            self._gauge = Gauge(self._penalty, pl_module, query)
            if self._saved is None:
                check_target(self._penalty.network(), part_name(self.submodule), self.target)
        if self._saved is not None:
            if self._saved["penalty"] is not None:
                self._penalty.load_state_dict(self._saved["penalty"])
            if self._gauge is not None and self._saved["gauge"] is not None:
                self._gauge.load_state_dict(self._saved["gauge"])
            self._saved = None

    def _make(self, pl_module: LightningModule, query: Query) -> Penalty:
        given = {"outputs": query.outputs, "inputs": query.inputs}
        options = self.options | {name: value for name, value in given.items() if value is not None}
        if isinstance(self.penalty, str):
            return build(self.penalty, pl_module, query.example, query.submodule, **options)
        return self.penalty(pl_module, query.example, query.submodule, **options)

    def _check(self, trainer: Trainer, pl_module: LightningModule, trial: Penalty) -> None:
        trained = {id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
        own = [p for p in self._part(pl_module).parameters() if p.requires_grad and id(p) in trained]
        check_trial(trial, own, part_name(self.submodule), self.target)

    def _try_batch(self, pl_module: LightningModule) -> None:
        """The first batch must have what the penalty and the rule need."""
        assert self._penalty is not None
        needs = self._penalty.needs | ({"inputs", "labels"} if self.goal_accuracy is not None else frozenset())
        if not needs:
            return
        inputs, labels = self._unpacked()
        for what, tensor in (("inputs", inputs), ("labels", labels)):
            if what in needs and tensor is None:
                kind = "floating-point" if what == "inputs" else "integer"
                rule = f"the {self.penalty} penalty" if what in self._penalty.needs else "goal_accuracy"
                raise InvalidExample(
                    f"LipschitzRegularizer: {rule} needs the batch's {what}, and the batch ({described(self._batch)}) "
                    f"holds no {kind} tensor of that kind. Give LipschitzRegularizer(unpack=lambda batch: (inputs, labels))."
                )
        if self._penalty.needs:
            # A trial of its own, so that this one's state does not move.
            trial = self._make(pl_module, replace(self.asked.query, example=self._example_of(inputs)))
            with torch.inference_mode(False), torch.enable_grad():
                trial(inputs, labels)

    def _example_of(self, inputs: Tensor | None) -> Any:
        assert self._penalty is not None
        example = self._penalty.network.example
        if example is None:
            assert inputs is not None
            return inputs[:1]
        return example

    def _part(self, pl_module: LightningModule) -> torch.nn.Module:
        return pl_module.get_submodule(self.submodule) if self.submodule else pl_module

    def _unpacked(self) -> tuple[Tensor | None, Tensor | None]:
        if self.unpack is not None:
            return self.unpack(self._batch)
        return self.asked.unpacked(self._batch)

    def _differentiate(self, pl_module: LightningModule, parameters: list[torch.nn.Parameter]) -> tuple[float, list[Tensor]]:
        assert self._penalty is not None
        inputs, labels = self._unpacked() if self._penalty.needs else (None, None)
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(pl_module.device.type, enabled=False):
            value = self._penalty(inputs, labels)
            found = torch.autograd.grad(value, parameters, allow_unused=True)
        gradients = [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]
        number = float(value.detach())
        total = torch.stack([g.detach().abs().sum().double() for g in gradients]).sum()
        if not (math.isfinite(number) and bool(total.isfinite())):
            raise LipguardError(f"the penalty is {number:g} and its gradient has size {float(total):g}.")
        return number, gradients

    def _accuracy(self, pl_module: LightningModule) -> tuple[float, float]:
        inputs, labels = self._unpacked()
        assert inputs is not None and labels is not None
        part = self._part(pl_module)
        with evaluating(part), torch.no_grad():
            logits = selected(part(inputs), self.asked.query.outputs, part_name(self.submodule))
            return float((logits.argmax(1) == labels).sum()), float(len(labels))

    def _together(
        self, trainer: Trainer, error: Exception | None, gradients: list[Tensor], numbers: tuple[float, ...]
    ) -> tuple[Exception | None, tuple[float, ...]]:
        """The mean over the ranks, which then hold the same numbers; a failure on one is one on all."""
        if not trainer.strategy.reduce_boolean_decision(error is None, all=True):
            return error or LipguardError("the penalty failed on another rank."), numbers
        shared = torch.tensor(numbers, dtype=torch.float64, device=gradients[0].device)
        for tensor in (shared, *gradients):
            torch.distributed.all_reduce(tensor)
            tensor /= trainer.world_size
        return None, tuple(shared.tolist())

    def _fail(self, error: Exception) -> None:
        self.failed += 1
        if self.on_failure == "raise":
            raise error
        if self.on_failure == "warn" and "failed" not in self._warned:
            self._warned.add("failed")
            warnings.warn(
                f"LipschitzRegularizer: {type(error).__name__}: {str(error).rstrip('.')}. Training goes on, "
                f"such steps without the penalty; {self.prefix}/failed counts them.",
                stacklevel=3,
            )

    def _warn_stuck(self, estimate: float) -> None:
        if "stuck" not in self._warned:
            self._warned.add("stuck")
            warnings.warn(
                f"LipschitzRegularizer: target={self.target:g} seems out of reach: for {_STUCK} steps the weight has stood at "
                f"its largest, {self.controller.weight:g}, and the estimate of the bound does not fall below {estimate:.6g}. "
                "Ask for a larger target, or look for layers that are frozen or normalised.",
                stacklevel=3,
            )
