"""`lipguard demo`: a digits classifier trained by Lightning with its verified Lipschitz bounds beside its accuracy."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lipguard.callbacks import LipschitzMonitor
from lipguard.cli.text import Screen
from lipguard.outward import show_lower, show_upper

__all__ = ["DigitsClassifier", "Epoch", "plot", "run"]


class DigitsClassifier(LightningModule):
    """A 64-128-128-10 ReLU classifier of the 8x8 digits bundled with scikit-learn."""

    def __init__(self, width: int = 128, learning_rate: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
        self.learning_rate = learning_rate
        self.example_input_array = torch.zeros(1, 64)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, 10) of images (batch, 64) with values in [0, 1]."""
        return self.network(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of a batch."""
        loss = functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Logs the accuracy."""
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


@dataclass(frozen=True)
class Epoch:
    """What one epoch's measurement found."""

    number: int
    accuracy: float
    spectral: float
    upper: float
    lower: float


class _Epochs(Callback):
    """A line after every epoch: accuracy and the current bounds."""

    def __init__(self, monitor: LipschitzMonitor, screen: Screen, epochs: int) -> None:
        self.monitor, self.screen, self.total = monitor, screen, epochs
        self.epochs: list[Epoch] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes and shows the values measured a moment ago by the monitor, which stands before this callback."""
        accuracy, last = float(trainer.callback_metrics["accuracy"]), self.monitor.last
        head = (f"epoch {trainer.current_epoch + 1:3d}/{self.total}", "dim"), f" accuracy {accuracy:.1%} "
        if last is None:
            self.screen.line(*head, ("not measured", "yellow"))
            return
        epoch = Epoch(trainer.current_epoch + 1, accuracy, last.spectral.value, last.upper.value, last.lower.value)
        self.epochs.append(epoch)
        self.screen.line(*head, (show_lower(epoch.lower, 4), "cyan"), "≤ L ≤", (show_upper(epoch.upper, 4), "bold green"))


def run(epochs: int = 30, out: str | Path = "lipguard-demo", console: Any = None) -> list[Epoch]:
    """Trains, shows the bounds while it does, and leaves the log, the checkpoint and a plot in `out`.

    Args:
        epochs: how many to train.
        out: the folder.
        console: a `rich.console.Console` to print on; None prints on stdout.
    Returns:
        The values of every epoch.
    """
    screen, out = Screen(console), Path(out)
    train, test = _digits()
    started = time.perf_counter()
    with _quiet():
        seed_everything(0, verbose=False)
        monitor = LipschitzMonitor(prog_bar=True)
        shown = _Epochs(monitor, screen, epochs)
        trainer = Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            callbacks=[monitor, shown],
            logger=CSVLogger(out, name="", version=""),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=10,
        )
        trainer.fit(DigitsClassifier(), DataLoader(train, batch_size=64, shuffle=True), DataLoader(test, batch_size=len(test)))
        trainer.save_checkpoint(out / "digits.ckpt")
    if shown.epochs:
        plot(shown.epochs, out / "bounds.png")
        _summary(screen, shown.epochs[-1], monitor, time.perf_counter() - started)
    else:
        screen.line(("No epoch could be measured; the log counts the failures.", "yellow"))
    _files(screen, out)
    return shown.epochs


def plot(epochs: list[Epoch], path: Path) -> None:
    """Accuracy and bounds over the epochs, as a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    blue, green, grey = "#1f6fb4", "#2a8f4f", "#8a8a8a"
    numbers = [epoch.number for epoch in epochs]
    figure, (top, bottom) = pyplot.subplots(
        2, 1, figsize=(8, 6.4), sharex=True, height_ratios=(1, 2), layout="constrained", dpi=144
    )
    top.plot(numbers, [100 * epoch.accuracy for epoch in epochs], color="#333333", marker="o", markersize=3)
    top.set_ylabel("test accuracy, %")
    top.set_title(
        "64-128-128-10 ReLU classifier of digits: accuracy and Lipschitz bounds while training", fontsize=11, loc="left"
    )

    lower, upper = [epoch.lower for epoch in epochs], [epoch.upper for epoch in epochs]
    bottom.fill_between(numbers, lower, upper, color=green, alpha=0.12, linewidth=0, label="where the constant lies")
    for values, colour, label in (
        ([epoch.spectral for epoch in epochs], grey, "product of spectral norms"),
        (upper, green, "LipSDP, verified upper bound"),
        (lower, blue, "witnessed lower bound"),
    ):
        last = (show_lower if values is lower else show_upper)(values[-1], 4)
        bottom.plot(numbers, values, color=colour, marker="o", markersize=3, label=f"{label}: {last}")
    bottom.set_yscale("log")
    bottom.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    bottom.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    bottom.yaxis.set_minor_formatter(ticker.NullFormatter())
    bottom.set_ylabel("global l2 Lipschitz constant")
    bottom.set_xlabel("epoch")
    bottom.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
    bottom.legend(frameon=False, fontsize=9)
    bottom.set_xlim(numbers[0] - 0.5, numbers[-1] + 0.5)
    for axes in (top, bottom):
        axes.grid(True, alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    pyplot.close(figure)


def _digits() -> tuple[TensorDataset, TensorDataset]:
    """Training and test images, four to one, scaled to [0, 1]."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('the demo needs scikit-learn and matplotlib: pip install "lipguard[demo]".') from error
    bunch: Any = load_digits()
    images = torch.as_tensor(bunch.data, dtype=torch.float32) / 16
    labels = torch.as_tensor(bunch.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    cut = len(images) * 4 // 5
    train, test = order[:cut], order[cut:]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


@contextmanager
def _quiet() -> Iterator[None]:
    """One thread, and Lightning's banners, tips and loader advice out of the terminal; warnings of lipguard stay."""
    loggers = [
        logging.getLogger(name)
        for name in ("lightning", "lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")
    ]
    levels, threads = [logger.level for logger in loggers], torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(lightning|pytorch_lightning|torch)(\.|$)")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        torch.set_num_threads(1)  # a network this small trains fastest on one
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _summary(screen: Screen, last: Epoch, monitor: LipschitzMonitor, seconds: float) -> None:
    each = monitor.measuring_seconds / last.number
    rows = [
        (("test accuracy", "dim"), f"{last.accuracy:.1%}", ""),
        (("product of spectral norms", "dim"), show_upper(last.spectral, 5), "verified upper bound"),
        (("LipSDP", "dim"), (show_upper(last.upper, 5), "green"), "verified upper bound"),
        (("steepest point found", "dim"), (show_lower(last.lower, 5), "cyan"), "witnessed lower bound"),
        (("seconds", "dim"), f"{seconds:.1f}", f"of which {monitor.measuring_seconds:.1f} measuring, {each:.3f} an epoch"),
        (("share of training time", "dim"), f"{monitor.overhead:.0%}", "short training: 0.5 s a measurement is always allowed"),
    ]
    screen.line()
    screen.table(rows, title=f"After {last.number} epochs")
    screen.line()


def _files(screen: Screen, out: Path) -> None:
    screen.line((f"Left in {out}/: metrics.csv, bounds.png, digits.ckpt, which is bounded again by", "dim"))
    screen.line(f"lipguard bound {out / 'digits.ckpt'} --model lipguard.cli.demo.DigitsClassifier")
