"""What the training recipes share: the digits, a Lightning classifier, an attack, and tables."""

from __future__ import annotations

import argparse
import itertools
import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def digits(highest: float = 1.0, train: int = 1200) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The 8x8 digits with pixels from 0 to `highest`, in a fixed random order: x and y for training, x and y for testing."""
    data = load_digits()
    order = torch.randperm(len(data.data), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(data.data / 16 * highest, dtype=torch.float32)[order], torch.tensor(data.target)[order]
    return x[:train], y[:train], x[train:], y[train:]


def dense(*sizes: int, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers with activations between them."""
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1])


class Classifier(LightningModule):
    """An ordinary classifier: Adam, and cross-entropy unless another loss of (module, x, y) is given."""

    def __init__(
        self, net: nn.Module, inputs: int, lr: float = 2e-3, weight_decay: float = 0.0, loss: Loss | None = None
    ) -> None:
        super().__init__()
        self.net, self.lr, self.weight_decay, self.loss = net, lr, weight_decay, loss
        self.example_input_array = torch.zeros(1, inputs)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        x, y = batch
        return nn.functional.cross_entropy(self(x), y) if self.loss is None else self.loss(self, x, y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam with decoupled weight decay."""
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)


def fit(make: Callable[[], LightningModule], x: Tensor, y: Tensor, seed: int, epochs: int, *callbacks: object) -> LightningModule:
    """A module trained in batches of 64; the same seed gives the same first weights and batches."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    seed_everything(seed, verbose=False)
    module = make()
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),  # pyright: ignore[reportArgumentType]
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True))
    return module.eval()


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of samples classified right."""
    with torch.no_grad():
        return float((model(x).argmax(1) == y).double().mean())


def attacked(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int = 40, highest: float | None = None) -> Tensor:
    """Projected gradient ascent of the cross-entropy on the l2 ball: the inputs found; pixels stay in [0, highest] if given."""
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(x.shape, generator=generator)
    delta = 0.5 * eps * delta / delta.norm(dim=1, keepdim=True)
    for _ in range(steps):
        delta.requires_grad_(True)
        gradient = torch.autograd.grad(nn.functional.cross_entropy(model(x + delta), y, reduction="sum"), delta)[0]
        with torch.no_grad():
            delta = delta + 2.5 * eps / steps * gradient / gradient.norm(dim=1, keepdim=True).clamp_min(1e-12)
            delta = delta * (eps / delta.norm(dim=1, keepdim=True)).clamp_max(1.0)
            if highest is not None:
                delta = (x + delta).clamp(0, highest) - x
    return (x + delta).detach()


def robust_accuracy(model: nn.Module, x: Tensor, y: Tensor, eps: float, highest: float | None = None) -> float:
    """Accuracy under the attack; a sample counts as lost if it is wrong before or after."""
    with torch.no_grad():
        right = model(x).argmax(1) == y
    moved = attacked(model, x, y, eps, highest=highest)
    with torch.no_grad():
        return float((right & (model(moved).argmax(1) == y)).double().mean())


def noisy_accuracy(model: nn.Module, x: Tensor, y: Tensor, sigma: float) -> float:
    """Accuracy under Gaussian noise, the mean of ten draws."""
    generator = torch.Generator().manual_seed(0)
    draws = [accuracy(model, x + sigma * torch.randn(x.shape, generator=generator), y) for _ in range(10)]
    return sum(draws) / len(draws)


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [list(headers), ["---"] * len(headers), *([_text(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _text(cell: object) -> str:
    return f"{cell:.3g}" if isinstance(cell, float) else str(cell)


def percent(value: float) -> str:
    """0.9713 as 97.1."""
    return f"{100 * value:.1f}"


def arguments(description: str, seeds: int, epochs: int) -> argparse.Namespace:
    """--seeds, --epochs and --out, the folder for the plot."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seeds", type=int, default=seeds, help="seeds 0, 1, ...")
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the plot")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    return given
