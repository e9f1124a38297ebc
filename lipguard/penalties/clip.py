"""`clip`: the steepest of a set of pairs of inputs that is made steeper from step to step: a lower estimate, never a bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lipguard.capture.selection import selected
from lipguard.errors import InvalidExample, UnknownName, UnsupportedQuery
from lipguard.network import Network
from lipguard.penalties.base import Penalty
from lipguard.query import Inputs, Outputs

_GROWTH = 1.3
"""Factor of a pair's step length after an accepted or a rejected step."""

_SPREAD = 0.1
"""New partners are v = u + _SPREAD U[0, 1)."""

Function = Callable[[Tensor], Tensor]


def quotients(function: Function, u: Tensor, v: Tensor) -> Tensor:
    """q(u, v) = ||f(u) - f(v)||^2 / ||u - v||^2 of every pair, (B,); 0 where u = v."""
    values = function(torch.cat([u, v])).flatten(1)
    rise = (values[: len(u)] - values[len(u) :]).square().sum(1)
    distance = (u - v).flatten(1).square().sum(1)
    tiny = torch.finfo(distance.dtype).tiny
    return torch.where(distance > tiny, rise / distance.clamp_min(tiny), torch.zeros_like(rise))


def clip(function: Function, u: Tensor, v: Tensor) -> Tensor:
    """max q over pairs of inputs, attached to the function's weights; the pairs are detached.

    Args:
        function: the module, in the mode in which it is meant.
        u, v: (B, ...) each.
    Source: Bungert, Raab, Roith, Schwinn, Tenbrinck 2021, arXiv:2103.12531.
    """
    return quotients(function, u.detach(), v.detach()).amax()


def ascend(function: Function, u: Tensor, v: Tensor, tau: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient ascent of q in both ends of every pair, each with its own step length, accepted only where q rises.

    Args:
        function: of a batch.
        u, v: (B, ...) each.
        tau: step lengths, (B,).
        steps: tries of every pair.
    Returns:
        The new pairs and step lengths.
    """
    u, v = u.detach(), v.detach()
    shape = (-1, *[1] * (u.ndim - 1))
    for _ in range(steps):
        with torch.enable_grad():
            a, b = u.clone().requires_grad_(), v.clone().requires_grad_()
            before = quotients(function, a, b)
            down, up = torch.autograd.grad(before.sum(), (a, b))
        with torch.no_grad():
            length = tau.reshape(shape)
            a, b = u + length * down, v + length * up
            after = quotients(function, a, b)
            rises = (after > before) & after.isfinite()
            accepted = rises.reshape(shape)
            u, v = torch.where(accepted, a, u), torch.where(accepted, b, v)
            tau = torch.where(rises, tau * _GROWTH, tau / _GROWTH)
    return u, v, tau


class CLIP(Penalty):
    """`clip` with its set of adversarial pairs.

    The pairs are drawn around the first batch, made steeper at every call, and drawn anew now and then. The module runs in
    evaluation mode: running statistics stay as they are and nothing is dropped.

    Args:
        model: the module.
        example: not needed; the pairs are drawn around the inputs of a call.
        submodule: dotted name of the part to penalise; the inputs are then that part's.
        pairs: size of the set; a smaller batch gives fewer.
        steps: ascent steps a call.
        redraw_every: calls after which the set is drawn anew; None for never.
        step: first step length.
        seed: of the pairs' own random numbers.
        outputs: what of the outputs, as for `lipguard.bound`; `inputs` is refused.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"inputs"})

    def __init__(
        self,
        model: nn.Module | Network,
        example: Tensor | None = None,
        submodule: str | None = None,
        pairs: int = 64,
        steps: int = 1,
        redraw_every: int | None = 100,
        step: float = 1.0,
        seed: int = 0,
        outputs: Outputs | None = None,
        inputs: Inputs | None = None,
    ) -> None:
        if pairs < 1 or steps < 0 or not step > 0 or (redraw_every is not None and redraw_every < 1):
            raise UnsupportedQuery(
                f"CLIP: pairs={pairs!r} and redraw_every={redraw_every!r} must be at least 1, steps={steps!r} at least 0, "
                f"step={step!r} positive."
            )
        if isinstance(model, Network):
            raise UnsupportedQuery("CLIP evaluates a module; it cannot be given a captured Network.")
        if inputs is not None:
            raise UnsupportedQuery(
                "CLIP evaluates the module on the batch's own inputs. Leave inputs out, or take the lipsdp penalty."
            )
        super().__init__(model, example, submodule, outputs, inputs)
        self.part = _part(model, submodule)
        self.pairs, self.steps, self.redraw_every, self.step = pairs, steps, redraw_every, step
        self.calls = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._set: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, inputs: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """max q over the set after its ascent.

        Raises:
            InvalidExample: no inputs are given when pairs must be drawn.
        """
        due = self._set is None or (self.redraw_every is not None and self.calls % self.redraw_every == 0)
        if due:
            if inputs is None:
                raise InvalidExample("the CLIP penalty draws its pairs around the batch's inputs: call penalty(inputs).")
            self._set = self._draw(inputs.detach())
        assert self._set is not None
        self.calls += 1
        with evaluating(self.part):
            self._set = ascend(self._function, *self._set, self.steps)
            return clip(self._function, *self._set[:2])

    def log_bound(self, value: float) -> float:
        """Logarithm of the constant estimated: half that of the quotient of squares."""
        return 0.5 * math.log(value) if value > 0 else -math.inf

    def _function(self, x: Tensor) -> Tensor:
        return selected(self.part(x), self.network.query.outputs, "the module")

    def _draw(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        chosen = torch.randperm(len(inputs), generator=self._generator)[: self.pairs]
        u = inputs[chosen.to(inputs.device)]
        noise = torch.rand(u.shape, generator=self._generator, dtype=torch.float64)
        return u, u + _SPREAD * noise.to(u), torch.full((len(u),), self.step, dtype=u.dtype, device=u.device)

    def state_dict(self) -> dict[str, Any]:
        """The pairs with their step lengths, and the random generator."""
        pairs = None if self._set is None else [t.cpu() for t in self._set]
        return {"calls": self.calls, "pairs": pairs, "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        self.calls = state["calls"]
        device = next((p.device for p in self.part.parameters()), torch.device("cpu"))
        self._set = None if state["pairs"] is None else tuple(t.to(device) for t in state["pairs"])  # type: ignore[assignment]
        self._generator.set_state(state["generator"].cpu())


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module's own mode afterwards."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode


def _part(model: nn.Module, submodule: str | None) -> nn.Module:
    if not submodule:
        return model
    try:
        return model.get_submodule(submodule)
    except AttributeError as error:
        known = ", ".join(name for name, _ in model.named_modules() if name)
        raise UnknownName(f"the model has no submodule {submodule!r}; it has {known or 'none'}.") from error
