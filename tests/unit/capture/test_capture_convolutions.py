"""Convolutional networks: capture equals the module, operators equal their unrolled matrices, bounds enclose the constant."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import lipguard as lg
from lipguard import errors
from lipguard.audit.recipe import captured, rebuild, recipe_of
from lipguard.network import Affine, Conv, Dense, Diagonal, Index, Network, Operator
from lipguard.programs.feedback import feedback_of
from lipguard.verify.norms.convolution import frequency_bound, kernel_bound
from lipguard.verify.norms.factors import prove_norm


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in float64 and evaluation mode, with random weights and statistics."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_floating_point():
            tensor.data = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) / math.sqrt(
                max(tensor[0].numel(), 1)
            )
            if name.endswith("running_var"):
                tensor.data = tensor.data.abs() + 0.1
    return module


def agree(module: nn.Module, shape: tuple[int, ...]) -> Network:
    """Capture; values and Jacobian equal the module's, every operator its matrix."""
    module = randomised(module)
    network = lg.capture(module, torch.zeros(shape, dtype=torch.float64))
    x = torch.randn(3, *shape[1:], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        expected = module(x.clone()).flatten(1)
    # sums of a few hundred products in float64
    tolerance = 1e-11 * (1 + float(expected.abs().max()))
    torch.testing.assert_close(network(x.flatten(1)), expected, rtol=0, atol=tolerance)
    own = torch.autograd.functional.jacobian(lambda z: module(z[None]).flatten(), x[0])
    theirs = torch.autograd.functional.jacobian(lambda z: network(z[None])[0], x[0].flatten())
    assert isinstance(own, Tensor) and isinstance(theirs, Tensor)
    torch.testing.assert_close(own.reshape(theirs.shape), theirs, rtol=1e-9, atol=1e-9)
    for node in network.nodes:
        if isinstance(node, Affine):
            check_operator(node.operator)
    return network


def check_operator(operator: Operator) -> None:
    """Application, adjoint and absolute value agree with the matrix, for any number of leading dimensions."""
    matrix = operator.dense()
    assert matrix.shape == operator.shape and matrix.dtype == torch.float64
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randn(2, 3, size, generator=generator, dtype=torch.float64) for size in reversed(operator.shape))
    torch.testing.assert_close(operator(x), x @ matrix.T, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(operator(x[0, 0]), matrix @ x[0, 0], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(operator.transpose()(y), y @ matrix, rtol=1e-11, atol=1e-11)
    assert torch.equal(operator.transpose().dense(), matrix.T) and operator.transpose().rho == operator.rho
    # Upper bounds of the magnitudes: exact where the operator is.
    magnitude = operator.abs().dense()
    assert bool((magnitude >= matrix.abs() * (1 + operator.rho)).all()) and operator.rho < 1e-14
    torch.testing.assert_close(magnitude, matrix.abs(), rtol=2 * operator.rho + (1e-15 if operator.rho else 0.0), atol=0)


def operators(network: Network) -> list[str]:
    return [type(node.operator).__name__ for node in network.nodes if isinstance(node, Affine)]


def unrolled(network: Network) -> Network:
    """The same network with every operator as an explicit matrix."""
    nodes = (Affine(n.source, Dense(n.operator.dense()), n.bias, n.name) if isinstance(n, Affine) else n for n in network.nodes)
    return Network(tuple(nodes))


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    dims = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 2))
    few, many = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    space = tuple(draw(st.integers(1, (9, 5, 3)[dims - 1])) for _ in range(dims))

    def each(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(least, most)) for _ in range(dims))

    kernel, stride, dilation = each(1, 3), each(1, 3), each(1, 2)
    bias = draw(st.booleans())
    if draw(st.booleans()):
        kind: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
        extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
        padding = tuple(draw(st.integers(0, d * (k - 1))) for d, k in zip(dilation, kernel, strict=True))
        large = (
            (n - 1) * s - 2 * p + d * (k - 1) + 1 + e
            for n, s, p, d, k, e in zip(space, stride, padding, dilation, kernel, extra, strict=True)
        )
        assume(min(large) >= 1)
        layer = kind(few, many, kernel, stride, padding, extra, groups, bias, dilation)
    else:
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        padding: Any = "same" if stride == (1,) * dims and draw(st.booleans()) else each(0, 2)
        mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        spans = tuple(d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
        pads = spans if padding == "same" else padding
        if mode in ("reflect", "circular"):
            assume(all(p < n for p, n in zip(pads, space, strict=True)))
        assume(all(n + (1 if padding == "same" else 2) * p > span for n, p, span in zip(space, pads, spans, strict=True)))
        layer = kind(few, many, kernel, stride, padding, dilation, groups, bias, mode)
    return layer, (1, few, *space)


@given(case=convolutions())
@settings(max_examples=60, deadline=None)
def test_random_convolutions(case: tuple[nn.Module, tuple[int, ...]]) -> None:
    layer, shape = case
    network = agree(nn.Sequential(layer, nn.ReLU(), nn.Flatten()), shape)
    operator = next(n.operator for n in network.nodes if isinstance(n, Affine) and isinstance(n.operator, Conv))
    exact = float(torch.linalg.matrix_norm(operator.dense(), 2))
    # the proofs' inflations and the rounding of the yardstick
    assert kernel_bound(operator) >= exact * (1 - 1e-12)
    frequency = frequency_bound(operator)
    assert frequency is not None and exact * (1 - 1e-12) <= frequency
    assert exact * (1 - 1e-12) <= prove_norm(operator, exact, 2.0) <= exact * (1 + 1e-6) + 1e-300


@st.composite
def pools(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    dims = draw(st.integers(1, 3))
    space = tuple(draw(st.integers(2, (9, 6, 4)[dims - 1])) for _ in range(dims))
    shape = (1, draw(st.integers(1, 3)), *space)
    if draw(st.booleans()):
        kind: Any = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[dims - 1]
        sizes = tuple(draw(st.integers(1, n)) for n in space)
        return kind(sizes if dims > 1 else sizes[0]), shape
    kind = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[dims - 1]
    kernel = draw(st.integers(1, min(space)))
    stride, padding = draw(st.integers(1, 3)), draw(st.integers(0, kernel // 2))
    options: dict[str, Any] = {"ceil_mode": draw(st.booleans()), "count_include_pad": draw(st.booleans())}
    if dims > 1 and draw(st.booleans()):
        options["divisor_override"] = draw(st.integers(1, 5))
    return kind(kernel, stride, padding, **options), shape


@given(case=pools())
@settings(max_examples=40, deadline=None)
def test_random_pools(case: tuple[nn.Module, tuple[int, ...]]) -> None:
    layer, shape = case
    assert set(operators(agree(nn.Sequential(layer), shape))) <= {"Conv"}


class Do(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "slice": lambda x: x[:, 1:3, ::2].relu() + x[:, [0, 3], ::2],
    "ellipsis": lambda x: x[..., 1] + x[:, :, None, :, 0].squeeze(2),
    "mask": lambda x: x[:, torch.tensor([True, False, True, False])],
    "chunk": lambda x: (lambda a, b: a.tanh() + 2 * b)(*x.chunk(2, 1)),
    "split": lambda x: (lambda a, b: torch.cat([b, a.relu()], 1))(*torch.split(x, [1, 3], dim=1)),
    "unbind": lambda x: sum(part * k for k, part in enumerate(x.unbind(1))),  # type: ignore[misc]
    "permute": lambda x: x.permute(0, 2, 3, 1).contiguous().view(len(x), -1).relu(),
    "transpose": lambda x: torch.transpose(x, 1, 3).movedim(1, 2).swapaxes(1, 2) * 2 + x.permute(0, 3, 2, 1),
    "matrix-transpose": lambda x: x.mT.flip(1).roll(1, 2),
    "cat": lambda x: torch.cat([x, x.relu(), torch.ones(len(x), 1, 6, 4, dtype=x.dtype)], dim=1).tanh(),
    "stack": lambda x: torch.stack([x, -x.relu()], dim=2),
    "pad": lambda x: F.pad(x, (1, 0, -1, 2)) * 2,
    "pad-constant": lambda x: F.pad(x, (1, 2), value=3.0).relu(),
    "pad-reflect": lambda x: F.pad(F.pad(x, (1, 1, 2, 2), mode="reflect"), (2, 0, 0, 1), mode="circular"),
    "pad-replicate": lambda x: F.pad(x, (3, 1, 2, 2), mode="replicate"),
    "nearest": lambda x: F.interpolate(x, scale_factor=2) + F.interpolate(x, size=(12, 8), mode="nearest-exact"),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True).relu(),
    "area": lambda x: F.interpolate(x, size=(4, 3), mode="area"),
    "shuffles": lambda x: F.pixel_unshuffle(F.pixel_shuffle(F.channel_shuffle(x, 2), 2).relu(), 2),
    "mean": lambda x: x - x.mean((2, 3), keepdim=True) + x.mean(dim=1, keepdim=True),
    "sum": lambda x: x.sum(-1) + x.sum((1, 3)).unsqueeze(1),
    "expand": lambda x: x[:, :1].expand(-1, 3, -1, -1) + x[:, 1:],
    "dropout": lambda x: F.dropout2d(x, training=False)[:, 0],
    "unfold": lambda x: F.unfold(x, (3, 2), padding=1, stride=2).relu() + x.unfold(2, 3, 1).flatten(1)[:, None, :9],
    "fold": lambda x: F.fold(F.unfold(x, 3, 1, 1).relu(), (6, 4), 3, padding=1),
    "write": lambda x: (h := x * 2, h.__setitem__((slice(None), slice(1, 3)), x[:, :2].relu()), h)[-1],
    "write-into-zeros": lambda x: (
        h := torch.zeros_like(x), h.__setitem__((slice(None), slice(None), slice(1, None)), x[:, :, :-1]),
        h.__setitem__((slice(None), 0), 2.5), h)[-1].tanh(),
    "where": lambda x: torch.where(torch.arange(4) % 2 == 0, x, x.relu()).masked_fill(torch.eye(6, 4) > 0, -1.0) * 2,
    "cumsum": lambda x: x.cumsum(2).relu() + x.cumsum(-1),
    "diff": lambda x: x.diff(dim=1).relu() + torch.diff(x, n=1, dim=1),
    "einsum": lambda x: torch.einsum("bchw,cdw->bdh", x, torch.linspace(-1, 1, 48, dtype=x.dtype).reshape(4, 3, 4)).tanh(),
    "einsum-groups": lambda x: torch.einsum("...hw,hwk->...kh", x, torch.linspace(-1, 1, 48, dtype=x.dtype).reshape(6, 4, 2)),
    "einsum-two": lambda x: torch.einsum("pq,bcpr,r->bqc", torch.eye(6, 5, dtype=x.dtype) + 1, x, x.new_ones(4)),
    "matmul-left": lambda x: (torch.linspace(-1, 1, 30, dtype=x.dtype).reshape(5, 6) @ x).relu(),
    "matmul-stack": lambda x: x @ torch.linspace(-1, 1, 48, dtype=x.dtype).reshape(4, 4, 3) + x @ x.new_ones(1, 1, 4, 3),
    "bmm": lambda x: torch.bmm(x[:, 0], torch.ones(4, 2, dtype=x.dtype).expand(len(x), 4, 2)).relu(),
    "linear-positions": lambda x: F.linear(x, torch.linspace(-1, 1, 12, dtype=x.dtype).reshape(3, 4), x.new_ones(3)).relu(),
    "waves": lambda x: torch.sin(3 * x) + x[:, :1].cos(),
    "logged": lambda x: (x.mean(), x.max(), x)[-1],
}  # fmt: skip


@pytest.mark.parametrize("name", MOVES)
def test_moves_joins_and_means(name: str) -> None:
    agree(Do(MOVES[name]), (1, 4, 6, 4))


@pytest.mark.parametrize(
    "layer",
    [
        nn.ZeroPad2d(1), nn.ConstantPad2d((0, 2, 1, 0), 1.5), nn.ReflectionPad2d(1), nn.ReplicationPad2d(2), nn.CircularPad2d(1),
        nn.Upsample(scale_factor=2), nn.UpsamplingBilinear2d(scale_factor=2), nn.PixelShuffle(2), nn.PixelUnshuffle(2),
        nn.ChannelShuffle(2), nn.BatchNorm2d(4), nn.Dropout2d(), nn.Flatten(), nn.Conv2d(4, 2, 3).requires_grad_(False),
    ],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_modules(layer: nn.Module) -> None:
    agree(nn.Sequential(layer), (1, 4, 6, 4))


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(3, 4, 3), nn.Tanh(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3),
    )  # fmt: skip


def vgg() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU(inplace=True),
        nn.Conv2d(3, 4, 3, padding=1, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Dropout(), nn.Linear(16, 3),
    )  # fmt: skip


class Block(nn.Module):
    """A residual block with a projection where the shape changes."""

    def __init__(self, few: int, many: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(few, many, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(many), nn.BatchNorm2d(many)
        self.conv2 = nn.Conv2d(many, many, 3, 1, 1, bias=False)
        self.short: nn.Module = nn.Identity()
        if stride > 1 or few != many:
            self.short = nn.Sequential(nn.Conv2d(few, many, 1, stride, bias=False), nn.BatchNorm2d(many))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        out += self.short(x)
        return F.relu(out)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.fc = nn.Sequential(Block(1, 2, 1), Block(2, 3, 2)), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(x).mean([2, 3]))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 3, 3, stride=2, padding=1)
        self.up, self.out = nn.ConvTranspose2d(3, 2, 2, stride=2), nn.Conv2d(7, 1, 3, padding=1, padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        a = F.leaky_relu(self.down1(x))
        b = F.leaky_relu(self.down2(a))
        up = F.interpolate(b, size=a.shape[2:], mode="nearest")
        return self.out(torch.cat([a, self.up(b).relu(), up], dim=1))


class Dense3(nn.Module):
    """Three layers that each see all earlier ones."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(1 + 2 * k, 2, 3, padding=1) for k in range(3))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)).relu())
        return torch.cat(features, 1).mean((-2, -1))


def series() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, padding="same", dilation=2), nn.BatchNorm1d(4), nn.GELU(), nn.Conv1d(4, 4, 4, stride=2, groups=4),
        nn.SiLU(), nn.Flatten(), nn.Linear(20, 2),
    )  # fmt: skip


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "lenet": (lenet, (1, 1, 8, 8)),
    "vgg": (vgg, (1, 1, 6, 6)),
    "resnet": (ResNet, (1, 1, 6, 6)),
    "unet": (UNet, (1, 1, 4, 4)),
    "densenet": (Dense3, (1, 1, 4, 4)),
    "series": (series, (1, 2, 12)),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_are_captured_and_bounded(name: str) -> None:
    build, shape = ARCHITECTURES[name]
    network = agree(build(), shape)
    lower, neuron, product = (lg.bound(network, method=m) for m in ("sampling", "lipsdp-neuron", "spectral"))
    assert all(c.rigor == "verified" for c in (lower, neuron, product))
    assert 0 < lower.value <= neuron.value <= product.value * (1 + 1e-6) and neuron.method == "lipsdp-neuron"
    # LipSDP of the unrolled matrices is the same program; 1e-7 is the solver's gap of the squared bound.
    assert lg.bound(unrolled(network)).value == pytest.approx(neuron.value, rel=1e-6)
    for norm in (1, math.inf):
        assert lg.bound(network, method="sampling", norm=norm).value <= lg.bound(network, norm=norm).value


def test_batchnorm_is_folded_into_convolutions() -> None:
    norm = nn.BatchNorm2d(4)
    plain = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), norm, nn.ReLU())
    transposed = nn.Sequential(nn.ConvTranspose2d(2, 4, 3, groups=2), norm, nn.ReLU())
    for model in (plain, transposed):
        assert operators(agree(model, (1, 2, 5, 5))) == ["Conv"]
    # a factor for each place is no factor for each channel
    mixed = nn.Sequential(nn.Conv2d(2, 4, 3), Do(lambda x: x * torch.arange(9.0).reshape(3, 3)))
    assert operators(agree(mixed, (1, 2, 5, 5))) == ["Conv", "Diagonal"]


def test_moves_behind_each_other_are_one() -> None:
    twice = Do(lambda x: F.pad(x.permute(0, 2, 3, 1)[:, 1:, ::2], (0, 1), value=2.0).flip(1).relu())
    assert operators(agree(twice, (1, 4, 6, 4))) == ["Index"]
    # there and back again: an identity, which needs no map
    assert operators(agree(Do(lambda x: x.mT.mT.relu()), (1, 4, 6, 4))) == []
    # what is cropped away is not counted: each entry is read once, not nine times
    cropped = Do(lambda x: F.pad(x, (4, 4), mode="replicate")[..., 4:-4] * 2)
    assert lg.bound(cropped, torch.zeros(1, 1, 3, dtype=torch.float64), method="spectral").value == pytest.approx(2, rel=1e-12)


def test_the_digest_tells_structures_apart() -> None:
    weight = torch.ones(2, 2, 3, dtype=torch.float64)
    variants = [
        Conv(weight, (8,), (8,), (1,), (1,), (1,)),
        Conv(weight, (8,), (8,), (1,), (2,), (2,)),
        Conv(weight, (8,), (8,), (1,), (1,), (1,), transposed=True),
        Conv(weight, (10,), (8,), (1,), (0,), (1,)),
        Conv(weight[:, :1], (8,), (8,), (1,), (1,), (1,), 2),
        Conv(weight, (15,), (8,), (2,), (1,), (1,)),
        Index(torch.arange(16).flip(0), 16),
        Index(torch.arange(16).flip(0), 16, transposed=True),
        Diagonal(torch.ones((), dtype=torch.float64), 16),
    ]
    digests = {
        Network((lg.capture(nn.Identity(), torch.zeros(1, op.shape[1])).nodes[0], Affine(0, op))).digest for op in variants
    }
    assert len(digests) == len(variants)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_records_rebuild_convolutional_networks(name: str) -> None:
    build, shape = ARCHITECTURES[name]
    model = randomised(build())
    network, recipe = captured(model, torch.zeros(shape, dtype=torch.float64))
    assert rebuild(recipe, model.state_dict()).digest == network.digest
    assert rebuild(recipe_of(network), {}).digest == network.digest
    assert any("entry" in step for step in recipe["tensors"])
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    assert rebuild(recipe, model.state_dict()).digest != network.digest


def test_live_kernels_carry_gradients() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.ConvTranspose2d(2, 1, 3), nn.BatchNorm2d(1))
    network = lg.capture(model, torch.zeros(1, 1, 5, 5), live=True)
    (network(torch.ones(1, 25)).sum() + feedback_of(network).rows[0][-1].sum()).backward()
    assert all(p.grad is not None for p in model.parameters())


REFUSED: dict[str, tuple[nn.Module, tuple[int, ...], type[Exception], str]] = {
    "unbatched": (nn.Conv2d(2, 2, 3), (1, 5, 5), errors.UnsupportedLayer, "taken for channels and mixed"),
    "channels": (nn.Conv2d(3, 2, 3), (1, 4, 5, 5), errors.InvalidExample, "expects 3 channels"),
    "small": (nn.Conv2d(1, 2, 7), (1, 1, 5, 5), errors.InvalidExample, "does not fit"),
    "flip": (Do(lambda x: x.flip(0)), (1, 3), errors.UnsupportedLayer, "mixes the samples"),
    "mean": (Do(lambda x: x - x.mean(0, keepdim=True)), (1, 2), errors.UnsupportedLayer, "torch.mean"),
    "cat-batch": (Do(lambda x: torch.cat([x, torch.arange(len(x))[:, None] * 1.0], 1)), (1, 3), errors.UnsupportedLayer,
        "treats the samples of a batch differently"),
    "kernel": (Do(lambda x: F.conv1d(x, x[:1])), (1, 2, 3), errors.UnsupportedLayer, "mixes the samples|depends on the input"),
    "random pool": (nn.FractionalMaxPool3d(2, 2), (1, 1, 4, 4, 4), errors.UnsupportedLayer, "windows at random"),
    "lp": (nn.LPPool2d(3, 2), (1, 1, 4, 4), errors.UnsupportedLayer, "power other than 2"),
    "alias": (Do(lambda x: (h := x * 2, h[:, :1].relu_(), h)[-1]), (1, 3), errors.UnsupportedLayer, "modified in place"),
    "group-norm": (nn.GroupNorm(1, 2), (1, 2, 3), errors.UnsupportedLayer, "standard deviation of the sample"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    model, shape, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        lg.capture(model, torch.ones(shape))
