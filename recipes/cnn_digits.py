"""A convolutional network on digits of 16 x 16 pixels, its verified Lipschitz bounds beside its accuracy.

One multiplier for each of its 3072 neurons takes longer than measuring may: the monitor chooses one a channel by itself, and
says so. A second monitor logs the product of the layers' norms beside it. Takes about a minute on one core.

Run with: python recipes/cnn_digits.py [picture.png]
"""

import logging
import sys
from pathlib import Path

import matplotlib as mpl
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset, random_split

from lipguard import LipschitzMonitor

EPOCHS = 12


class Classifier(LightningModule):
    """A classifier of digits (batch, 1, 16, 16)."""

    def __init__(self, network: nn.Module, learning_rate: float = 3e-3) -> None:
        super().__init__()
        self.network, self.learning_rate = network, learning_rate
        self.example_input_array = torch.zeros(1, 1, 16, 16)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, 10)."""
        return self.network(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of a batch."""
        loss = functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy."""
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


class Curve(Callback):
    """Keeps and prints what every epoch logged."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """One row of the table; the monitors, which stand before this callback, have measured."""
        row = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if not self.rows:
            print(f"{'epoch':>5} {'accuracy':>9} {'witnessed >=':>13} {'LipSDP <=':>12} {'product <=':>12} {'seconds':>8}")
        self.rows.append(row)
        print(
            f"{len(self.rows):5d} {row['accuracy']:9.3f} {row['lipschitz/lower']:13.3f} {row['lipschitz/upper']:12.3f} "
            f"{row['product/upper']:12.3f} {row['lipschitz/seconds']:8.2f}"
        )


def digits() -> tuple[DataLoader, DataLoader]:
    """Training and validation batches of the 8 x 8 digits, upsampled to 16 x 16, values in [0, 1]."""
    data = load_digits()
    images = torch.tensor(data.images / 16, dtype=torch.float32)[:, None]
    images = functional.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)
    training, validation = random_split(TensorDataset(images, torch.tensor(data.target)), [0.8, 0.2])
    return DataLoader(training, batch_size=64, shuffle=True), DataLoader(validation, batch_size=512)


def train(network: nn.Module, epochs: int = EPOCHS) -> list[dict[str, float]]:
    """Train with both monitors; what every epoch logged."""
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    curve = Curve()
    monitors = [LipschitzMonitor(), LipschitzMonitor(method="spectral", prefix="product")]
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=[*monitors, curve], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Classifier(network), *digits())
    return curve.rows


def plot(rows: list[dict[str, float]], title: str, path: Path) -> None:
    """Bounds over epochs on a logarithmic axis, and the accuracy below them."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    epochs = range(1, len(rows) + 1)
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(7, 5.5), height_ratios=(3, 1), layout="constrained")
    above.fill_between(epochs, [r["lipschitz/lower"] for r in rows], [r["lipschitz/upper"] for r in rows], color="0.92")
    above.plot(epochs, [r["product/upper"] for r in rows], "s--", color="tab:orange", label="product of norms (verified)")
    above.plot(epochs, [r["lipschitz/upper"] for r in rows], "o-", color="tab:blue", label="LipSDP by channel (verified)")
    above.plot(epochs, [r["lipschitz/lower"] for r in rows], "^-", color="tab:green", label="witnessed from below (verified)")
    above.set(yscale="log", ylabel="Lipschitz constant, 2-norm", title=title)
    above.legend(frameon=False)
    below.plot(epochs, [100 * r["accuracy"] for r in rows], "o-", color="0.3")
    below.set(xlabel="epoch", ylabel="accuracy, %")
    figure.savefig(path, dpi=130)
    print(f"picture: {path}")


if __name__ == "__main__":
    seed_everything(0, verbose=False)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip
    plot(train(model), "A CNN on digits of 16 x 16", Path(sys.argv[1] if len(sys.argv) > 1 else "cnn_digits.png"))
