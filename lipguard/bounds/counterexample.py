"""Inputs of another class near samples, found by linearisation: an upper end for the search of certified radii."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipguard.certificate import Box
from lipguard.network import Network

_STEPS = 20
_OVERSHOOT = 1.02
_HALVINGS = 20


def nearest_found(network: Network, x: Tensor, y: Tensor, box: Box | None = None) -> Tensor:
    """2-norm distance from each sample to an input that is not of class y, inf where none was found.

    Each step goes to the nearest of the planes on which a linearised difference f_y - f_j vanishes (Moosavi-Dezfooli et
    al. 2016, DeepFool); the way back to the sample is then halved as long as the class is another.

    Args:
        network: a classifier.
        x: samples, (B, d).
        y: classes, (B,).
        box: every input that can occur.
    """
    at, found = x.clone(), torch.full_like(x[:, 0], math.inf)
    best = x.clone()
    for _ in range(_STEPS):
        wrong = _wrong(network, at, y)
        distance = torch.linalg.vector_norm(at - x, dim=1)
        better = wrong & (distance < found)
        found, best = torch.where(better, distance, found), torch.where(better[:, None], at, best)
        left = found.isinf()
        if not bool(left.any()):
            break
        at = torch.where(left[:, None], _step(network, at, y), at)
        at = at if box is None else box.project(at)
    low, high = torch.zeros_like(found), torch.ones_like(found)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        wrong = _wrong(network, x + middle[:, None] * (best - x), y)
        low, high = torch.where(wrong, low, middle), torch.where(wrong, middle, high)
    return torch.where(found.isinf(), found, torch.linalg.vector_norm(best - x, dim=1) * high)


def _wrong(network: Network, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return network(x).argmax(1) != y


def _step(network: Network, x: Tensor, y: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        x = x.clone().requires_grad_(True)
        f = network(x)
        rows = torch.stack([torch.autograd.grad(f[:, j].sum(), x, retain_graph=True)[0] for j in range(f.shape[1])], 1)
    with torch.no_grad():
        margins = f.gather(1, y[:, None]) - f
        normals = rows.gather(1, y[:, None, None].expand(-1, 1, rows.shape[2])) - rows
        length = torch.linalg.vector_norm(normals, dim=2).clamp_min(1e-300)
        distance = (margins.clamp_min(0) / length).scatter(1, y[:, None], math.inf)
        nearest = distance.argmin(1)[:, None]
        normal = normals.gather(1, nearest[:, :, None].expand(-1, 1, normals.shape[2]))[:, 0]
        size = distance.gather(1, nearest) / length.gather(1, nearest)
        step = _OVERSHOOT * size * normal + 1e-9 * normal / length.gather(1, nearest)
        return (x - torch.where(step.isfinite(), step, torch.zeros_like(step))).detach()
