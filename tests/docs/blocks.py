"""The Python blocks of a page, and running them as a reader would: one after the other, in one module."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import torch

import lipguard as lg

ROOT = Path(__file__).parents[2]


def blocks(page: str) -> list[tuple[int, str]]:
    """(line number, code) of every Python block of a page of the repository."""
    text = (ROOT / page).read_text()
    return [(text.count("\n", 0, m.start(1)) + 1, m[1]) for m in re.finditer(r"^```python\n(.*?)^```", text, re.S | re.M)]


def given() -> dict[str, object]:
    """What the pages say is there: a small classifier, one of its inputs, a batch with labels, and the box of all inputs."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).eval()
    batch = torch.rand(4, 4)
    return {
        "model": model, "example": torch.zeros(1, 4), "batch": batch, "labels": model(batch).argmax(1), "box": lg.Box(0.0, 1.0),
    }  # fmt: skip


def run(page: str, name: str, code: list[tuple[int, str]]) -> types.ModuleType:
    """Runs blocks in a module of this name, whose tracebacks give the page's lines."""
    module = types.ModuleType(name)
    vars(module).update(given())
    sys.modules[name] = module
    for line, block in code:
        exec(compile("\n" * (line - 1) + block, str(ROOT / page), "exec"), vars(module))  # noqa: S102 - the page itself
    return module
