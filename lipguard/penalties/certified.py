"""Losses for certified training: cross-entropy on the worst logits that a bound leaves possible on a ball."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipguard.errors import InvalidExample, UnsupportedQuery
from lipguard.network import Dense, Network
from lipguard.penalties.intervals import through
from lipguard.penalties.local import Local, LocalBounds, layers
from lipguard.penalties.norms import operator_norm
from lipguard.query import Inputs, Outputs

Form = Literal["worst", "extra"]


def worst_logits(logits: Tensor, labels: Tensor, growth: Tensor) -> Tensor:
    """Logits relative to the label's as they could become: z_j + growth_j for j != y, and z_y itself.

    Args:
        logits: (B, m).
        labels: (B,), int64.
        growth: how much z_j - z_y can grow on the ball, (B, m); entry y is not read.
    """
    own = functional.one_hot(labels, logits.shape[1]).bool()
    return logits + torch.where(own, torch.zeros_like(growth), growth)


def pair_bounds(last: Tensor, constant: Tensor) -> Tensor:
    """K_ij = ||w_i - w_j|| times the constant of everything before the last layer, (..., m, m).

    Args:
        last: weight of the last layer, (m, n).
        constant: 0-d, or one for each sample, (B,).
    """
    square = (last[:, None] - last[None]).square().sum(-1)
    distance = torch.where(square > 0, square, torch.ones_like(square)).sqrt() * (square > 0)
    return constant[..., None, None] * distance


def certified_cross_entropy(logits: Tensor, labels: Tensor, growth: Tensor, form: Form = "worst") -> Tensor:
    """Cross-entropy of what a bound leaves possible on the ball.

    Args:
        logits: (B, m).
        labels: (B,), int64.
        growth: how much z_j - z_i can grow on the ball, (B, m, m) at [b, i, j], as eps * `pair_bounds`; or how much z_j - z_y
            can, (B, m), for the form "worst".
        form: "worst": on the worst logits (Huang et al. 2021, arXiv:2111.01395). "extra": on the logits with one
            class more, max_{j != c} (z_j + growth_cj) for the predicted class c, so that a sample is right where the
            label is predicted by a margin that the ball cannot undo (GloRo: Leino et al. 2021, arXiv:2102.08452).
    Raises:
        UnsupportedQuery: an unknown form, or "extra" without pairs.
    """
    if form not in ("worst", "extra"):
        raise UnsupportedQuery(f"form={form!r} must be 'worst' or 'extra'.")
    rows = torch.arange(len(logits), device=logits.device)
    if form == "worst":
        return functional.cross_entropy(
            worst_logits(logits, labels, growth[rows, labels] if growth.ndim == 3 else growth), labels
        )
    if growth.ndim != 3:
        raise UnsupportedQuery("form='extra' needs the growth of every pair of classes, (B, m, m).")
    predicted = logits.detach().argmax(1)
    own = functional.one_hot(predicted, logits.shape[1]).bool()
    rivals = (logits + growth[rows, predicted]).masked_fill(own, -torch.inf)
    return functional.cross_entropy(torch.cat([logits, rivals.amax(1, keepdim=True)], 1), labels)


def local_growth(bounds: LocalBounds, radius: float) -> Tensor:
    """How much z_j - z_i can grow on the balls, (B, m, m) at [b, i, j]: by the ball in the last hidden layer and by its box.

    max over ||delta|| <= r and delta in the box of (w_j - w_i)'delta is at most the smaller of the two maxima.
    """
    last = bounds.last.operator.dense()
    ball = radius * pair_bounds(last, bounds.features)
    differences = last[None] - last[:, None]  # [i, j] = w_j - w_i
    m = last.shape[0]
    lower, upper = bounds.hidden
    lower, upper = bounds.hidden
    box = through(Dense(differences.reshape(m * m, -1)), None, (lower, upper))[1].reshape(-1, m, m)
    if bounds.last.bias is not None:
        box = box + (bounds.last.bias[None, :] - bounds.last.bias[:, None])
    margin = bounds.logits[:, None, :] - bounds.logits[:, :, None]
    return torch.minimum(ball, box - margin).clamp_min(0)


class Certified(Local):
    """Cross-entropy on the logits that a bound leaves possible on a ball: added to the usual loss, or in its place.

    With weight (1 - k) / k beside the cross-entropy this is k CE + (1 - k) CE(worst) up to the factor k.

    Args:
        model, example, submodule: as for every `Penalty`.
        radius: eps, in the 2-norm and the units of the network's input.
        bounds: "local" (each sample's own, `local`) or "global" (the product of the layers' norms).
        form: "worst" or "extra", as for `certified_cross_entropy`.
        iterations: power iterations a call.

    The norms approach from below: what is certified after training is for `lipguard`'s verified bounds to say.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"inputs", "labels"})

    def __init__(
        self,
        model: nn.Module | Network,
        example: Tensor | None = None,
        submodule: str | None = None,
        radius: float = 0.1,
        bounds: Literal["local", "global"] = "local",
        form: Form = "worst",
        iterations: int = 2,
        outputs: Outputs | None = None,
        inputs: Inputs | None = None,
    ) -> None:
        if bounds not in ("local", "global"):
            raise UnsupportedQuery(f"Certified: bounds={bounds!r} must be 'local' or 'global'.")
        if form not in ("worst", "extra"):
            raise UnsupportedQuery(f"Certified: form={form!r} must be 'worst' or 'extra'.")
        super().__init__(model, example, submodule, radius, iterations, outputs, inputs)
        self.kind = bounds
        self.form: Form = form

    def __call__(self, inputs: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """The cross-entropy.

        Raises:
            InvalidExample: inputs or labels are missing.
        """
        if labels is None:
            raise InvalidExample("the Certified penalty needs the batch's labels: call penalty(inputs, labels).")
        if self.kind == "local":
            found = self.bounds(inputs)
            return certified_cross_entropy(found.logits, labels, local_growth(found, self.radius), self.form)
        if inputs is None:
            raise InvalidExample("the Certified penalty needs the batch's inputs: call penalty(inputs, labels).")
        logits, growth = self._globally(inputs)
        return certified_cross_entropy(logits, labels, growth.expand(len(logits), -1, -1), self.form)

    def log_bound(self, value: float) -> float:
        """nan: a cross-entropy stands for no bound."""
        return float("nan")

    def _globally(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        network = self.network(native=True)
        steps = layers(network)
        z = inputs.detach().flatten(1).to(steps[0][0].operator.tensors()[0])
        constant = z.new_ones(())
        for k, (affine, activation) in enumerate(steps):
            z = affine.operator(z) if affine.bias is None else affine.operator(z) + affine.bias
            if activation is None:
                break
            norm, vector = operator_norm(affine.operator, self.vectors.get(k), self.iterations)
            if vector is not None:
                self.vectors[k] = vector
            alpha, beta = activation.function.slopes
            constant = constant * norm * torch.maximum(alpha.abs(), beta.abs()).amax()
            z = activation.function(z).to(z)
        return z, self.radius * pair_bounds(steps[-1][0].operator.dense(), constant).to(z)
