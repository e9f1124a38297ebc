"""Patterns that a point satisfies but no open region: found, and forbidden with as few neurons as possible.

Closed regions over-count where hyperplanes coincide or meet in more than general position: bias-free networks with 0
in the domain, tied or proportional neurons, faces of the domain touched. The Chebyshev-radius linear program of such
a pattern has radius 0. A subset of its inequalities already has none; those neurons, together with the earlier ones
that their rows depend on, can never be in these pieces at once, and one no-good cut says so.
"""

from __future__ import annotations

import numpy as np

from lipguard.exact.piecewise import Pattern, PiecewiseForm
from lipguard.exact.problem import Problem
from lipguard.exact.regions import Cell, cell, interior


def degenerate_subset(task: Problem, pattern: Pattern) -> list[int] | None:
    """Neurons whose pieces in `pattern` exclude an interior, as few as a deletion filter finds; None if there is one.

    The subset is closed under dependence: a pattern that agrees on it has no interior, whatever the others do.
    """
    form = task.form
    for until in range(1, len(form.layers) + 1):
        region = cell(form, pattern, until)
        found = interior(task.domain, region)
        if region.violated:
            return _with_ancestors(form, list(region.violated[:1]))
        if not found.exists:
            owners = found.support if len(found.support) and not _exists(task, region, found.support) else region.owners
            kept = list(dict.fromkeys(int(i) for i in owners))
            # Later layers first: a cut on early neurons alone forbids more.
            for i in sorted(kept, reverse=True):
                fewer = [j for j in kept if j != i]
                if fewer and not _exists(task, region, np.array(fewer)):
                    kept = fewer
            return _with_ancestors(form, kept)
    return None


def _exists(task: Problem, region: Cell, owners: Pattern) -> bool:
    keep = np.isin(region.owners, owners)
    return interior(task.domain, Cell(region.rows[keep], region.right[keep], region.owners[keep])).exists


def _with_ancestors(form: PiecewiseForm, neurons: list[int]) -> list[int]:
    """The neurons and all earlier ones that reach them through nonzero weights."""
    members = np.zeros(form.size, dtype=bool)
    members[neurons] = True
    for layer in reversed(form.layers):
        own = np.arange(layer.start, layer.stop)[members[layer]]
        members |= (form.b_matrix[own] != 0).any(axis=0)
    return np.flatnonzero(members).tolist()
