"""Which demands leave a region no interior? A linear program proposes weights; `lipguard.verify.phases.flat` decides."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lipguard.solvers import highs
from lipguard.verify.domain.localized import Reduced
from lipguard.verify.phases.flat import is_flat
from lipguard.verify.phases.phase_form import PhaseForm
from lipguard.verify.phases.phases import Implied, piece_ends

THIN = 1e-9
"""A region whose demands can be met together with no more margin than this may have no interior."""

_NOISE = 1e-9


def flat_weights(form: PhaseForm, ranges: Implied, reduced: Reduced, k: int, part: int) -> Tensor | None:
    """Weights that prove that region k has no interior, read by `verify.phases.flat.is_flat`; None if none are found.

    The program maximises the least distance of an input of the domain from the demands that no free neuron enters.
    """
    n = form.neurons
    phases = ranges.phases[k]
    cut_low, cut_high = (e[0].numpy() for e in piece_ends(form, phases[None], slice(0, n)))
    p, height = reduced.p[k].numpy(), reduced.height[k].numpy()
    f = reduced.index.shape[1]
    known = (form.exact | form.conic).numpy()
    affine = known & ~(p[:, :f] != 0).any(1) & (np.abs(p[:, f:]).sum(1) > reduced.inner.spread[k].numpy().sum(1))
    below, above = np.flatnonzero(affine & np.isfinite(cut_low)), np.flatnonzero(affine & np.isfinite(cut_high))
    owners, signs = np.r_[below, above], np.r_[np.ones(len(below)), -np.ones(len(above))]
    if not len(owners):
        return None
    gradient = signs[:, None] * p[owners, f:]
    room = np.r_[height[below] - cut_low[below], cut_high[above] - height[above]]
    length = np.linalg.norm(gradient, axis=1)
    lower, upper = form.lower[part].numpy(), form.upper[part].numpy()
    single = _touching(form, gradient, room, lower, upper)
    if single is not None:
        weights = torch.zeros(n, dtype=torch.float64)
        weights[owners[single]] = signs[single]
        if is_flat(form, phases, weights, part):
            return weights
    d = gradient.shape[1]
    rows, right = np.concatenate([-gradient, length[:, None]], 1), room
    if form.ball_norm == 1.0 and np.isfinite(form.radius):
        # |x - center| <= s, sum s <= radius.
        eye, none = np.eye(d), np.zeros((d, 1))
        around = np.block([[eye, none, -eye], [-eye, none, -eye], [np.zeros((1, d + 1)), np.ones((1, d))]])
        rows = np.concatenate([np.pad(rows, ((0, 0), (0, d))), around])
        right = np.r_[room, form.center.numpy(), -form.center.numpy(), form.radius]
        lower, upper = lower - 1.0, upper + 1.0  # implied: they must not become active
    extra = rows.shape[1] - d - 1
    objective = np.r_[np.zeros(d), 1.0, np.zeros(extra)]
    low, high = np.r_[lower, -np.inf, np.zeros(extra)], np.r_[upper, 1.0, np.full(extra, np.inf)]
    result = highs.maximise(objective, rows, right, low, high)
    if not result.optimal or result.value > THIN:
        return None
    dual = np.maximum(result.duals[: len(owners)], 0)
    kept = dual * length > _NOISE * (dual * length).max(initial=0.0)
    weights = torch.zeros(n, dtype=torch.float64)
    weights[owners[kept]] = torch.from_numpy(signs[kept] * dual[kept])
    return weights if is_flat(form, phases, weights, part) else None


def _touching(form: PhaseForm, gradient: np.ndarray, room: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> int | None:
    """A demand that the domain meets with no margin, if there is one."""
    if np.isfinite(form.radius) and form.ball_norm != np.inf:
        dual = {1.0: np.inf, 2.0: 2.0}[form.ball_norm]
        top = gradient @ form.center.numpy() + form.radius * np.linalg.norm(gradient, dual, axis=1) + room
    else:
        top = np.maximum(gradient * lower, gradient * upper).sum(1) + room
    best = int(np.argmin(top / np.linalg.norm(gradient, axis=1)))
    return best if top[best] <= THIN * np.linalg.norm(gradient[best]) else None
