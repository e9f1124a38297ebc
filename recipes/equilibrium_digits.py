"""Lipschitz-bounded equilibrium networks on digits, in the manner of Revay, Wang and Manchester's table (arXiv:2010.01732).

Trained at several gammas, and once without a bound: test error, gamma, the verified SDP bound of the trained network and a
verified lower bound. On MNIST with width 80 the paper reports, gamma: error % (observed lower bound), 0.1: 10.12 (0.041),
0.5: 3.52 (0.458), 1: 2.36 (0.865), 5: 1.81 (2.91), none: 2.08 (239).
Run with: python recipes/equilibrium_digits.py --output equilibrium
It writes equilibrium.md and equilibrium.png, in about a minute on one core.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import lipguard as lg
from lipguard.nn import LipschitzEquilibrium


@dataclass
class Row:
    """One trained network."""

    gamma: float | None
    error: float
    upper: float
    lower: float
    residual: float
    seconds: float


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train and test images, entries in [0, 1], and labels."""
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    train, test = train_test_split(torch.arange(len(x)), test_size=0.25, random_state=0, stratify=y)
    return x[train], y[train], x[test], y[test]


def trained(gamma: float | None, width: int, epochs: int) -> tuple[LipschitzEquilibrium, float]:
    """A classifier with the bound gamma and its test error in per cent."""
    torch.manual_seed(0)
    x, y, x_test, y_test = data()
    model = LipschitzEquilibrium(64, width, 10, gamma)
    steps = epochs * (len(x) // 128)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(steps):
        batch = torch.randint(len(x), (128,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        error = float((model(x_test).argmax(1) != y_test).float().mean()) * 100
    return model, error


def measure(gamma: float | None, width: int, epochs: int) -> Row:
    """Train, and bound from both sides."""
    began = time.perf_counter()
    model, error = trained(gamma, width, epochs)
    network = lg.capture(model, torch.zeros(1, 64))
    upper = lg.bound(network)
    lower = lg.bound(network, method="sampling", time_limit=5)
    assert upper.rigor == lower.rigor == "verified"
    return Row(gamma, error, upper.value, lower.value, model.residual, time.perf_counter() - began)


def table(rows: list[Row]) -> str:
    """The rows in Markdown; both bounds are verified, the residual is of the equilibria of the test images."""
    head = "| gamma | test error % | SDP bound | lower bound | residual | seconds |\n|--:|--:|--:|--:|--:|--:|"
    lines = [
        f"| {'none' if r.gamma is None else f'{r.gamma:g}'} | {r.error:.2f} | {r.upper:.4f} | {r.lower:.4f} "
        f"| {r.residual:.0e} | {r.seconds:.1f} |"
        for r in rows
    ]
    return "\n".join([head, *lines]) + "\n"


def plot(rows: list[Row], path: Path) -> None:
    """Test error over the SDP bound, and what the trained networks use of their gamma."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, row in enumerate(rows):
        name = "no bound" if row.gamma is None else f"gamma = {row.gamma:g}"
        left.plot(row.upper, row.error, "o", color="#1f5a93", ms=7)
        side = {"xytext": (-8, 6), "ha": "right"} if i % 2 else {"xytext": (8, 6), "ha": "left"}
        left.annotate(name, (row.upper, row.error), textcoords="offset points", **side)
    left.set_xscale("log")
    left.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    left.margins(x=0.4, y=0.18)
    left.set(xlabel="SDP bound, verified", ylabel="test error, %")
    bounded = [row for row in rows if row.gamma is not None]
    places = range(len(bounded))
    for place, row in zip(places, bounded, strict=True):
        ends = [100 * row.lower / row.gamma, 100 * row.upper / row.gamma]
        label = "lower to SDP bound, both verified" if place == 0 else None
        right.plot([place, place], ends, color="#1f5a93", lw=12, solid_capstyle="butt", label=label)
        right.plot(place, ends[1], "_", color="#b5442e", ms=20, mew=2, label="SDP bound" if place == 0 else None)
    right.axhline(100, color="0.4", lw=1, ls="--")
    right.set_xticks(list(places), [f"{row.gamma:g}" for row in bounded])
    right.set(xlabel="gamma", ylabel="per cent of gamma", xlim=(-0.6, len(bounded) - 0.4), ylim=(88, 101))
    right.legend(frameon=False, loc="lower left")
    for axes in (left, right):
        axes.grid(alpha=0.25)
    figure.suptitle("Lipschitz-bounded equilibrium networks on digits")
    figure.savefig(path, dpi=160)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="equilibrium", help="path of the files without suffix")
    parser.add_argument("--width", type=int, default=80)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--gammas", type=float, nargs="*", default=[0.1, 0.5, 1.0, 5.0])
    arguments = parser.parse_args()
    found = []
    for gamma in [*arguments.gammas, None]:
        found.append(measure(gamma, arguments.width, arguments.epochs))
        print(table(found[-1:]).splitlines()[-1], flush=True)
    Path(f"{arguments.output}.md").write_text(table(found))
    plot(found, Path(f"{arguments.output}.png"))
