"""Networks of convolutions, pools and branches drawn by Hypothesis: captured exactly, lower <= upper, and no exception."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_capture_convolutions import randomised
from test_random_networks import ACTIVATIONS
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import lipguard as lg
from lipguard.bounds.sampling import Sampling
from lipguard.bounds.semidefinite import Semidefinite
from lipguard.bounds.spectral import Spectral
from lipguard.bounds.toeplitz import Toeplitz
from lipguard.certificate import Query
from lipguard.programs.rewriting import slope_restricted
from lipguard.solvers.threads import one_thread

ENTRIES = 160
"""Entries of one sample up to which further layers are drawn."""
SOLVED = 90
"""Neurons up to which the semidefinite program is solved as well."""

# torch's softplus jumps by 1e-9 at its threshold of 20, which is no rounding.
SMOOTH = ACTIVATIONS | {"softplus": lambda n: nn.Softplus(2.0, threshold=100)}

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
AVERAGES = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
ADAPTIVE = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Calls(nn.Module):
    """Layers one after another, each with how its value meets the one before it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.joins: list[Any] = []

    def add(self, layer: nn.Module, join: Any = None) -> None:
        self.layers.append(layer)
        self.joins.append(join)

    def forward(self, x: Tensor) -> Tensor:
        for layer, join in zip(self.layers, self.joins, strict=True):
            x = layer(x) if join is None else join(x, layer)
        return x


def pair(draw: st.DrawFn, dims: int, least: int, most: int) -> tuple[int, ...]:
    return tuple(draw(st.integers(least, most)) for _ in range(dims))


def convolution(draw: st.DrawFn, shape: tuple[int, ...], same: bool = False) -> nn.Module | None:
    """A convolution that fits (channels, *space), in any of its options; one that keeps the shape if `same`."""
    channels, *space = shape
    dims = len(space)
    groups = draw(st.sampled_from([g for g in (1, 1, 2, channels) if channels % g == 0]))
    out = channels if same else groups * draw(st.integers(1, 2))
    bias = draw(st.booleans())
    kernel, dilation = pair(draw, dims, 1, 3), pair(draw, dims, 1, 2)
    spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    if same:
        if mode in ("reflect", "circular") and any(s >= n for s, n in zip(spans, space, strict=True)):
            mode = "zeros"
        return CONVOLUTIONS[dims - 1](channels, out, kernel, 1, "same", dilation, groups, bias, mode)
    stride = pair(draw, dims, 1, 3)
    if draw(st.sampled_from([False, False, True])):
        extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
        padding = tuple(draw(st.integers(0, span)) for span in spans)
        large = [
            (n - 1) * s - 2 * p + span + 1 + e for n, s, p, span, e in zip(space, stride, padding, spans, extra, strict=True)
        ]
        if min(large) < 1 or out * math.prod(large) > 2 * ENTRIES:
            return None
        return TRANSPOSED[dims - 1](channels, out, kernel, stride, padding, extra, groups, bias, dilation)
    padding = pair(draw, dims, 0, 2)
    if mode in ("reflect", "circular") and any(p >= n for p, n in zip(padding, space, strict=True)):
        mode = "zeros"
    if any(n + 2 * p <= span for n, p, span in zip(space, padding, spans, strict=True)):
        return None
    return CONVOLUTIONS[dims - 1](channels, out, kernel, stride, padding, dilation, groups, bias, mode)


def pool(draw: st.DrawFn, shape: tuple[int, ...]) -> nn.Module:
    _, *space = shape
    dims = len(space)
    if draw(st.booleans()):
        sizes = tuple(draw(st.integers(1, n + 1)) for n in space)
        return ADAPTIVE[dims - 1](sizes if dims > 1 else sizes[0])
    kernel = tuple(draw(st.integers(1, n)) for n in space)
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    options = {"ceil_mode": draw(st.booleans()), "count_include_pad": draw(st.booleans())}
    return AVERAGES[dims - 1](kernel, pair(draw, dims, 1, 3), padding, **options)


class Move(nn.Module):
    """A rearrangement by name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        c = x.shape[1]
        match self.name:
            case "flip":
                return x.flip(1, -1)
            case "roll":
                return x.roll(1, -1)
            case "shuffle":
                return x.unflatten(1, (2, c // 2)).transpose(1, 2).flatten(1, 2) if c % 2 == 0 else x
            case "swap":
                return x.transpose(1, -1)
            case "crop":
                return x[..., 1:] if x.shape[-1] > 1 else x
            case "every second":
                return x[:, :, ::2]
            case "pad":
                return F.pad(x, (1, 2), value=0.5)
            case "reflect":
                return F.pad(x, (1, 0), mode="replicate") if x.ndim < 5 else x
            case "upsample":
                return F.interpolate(x, scale_factor=2) if x.numel() // len(x) * 2 ** (x.ndim - 2) <= ENTRIES else x
            case "mean":
                return x - x.mean(-1, keepdim=True)
            case "pixel":
                return F.pixel_shuffle(x, 2) if x.ndim == 4 and c % 4 == 0 else x
        raise AssertionError(self.name)


MOVES = ["flip", "roll", "shuffle", "swap", "crop", "every second", "pad", "reflect", "upsample", "mean", "pixel"]


def residual(x: Tensor, layer: nn.Module) -> Tensor:
    return x + layer(x)


def concatenated(x: Tensor, layer: nn.Module) -> Tensor:
    return torch.cat([layer(x), x], 1)


def half(x: Tensor, layer: nn.Module) -> Tensor:
    a, b = x.chunk(2, 1)
    return torch.cat([a, layer(b)], 1)


def shared(x: Tensor, layer: nn.Module) -> Tensor:
    return layer(layer(x).tanh()) - x


class Projected(nn.Module):
    """A residual block whose shortcut is a strided projection, with BatchNorm on both ways."""

    def __init__(self, few: int, many: int, dims: int, stride: int, activation: nn.Module) -> None:
        super().__init__()
        conv, norm = CONVOLUTIONS[dims - 1], NORMS[dims - 1]
        self.way = nn.Sequential(
            conv(few, many, 3, stride, 1, bias=False), norm(many), activation, conv(many, many, 3, 1, 1), norm(many)
        )
        self.short = nn.Sequential(conv(few, many, 1, stride, bias=False), norm(many))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.way(x) + self.short(x))


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """(module, shape of a batch of one)."""
    torch.manual_seed(draw(st.integers(0, 2**31 - 1)))
    dims = draw(st.sampled_from([1, 1, 2, 2, 2, 3]))
    shape = (draw(st.integers(1, 4)), *pair(draw, dims, 2, (12, 5, 3)[dims - 1]))
    start = (1, *shape)
    model = Calls().double().eval()

    def grow(layer: nn.Module, join: Any = None) -> None:
        nonlocal shape
        layer = randomised(layer, len(model.layers))
        with torch.no_grad():
            x = torch.zeros(1, *shape, dtype=torch.float64)
            y = layer(x) if join is None else join(x, layer)
        if math.prod(y.shape) <= 2 * ENTRIES:
            model.add(layer, join)
            shape = tuple(y.shape[1:])

    def activation() -> nn.Module:
        return SMOOTH[draw(st.sampled_from(sorted(SMOOTH)))](shape[0])

    for _ in range(draw(st.integers(1, 4))):
        if math.prod(shape) > ENTRIES:
            break
        kind = draw(st.sampled_from(["conv", "conv", "pool", "norm", "move", "residual", "projected", "cat", "half", "shared"]))
        if kind == "conv":
            layer = convolution(draw, shape)
            if layer is not None:
                grow(layer)
        elif kind == "pool":
            grow(pool(draw, shape))
        elif kind == "norm":
            grow(NORMS[dims - 1](shape[0], affine=draw(st.booleans())))
        elif kind == "move":
            grow(Move(draw(st.sampled_from(MOVES))))
        elif kind == "projected":
            grow(Projected(shape[0], draw(st.integers(1, 3)), dims, draw(st.integers(1, 2)), nn.ReLU()))
        else:
            part = (shape[0] // 2, *shape[1:]) if kind == "half" else shape
            if part[0] == 0 or (kind == "half" and shape[0] % 2):
                continue
            inner = convolution(draw, part, same=True)
            assert inner is not None
            join = {"residual": residual, "cat": concatenated, "half": half, "shared": shared}[kind]
            grow(inner if kind == "shared" else nn.Sequential(inner, nn.LeakyReLU(0.1)), join)
        if draw(st.booleans()):
            grow(activation())
    if draw(st.booleans()):
        grow(nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), draw(st.integers(1, 5)))))
    if not model.layers:
        grow(nn.Flatten())
    return model, start


def check(case: tuple[nn.Module, tuple[int, ...]]) -> None:
    model, shape = case
    network = lg.capture(model, torch.zeros(shape, dtype=torch.float64))
    x = torch.randn(3, *shape[1:], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        expected = model(x.clone()).flatten(1)
        values = network.values(x.flatten(1))
    # sums of at most some hundred products in float64, through some twelve layers
    scale = 1 + max(float(v.abs().max()) for v in values)
    torch.testing.assert_close(values[-1], expected, rtol=0, atol=1e-11 * scale)
    with one_thread():
        lower, _ = Sampling(starts=4, steps=4)(network, Query())
        product, _ = Spectral()(network, Query())
        toeplitz, _ = Toeplitz()(network, Query())
        assert (lower.rigor, product.rigor, toeplitz.rigor) == ("verified",) * 3
        # the inflations of the proofs of both
        assert lower.value <= product.value <= toeplitz.value * (1 + 1e-6) < math.inf
        if slope_restricted(network).neurons <= SOLVED and network.inputs <= SOLVED:
            neuron, _ = Semidefinite()(network, Query())
            assert neuron.rigor == "verified" and lower.value <= neuron.value <= product.value * (1 + 1e-5)


OPTIONS: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
}


@settings(max_examples=150, **OPTIONS)
@given(networks())
def test_a_hundred_and_fifty_networks(case: tuple[nn.Module, tuple[int, ...]]) -> None:
    check(case)


@pytest.mark.slow
def test_five_hundred_networks() -> None:
    seen = 0

    @settings(max_examples=520, **OPTIONS)
    @given(networks())
    def run(case: tuple[nn.Module, tuple[int, ...]]) -> None:
        nonlocal seen
        check(case)
        seen += 1

    run()
    assert seen >= 500
