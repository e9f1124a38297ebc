"""`lipsdp-channel`: the torus form equals the network, its program the tied LipSDP of the unrolled torus, bounds enclose."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from itertools import product

import cvxpy as cp
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_capture_convolutions import Dense3, ResNet, UNet, randomised
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import lipguard as lg
from lipguard import errors
from lipguard.audit.encoding import certificate_from_json, certificate_json
from lipguard.bounds.channel import Channel, _Problem
from lipguard.certificate import ChannelMultipliers, Query
from lipguard.network import Activation, Network
from lipguard.programs.rewriting import slope_restricted
from lipguard.programs.torus import Torus
from lipguard.programs.torus_blocks import blocks
from lipguard.solvers.frequency_spheres import FrequencySpheres
from lipguard.solvers.low_rank import LowRank
from lipguard.verify.enclosed import Enclosed
from lipguard.verify.lmi.fronts import front

_CONVOLUTIONS = {1: (nn.Conv1d, nn.ConvTranspose1d), 2: (nn.Conv2d, nn.ConvTranspose2d), 3: (nn.Conv3d, nn.ConvTranspose3d)}
_LARGEST_SIDE, _LARGEST_RESULT = {1: 9, 2: 6, 3: 3}, {1: 12, 2: 7, 3: 3}


def images(seed: int, dims: int | None = None, head: bool | None = None) -> tuple[nn.Module, tuple[int, ...]]:
    """A random stack of convolutions of every kind, with or without activations between them, and its input's shape."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    dims = dims or rng.choice((1, 1, 2, 2, 3))
    channels = rng.choice((1, 2))
    shape = (1, channels, *[rng.randint(3, _LARGEST_SIDE[dims]) for _ in range(dims)])
    layers: list[nn.Module] = []
    for _ in range(rng.randint(1, 4 - dims) if dims > 1 else rng.randint(1, 3)):
        for _ in range(20):
            layer = _CONVOLUTIONS[dims][rng.random() < 0.3](
                channels,
                4,
                rng.randint(1, 3),
                stride=rng.randint(1, 2),
                padding=rng.randint(0, 2),
                dilation=rng.randint(1, 2),
                groups=rng.choice((1, 2)) if channels % 2 == 0 else 1,
            )
            try:
                result = nn.Sequential(*layers, layer)(torch.zeros(shape)).shape
            except RuntimeError:  # the kernel does not fit
                continue
            if min(result[2:]) > 1 and max(result[2:]) <= _LARGEST_RESULT[dims]:
                layers.append(layer)
                channels = 4
                break
        if layers and rng.random() < 0.8:
            layers.append(rng.choice((nn.ReLU, lambda: nn.LeakyReLU(0.2), nn.GELU))())
    if not layers:
        layers.append(_CONVOLUTIONS[dims][0](channels, 4, 1))
    layers.append(nn.ReLU())
    if rng.random() < 0.6 if head is None else head:
        size = nn.Sequential(*layers)(torch.zeros(shape)).numel()
        layers += [nn.Flatten(), nn.Linear(size, 4), nn.ReLU(), nn.Linear(4, 3)]
    return nn.Sequential(*layers).double(), shape


def captured(module: nn.Module, shape: tuple[int, ...]) -> Network:
    return lg.capture(module, torch.zeros(shape, dtype=torch.float64))


class Block(nn.Module):
    """A residual block with a projection, with option A's padding of channels, or with neither."""

    def __init__(self, few: int, many: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(few, many, 3, stride, 1), nn.Conv2d(many, many, 3, 1, 1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(many), nn.BatchNorm2d(many)])
        self.projection = nn.Conv2d(few, many, 1, stride) if shortcut == "B" and stride > 1 else None
        self.stride, self.pad = stride, (many - few) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[1](self.second(torch.relu(self.norms[0](self.first(x)))))
        if self.projection is not None:
            x = self.projection(x)
        elif self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return torch.relu(x + y)


class Residual(nn.Module):
    """A ResNet for small images: 6 n + 2 layers, after He et al. 2016, section 4.2."""

    def __init__(self, n: int, widths: tuple[int, ...], shortcut: str, inputs: int = 3) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(inputs, widths[0], 3, 1, 1), nn.BatchNorm2d(widths[0])
        parts, few = [], widths[0]
        for stage, many in enumerate(widths):
            for k in range(n):
                parts.append(Block(few, many, 2 if stage and not k else 1, shortcut))
                few = many
        self.blocks, self.head = nn.Sequential(*parts), nn.Linear(few, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(torch.relu(self.norm(self.first(x))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def generator() -> nn.Module:
    seed = (nn.Linear(3, 16), nn.ReLU(), nn.Unflatten(1, (4, 2, 2)))
    return nn.Sequential(*seed, nn.ConvTranspose2d(4, 3, 4, 2, 1), nn.ReLU(), nn.Conv2d(3, 2, 3, 1, 1))


class Resampled(nn.Module):
    """Nearest upsampling, a pixel shuffle, a border of zeros, channels chosen and joined."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(1, 4, 3, 2, 1), nn.Conv2d(4, 4, 3), nn.Conv2d(3, 2, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.second(F.pad(x, (1, 1, 1, 1))))
        up = F.interpolate(x[:, [2, 0]], scale_factor=2, mode="nearest")
        return torch.relu(self.third(torch.cat([up, F.pixel_shuffle(x, 2)], 1)))


class Hourglass(nn.Module):
    """Down twice and up twice, with skips: the way up is a layer of several places at one frequency."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 3, 3, 2, 1), nn.Conv2d(3, 3, 3, 2, 1)])
        self.up = nn.ModuleList([nn.ConvTranspose2d(3, 3, 2, 2), nn.ConvTranspose2d(6, 2, 2, 2)])
        self.last = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.down[0](x))
        b = torch.relu(self.down[1](a))
        c = torch.cat([torch.relu(self.up[0](torch.relu(self.down[2](b)))), b], 1)
        return self.last(torch.cat([torch.relu(self.up[1](c)), a], 1))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "projection": (lambda: Residual(1, (2, 4), "B", 1), (1, 1, 6, 6)),
    "option-a": (lambda: Residual(1, (2, 4), "A", 1), (1, 1, 6, 6)),
    "generator": (generator, (1, 3)),
    "resampled": (Resampled, (1, 1, 8, 8)),
    "hourglass": (Hourglass, (1, 1, 8, 8)),
    "resnet": (ResNet, (1, 1, 8, 8)),
    "separable": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 2, 3, 1, 1, groups=2), nn.Conv2d(2, 4, 3, 1, 1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 2, 2)
        ),
        (1, 2, 6, 6),
    ),
}  # fmt: skip


CONV, IMAGE = nn.Conv1d, (1, 1, 6)
CIRCULAR = nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular")
BETWEEN = (nn.Flatten(), nn.Linear(8, 8), nn.Unflatten(1, (2, 4)))


def network_of(name: str) -> Network:
    make, shape = MODELS[name]
    return captured(randomised(make()), shape)


class Signals:
    """Values on the torus, from their components at the frequencies that are held, and back."""

    def __init__(self, torus: Torus) -> None:
        self.torus = torus

    def components(self, i: int, window: Tensor) -> Tensor:
        """Orthonormal transforms by blocks of a node's value, zero outside its window: (F, components)."""
        torus, shape = self.torus, self.torus.shapes[i]
        if shape is None:
            return window[None]
        side, count = torus.side(i), torus.blocks[i]
        full = torch.zeros(shape[0], *side, dtype=torch.float64)
        full[(slice(None), *(slice(n) for n in shape[1:]))] = window.reshape(shape)
        result = []
        for f in torus.levels[torus.level(i)].frequencies.tolist():
            parts = []
            for place in product(*(range(m // b) for m, b in zip(side, count, strict=True))):
                own = full[(slice(None), *(slice(p, None, m // b) for p, m, b in zip(place, side, count, strict=True)))]
                angle = torch.zeros(count, dtype=torch.float64)
                for axis, (a, b) in enumerate(zip(f, count, strict=True)):
                    line = torch.arange(b, dtype=torch.float64) * (a / b)
                    angle = angle - 2 * math.pi * line.reshape([-1 if k == axis else 1 for k in range(len(count))])
                wave = torch.complex(angle.cos(), angle.sin()) / math.sqrt(math.prod(count))
                parts.append((own * wave).flatten(1).sum(1))
            result.append(torch.cat(parts))
        return torch.stack(result)


def applied(torus: Torus, row: dict[int, Tensor], values: dict[int, Tensor], level: int) -> Tensor:
    """A row of blocks times components, folded onto the frequencies of a level; by the formula, over all frequencies."""
    total: Tensor | None = None
    for source, block in row.items():
        its = torus.layers[source].level if source >= 0 else torus.ends[0][0]
        finest = min(level, its)
        terms = (block @ values[source][torus.descent(finest, its)].to(block.dtype)[:, :, None])[:, :, 0]
        fold, counts = torus.descent(finest, level), torus.levels[finest].counts
        own = torch.zeros(len(torus.levels[level].counts), terms.shape[1], dtype=torch.complex128)
        for f, g in enumerate(fold.tolist()):
            term = terms[f].to(own.dtype)
            mirrored = torus.levels[level].counts[g] == 1 and counts[f] == 2
            own[g] += term + term.conj() if mirrored else term
        total = own if total is None else total + own
    assert total is not None
    return total


def check_torus_form(network: Network) -> None:
    """A derivative through the torus form, with masks and the network's own slopes, is the network's derivative."""
    torus = Torus(network)
    rows, out = blocks(torus)
    signals = Signals(torus)
    generator = torch.Generator().manual_seed(3)
    x, d = torch.randn(2, network.inputs, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        plain = network.values(x[None])
    _, derivative = torch.func.jvp(lambda z: tuple(v[0] for v in network.values(z[None])), (x,), (d,))
    values = {-1: signals.components(0, d)}
    for k, layer in enumerate(torus.layers):
        expected = signals.components(layer.source, derivative[layer.source])
        got = applied(torus, rows[k], values, layer.level)
        if torus.shapes[layer.node] is not None:
            # Outside the window the pre-activation is whatever the torus makes of it: compare after the mask.
            got = masked(torus, layer.node, got)
            expected = masked(torus, layer.node, signals.components(layer.node, derivative[layer.source]))
        torch.testing.assert_close(got, expected.to(got.dtype), rtol=0, atol=1e-10 * (1 + float(expected.abs().max())))
        values[k] = signals.components(layer.node, derivative[layer.node])
        assert isinstance(network.nodes[layer.node], Activation) or layer.node == layer.source
    got = applied(torus, out, values, torus.ends[1][0])
    last = len(network.nodes) - 1
    expected = signals.components(last, derivative[last])
    got = got if torus.shapes[last] is None else masked(torus, last, got)
    torch.testing.assert_close(got, expected.to(got.dtype), rtol=0, atol=1e-10 * (1 + float(expected.abs().max())))
    assert len(plain) == len(derivative)


def masked(torus: Torus, i: int, components: Tensor) -> Tensor:
    """Components of the signal's part inside the window, by way of the signal itself."""
    shape, side, count = torus.shapes[i], torus.side(i), torus.blocks[i]
    assert shape is not None
    level = torus.levels[torus.level(i)]
    full = torch.zeros(shape[0], *side, dtype=torch.complex128)
    places = list(product(*(range(m // b) for m, b in zip(side, count, strict=True))))
    table = components.reshape(len(components), len(places), shape[0])
    for f, (numbers, weight) in enumerate(zip(level.frequencies.tolist(), level.counts.tolist(), strict=True)):
        angle = torch.zeros(count, dtype=torch.float64)
        for axis, (a, b) in enumerate(zip(numbers, count, strict=True)):
            line = torch.arange(b, dtype=torch.float64) * (a / b)
            angle = angle + 2 * math.pi * line.reshape([-1 if k == axis else 1 for k in range(len(count))])
        wave = torch.complex(angle.cos(), angle.sin()) / math.sqrt(math.prod(count))
        for k, place in enumerate(places):
            term = table[f, k].reshape(-1, *[1] * len(count)) * wave
            own = (slice(None), *(slice(p, None, m // b) for p, m, b in zip(place, side, count, strict=True)))
            full[own] += term if weight == 1 else 2 * term.real
    window = full[(slice(None), *(slice(n) for n in shape[1:]))]
    assert float(window.imag.abs().max()) <= 1e-9 * (1 + float(window.real.abs().max()))
    return Signals(torus).components(i, window.real.flatten()).to(torch.complex128)


@pytest.mark.parametrize("name", MODELS)
def test_the_torus_form_is_the_network(name: str) -> None:
    check_torus_form(network_of(name))


@given(st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_the_torus_form_of_random_stacks(seed: int) -> None:
    module, shape = images(seed)
    check_torus_form(captured(module, shape))


@given(st.integers(0, 10**6))
@settings(max_examples=10, deadline=None)
def test_lower_bounds_stay_below(seed: int) -> None:
    module, shape = images(seed)
    network = captured(module, shape)
    found = lg.bound(network, method="lipsdp-channel")
    product = lg.bound(network, method="spectral")
    assert found.rigor == "verified" and found.value <= product.value
    assert lg.bound(network, method="sampling", time_limit=0.05).value <= found.value
    if slope_restricted(network).neurons <= 150:
        # The torus allows more signals than the window, and ties multipliers.
        assert lg.bound(network).value <= found.value * (1 + 1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_bounds_of_architectures(name: str) -> None:
    network = network_of(name)
    found = Channel()(network, Query())[0]
    assert found.method == "lipsdp-channel" or found.value == found.details.get("product", found.value)
    assert found.rigor == "verified"
    assert lg.bound(network, method="sampling", time_limit=0.05).value <= found.value
    assert lg.bound(network, method="spectral").value >= found.value


def small(seed: int, channels: tuple[int, int] = (4, 6)) -> Network:
    torch.manual_seed(seed)
    few, many = channels
    return captured(
        nn.Sequential(
            nn.Conv2d(1, few, 3, padding=1), nn.ReLU(), nn.Conv2d(few, many, 3, 2, 1), nn.ReLU(),
            nn.Flatten(), nn.Linear(16 * many, 10),
        ).double(),
        (1, 1, 8, 8),
    )  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1])
def test_between_neurons_and_product(seed: int) -> None:
    network = small(seed, (2, 4))
    neuron = lg.bound(network, method="lipsdp-neuron", tol=1e-4).value
    channel = lg.bound(network, method="lipsdp-channel")
    layer = Channel(granularity="layer")(network, Query())[0]
    product = lg.bound(network, method="spectral").value
    assert channel.method == "lipsdp-channel"
    assert neuron <= channel.value * (1 + 1e-4)
    assert channel.value <= layer.value * (1 + 1e-3) and layer.value < product


def test_a_single_convolution_has_its_norm_on_the_torus() -> None:
    # relu of [1, 1] * x: |1 + exp(i f)| is 2 at f = 0, whatever the window.
    module = nn.Sequential(nn.Conv1d(1, 1, 2, padding=1, bias=False), nn.ReLU(), nn.Conv1d(1, 1, 1, bias=False)).double()
    for parameter in module.parameters():
        parameter.data.fill_(1)
    problem = _Problem(Torus(captured(module, (1, 1, 7))), False)
    found = LowRank().climb(FrequencySpheres(problem.program), *problem.program.interior())
    # One multiplier t: t (2 - ...) eliminated gives K*K t^2 / (2 t - 1), at its least where t = 1: |K|^2 = 4.
    assert found.rho == pytest.approx(4, rel=1e-5)
    assert found.dual == pytest.approx(4, rel=1e-5)


def test_the_optimum_is_that_of_the_unrolled_torus() -> None:
    """The tied LipSDP of the circular network, whose matrices are built entry by entry, solved by Clarabel."""
    torch.manual_seed(5)
    first, second = (
        nn.Conv1d(1, 2, 3, padding=1, bias=False).double(),
        nn.Conv1d(2, 2, 3, stride=2, padding=1, bias=False).double(),
    )
    head = nn.Linear(6, 2, bias=False).double()
    network = captured(nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), head), (1, 1, 5))
    torus = Torus(network)
    length = torus.side(0)[0]
    assert length >= 6 and length % 2 == 0

    def circular(weight: Tensor, stride: int) -> Tensor:
        matrix = torch.zeros(weight.shape[0], length // stride, weight.shape[1], length, dtype=torch.float64)
        for o, i, c, t in product(range(len(weight)), range(length // stride), range(weight.shape[1]), range(3)):
            matrix[o, i, c, (stride * i + t - 1) % length] += weight[o, c, t].detach()
        return matrix.flatten(2).flatten(0, 1)

    one, two = circular(first.weight, 1), circular(second.weight, 2)
    last = torch.zeros(2, 2, length // 2, dtype=torch.float64)
    last[:, :, :3] = head.weight.detach().reshape(2, 2, 3)
    last = last.flatten(1)
    # Variables x, u, v: rho |x|^2 + 2 s u'(u - W1 x) + 2 t v'(v - W2 u) - |H v|^2.
    rho, s, t = cp.Variable(), cp.Variable(2), cp.Variable(2)
    spread = [torch.eye(2, dtype=torch.float64).repeat_interleave(n, 0).numpy() for n in (length, length // 2)]
    ts, tt = (cp.diag(matrix @ variable) for matrix, variable in zip(spread, (s, t), strict=True))
    a, b, h = one.numpy(), two.numpy(), last.numpy()
    zero = torch.zeros(length, length, dtype=torch.float64).numpy()
    matrix = cp.bmat(
        [
            [rho * torch.eye(length).numpy(), -(a.T @ ts), zero],
            [-(ts @ a), 2 * ts, -(b.T @ tt)],
            [zero.T, -(tt @ b), 2 * tt - h.T @ h],
        ]
    )
    problem = cp.Problem(cp.Minimize(rho), [(matrix + matrix.T) / 2 >> 0, s >= 0, t >= 0])
    problem.solve(solver="CLARABEL", tol_gap_abs=1e-9, tol_gap_rel=1e-9, tol_feas=1e-9)
    own = _Problem(torus, False)
    t, rho = own.program.interior()
    found = LowRank().climb(FrequencySpheres(own.program), t, rho)
    assert len(t) == 4
    assert found.rho == pytest.approx(float(problem.value), rel=1e-5)
    assert found.dual == pytest.approx(float(problem.value), rel=1e-5)
    value = lg.bound(network, method="lipsdp-channel").value
    assert value**2 >= float(problem.value) * (1 - 1e-7)


def proposal(network: Network) -> lg.Certificate:
    found = Channel()(network, Query())[0]
    assert isinstance(found.evidence, ChannelMultipliers)
    return found


def test_corrupted_evidence_is_refused_or_weaker() -> None:
    network = small(3)
    good = proposal(network)
    evidence = good.evidence
    assert isinstance(evidence, ChannelMultipliers)
    assert lg.verify(network, good).value == pytest.approx(good.value, rel=1e-12)
    nodes = sorted(evidence.t)

    def altered(**changes: object) -> lg.Certificate:
        return dataclasses.replace(good, evidence=dataclasses.replace(evidence, **changes))  # type: ignore[arg-type]

    refused = {
        "zero": {"t": {**evidence.t, nodes[0]: torch.zeros_like(evidence.t[nodes[0]])}},
        "negative": {"t": {**evidence.t, nodes[0]: -evidence.t[nodes[0]]}},
        "huge": {"t": {**evidence.t, nodes[1]: evidence.t[nodes[1]] * 100}},
        "nan": {"t": {**evidence.t, nodes[0]: torch.full_like(evidence.t[nodes[0]], math.nan)}},
        "missing": {"t": {nodes[0]: evidence.t[nodes[0]]}},
        "too few": {"t": {**evidence.t, nodes[0]: evidence.t[nodes[0]][:-1]}},
        "too many": {"t": {**evidence.t, 99: evidence.t[nodes[0]]}},
        "masked input": {"t": {**evidence.t, 0: torch.ones(1, dtype=torch.float64)}},
        "rho": {"rho": math.nan},
        "no torus": {"sides": {}},
        "a node without a torus": {"sides": {i: s for i, s in evidence.sides.items() if i != 1}},
        "short": {"sides": {i: tuple(8 // (16 // (m // 1)) if m < 10 else 8 for m in s) for i, s in evidence.sides.items()}},
        "unequal": {"sides": {**evidence.sides, 1: tuple(m + 2 for m in evidence.sides[1])}},
        "flat": {"sides": {i: s[:1] for i, s in evidence.sides.items()}},
        "a vector on a torus": {"sides": {**evidence.sides, len(network.nodes) - 1: (10, 10)}},
    }
    for name, changes in refused.items():
        with pytest.raises(errors.NotCertified):
            pytest.fail(f"{name}: {lg.verify(network, altered(**changes)).value}")
    # Other multipliers inside the cone prove their own, weaker bound.
    halved = {**evidence.t, nodes[1]: evidence.t[nodes[1]] / 2}
    assert lg.verify(network, altered(t=halved)).value > good.value
    with pytest.raises(errors.NotCertified, match="norm"):
        lg.verify(network, dataclasses.replace(good, norm=(1.0, 1.0)))


def test_a_torus_that_is_too_short_is_refused() -> None:
    # A window of 8 and a padding of 1: on a torus of 8 the first place reads the last one.
    network = captured(
        nn.Sequential(nn.Conv1d(1, 2, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).double(), (1, 1, 8)
    )
    good = proposal(network)
    assert isinstance(good.evidence, ChannelMultipliers) and good.evidence.sides[0] == (9,)
    for length, fits in ((8, False), (9, True), (11, True), (7, False)):
        evidence = dataclasses.replace(good.evidence, sides=dict.fromkeys(good.evidence.sides, (length,)))
        if fits:
            assert lg.verify(network, dataclasses.replace(good, evidence=evidence)).value >= 0
            continue
        with pytest.raises(errors.NotCertified):
            lg.verify(network, dataclasses.replace(good, evidence=evidence))


def test_masks_between_convolutions_are_demanded() -> None:
    network = network_of("separable")
    torus = Torus(network)
    masks = [layer.node for layer in torus.layers if layer.node == layer.source]
    assert masks, "a padded convolution reads what a convolution wrote"
    good = proposal(network)
    evidence = good.evidence
    assert isinstance(evidence, ChannelMultipliers) and set(masks) <= set(evidence.t)
    without = {i: t for i, t in evidence.t.items() if i not in masks}
    with pytest.raises(errors.NotCertified, match="zero"):
        lg.verify(network, dataclasses.replace(good, evidence=dataclasses.replace(evidence, t=without)))


def test_fronts_are_what_they_claim() -> None:
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(3, 5, 8, generator=generator, dtype=torch.complex128)
    pivot, cross = whole @ whole.mH + torch.eye(5), torch.randn(3, 5, 2, generator=generator, dtype=torch.complex128)
    radius = torch.full((7, 7), 1e-13, dtype=torch.float64)
    u = front(Enclosed(pivot, radius[:5, :5].triu(1).tril(1)), Enclosed(cross, radius[:5, 5:].triu(1).tril(1)))
    schur = cross.mH @ torch.linalg.solve(pivot, cross)
    gap = torch.linalg.eigvalsh(u - schur)
    assert float(gap.min()) >= 0 and float(gap.max()) <= 1e-8 * float(torch.linalg.eigvalsh(schur).max())
    with pytest.raises(errors.NotCertified):
        front(Enclosed(pivot - 10 * torch.eye(5)), Enclosed(cross))


def test_records_keep_the_evidence() -> None:
    network = small(4)
    good = proposal(network)
    again = certificate_from_json(certificate_json(good))
    assert isinstance(again.evidence, ChannelMultipliers) and isinstance(good.evidence, ChannelMultipliers)
    assert again.evidence.sides == good.evidence.sides
    assert all(torch.equal(again.evidence.t[i], t) for i, t in good.evidence.t.items())
    assert lg.verify(network, again).value == good.value


@pytest.mark.parametrize("scale", [2.0**20, 2.0**-200])
def test_scales_change_nothing(scale: float) -> None:
    plain, scaled = (nn.Sequential(nn.Conv1d(1, 2, 3, 1, 1), nn.ReLU(), nn.Conv1d(2, 2, 3, 2, 1)).double() for _ in range(2))
    plain.append(nn.ReLU())
    scaled.append(nn.ReLU())
    scaled.load_state_dict(plain.state_dict())
    for i, factor in ((0, scale), (2, 1 / scale)):
        scaled[i].weight.data *= factor  # type: ignore[operator]
        scaled[i].bias.data *= factor  # type: ignore[operator]
    values = [Channel()(captured(module, (1, 1, 8)), Query())[0] for module in (plain, scaled)]
    assert values[0].value == pytest.approx(values[1].value, rel=5e-3)


def test_a_neighbour_starts_from_the_last_multipliers() -> None:
    network = small(6)
    first, state = Channel()(network, Query())
    again, _ = Channel(time_limit=0.0)(network, Query(), state)
    cold, _ = Channel(time_limit=0.0)(network, Query())
    assert first.value <= again.value * (1 + 1e-6) and again.value < cold.value


@pytest.mark.parametrize(
    ("model", "shape", "words"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), (1, 4), "lipsdp-neuron"),
        (lambda: nn.Sequential(CONV(1, 2, 3), nn.ReLU(), CIRCULAR, nn.ReLU()), IMAGE, "alike"),
        (lambda: nn.Sequential(CONV(1, 2, 3), nn.ReLU(), *BETWEEN, CONV(2, 2, 3), nn.ReLU()), IMAGE, "frequencies mix"),
        (lambda: nn.Sequential(*BETWEEN[1:], CONV(2, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2)), (1, 8), "submodule"),
    ],
)  # fmt: skip
def test_refusals_name_the_next_method(model: Callable[[], nn.Module], shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(errors.UnsupportedQuery, match=words):
        lg.bound(captured(model().double(), shape), method="lipsdp-channel")


def test_other_norms_solvers_and_sizes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    network = small(0)
    with pytest.raises(errors.UnsupportedQuery, match="spectral"):
        lg.bound(network, method="lipsdp-channel", norm=math.inf)
    with pytest.raises(errors.UnsupportedQuery, match="low-rank"):
        lg.bound(network, method="lipsdp-channel", solver="scs")
    monkeypatch.setattr("lipguard.bounds.cost.MEMORY_SEARCH", 1e3)
    with pytest.raises(errors.UnsupportedQuery, match="submodules"):
        lg.bound(network, method="lipsdp-channel")


def test_concatenations_and_skips() -> None:
    for module in (Dense3(), Hourglass()):
        network = captured(randomised(module), (1, 1, 8, 8))
        found = lg.bound(network, method="lipsdp-channel")
        assert found.method == "lipsdp-channel" and found.value < float(found.details["product"])
        assert lg.bound(network, method="sampling", time_limit=0.05).value <= found.value
    with pytest.raises(errors.UnsupportedQuery, match="alike"):  # a reflected border
        lg.bound(captured(randomised(UNet()), (1, 1, 8, 8)), method="lipsdp-channel")


def cifar(hidden: int | None = None) -> nn.Module:
    head = [nn.Linear(8192, 10)] if hidden is None else [nn.Linear(8192, hidden), nn.ReLU(), nn.Linear(hidden, 10)]
    stack = [nn.Conv2d(3, 32, 3, 1, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Conv2d(64, 128, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*stack, nn.Flatten(), *head)


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [None, 256])
def test_cifar_size(hidden: int | None) -> None:
    torch.manual_seed(0)
    network = lg.capture(cifar(hidden), torch.zeros(1, 3, 32, 32))
    found = lg.bound(network, method="lipsdp-channel", time_limit=40)
    assert found.method == "lipsdp-channel" and found.value <= 0.75 * float(found.details["product"])


@pytest.mark.slow
@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_resnet_20(shortcut: str) -> None:
    network = captured(randomised(Residual(3, (16, 32, 64), shortcut)), (1, 3, 32, 32))
    found = lg.bound(network, method="lipsdp-channel", time_limit=120)
    assert found.method == "lipsdp-channel" and found.value <= 0.5 * float(found.details["product"])


def test_sums_of_images_that_only_vectors_read_need_no_torus() -> None:
    """A maximum over windows before the head ends in such a sum: (a + b)/2 + |a - b|/2."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 3, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)).double()
    certificate = lg.bound(captured(module, (1, 1, 6, 6)), method="lipsdp-channel")
    assert isinstance(certificate.evidence, ChannelMultipliers)
    assert certificate.rigor == "verified"
