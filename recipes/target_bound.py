"""The verified bound of a training is led to a value that is asked for, on digits: a dense and a convolutional network.

Run with: python recipes/target_bound.py --seeds 1 --out figures
"""

from __future__ import annotations

import matplotlib as mpl
import matplotlib.pyplot as plt
from common import Classifier, accuracy, arguments, dense, digits, fit, percent, table
from torch import nn

import lipguard as lg


class History(lg.LipschitzMonitor):
    """The monitor, keeping the verified bound of every epoch."""

    def on_fit_start(self, trainer: object, pl_module: object) -> None:
        """A new list for every training."""
        self.bounds: list[float] = []

    def on_train_epoch_end(self, trainer: object, pl_module: object) -> None:
        """Measures, and keeps the value."""
        super().on_train_epoch_end(trainer, pl_module)  # pyright: ignore[reportArgumentType]
        assert self.last is not None
        self.bounds.append(self.last.upper.value)


def convolutional() -> nn.Module:
    """Two strided convolutions and a linear layer."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


NETWORKS = {"MLP 64-64-64-10": lambda: dense(64, 64, 64, 10), "CNN 8-16-10": convolutional}
TARGETS = (5.0, 10.0, 20.0)

if __name__ == "__main__":
    given = arguments(__doc__ or "", seeds=1, epochs=40)
    x, y, test_x, test_y = digits()
    rows = []
    histories: dict[tuple[str, float | None], list[float]] = {}
    for name, net in NETWORKS.items():
        for target in (None, *TARGETS):
            for seed in range(given.seeds):
                history = History(max_overhead=1.0)
                callbacks = [history] if target is None else [history, lg.LipschitzRegularizer(target=target)]
                model = fit(lambda net=net: Classifier(net(), 64), x, y, seed, given.epochs, *callbacks)
                bound = lg.bound(model, test_x[:1]).value
                off = "" if target is None else f"{100 * (bound / target - 1):+.1f} %"
                rows.append((name, target or "none", seed, f"{bound:.3f}", off, percent(accuracy(model, test_x, test_y))))
                histories.setdefault((name, target), history.bounds)
    print(table(("network", "target", "seed", "verified bound", "off", "accuracy %"), rows))

    mpl.use("Agg")
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for place, name in zip(axes, NETWORKS, strict=True):
        for color, target in enumerate((None, *TARGETS)):
            label = "no target" if target is None else f"target {target:g}"
            place.plot(range(1, given.epochs + 1), histories[name, target], color=f"C{color}", label=label)
            if target is not None:
                place.axhline(target, color=f"C{color}", linestyle=":", linewidth=1)
        place.set(title=name, xlabel="epoch", yscale="log")
        place.grid(alpha=0.3, which="both")
    axes[0].set(ylabel="verified bound")
    axes[0].legend()
    figure.savefig(given.out / "target_bound.png", dpi=120)
