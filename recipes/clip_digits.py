"""CLIP against plain training and weight decay, on digits: accuracy, accuracy under noise and attack, and the bound.

The pixels run from 0 to 2.7, so that the images are as long as MNIST's with pixels up to 1 (9.2 on average), on which CLIP's
authors attack with eps = 2. Source: arXiv:2103.12531, table 1.

Run with: python recipes/clip_digits.py --seeds 5 --out figures
"""

from __future__ import annotations

import statistics

import matplotlib as mpl
import matplotlib.pyplot as plt
from common import Classifier, accuracy, arguments, dense, digits, fit, noisy_accuracy, percent, robust_accuracy, table

import lipguard as lg

HIGHEST, EPS, SIGMA = 2.7, 2.0, 1.0
RADII = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
METHODS = {
    "plain": (0.0, None),
    "weight decay 0.1": (0.1, None),
    "weight decay 1": (1.0, None),
    "CLIP, goal 97 %": (0.0, 0.97),
    "CLIP, goal 99 %": (0.0, 0.99),
}

if __name__ == "__main__":
    given = arguments(__doc__ or "", seeds=3, epochs=60)
    x, y, test_x, test_y = digits(HIGHEST)
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in METHODS}
    curves: dict[str, list[list[float]]] = {name: [] for name in METHODS}
    for seed in range(given.seeds):
        for name, (decay, goal) in METHODS.items():
            callbacks = []
            if goal is not None:
                rule = {"step": 0.002, "window": 5}
                callbacks.append(lg.LipschitzRegularizer("clip", goal_accuracy=goal, controller=rule))
            make = lambda decay=decay: Classifier(dense(64, 200, 80, 10), 64, weight_decay=decay)  # noqa: E731
            model = fit(make, x, y, seed, given.epochs, *callbacks)
            curve = [robust_accuracy(model, test_x, test_y, eps, HIGHEST) for eps in RADII]
            bound = lg.bound(model, test_x[:1], tol=1e-4).value
            noise = noisy_accuracy(model, test_x, test_y, SIGMA)
            found[name].append((accuracy(model, test_x, test_y), noise, curve[RADII.index(EPS)], bound))
            curves[name].append(curve)
    rows = []
    for name, runs in found.items():
        clean, noise, attack, bound = (statistics.mean(column) for column in zip(*runs, strict=True))
        above = sum(a[2] > b[2] for a, b in zip(runs, found["plain"], strict=True))
        beats = "" if name == "plain" else f"{above} of {given.seeds}"
        rows.append((name, percent(clean), percent(noise), percent(attack), beats, f"{bound:.1f}"))
    print(table(("method", "accuracy %", f"noise {SIGMA:g} %", f"PGD eps {EPS:g} %", "above plain", "verified bound"), rows))

    mpl.use("Agg")
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, runs in curves.items():
        means = [statistics.mean(column) for column in zip(*runs, strict=True)]
        clean = statistics.mean(run[0] for run in found[name])
        axes.plot(
            (0, *RADII), [100 * v for v in (clean, *means)], marker="o", label=name, linestyle="-" if "CLIP" in name else "--"
        )
    axes.set(xlabel="l2 radius of the attack (pixels from 0 to 2.7)", ylabel="accuracy under PGD, %", ylim=(0, 101))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(given.out / "clip_digits.png", dpi=120)
