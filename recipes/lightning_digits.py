"""An ordinary Lightning script with one line added: the callback.

Run with: python recipes/lightning_digits.py
"""

import torch
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lipguard import LipschitzMonitor


class Digits(LightningModule):
    """A classifier of 8x8 digits."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of a batch of images."""
        return self.network(x)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Cross-entropy of a batch."""
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters())


if __name__ == "__main__":
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target))
    trainer = Trainer(
        max_epochs=10,
        accelerator="cpu",
        callbacks=[LipschitzMonitor(prog_bar=True)],  # the added line
    )
    trainer.fit(Digits(), DataLoader(data, batch_size=64, shuffle=True))
    print({name: float(value) for name, value in trainer.callback_metrics.items()})
