"""Certified robustness of digits classifiers: clean, attacked and certified accuracy over the radius; global and local bounds.

Two classifiers 64-64-64-10 of the 8x8 digits scaled to [0, 1], one trained plainly, one with noise on its inputs. Each
sample's radius is proved by class-pair constants on R^d ("global") and on its own ball within the images' box ("local");
projected gradient ascent attacks from the other side.
Run with: python recipes/local_robustness.py --samples 100 --output robustness
It writes robustness.md and robustness.png.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import lipguard as lg

EPS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
BOX = lg.Box(0.0, 1.0)


@dataclass
class Curves:
    """Shares of the samples at each radius, and what was measured beside them."""

    name: str
    attacked: list[float]
    certified: dict[str, list[float]]
    median: dict[str, float]
    overall: float
    local: float
    seconds: dict[str, float]


def digits() -> tuple[Tensor, Tensor]:
    """The images in a fixed random order."""
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return torch.tensor(x / 16, dtype=torch.float32)[order], torch.tensor(y)[order]


def trained(x: Tensor, y: Tensor, noise: float) -> nn.Sequential:
    """A classifier; `noise` is the standard deviation of what is added to every training image."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(40):
        for some in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model(x[some] + noise * torch.randn(len(some), 64)), y[some]).backward()
            optimizer.step()
    return model


def accuracy_attacked(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int = 50, starts: int = 3) -> float:
    """Accuracy under projected gradient ascent in the 2-norm ball of radius eps, inside the images' box."""
    generator = torch.Generator().manual_seed(0)
    fooled = model(x).argmax(1) != y
    for _ in range(starts if eps else 0):
        step = eps * functional.normalize(torch.randn(x.shape, generator=generator), dim=1)
        for _ in range(steps):
            at = (x + step).clamp(0, 1).requires_grad_(True)
            (gradient,) = torch.autograd.grad(functional.cross_entropy(model(at), y, reduction="sum"), at)
            step = at.detach() - x + 0.15 * eps * functional.normalize(gradient, dim=1)
            step = (x + step).clamp(0, 1) - x
            step = step * (eps * (1 - 1e-6) / step.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp_max(1.0)
            fooled |= model(x + step).argmax(1) != y
    return float((~fooled).double().mean())


def measured(name: str, model: nn.Module, x: Tensor, y: Tensor) -> Curves:
    """Everything about one classifier."""
    found = {
        "global": lg.certify(model, x, y, EPS[1], method="global"),
        "local": lg.certify(model, x, y, EPS[1], method="local", box=BOX),
    }
    certified = {m: [float(((r.radius >= eps) & r.correct).double().mean()) for eps in EPS] for m, r in found.items()}
    balls = [lg.Ball(center, EPS[1], box=BOX) for center in x]
    local = torch.tensor([certificate.value for certificate in lg.bound(model, x[:1], domain=balls)])
    return Curves(
        name,
        [accuracy_attacked(model, x, y, eps) for eps in EPS],
        certified,
        {m: float(r.radius.median()) for m, r in found.items()},
        lg.bound(model, x[:1]).value,
        float(local.median()),
        {m: r.seconds for m, r in found.items()},
    )


def markdown(all_curves: list[Curves], samples: int) -> str:
    """The tables."""
    lines = [f"# Robustness of digits classifiers on {samples} test images", ""]
    for curves in all_curves:
        lines += [f"## {curves.name}", "", "| eps | under attack | certified, local | certified, global |", "|---|---|---|---|"]
        for i, eps in enumerate(EPS):
            shares = (curves.attacked[i], curves.certified["local"][i], curves.certified["global"][i])
            lines.append(f"| {eps:g} | " + " | ".join(f"{100 * share:.0f} %" for share in shares) + " |")
        lines += [
            "",
            f"Clean accuracy {100 * curves.attacked[0]:.0f} %. Median certified radius {curves.median['local']:.3f} (local, "
            f"{curves.seconds['local']:.0f} s), {curves.median['global']:.3f} (global, {curves.seconds['global']:.0f} s). Bound "
            f"of all outputs: {curves.overall:.2f} on R^d, {curves.local:.2f} in the median on balls of radius {EPS[1]:g}.",
            "",
        ]
    return "\n".join(lines)


def plot(all_curves: list[Curves], path: Path) -> None:
    """Shares over the radius, one panel for each classifier."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(all_curves), figsize=(9.5, 3.9), sharey=True, layout="constrained")
    for panel, curves in zip(panels, all_curves, strict=True):
        panel.plot(EPS, curves.attacked, "o-", color="#b2432f", label="under attack (PGD)")
        panel.plot(EPS, curves.certified["local"], "s-", color="#1f5a99", label="certified, local")
        panel.plot(EPS, curves.certified["global"], "^--", color="#6c9bd1", label="certified, global")
        panel.fill_between(EPS, curves.certified["local"], curves.attacked, color="#d9d9d9", alpha=0.5, lw=0, label="undecided")
        panel.set_title(curves.name, fontsize=11)
        panel.set_xlabel("radius eps (2-norm, pixels in [0, 1])")
        panel.set_ylim(-0.02, 1.02)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("share of test images")
    panels[-1].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100, help="test images")
    parser.add_argument("--output", type=Path, default=Path("robustness"), help="path without suffix")
    options = parser.parse_args()
    x, y = digits()
    test_x, test_y = x[1400 : 1400 + options.samples], y[1400 : 1400 + options.samples]
    found = []
    for name, noise in (("plain training", 0.0), ("noise 0.25 in training", 0.25)):
        found.append(measured(name, trained(x[:1400], y[:1400], noise), test_x, test_y))
        print(f"{name}: done")
    text = markdown(found, len(test_x))
    options.output.with_suffix(".md").write_text(text)
    plot(found, options.output.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
