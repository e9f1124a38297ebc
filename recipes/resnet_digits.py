"""A small ResNet with BatchNorm on digits of 16 x 16 pixels, its verified Lipschitz bounds beside its accuracy.

The bound is of the network as it is deployed, with BatchNorm's running statistics: in the first epochs, when these have not
settled, it may rise and fall by orders of magnitude. Takes about a minute on one core.

Run with: python recipes/resnet_digits.py [picture.png]
"""

import sys
from pathlib import Path

import torch
from cnn_digits import plot, train
from lightning.pytorch import seed_everything
from torch import Tensor, nn


class Block(nn.Module):
    """A residual block, with a projection where the shape changes."""

    def __init__(self, few: int, many: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(few, many, 3, stride, 1, bias=False), nn.BatchNorm2d(many)
        self.conv2, self.norm2 = nn.Conv2d(many, many, 3, 1, 1, bias=False), nn.BatchNorm2d(many)
        self.short = nn.Identity()
        if stride > 1 or few != many:
            self.short = nn.Sequential(nn.Conv2d(few, many, 1, stride, bias=False), nn.BatchNorm2d(many))

    def forward(self, x: Tensor) -> Tensor:
        """relu(short(x) + way(x))."""
        way = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(way + self.short(x))


class ResNet(nn.Module):
    """Three residual blocks of 4, 8 and 16 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Sequential(nn.Conv2d(1, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.blocks = nn.Sequential(Block(4, 4, 1), Block(4, 8, 2), Block(8, 16, 2))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, 10)."""
        return self.head(self.blocks(self.start(x)).mean((2, 3)))


if __name__ == "__main__":
    seed_everything(0, verbose=False)
    plot(train(ResNet()), "A ResNet on digits of 16 x 16", Path(sys.argv[1] if len(sys.argv) > 1 else "resnet_digits.png"))
