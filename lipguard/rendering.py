"""How results look: one line in a terminal, a small table in a notebook. Never a tensor, and never markup from outside."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

__all__ = ["clipped", "line", "norm_text", "table"]

_LONGEST = 200
"""Characters of a repr."""


def clipped(text: str, longest: int) -> str:
    """The text on one line, cut where it is longer."""
    one = " ".join(text.split())
    return one if len(one) <= longest else f"{one[: longest - 3]}..."


def line(name: str, parts: Iterable[str]) -> str:
    """`name(part, part)` in at most 200 characters."""
    return f"{name}({clipped(', '.join(filter(None, parts)), _LONGEST - len(name) - 2)})"


def norm_text(norm: tuple[float, float]) -> str:
    """The norm, or "input -> output" where they differ."""
    p, q = (f"{one:g}" for one in norm)
    return p if p == q else f"{p} -> {q}"


def table(title: str, rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> str:
    """A small HTML table that needs nothing else; every text is escaped."""
    cell = "text-align: left; vertical-align: top; padding: 2px 12px 2px 0"
    lines = [f"<caption style='text-align: left; font-weight: bold'>{html.escape(title)}</caption>"]
    if head:
        lines.append(f"<tr>{''.join(f'<th style={cell!r}>{html.escape(text)}</th>' for text in head)}</tr>")
    for row in rows:
        first, *rest = (html.escape(text) for text in row)
        cells = "".join(f"<td style={cell!r}>{text}</td>" for text in rest)
        lines.append(f"<tr><th scope='row' style={cell!r}>{first}</th>{cells}</tr>")
    return f"<table style='border-collapse: collapse'>{''.join(lines)}</table>"
