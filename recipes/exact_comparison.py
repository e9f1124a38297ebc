"""Exact methods side by side under equal time limits, in the manner of Sbihi, Jan and Couellan (arXiv:2402.01199).

Networks are made here: trained on iris and on two moons, and random. For each the l2 constant by MIQCQP (Gurobi and
SCIP, with the formulation as published and with lipguard's bounds and cut-off), branch and bound and enumeration, the
l-infinity constant by MILP, with LipSDP as the bound without a search.
Run with: python recipes/exact_comparison.py --seconds 60 --output comparison
It writes comparison.md and comparison.png.
"""

import argparse
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_iris, make_moons
from sklearn.preprocessing import minmax_scale
from torch import Tensor, nn

import lipguard as lg

METHODS: dict[str, dict[str, object]] = {
    "MIQCQP as published, Gurobi": {"method": "miqcqp", "solver": "gurobi", "formulation": "published"},
    "MIQCQP, Gurobi": {"method": "miqcqp", "solver": "gurobi"},
    "MIQCQP as published, SCIP": {"method": "miqcqp", "solver": "scip", "formulation": "published"},
    "MIQCQP, SCIP": {"method": "miqcqp", "solver": "scip"},
    "branch and bound": {"method": "branch-and-bound"},
    "enumeration": {"method": "enumeration"},
    "MILP, Gurobi (linf)": {"method": "milp", "solver": "gurobi", "norm": math.inf},
    "MILP, HiGHS (linf)": {"method": "milp", "solver": "highs", "norm": math.inf},
}


@dataclass
class Row:
    """One method on one network."""

    network: str
    method: str
    lower: float
    upper: float
    rigor: str
    status: str
    seconds: float


def multilayer(sizes: list[int]) -> nn.Sequential:
    """ReLU between linear maps."""
    modules: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        modules += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*modules[:-1]).double()


def trained(sizes: list[int], x: Tensor, y: Tensor) -> nn.Sequential:
    """A classifier of (x, y)."""
    model = multilayer(sizes)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(400):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def networks() -> dict[str, nn.Sequential]:
    """The networks by name."""
    torch.manual_seed(0)
    x, y = load_iris(return_X_y=True)
    iris = torch.tensor(minmax_scale(x, (-1, 1))), torch.tensor(y)
    x, y = make_moons(200, noise=0.1, random_state=0)
    moons = torch.tensor(minmax_scale(x, (-1, 1))), torch.tensor(y)
    return {
        "iris 4-8-8-3": trained([4, 8, 8, 3], *iris),
        "iris 4-16-3": trained([4, 16, 3], *iris),
        "moons 2-12-12-2": trained([2, 12, 12, 2], *moons),
        "moons 2-20-20-2": trained([2, 20, 20, 2], *moons),
        "random 4-16-16-3": multilayer([4, 16, 16, 3]),
        "random 5-15-15-1": multilayer([5, 15, 15, 1]),
    }


def compare(seconds: float, say: Callable[[str], None]) -> list[Row]:
    """Every method on every network, each for at most `seconds`, on the box [-1, 1]^d."""
    box = lg.Box(-1.0, 1.0)
    rows = []
    for name, model in networks().items():
        example = torch.zeros(1, model[0].in_features, dtype=torch.float64)
        bound = lg.bound(model, example)
        rows.append(Row(name, "LipSDP", 0.0, bound.value, bound.rigor, "upper bound", bound.seconds))
        say(f"{name}: LipSDP {bound.value:.4f}")
        for method, options in METHODS.items():
            found = lg.exact(model, example, domain=box, time_limit=seconds, **options)  # type: ignore[arg-type]
            rows.append(Row(name, method, found.lower, found.upper, found.rigor, found.status, found.seconds))
            say(f"{name}: {method} [{found.lower:.6g}, {found.upper:.6g}] {found.status}, {found.seconds:.1f} s")
    return rows


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = [
        "| network | method | lower | upper | upper / lower | upper is | status | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        ratio = f"{r.upper / r.lower:.4f}" if r.lower > 0 else ""
        lower = f"{r.lower:.6f}" if r.lower > 0 else ""
        lines.append(
            f"| {r.network} | {r.method} | {lower} | {r.upper:.6f} | {ratio} | {r.rigor} | {r.status} | {r.seconds:.1f} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: list[Row], file: Path, seconds: float) -> None:
    """One panel a network: every l2 method's enclosure, relative to the best lower bound, with its time beside it."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(r.network for r in rows))
    figure = Figure(figsize=(11, 2.1 * ((len(names) + 1) // 2)), layout="constrained")
    axes = figure.subplots((len(names) + 1) // 2, 2, squeeze=False).flatten()
    for axis, name in zip(axes, names, strict=False):
        shown = [r for r in rows if r.network == name and "linf" not in r.method][::-1]
        best = max(r.lower for r in shown)
        for place, r in enumerate(shown):
            color = {"closed": "tab:green", "upper bound": "tab:gray"}.get(r.status, "tab:orange")
            ends = [r.lower / best, r.upper / best] if r.lower > 0 else [r.upper / best]
            axis.plot(ends, [place] * len(ends), "-", color=color, linewidth=7, solid_capstyle="butt", alpha=0.6)
            axis.plot(ends, [place] * len(ends), "o", color=color, markersize=6)
            axis.annotate(f"{r.seconds:.1f} s", (ends[-1], place), (8, 0), textcoords="offset points", va="center", fontsize=7)
        low, high = axis.get_xlim()
        spread = max(high - low, 0.02)
        axis.set_xlim(low - 0.03 * spread, high + 0.15 * spread)
        axis.set_ylim(-0.6, len(shown) - 0.4)
        axis.axvline(1.0, color="black", linewidth=0.6, linestyle=":")
        axis.set_yticks(range(len(shown)), [r.method for r in shown], fontsize=8)
        axis.ticklabel_format(axis="x", useOffset=False)
        axis.tick_params(axis="x", labelsize=8)
        axis.set_title(f"{name} (1 = {best:.4g})", fontsize=9)
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    colors = "green: closed, orange: out of time, gray: LipSDP"
    text = f"Lower and upper bounds of the l2 constant on [-1, 1]^d after at most {seconds:g} s ({colors})"
    figure.suptitle(text, fontsize=10)
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="time limit of every method on every network")
    parser.add_argument("--output", type=Path, default=Path("comparison"), help="where to write, without suffix")
    arguments = parser.parse_args()
    found = compare(arguments.seconds, print)
    arguments.output.with_suffix(".md").write_text(table(found))
    plot(found, arguments.output.with_suffix(".png"), arguments.seconds)
    print(table(found))
