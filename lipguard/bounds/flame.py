"""The picture of an explanation: a horizontal flame graph."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

from lipguard.errors import UnsupportedQuery
from lipguard.outward import show_upper

if TYPE_CHECKING:
    from lipguard.bounds.explain import Explanation

__all__ = ["flame"]

_WIDTH, _ROW = 9.0, 0.55
"""Inches: of the figure, and of one row of bars."""

_CHARACTER = 0.0105
"""Width of a character of a label as a part of the axis, at the font size used."""


def flame(explanation: Explanation, path: str | os.PathLike[str] | None = None) -> Any:
    """Bars as wide as the shares: modules below, what they consist of above; the colour tells a layer's norm.

    A share below 0 (a layer whose norm is below 1, in a product) is drawn as wide as its size, and hatched.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise UnsupportedQuery('a picture needs matplotlib: pip install "lipguard[demo]".') from error
    rows = [row for row in explanation.rows if row.share and math.isfinite(row.share)]
    whole = sum(abs(row.share) for row in rows) or 1.0
    paths = [row.layer.split(".") if not row.layer.startswith("(") else [row.layer] for row in rows]
    depth = max(map(len, paths), default=1)
    figure = Figure(figsize=(_WIDTH, 1.7 + _ROW * (depth + 1)), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    norms = [row.norm for row in rows if row.norm > 0 and math.isfinite(row.norm)]
    low, high = (min(norms), max(norms)) if norms else (1.0, 1.0)
    colours: Any = ScalarMappable(LogNorm(low * 0.999, high * 1.001), "cividis")  # one order of lightness, read alike by all eyes

    def bar(level: int, start: float, width: float, label: str, colour: Any, hatch: str = "") -> None:
        axes.barh(level, width, left=start, height=0.94, color=colour, edgecolor="white", linewidth=1.2, hatch=hatch)
        room = int(width / _CHARACTER)
        if room >= 3:
            text = label if len(label) <= room else f"{label[: room - 1]}…"
            dark = sum(w * c for w, c in zip((0.299, 0.587, 0.114), colour[:3], strict=True)) < 0.55
            axes.text(start + width / 2, level, text, ha="center", va="center", fontsize=9, color="white" if dark else "black")

    grey = (0.86, 0.86, 0.86, 1.0)
    bar(0, 0.0, 1.0, explanation._title(), grey)
    start = 0.0
    open_at: list[tuple[str, float]] = []  # the modules that the last layer lay in, and where each began
    for row, names in zip(rows, paths, strict=True):
        modules = names[:-1]
        same = 0
        while same < min(len(open_at), len(modules)) and open_at[same][0] == modules[same]:
            same += 1
        for level in range(len(open_at) - 1, same - 1, -1):
            bar(level + 1, open_at[level][1], start - open_at[level][1], open_at[level][0], grey)
        open_at = [*open_at[:same], *((name, start) for name in modules[same:])]
        width = abs(row.share) / whole
        colour: Any = colours.to_rgba(row.norm) if row.norm > 0 and math.isfinite(row.norm) else grey
        hatch = "///" if row.share < 0 else ""
        bar(len(names), start, width, f"{names[-1]}  {row.share / whole:.0%}", tuple(colour), hatch)
        start += width
    for level in range(len(open_at) - 1, -1, -1):
        bar(level + 1, open_at[level][1], start - open_at[level][1], open_at[level][0], grey)
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.55, depth + 0.55)
    axes.set_yticks([])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel(f"share of {explanation.unit}; the sum is {explanation.total:.4g}", fontsize=9)
    axes.set_title(f"Layers' shares of the {explanation._title()} ({explanation.how})", fontsize=10, loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)
    if norms:
        scale = figure.colorbar(colours, ax=axes, pad=0.01, aspect=12)
        scale.set_label("norm of the layer", fontsize=9)
        ticks = sorted({low, math.sqrt(low * high), high}) if high > low * 1.01 else [low]
        scale.set_ticks(ticks, labels=[show_upper(tick, 3) for tick in ticks])
        scale.ax.minorticks_off()
    if path is not None:
        figure.savefig(path)
    return figure
