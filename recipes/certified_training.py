"""Certified training on digits and iris: clean accuracy, accuracy under attack, and certified accuracy over eps.

Certified <= PGD <= clean on every row: an attack finds no more than there is, a certificate proves no more than holds.
Sources: Huang et al. 2021, arXiv:2111.01395 (local bounds, worst logits); Leino et al. 2021, arXiv:2102.08452 (extra class).

Run with: python recipes/certified_training.py --out figures
"""

from __future__ import annotations

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from common import Classifier, accuracy, arguments, dense, digits, fit, percent, robust_accuracy, table
from sklearn.datasets import load_iris
from torch import Tensor, nn

import lipguard as lg
from lipguard.nn import ReLUTheta


def iris() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Iris, each measurement with mean 0 and deviation 1."""
    data = load_iris()
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(data.data, dtype=torch.float32)[order], torch.tensor(data.target)[order]
    x = (x - x.mean(0)) / x.std(0)
    return x[:100], y[:100], x[100:], y[100:]


# name: data, sizes, radius of the training, radii of the table, test samples, highest pixel for the attack
PROBLEMS = {
    "digits": (digits, (64, 64, 10), 0.8, (0.2, 0.4, 0.8, 1.2), 100, None),
    "iris": (iris, (4, 16, 3), 0.6, (0.2, 0.4, 0.8, 1.2), 50, None),
}
METHODS = {
    "plain": (nn.ReLU, None),
    "global, extra class": (nn.ReLU, {"bounds": "global", "form": "extra"}),
    "local, worst logits": (nn.ReLU, {"bounds": "local", "form": "worst"}),
    "local, ReLU_theta": (ReLUTheta, {"bounds": "local", "form": "worst"}),
}

if __name__ == "__main__":
    given = arguments(__doc__ or "", seeds=1, epochs=40)
    rows = []
    curves: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
    for problem, (load, sizes, radius, radii, count, highest) in PROBLEMS.items():
        x, y, test_x, test_y = load()
        test_x, test_y = test_x[:count], test_y[:count]
        for method, (activation, options) in METHODS.items():
            callbacks = []
            if options is not None:
                callbacks.append(lg.LipschitzRegularizer("certified", weight=1.0, options={"radius": radius, **options}))
            epochs = given.epochs if problem == "digits" else 6 * given.epochs
            make = lambda sizes=sizes, activation=activation: Classifier(dense(*sizes, activation=activation), sizes[0])  # noqa: E731
            model = fit(make, x, y, 0, epochs, *callbacks)
            clean = accuracy(model, test_x, test_y)
            attack = [robust_accuracy(model, test_x, test_y, eps, highest) for eps in radii]
            proofs = [lg.certify(model, test_x, test_y, eps, radii=False, time_limit=30).certified_accuracy for eps in radii]
            curves[problem, method] = ([clean, *attack], [clean, *proofs])
            cells = [f"{percent(a)} / {percent(p)}" for a, p in zip(attack, proofs, strict=True)]
            bound = lg.bound(model, test_x[:1]).value
            rows.append((problem, method, percent(clean), *cells, f"{bound:.2f}"))
            assert all(p <= a <= clean for a, p in zip(attack, proofs, strict=True))
        print(table(("data", "training", "clean %", *(f"PGD / certified % at {r:g}" for r in radii), "global bound"), rows), "\n")
        rows = []

    mpl.use("Agg")
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for place, (problem, (*_, radii, _, _)) in zip(axes, PROBLEMS.items(), strict=True):
        for color, method in enumerate(METHODS):
            attack, proofs = curves[problem, method]
            place.plot((0, *radii), [100 * v for v in attack], color=f"C{color}", linestyle="--", marker=".")
            place.plot((0, *radii), [100 * v for v in proofs], color=f"C{color}", marker="o", label=method)
        place.set(title=f"{problem}: PGD (dashed), certified (solid)", xlabel="eps (l2)")
        place.grid(alpha=0.3)
    axes[0].set(ylabel="accuracy on the test set, %", ylim=(-2, 101))
    axes[0].legend()
    figure.savefig(given.out / "certified_training.png", dpi=120)
