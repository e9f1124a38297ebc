"""What adversarial training does to the verified bound, on digits with pixels from 0 to 1.

Source of the experiment: Fazlyab et al. 2019, arXiv:1906.04893, section 4.

Run with: python recipes/adversarial_training.py --seeds 3 --out figures
"""

from __future__ import annotations

import statistics

import matplotlib as mpl
import matplotlib.pyplot as plt
from common import Classifier, accuracy, arguments, attacked, dense, digits, fit, percent, robust_accuracy, table
from torch import Tensor, nn

import lipguard as lg

RADII, ATTACK = (0.0, 0.1, 0.2, 0.4, 0.8), 0.4


def adversarial(eps: float) -> object:
    """Cross-entropy on the inputs that a short attack finds."""

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(attacked(model, x, y, eps, steps=7, highest=1.0) if eps else x), y)

    return loss


if __name__ == "__main__":
    given = arguments(__doc__ or "", seeds=2, epochs=30)
    x, y, test_x, test_y = digits()
    rows, bounds, products = [], [], []
    for eps in RADII:
        runs = []
        for seed in range(given.seeds):
            model = fit(lambda eps=eps: Classifier(dense(64, 64, 64, 10), 64, loss=adversarial(eps)), x, y, seed, given.epochs)
            proved = [lg.bound(model, test_x[:1], method=name).value for name in ("lipsdp-neuron", "spectral")]
            runs.append((accuracy(model, test_x, test_y), robust_accuracy(model, test_x, test_y, ATTACK, 1.0), *proved))
        clean, robust, bound, product = (statistics.mean(column) for column in zip(*runs, strict=True))
        rows.append((f"{eps:g}", percent(clean), percent(robust), f"{bound:.2f}", f"{product:.2f}"))
        bounds.append([run[2] for run in runs])
        products.append([run[3] for run in runs])
    print(table(("trained at eps", "accuracy %", f"PGD eps {ATTACK:g} %", "LipSDP bound", "product of norms"), rows))

    mpl.use("Agg")
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for values, label in ((bounds, "LipSDP, verified"), (products, "product of norms, verified")):
        means = [statistics.mean(runs) for runs in values]
        ends = [
            [m - min(r) for m, r in zip(means, values, strict=True)],
            [max(r) - m for m, r in zip(means, values, strict=True)],
        ]
        axes.errorbar(RADII, means, ends, marker="o", capsize=3, label=label)
    axes.set(
        xlabel="eps of adversarial training (l2, pixels from 0 to 1)", ylabel="bound of the Lipschitz constant", ylim=(0, None)
    )
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(given.out / "adversarial_training.png", dpi=120)
