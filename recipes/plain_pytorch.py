"""The verified bounds in a plain PyTorch loop, without Lightning.

Run with: python recipes/plain_pytorch.py
"""

import torch
from torch import nn

from lipguard import Tracker

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
x = 4 * torch.rand(512, 2) - 2
y = (x[:, :1] * 3).sin() * x[:, 1:]

tracker = Tracker(model, x[:1])
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for step in range(1, 601):
    loss = nn.functional.mse_loss(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 100 == 0:
        upper, lower = tracker.update()
        print(f"step {step:4d}   loss {loss.item():.4f}   {lower:.4f} <= Lipschitz constant <= {upper:.4f}")
