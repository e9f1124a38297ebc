"""A pendulum's controller learned by imitation, its local Lipschitz constant kept under a limit while it is learned.

The expert is a saturated feedback, steep around the upright position. A network that imitates it freely is as steep, and
passes on the sensors' noise as violent torques; under a limit on the box of states where it works it stays calm. The
constant on that box is verified by an exact search.

Run with: python recipes/closed_loop.py --out figures
"""

from __future__ import annotations

import math

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from common import Classifier, arguments, dense, fit, table
from torch import Tensor, nn

import lipguard as lg

BOX = lg.Box([-1.0, -3.0], [1.0, 3.0])  # angle in rad, angular velocity in rad/s
LIMITS = (None, 30.0, 15.0)
STRONGEST, STEP, NOISE = 15.0, 0.02, 0.05


def expert(state: Tensor) -> Tensor:
    """Torque (B, 1) of a saturated linear feedback."""
    return STRONGEST * torch.tanh((-60.0 * state[:, :1] - 12.0 * state[:, 1:]) / STRONGEST)


def simulate(policy: nn.Module, noise: float, steps: int = 250, starts: int = 50) -> tuple[Tensor, Tensor]:
    """States (steps, starts, 2) and torques (steps, starts, 1) of angle'' = 9.81 sin(angle) + torque - 0.1 angle'."""
    generator = torch.Generator().manual_seed(0)
    state = torch.rand(starts, 2, generator=generator) * torch.tensor([1.0, 2.0]) - torch.tensor([0.5, 1.0])
    states, torques = [], []
    with torch.no_grad():
        for _ in range(steps):
            torque = policy(state + noise * torch.randn(state.shape, generator=generator)).clamp(-STRONGEST, STRONGEST)
            speed = state[:, 1:] + STEP * (9.81 * torch.sin(state[:, :1]) + torque - 0.1 * state[:, 1:])
            state = torch.cat([state[:, :1] + STEP * speed, speed], 1)
            states.append(state)
            torques.append(torque)
    return torch.stack(states), torch.stack(torques)


def imitation(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean squared difference from the expert's torque, in units of the strongest."""
    return nn.functional.mse_loss(model(x), y) / STRONGEST


if __name__ == "__main__":
    given = arguments(__doc__ or "", seeds=1, epochs=60)
    x = BOX.sample(2000, 2, torch.Generator().manual_seed(1)).float()
    y = expert(x)
    rows, runs = [], []
    for limit in LIMITS:
        callbacks = []
        if limit is not None:
            callbacks.append(lg.LipschitzRegularizer("lipsdp-local", target=0.97 * limit, options={"domain": BOX}))
        policy = fit(lambda: Classifier(dense(2, 16, 16, 1), 2, lr=5e-3, loss=imitation), x, y, 0, given.epochs, *callbacks)
        exact = lg.exact(policy, x[:1], domain=BOX, time_limit=60)
        error = math.sqrt(float((policy(x) - y).square().mean()))
        calm, _ = simulate(policy, 0.0)
        states, torques = simulate(policy, NOISE)
        settled = float((calm[-1, :, 0].abs() < 0.1).float().mean())
        chatter = float((torques[1:] - torques[:-1]).abs().mean())
        angle = float(states[-100:, :, 0].square().mean().sqrt())
        local = f"{exact.lower:.3f} .. {exact.upper:.3f}"
        rows.append(
            (limit or "none", local, exact.rigor, f"{error:.2f}", f"{100 * settled:.0f}", f"{angle:.3f}", f"{chatter:.2f}")
        )
        runs.append((states[:, 0, 0], torques[:, 0, 0], policy))
    headers = (
        "limit",
        "constant on the box",
        "rigor",
        "imitation error",
        "upright %",
        "angle, noisy",
        "torque change a step, noisy",
    )
    print(table(headers, rows))

    mpl.use("Agg")
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    angles = torch.stack([torch.linspace(-1, 1, 400), torch.zeros(400)], 1)
    time = STEP * torch.arange(len(runs[0][0]))
    axes[0].plot(angles[:, 0], expert(angles), color="black", linestyle=":", label="expert")
    for color, ((angle, torque, policy), limit) in enumerate(zip(runs, LIMITS, strict=True)):
        label = "no limit" if limit is None else f"limit {limit:g}"
        with torch.no_grad():
            axes[0].plot(angles[:, 0], policy(angles), color=f"C{color}", label=label)
        axes[1].plot(time, angle, color=f"C{color}", label=label)
        axes[2].plot(time, torque, color=f"C{color}", linewidth=0.8, label=label)
    axes[0].set(xlabel="angle, rad (at rest)", ylabel="torque", title="policies")
    axes[1].set(xlabel="time, s", ylabel="angle, rad", title=f"closed loop, noise {NOISE:g}")
    axes[2].set(xlabel="time, s", ylabel="torque", title="torques")
    axes[0].legend()
    for place in axes:
        place.grid(alpha=0.3)
    figure.savefig(given.out / "closed_loop.png", dpi=120)
