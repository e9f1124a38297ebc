"""MaxMin against ReLU with the same weights budget on digits: as many weights, of the same norms.

First trained freely, then with orthogonal layers scaled to a product of norms. MaxMin keeps the norm of gradients, ReLU
loses some of it in every layer where a neuron is off. Of MaxMin two values of LipSDP are given: lipguard's,
and that of the same function written in ReLUs, which does not know that MaxMin is 1-Lipschitz.

Certified is a test image whose margin exceeds sqrt(2) times LipSDP's bound times 0.25: no change of the image by 0.25 in
the 2-norm changes its class.

Run with: python recipes/maxmin_digits.py --output maxmin
It writes maxmin.md and maxmin.png.
"""

import argparse
import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

import lipguard as lg
from lipguard.nn import MaxMin

BUDGETS = (None, 1.0, 4.0, 16.0)
"""Products of norms; None trains freely."""
RADIUS = 0.25
WIDTH, DEPTH = 32, 3


@dataclass
class Row:
    """One trained network."""

    activation: str
    budget: float | None
    accuracy: float
    certified: float
    product: float
    lipsdp: float
    rewritten: float | None
    lower: float


class Scaled(nn.Module):
    """factor x."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Scale."""
        return self.factor * x


class InReLUs(nn.Module):
    """MaxMin by ReLUs: max(a, b) = relu(a - b) + relu(b) - relu(-b), and min(a, b) likewise."""

    def forward(self, x: Tensor) -> Tensor:
        """Maxima, then minima."""
        a, b = x.chunk(2, 1)
        same = torch.relu(b) - torch.relu(-b)
        return torch.cat([torch.relu(a - b) + same, same - torch.relu(b - a)], 1)


def network(activation: type[nn.Module], budget: float | None) -> nn.Sequential:
    """Linear layers; with a budget they are orthogonal, and their norms multiply to it."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise((64, *[WIDTH] * DEPTH, 10)):
        layers += [nn.Linear(inputs, outputs), activation()]
    layers.pop()
    if budget is None:
        return nn.Sequential(*layers)
    made = [orthogonal(layer, orthogonal_map="cayley") if isinstance(layer, nn.Linear) else layer for layer in layers]
    return nn.Sequential(Scaled(budget), *made)


def trained(activation: type[nn.Module], budget: float | None, x: Tensor, y: Tensor, epochs: int) -> nn.Sequential:
    """Adam on the cross-entropy."""
    torch.manual_seed(0)
    model = network(activation, budget)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=epochs * math.ceil(len(x) / 128))
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def measured(name: str, budget: float | None, model: nn.Sequential, x: Tensor, y: Tensor) -> Row:
    """Accuracies on test images, and verified bounds on both sides."""
    captured = lg.capture(model, x[:1])
    product, upper, lower = (lg.bound(captured, method=m).value for m in ("spectral", "lipsdp-neuron", "sampling"))
    plain = nn.Sequential(*(InReLUs() if isinstance(layer, MaxMin) else layer for layer in model))
    rewritten = lg.bound(plain, x[:1], method="lipsdp-neuron").value if name == "MaxMin" else None
    with torch.no_grad():
        top = model(x).topk(2, 1)
    correct = top.indices[:, 0] == y
    certified = correct & (top.values[:, 0] - top.values[:, 1] > math.sqrt(2) * upper * RADIUS)
    return Row(name, budget, float(correct.float().mean()), float(certified.float().mean()), product, upper, rewritten, lower)


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    lines = [
        f"| activation | budget | test accuracy | certified at {RADIUS} | product | LipSDP | LipSDP in ReLUs | sampled lower |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        rewritten = "" if r.rewritten is None else f"{r.rewritten:.4f}"
        lines.append(
            f"| {r.activation} | {label(r)} | {r.accuracy:.1%} | {r.certified:.1%} | {r.product:.4f} | {r.lipsdp:.4f} "
            f"| {rewritten} | {r.lower:.4f} |"
        )
    return "\n".join(lines) + "\n"


def label(row: Row) -> str:
    """The budget in words."""
    return "free" if row.budget is None else f"{row.budget:g}"


def plot(rows: list[Row], path: Path) -> None:
    """The share of the budget between both bounds, and the accuracies."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    colours = {"MaxMin": "#0072b2", "ReLU": "#d55e00"}
    for k, (name, colour) in enumerate(colours.items()):
        own = [row for row in rows if row.activation == name]
        at = [i + 0.36 * k - 0.18 for i in range(len(own))]
        low, high = ([getattr(row, side) / row.product for row in own] for side in ("lower", "lipsdp"))
        left.vlines(at, low, high, color=colour, linewidth=10, alpha=0.4, label=f"{name}: sampled lower to LipSDP")
        for ends in (low, high):
            left.plot(at, ends, "_", color=colour, markersize=20, markeredgewidth=2.5)
        right.bar(at, [100 * row.accuracy for row in own], 0.34, color=colour, alpha=0.3, label=f"{name}: test accuracy")
        right.bar(at, [100 * row.certified for row in own], 0.34, color=colour, label=f"{name}: certified at {RADIUS}")
    rewritten = [row.rewritten / row.product for row in rows if row.rewritten is not None]
    left.plot([i - 0.18 for i in range(len(rewritten))], rewritten, "x", color="#0072b2", label="MaxMin: LipSDP in ReLUs")
    left.axhline(1, color="black", linewidth=0.8, linestyle=":")
    names = [label(row) for row in rows if row.activation == "ReLU"]
    left.set(title="Lipschitz constant over the product of the layers' norms", yscale="log", ylim=(0.5, 40))
    left.set_yticks((0.5, 1, 2, 5, 10, 20), ("0.5", "1", "2", "5", "10", "20"))
    left.minorticks_off()
    right.set(title="test images", ylabel="per cent", ylim=(0, 135))
    for axes in (left, right):
        axes.set(xlabel="budget: product of norms, or trained freely")
        axes.set_xticks(range(len(names)), names)
    left.legend(loc="center right")
    right.legend(loc="upper right", ncols=2)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="maxmin", help="file name without suffix")
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1347], order[1347:]
    rows = []
    for budget in BUDGETS:
        for name, activation in (("MaxMin", MaxMin), ("ReLU", nn.ReLU)):
            model = trained(activation, budget, x[train], y[train], options.epochs)
            rows.append(measured(name, budget, model, x[test], y[test]))
    output = Path(options.output)
    output.with_suffix(".md").write_text(table(rows))
    plot(rows, output.with_suffix(".png"))
    print(table(rows))


if __name__ == "__main__":
    main()
