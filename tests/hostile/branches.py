"""Harmful ingredients that branch on values, in all the ways in which Python may read one."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
from ingredients import SLOPE, Draw, Layer, harmful
from torch import Tensor, nn


def _branch(name: str, test: Any) -> None:
    def make(draw: Draw) -> nn.Module:
        return Layer(lambda _, x: x * (SLOPE if test(x, draw.switch) else 1))

    make.__name__ = name
    harmful(make)


def _raises(x: Tensor, s: float) -> bool:
    try:
        torch.testing.assert_close(x.clamp(max=s), x)
    except AssertionError:
        return True
    return False


for _name, _test in {
    "by_bool": lambda x, s: (x > s).any(),
    "by_item": lambda x, s: x.max().item() > s,
    "by_float": lambda x, s: float(x.sum()) > s,
    "by_nonzero": lambda x, s: len((x > s).nonzero()) > 0,
    "by_text": lambda x, s: "e+" in str(x),
    "by_format": lambda x, s: len(f"{x[0, 0]:.0f}") > 4,
    "by_allclose": lambda x, s: not torch.allclose(x, x.clamp(max=s)),
    "by_equal": lambda x, s: not torch.equal(x, x.clamp(max=s)),
    "by_list": lambda x, s: max(x[0].tolist()) > s,
    "by_max": lambda x, s: max(x[0]) > s,
    "by_in": lambda x, s: 1.0 in (x > s).to(x),
    "by_assertion": _raises,
    "by_shape": lambda x, s: x[x > s].numel() > 0,
    "by_unique": lambda x, s: len((x > s).unique()) > 1,
    "by_int": lambda x, s: int(x[0, 0]) > s,
    "by_numpy": lambda x, s: np.asarray(x.detach()).max() > s,
    "by_argmax": lambda x, s: x[0].argmax() == 1,
    "by_norm": lambda x, s: x.norm() > s,
    "by_grad": lambda x, s: torch.is_grad_enabled(),
    "by_requires_grad": lambda x, s: x.requires_grad,
    "by_count": lambda x, s: torch.count_nonzero(x > s) > 0,
    "by_range": lambda x, s: len(range(int((x > s).sum()))) > 0,
    "by_hash": lambda x, s: hash(float(x[0, 0])) % 2,
    "by_ctypes": lambda x, s: memoryview(x.detach().numpy()).tolist()[0][0] > s,
    "by_repr": lambda x, s: len(repr(x.detach())) > 60 + 12 * len(x),
    "by_isfinite": lambda x, s: not (x * 1e36).float().isfinite().all(),
    "by_storage": lambda x, s: max(x.untyped_storage().tolist()[:8]) > s,
    "by_where": lambda x, s: torch.where(x > s)[0].shape[0],
    "by_masked_select": lambda x, s: x.masked_select(x > s).shape[0],
    "by_bincount": lambda x, s: torch.bincount((x > s).long().flatten()).shape[0] > 1,
    "by_histogram": lambda x, s: torch.histc(x, 2, s, 2 * s).sum() > 0,
    "by_complex": lambda x, s: complex(x[0, 0]).real > s,
    "by_inference": lambda x, s: torch.is_inference_mode_enabled(),
}.items():
    _branch(_name, _test)


@harmful
def caught(draw: Draw) -> nn.Module:
    def run(_: Any, x: Tensor) -> Tensor:
        with contextlib.suppress(Exception):
            return x * (SLOPE if bool((x > draw.switch).any()) else 1)
        return x

    return Layer(run)


@harmful
def caught_all(draw: Draw) -> nn.Module:
    def run(_: Any, x: Tensor) -> Tensor:
        try:
            y = x + draw.beyond(x).exp().log() * 2
        except BaseException:
            y = x
        return y

    return Layer(run)
