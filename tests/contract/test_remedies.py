"""Every remedy that a message names is typed where the error was raised; and every one names arguments that are there."""

# Wrong arguments are the subject here.
# pyright: reportCallIssue=false, reportArgumentType=false

import ast
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lipguard as lg
from lipguard import callbacks, penalties
from lipguard.errors import LipguardError

X = torch.zeros(1, 4)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Any:
        return {"logits": self.net(x), "value": self.net(x)[:, :1]}


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.relu(self.fc(x) + y)


NET, HEADS, TWO = Heads().net, Heads(), Two()
Y = torch.zeros(1, 3)

REMEDIES: dict[str, tuple[Callable[[], Any], str, Callable[[], Any]]] = {
    "no example": (lambda: lg.bound(NET), r"Give example=", lambda: lg.bound(NET, X)),
    "several outputs": (
        lambda: lg.bound(HEADS, X), r"Choose one with outputs=\.\.\., of 'logits'", lambda: lg.bound(HEADS, X, outputs="logits")
    ),
    "several outputs, exact": (lambda: lg.exact(HEADS, X), "outputs=", lambda: lg.exact(HEADS, X, outputs="value")),
    "several outputs, tracked": (
        lambda: lg.Tracker(HEADS, X).update(), "outputs=", lambda: lg.Tracker(HEADS, X, outputs="logits").update()
    ),
    "several inputs": (lambda: lg.bound(TWO, X), r"Give example=\(x, y\).*inputs='x'", lambda: lg.bound(TWO, (X, Y), inputs="x")),
    "several inputs of two batches": (
        lambda: lg.bound(TWO, (X, Y[0])), "Choose with inputs=", lambda: lg.bound(TWO, (X, Y[0]), inputs="x")
    ),
    "no inputs": (
        lambda: lg.bound(TWO, (X, Y), inputs=0.5), r"inputs=\('x', 'y'\)", lambda: lg.bound(TWO, (X, Y), inputs=("x", "y"))
    ),
    "no such input": (lambda: lg.bound(TWO, (X, Y), inputs="z"), "it has 'x', 'y'", lambda: lg.bound(TWO, (X, Y), inputs="y")),
    "whole numbers": (lambda: lg.bound(NET, X.long()), r"example\.float\(\)", lambda: lg.bound(NET, X.long().float())),
    "no tensor": (lambda: lg.bound(NET, (1, 4)), r"torch\.zeros\(1, 4\)", lambda: lg.bound(NET, torch.zeros(1, 4))),
    "no domain": (lambda: lg.exact(NET, X, domain=(0, 1)), r"lipguard\.Box", lambda: lg.exact(NET, X, domain=lg.Box(0, 1))),
    "no domain as text": (lambda: lg.bound(NET, X, domain="0,1"), "'box:0,1'", lambda: lg.bound(NET, X, domain="box:0,1")),
    "unbounded": (lambda: lg.bound(NET, X, domain=lg.Box(0, torch.inf)), "domain=None", lambda: lg.bound(NET, X, domain=None)),
    "no norm": (lambda: lg.bound(NET, X, norm="l2"), "1, 2 or inf", lambda: [lg.bound(NET, X, norm=p) for p in (1, 2, "inf")]),
    "no outputs": (lambda: lg.bound(NET, X, outputs=0.5), r"outputs=\(3, 5\)", lambda: lg.bound(NET, X, outputs=(0, 2))),
    "one entry": (lambda: lg.bound(NET, X, outputs=0), r"torch\.eye\(m\)", lambda: lg.bound(NET, X, outputs=torch.eye(3)[0:1])),
    "matrix of another size": (
        lambda: lg.bound(NET, X, inputs=torch.eye(3)), r"torch\.eye\(4\)", lambda: lg.bound(NET, X, inputs=torch.eye(4))
    ),
    "lower where upper": (
        lambda: lg.LipschitzMonitor(method="sampling"), "method='spectral'", lambda: lg.LipschitzMonitor(method="spectral")
    ),
    "typo": (lambda: lg.bound(NET, X, method="spectrl"), "mean 'spectral'", lambda: lg.bound(NET, X, method="spectral")),
    "never": (lambda: lg.LipschitzMonitor(every_n_epochs=None), "every_n_train_steps",
        lambda: lg.LipschitzMonitor(every_n_epochs=None, every_n_train_steps=5)),
    "penalty on a domain": (
        lambda: lg.LipschitzRegularizer("lipsdp", weight=1.0, domain="box:0,1"), "penalty='lipsdp-local'",
        lambda: lg.LipschitzRegularizer("lipsdp-local", weight=1.0, domain="box:0,1"),
    ),
    "penalty without its domain": (
        lambda: lg.LipschitzRegularizer("lipsdp-local", weight=1.0), r"domain=lipguard\.Box\(0, 1\)",
        lambda: lg.LipschitzRegularizer("lipsdp-local", weight=1.0, domain=lg.Box(0, 1)),
    ),
    "projection of outputs": (
        lambda: lg.LipschitzProjection(1.0, outputs="logits"), r"submodule=\.\.\. or layers=",
        lambda: (lg.LipschitzProjection(1.0, submodule="net"), lg.LipschitzProjection(1.0, layers=["net.0"])),
    ),
    "certify on a ball": (
        lambda: lg.certify(NET, X, torch.zeros(1).long(), 0.1, domain="ball:1"), r"domain=lipguard\.Box\(0, 1\)",
        lambda: lg.certify(NET, X, torch.zeros(1).long(), 0.1, domain=lg.Box(0, 1), method="spectral"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REMEDIES)
def test_what_a_message_advises_is_typed_and_works(name: str) -> None:
    wrong, advice, right = REMEDIES[name]
    with pytest.raises(LipguardError, match=advice):
        wrong()
    assert right() is not None


def test_messages_name_arguments_that_entry_points_take() -> None:
    entries: list[Any] = [lg.bound, lg.exact, lg.certify, lg.capture, lg.Tracker, lg.Box, lg.Ball, lg.Query]
    entries += [getattr(callbacks, name) for name in callbacks.__all__] + list(penalties.NAMES.values())
    known = {name for entry in entries for name in inspect.signature(entry).parameters}
    unknown: list[str] = []
    for path in sorted(Path(lg.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and node.exc is not None:
                parts = [
                    part.value for part in ast.walk(node.exc) if isinstance(part, ast.Constant) and isinstance(part.value, str)
                ]
                # A remedy is spelt name=... or name='value'.
                named = re.findall(r"\b([a-z_]+)=(?:\.\.\.|'[^']*')", " ".join(parts))
                unknown += [f"{path.name}:{node.lineno}: {name}" for name in named if name not in known]
    assert not unknown
