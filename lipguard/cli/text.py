"""The command line's screen: by rich where it is installed and the output is a terminal, else plain text of any width.

A pipe, a file or a CI log has no width: nothing is cut there, so that names can be told apart and searched for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

__all__ = ["Cell", "Screen", "progress"]

Cell = str | tuple[str, str]
"""A text, or a text with a style of rich ("green", "bold", "dim")."""


class Screen:
    """Where a command prints: lines and tables.

    Args:
        console: a `rich.console.Console` to print on; None takes one if rich is installed and stdout is a terminal.
    """

    def __init__(self, console: Any = None) -> None:
        self.console = _console(sys.stdout) if console is None else console

    def line(self, *cells: Cell) -> None:
        """One line of texts, a blank between each two."""
        if self.console is None:
            _write(" ".join(text for text, _ in map(_styled, cells)))
        else:
            self.console.print(*(_rich(cell) for cell in cells), soft_wrap=True, highlight=False)

    def table(self, rows: Sequence[Sequence[Cell]], head: Sequence[str] = (), title: str = "") -> None:
        """Rows of cells in columns, the head over them."""
        if title:
            self.line((title, "italic"))
        if self.console is None:
            _plain_table([head, *rows] if head else rows)
            return
        from rich.table import Table

        grid = Table(*head, box=None, show_header=bool(head), header_style="dim", padding=(0, 2, 0, 0))
        for column in grid.columns:
            column.overflow = "fold"  # a long name goes on in the next line; it is never cut
        for row in rows:
            grid.add_row(*map(_rich, row))
        self.console.print(grid)


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields a function that takes how many of `total` are done; a bar on stderr, where that is a terminal with rich."""
    console = _console(sys.stderr)
    if console is None:
        yield lambda done: None
        return
    from rich.progress import Progress

    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, completed=done)


def _console(stream: Any) -> Any:
    if not stream.isatty():
        return None
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        return None
    return Console(file=stream)


def _styled(cell: Cell) -> tuple[str, str]:
    return (cell, "") if isinstance(cell, str) else cell


def _rich(cell: Cell) -> Any:
    from rich.text import Text

    text, style = _styled(cell)
    return Text(text, style=style)  # not markup: a file may be called "[red].ckpt"


def _plain_table(rows: Sequence[Sequence[Cell]]) -> None:
    texts = [[text for text, _ in map(_styled, row)] for row in rows]
    widths = [max(len(row[i]) for row in texts if i < len(row)) for i in range(max(map(len, texts), default=0))]
    for row in texts:
        _write("  ".join(text.ljust(width) for text, width in zip(row, widths[: len(row)], strict=True)).rstrip())


def _write(text: str) -> None:
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    # A terminal or pipe in another encoding gets a stand-in for "→" or "≤", never a traceback.
    print(text.encode(encoding, "replace").decode(encoding))  # noqa: T201 - the command's output
