"""CertifiedAccuracy: the share of validation samples whose class is proved on a ball around them, logged beside the loss."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from lipguard.bounds.robustness import Method, certify, one_box
from lipguard.callbacks.asked import Asked, named, number, on_failure_of, whole
from lipguard.callbacks.base import Callback
from lipguard.callbacks.example import described
from lipguard.capture.capture import network_of
from lipguard.certificate import Box
from lipguard.errors import InvalidDomain, InvalidExample, UnknownName
from lipguard.query import Inputs, Norm, Outputs

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["CertifiedAccuracy"]

_LOGGER = logging.getLogger("lipguard.callbacks")

_CHUNK = 16
"""Samples between two looks at the clock."""


class CertifiedAccuracy(Callback):
    """Logs the certified accuracy on the validation or test set: correct samples that keep their class on a whole 2-norm ball.

    Logged at the end of validation, and of `trainer.test`: `{prefix}/certified_accuracy@{eps}` for each radius, a lower bound of
    the accuracy under every attack of that size on the samples treated; `{prefix}/certified_samples`, their number; and
    `{prefix}/certified_seconds`. The samples are the first of the validation set; where the time ends before they do, the
    share is that of the samples done, and the log says so. With several processes each certifies its own samples.

    The weights, the modes and the state of every random generator are left as they were. A failure is warned of once.

    Args:
        eps: radius, or several, in the units of the network's input.
        method: as for `lipguard.certify`: "local", "global" or "spectral".
        box: all possible inputs, [0, 1] for images.
        every_n_epochs: certify in the validation of every n-th epoch.
        max_samples: samples at most, of each process.
        seconds: time budget of one validation.
        submodule: dotted name of the part that maps samples to logits; None for the module's `forward`.
        select: from a batch to (samples, labels); None takes the first two tensors of a sequence, and of a mapping the tensor
            that `forward` takes and the first whole numbers, one for each sample.
        prefix: first part of the names logged.
        on_failure: "warn" (once), "ignore" or "raise".
        norm: 2, the norm of the balls; others are refused.
        domain: the same as `box`, or text such as "box:0,1".
        outputs: which of several tensors are the logits, as for `lipguard.certify`.
        inputs: of which of several tensors the samples are; the others are held at the example's values.
        example: an input of the module, where that is more than a sample; None takes its `example_input_array`.

    Raises:
        LipguardError: an argument that no module could make valid; the message says which, and what to write.

    Example::

        trainer = Trainer(callbacks=[CertifiedAccuracy(eps=(0.1, 0.25), box=lg.Box(0.0, 1.0))])
    """

    def __init__(
        self,
        eps: float | Sequence[float] = 0.1,
        method: Method = "local",
        box: Box | None = None,
        every_n_epochs: int = 1,
        max_samples: int = 256,
        seconds: float = 10.0,
        submodule: str | None = None,
        select: Callable[[Any], tuple[Tensor, Tensor]] | None = None,
        prefix: str = "lipschitz",
        on_failure: Literal["warn", "raise", "ignore"] = "warn",
        norm: Norm = 2,
        domain: Box | str | dict[str, Any] | None = None,
        outputs: Outputs | list[Any] | None = None,
        inputs: Inputs | list[Any] | None = None,
        example: Any = None,
    ) -> None:
        super().__init__()
        who = "CertifiedAccuracy"
        with named(who):
            domain = one_box(norm, domain, box)
        self.asked = Asked(who, norm=norm, domain=domain, submodule=submodule, outputs=outputs, inputs=inputs, example=example)
        self.eps = tuple(sorted(eps)) if isinstance(eps, Sequence) else (eps,)
        if not self.eps or not all(0 < one < math.inf for one in self.eps):
            raise InvalidDomain(f"CertifiedAccuracy: eps={eps!r} must be a positive radius, or several.")
        if method not in get_args(Method):
            raise UnknownName(f"CertifiedAccuracy: method={method!r}; there are {', '.join(get_args(Method))}.")
        whole(who, every_n_epochs=every_n_epochs, max_samples=max_samples)
        number(who, "a positive number of seconds", lambda value: value > 0, seconds=seconds)
        self.method: Method = method
        self.box, self.every_n_epochs, self.max_samples, self.seconds = domain, every_n_epochs, max_samples, seconds
        self.select, self.prefix, self.on_failure = select, prefix, on_failure_of(who, on_failure)
        self._samples: list[tuple[Tensor, Tensor]] = []
        self._warned = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses a submodule that the module does not have.

        Raises:
            UnknownName: there is no such submodule.
        """
        self.asked.check(pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets the samples of an earlier validation."""
        self._samples = []

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keeps the first samples of the first validation set."""
        missing = self.max_samples - sum(len(x) for x, _ in self._samples)
        if missing <= 0 or dataloader_idx != 0 or not self._due(trainer):
            return
        try:
            x, y = self._pair(pl_module, batch) if self.select is None else self.select(batch)
            self._samples.append((x[:missing].detach().clone(), y[:missing].detach().clone()))
        except Exception as error:
            self._fail(error)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Certifies the samples kept and logs the shares."""
        if not self._due(trainer):
            return
        samples, self._samples = self._samples, []
        try:
            with torch.inference_mode(False), torch.no_grad():
                values, count = self._certified(pl_module, samples)
        except Exception as error:  # a training of days must survive any trouble of its gauge
            self._fail(error)
            values, count = {}, 0
        if trainer.world_size > 1:
            # Every process must log the same names: where one has nothing to log, none has.
            least = trainer.strategy.reduce(torch.tensor(float(count), device=pl_module.device), reduce_op="min")
            values = values if float(least) > 0 else {}
        for name, value in values.items():
            pl_module.log(
                f"{self.prefix}/{name}", value, on_epoch=True, sync_dist=trainer.world_size > 1, batch_size=max(1, count)
            )

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def _pair(self, pl_module: LightningModule, batch: Any) -> tuple[Tensor, Tensor]:
        """Samples and labels: the first two tensors of a sequence; of a mapping what forward takes, and whole numbers."""
        if not isinstance(batch, Mapping):
            return _first_two(batch)
        x, y = self.asked.of_batch(pl_module, batch)
        if x is None or y is None:
            raise InvalidExample(f"a validation batch of {described(batch)} holds no samples with labels. Give select=...")
        return x, y

    def _due(self, trainer: Trainer) -> bool:
        if trainer.sanity_checking or trainer.barebones:
            return False
        return trainer.state.fn != "fit" or (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def _certified(self, pl_module: LightningModule, samples: list[tuple[Tensor, Tensor]]) -> tuple[dict[str, float], int]:
        """Values to log, and over how many samples."""
        if not samples:
            return {}, 0
        began = time.perf_counter()
        x, y = (torch.cat([part.clone() for part in column]) for column in zip(*samples, strict=True))
        # The samples are the example, unless the module takes more than they hold.
        query = replace(self.asked.query, example=x[:1])
        if self.asked.query.example is not None or query.inputs is not None:
            query = self.asked.at(pl_module.trainer, pl_module)
        network = network_of(pl_module, query)
        step = _CHUNK if self.method == "local" else len(x)
        held, done = dict.fromkeys(self.eps, 0), 0
        for start in range(0, len(x), step):
            remaining = self.seconds - (time.perf_counter() - began)
            if remaining <= 0:
                break
            part = slice(start, start + step)
            found = self._chunk(network, x[part], y[part], remaining)
            if found is None:
                break
            done += len(x[part])
            for eps, count in found.items():
                held[eps] += count
        if not done:
            raise TimeoutError(f"no sample could be certified in {self.seconds:g} s; raise `seconds` or take method='spectral'.")
        if done < len(x):
            _LOGGER.info("certified accuracy: the time of %g s sufficed for %d of %d samples", self.seconds, done, len(x))
        values = {f"certified_accuracy@{eps:g}": count / done for eps, count in held.items()}
        return values | {"certified_samples": float(done), "certified_seconds": time.perf_counter() - began}, done

    def _chunk(self, network: Any, x: Tensor, y: Tensor, remaining: float) -> dict[float, int] | None:
        """How many samples are certified at each radius; None where the time ended in between."""
        deadline = time.perf_counter() + remaining
        if self.method != "local":
            result = certify(network, x, y, self.eps[0], method=self.method, time_limit=remaining)
            return {eps: int((result.radius >= eps).sum()) for eps in self.eps}
        held: dict[float, int] = {}
        left = torch.ones(len(x), dtype=torch.bool, device=x.device)
        for eps in self.eps:  # from the smallest: what fails at one radius fails at every larger one
            held[eps] = 0
            if not bool(left.any()):
                continue
            limit = deadline - time.perf_counter()
            result = certify(network, x[left], y[left], eps, box=self.box, radii=False, time_limit=max(limit, 0.0))
            if not bool(result.complete.all()):
                return None
            left[left.clone()] = result.certified.to(left.device)
            held[eps] = int(left.sum())
        return held

    def _fail(self, error: Exception) -> None:
        if self.on_failure == "raise":
            raise error
        if self.on_failure == "warn" and not self._warned:
            self._warned = True
            warnings.warn(f"CertifiedAccuracy logged nothing: {type(error).__name__}: {error} Training goes on.", stacklevel=3)


def _first_two(batch: Any) -> tuple[Tensor, Tensor]:
    tensors = [part for part in batch if isinstance(part, Tensor)] if isinstance(batch, (tuple, list)) else []
    if len(tensors) < 2:
        raise InvalidExample(
            f"a validation batch of type {type(batch).__name__} is no pair (samples, labels). Give CertifiedAccuracy(select=...)."
        )
    return tensors[0], tensors[1]
