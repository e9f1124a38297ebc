"""What the weight of a penalty is at each step: fixed, led by a target bound, or led by the training accuracy."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from lipguard.errors import UnsupportedQuery

_STEEP, _UNHURRIED = 5.0, 0.1
"""How much steeper the proportional part is farther than `near` below the target, and the share of its speed at which the ascent
moves before the target is reached."""

_ABOVE, _STRONGEST = 2.0, 4.0
"""Above the target: how much steeper the proportional part is, and its largest value: more would tear a network apart."""


class Controller(ABC):
    """The weight of a penalty, changed by what each step shows.

    Attributes:
        weight: for the next step.
    """

    weight: float

    @abstractmethod
    def update(self, log_bound: float, hits: float = 0.0, total: float = 0.0) -> None:
        """Take in one step.

        Args:
            log_bound: logarithm of the bound at the weights before the step.
            hits, total: samples of its batch that were classified right, and all.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs."""
        return {k: v for k, v in vars(self).items() if not k.startswith("_")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        vars(self).update(state)


@dataclass
class Fixed(Controller):
    """The same weight at every step."""

    weight: float

    def __post_init__(self) -> None:
        """Check the weight."""
        if not 0 <= self.weight < math.inf:
            raise UnsupportedQuery(f"weight={self.weight!r} must be a finite number >= 0.")

    def update(self, log_bound: float, hits: float = 0.0, total: float = 0.0) -> None:
        """Nothing changes."""


@dataclass
class Target(Controller):
    """Dual ascent on log bound - log target.

    The weight is the multiplier of the constraint log bound <= log target; it is kept positive by working on its logarithm,
    log weight = I + P(e) with e = log bound - log target. I moves by `rate` e a step: the ascent. P is about `gain` e, as of an
    augmented Lagrangian: it damps. Farther than `near` below the target it falls steeply, so that the weight vanishes.

    Against windup, I hardly moves before the bound has come to its target for the first time, and stands still while the weight
    is held at one of its limits; an e beyond `near` counts as `near`. The weight changes by no more than a factor e^`longest`
    a step.

    Attributes:
        target: the bound, > 0; approached from below and above.
        weight: of a bound at its target, before the ascent has moved it: of the size of the loss's change when the bound doubles.
        least, most: limits of the weight.
        saturated: steps in a row with the weight at its upper limit and the bound above the target and not falling.
    """

    target: float
    weight: float = 0.05
    gain: float = 10.0
    rate: float = 0.2
    near: float = 0.2
    longest: float = 0.5
    least: float = 1e-8
    most: float = 1e3
    integral: float = field(default=math.nan, init=False)
    started: bool = field(default=False, init=False)
    reached: bool = field(default=False, init=False)
    saturated: int = field(default=0, init=False)
    lowest: float = field(default=math.inf, init=False)

    def __post_init__(self) -> None:
        """Check the target."""
        if not 0 < self.target < math.inf:
            raise UnsupportedQuery(
                f"target={self.target!r} must be a finite number > 0: no network that learns has a Lipschitz bound of 0."
            )
        self.integral = math.log(self.weight)

    def update(self, log_bound: float, hits: float = 0.0, total: float = 0.0) -> None:
        """One step of the ascent."""
        if not math.isfinite(log_bound):
            return
        low, high = math.log(self.least), math.log(self.most)
        error = log_bound - math.log(self.target)
        damping = self._damping(error)
        wanted = self.integral + damping
        held = (wanted <= low and error < 0) or (wanted >= high and error > 0)
        self.reached = self.reached or error > 0
        if not held:
            # Far away the ascent goes on as if the bound were near.
            move = max(-self.near, min(error, self.near))
            if not self.reached:
                # On the way up, only as much as it takes to let a bound through that the weight holds back.
                move *= _UNHURRIED if error > -2 * self.near else 0.0
            self.integral = min(high, max(low, self.integral + self.rate * move))
        now = math.log(self.weight)
        change = min(high, max(low, self.integral + damping)) - now
        longest = self.longest if self.started else math.inf
        self.weight, self.started = math.exp(now + max(-longest, min(longest, change))), True
        falls = log_bound < self.lowest - 1e-3
        self.lowest = min(self.lowest, log_bound) if error > 0 else math.inf
        self.saturated = self.saturated + 1 if self.weight >= 0.99 * self.most and error > 0.05 and not falls else 0

    def _damping(self, error: float) -> float:
        if error > 0:
            return min(_ABOVE * self.gain * error, _STRONGEST)
        return self.gain * (error + _STEEP * min(error + self.near, 0.0))


@dataclass
class Discrepancy(Controller):
    """CLIP's rule: more regularisation while the training accuracy is above its goal, less while it is below.

    Attributes:
        goal: training accuracy to keep, in (0, 1).
        weight: first weight; the published rule starts at 0.
        step: added to, or taken from, the weight after every window.
        window: steps over which the accuracy is taken.

    Source: arXiv:2103.12531, Algorithm 2.
    """

    goal: float
    weight: float = 0.0
    step: float = 0.01
    window: int = 10
    hits: float = field(default=0.0, init=False)
    total: float = field(default=0.0, init=False)
    steps: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        """Check the goal."""
        if not 0 < self.goal < 1:
            raise UnsupportedQuery(f"goal_accuracy={self.goal!r} must lie between 0 and 1, such as 0.97.")
        if not self.step > 0 or self.window < 1:
            raise UnsupportedQuery(f"step={self.step!r} must be positive and window={self.window!r} at least 1.")

    def update(self, log_bound: float, hits: float = 0.0, total: float = 0.0) -> None:
        """Count, and change the weight at the end of a window."""
        self.hits, self.total, self.steps = self.hits + hits, self.total + total, self.steps + 1
        if self.steps >= self.window and self.total > 0:
            above = self.hits / self.total > self.goal
            self.weight = self.weight + self.step if above else max(self.weight - self.step, 0.0)
            self.hits, self.total, self.steps = 0.0, 0.0, 0
