"""What a user sees on the error stream while a training waits for its last audits."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

__all__ = ["waiting"]


@contextlib.contextmanager
def waiting(text: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """Yields a function that takes the count done so far: a progress bar where rich is installed, one line where it is not."""
    if not shown:
        yield lambda done: None
        return
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ModuleNotFoundError:
        print(f"{text} ({total})...", file=sys.stderr, flush=True)  # noqa: T201 - for the person at the terminal
        yield lambda done: None
        return
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(text, total=total)
        yield lambda done: progress.update(task, completed=done)
