"""Classifiers of images and of videos."""

from __future__ import annotations

import architectures as made
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from gallery.parts import Apply, Concat, Residual, Specimen, cbr, head, mlp


def alexnet():
    features = nn.Sequential(
        nn.Conv2d(3, 4, 5, stride=2, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
        nn.Conv2d(4, 6, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
        nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d((2, 2)),
    )  # fmt: skip
    return nn.Sequential(features, nn.Flatten(), nn.Dropout(), nn.Linear(24, 16), nn.ReLU(inplace=True), nn.Linear(16, 4))


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3, 1 x 1 (He et al. 2016); `groups` makes it that of ResNeXt, `wide` that of WideResNet-50-2."""

    def __init__(self, c_in, planes, stride=1, groups=1, width=None, expansion=4) -> None:
        super().__init__()
        width, c_out = width or planes, expansion * planes
        self.conv1, self.conv2 = cbr(c_in, width, 1), cbr(width, width, 3, stride, groups)
        self.conv3 = cbr(width, c_out, 1, act=None)
        self.downsample = cbr(c_in, c_out, 1, stride, act=None) if stride != 1 or c_in != c_out else None
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.conv3(self.conv2(self.conv1(x)))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """The ImageNet ResNet of bottlenecks: stem with a max pool, four stages; (3, 4, 6, 3) and width 64 is ResNet-50."""

    def __init__(self, blocks=(3, 4, 6, 3), width=64, classes=1000, groups=1, base=64) -> None:
        super().__init__()
        self.stem = nn.Sequential(cbr(3, width, 7, 2), nn.MaxPool2d(3, 2, 1))
        stages, c_in = [], width
        for stage, count in enumerate(blocks):
            planes = width * 2**stage
            inner = planes * base * groups // 64
            for i in range(count):
                stages.append(Bottleneck(c_in, planes, 2 if stage and not i else 1, groups, inner))
                c_in = 4 * planes
        self.stages, self.head = nn.Sequential(*stages), head(c_in, classes)

    def forward(self, x):
        return self.head(self.stages(self.stem(x)))


def basic(c_in, c_out, stride=1):
    shortcut = cbr(c_in, c_out, 1, stride, act=None) if stride != 1 or c_in != c_out else None
    return nn.Sequential(Residual(cbr(c_in, c_out, 3, stride), cbr(c_out, c_out, act=None), shortcut=shortcut), nn.ReLU())


def resnet18():
    stages = [basic(4, 4), basic(4, 4), basic(4, 6, 2), basic(6, 6), basic(6, 8, 2), basic(8, 8)]
    return nn.Sequential(cbr(3, 4, 7, 2), nn.MaxPool2d(3, 2, 1), *stages, head(8))


def preact(c_in, c_out, stride=1, drop=0.0):
    branch = [
        nn.BatchNorm2d(c_in), nn.ReLU(), nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.Dropout(drop),
        nn.BatchNorm2d(c_out), nn.ReLU(), nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False),
    ]  # fmt: skip
    return Residual(*branch, shortcut=nn.Conv2d(c_in, c_out, 1, stride, bias=False) if c_in != c_out else None)


def preact_resnet(width=2, drop=0.0):
    blocks = [preact(4, 4 * width, 1, drop), preact(4 * width, 4 * width, 1, drop), preact(4 * width, 8 * width, 2, drop)]
    return nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), *blocks, nn.BatchNorm2d(8 * width), nn.ReLU(), head(8 * width))


class Fire(nn.Module):
    def __init__(self, c_in, squeeze, expand) -> None:
        super().__init__()
        self.squeeze, self.expand1 = nn.Conv2d(c_in, squeeze, 1), nn.Conv2d(squeeze, expand, 1)
        self.expand3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x):
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1(x)), F.relu(self.expand3(x))], 1)


def squeezenet():
    pool = nn.MaxPool2d(3, 2, ceil_mode=True)
    last = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(8, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten())
    return nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.ReLU(), pool, Fire(6, 2, 3), Fire(6, 3, 4), last)


def inception(c_in, a, b, c, d):
    return Concat(
        cbr(c_in, a, 1), nn.Sequential(cbr(c_in, 2, 1), cbr(2, b, 3)), nn.Sequential(cbr(c_in, 2, 1), cbr(2, c, 5)),
        nn.Sequential(nn.MaxPool2d(3, 1, 1), cbr(c_in, d, 1)),
    )  # fmt: skip


def googlenet():
    blocks = [inception(4, 2, 3, 2, 2), nn.MaxPool2d(3, 2, 1), inception(9, 2, 3, 2, 1)]
    return nn.Sequential(cbr(3, 4, 7, 2), *blocks, head(8))


def inception_v3():
    factored = nn.Sequential(cbr(4, 3, 1), cbr(3, 3, (1, 7)), cbr(3, 4, (7, 1)))
    split = nn.Sequential(cbr(4, 3, 1), Concat(cbr(3, 2, (1, 3)), cbr(3, 2, (3, 1))))
    block = Concat(cbr(4, 2, 1), factored, split, nn.Sequential(nn.AvgPool2d(3, 1, 1), cbr(4, 2, 1)))
    return nn.Sequential(cbr(3, 4, 3, 2), block, head(12))


def separable(c_in, c_out, stride=1, act=nn.ReLU):
    return nn.Sequential(cbr(c_in, c_in, 3, stride, c_in, act), cbr(c_in, c_out, 1, act=act))


def xception():
    def sep(c_in, c_out):
        return nn.Sequential(
            nn.Conv2d(c_in, c_in, 3, 1, 1, groups=c_in, bias=False), nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out)
        )

    entry = Residual(sep(4, 6), nn.ReLU(), sep(6, 6), nn.MaxPool2d(3, 2, 1), shortcut=cbr(4, 6, 1, 2, act=None))
    middle = Residual(nn.ReLU(), sep(6, 6), nn.ReLU(), sep(6, 6))
    return nn.Sequential(cbr(3, 4, 3, 2), entry, middle, nn.ReLU(), head(6))


class SqueezeExcite(nn.Module):
    def __init__(self, channels) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, 2, 1), nn.ReLU(), nn.Conv2d(2, channels, 1), nn.Hardsigmoid()
        )

    def forward(self, x):
        return x * self.gate(x)


def inverted(c_in, c_out, stride=1, expand=2, act=nn.ReLU6, se=False, kernel=3):
    """MobileNet v2's inverted residual, with v3's gate on request."""
    hidden = expand * c_in
    layers = [cbr(c_in, hidden, 1, act=act), cbr(hidden, hidden, kernel, stride, hidden, act)]
    layers += [SqueezeExcite(hidden)] if se else []
    layers += [cbr(hidden, c_out, 1, act=None)]
    return Residual(*layers) if stride == 1 and c_in == c_out else nn.Sequential(*layers)


def mobilenet(act=nn.ReLU6, se=False, kernel=3):
    blocks = [inverted(4, 4, act=act, se=se), inverted(4, 6, 2, act=act, kernel=kernel), inverted(6, 6, act=act, se=se)]
    return nn.Sequential(cbr(3, 4, 3, 2, act=act), *blocks, cbr(6, 8, 1, act=act), nn.Dropout(0.2), head(8))


class ShuffleUnit1(nn.Module):
    """ShuffleNet v1, stride 2: grouped 1 x 1 convolutions, a shuffle between, an average pool beside, joined."""

    def __init__(self, c_in, c_out, groups=2) -> None:
        super().__init__()
        self.squeeze, self.groups = cbr(c_in, 4, 1, 1, groups), groups
        self.spatial, self.expand = cbr(4, 4, 3, 2, 4, None), cbr(4, c_out - c_in, 1, 1, groups, None)

    def forward(self, x):
        out = made.channel_shuffle(self.squeeze(x), self.groups)
        out = self.expand(self.spatial(out))
        return F.relu(torch.cat([F.avg_pool2d(x, 3, 2, 1), out], 1))


class Ghost(nn.Module):
    """Half of the features by a convolution, the others by cheap depthwise ones of these."""

    def __init__(self, c_in, c_out) -> None:
        super().__init__()
        self.primary, self.cheap = cbr(c_in, c_out // 2, 1), cbr(c_out // 2, c_out // 2, 3, groups=c_out // 2)

    def forward(self, x):
        first = self.primary(x)
        return torch.cat([first, self.cheap(first)], dim=1)


class RepVGGBlock(nn.Module):
    def __init__(self, channels) -> None:
        super().__init__()
        self.dense, self.pointwise = cbr(channels, channels, 3, act=None), cbr(channels, channels, 1, act=None)
        self.identity = nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.relu(self.dense(x) + self.pointwise(x) + self.identity(x))


class ChannelsLast(nn.Module):
    """A layer of the last dimension, applied to channels."""

    def __init__(self, layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def convnext():
    block = Residual(
        nn.Conv2d(4, 4, 7, padding=3, groups=4), ChannelsLast(nn.LayerNorm(4)), nn.Conv2d(4, 8, 1), nn.GELU(), nn.Conv2d(8, 4, 1)
    )
    return nn.Sequential(nn.Conv2d(3, 4, 4, 4), block, head(4))


def convmixer():
    def block():
        depthwise = Residual(nn.Conv2d(4, 4, 5, groups=4, padding="same"), nn.GELU(), nn.BatchNorm2d(4))
        return nn.Sequential(depthwise, nn.Conv2d(4, 4, 1), nn.GELU(), nn.BatchNorm2d(4))

    return nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.GELU(), nn.BatchNorm2d(4), block(), block(), head(4))


class PoolMixer(nn.Module):
    def forward(self, x):
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) - x


def poolformer(norm):
    def block():
        channels = nn.Sequential(norm(), nn.Conv2d(4, 8, 1), nn.GELU(), nn.Conv2d(8, 4, 1))
        return nn.Sequential(Residual(norm(), PoolMixer()), Residual(channels))

    return nn.Sequential(nn.Conv2d(3, 4, 4, 4), block(), block(), head(4))


class Affine(nn.Module):
    """ResMLP's normalisation: a scale and a shift a channel, no statistics."""

    def __init__(self, dim) -> None:
        super().__init__()
        self.alpha, self.beta = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        return self.alpha * x + self.beta


class Tokens(nn.Module):
    """Patches as tokens (batch, tokens, dim), blocks, the mean of the tokens."""

    def __init__(self, *blocks, dim=6) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Conv2d(1, dim, 4, 4), nn.Sequential(*blocks), nn.Linear(dim, 4)

    def forward(self, x):
        return self.head(self.blocks(self.embed(x).flatten(2).transpose(1, 2)).mean(1))


class AcrossTokens(nn.Module):
    def __init__(self, layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.transpose(1, 2)).transpose(1, 2)


def resmlp():
    def block():
        tokens = Residual(Affine(6), AcrossTokens(nn.Linear(4, 4)), Affine(6))
        return nn.Sequential(tokens, Residual(Affine(6), mlp(6, 12, 6, act=nn.GELU), Affine(6)))

    return Tokens(block(), block())


class SpatialGate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.spatial = nn.Linear(4, 4)

    def forward(self, x):
        u, v = x.chunk(2, -1)
        return u * self.spatial(v.transpose(1, 2)).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, dim=6) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v))


class Maxout(nn.Module):
    def __init__(self, inputs, outputs, pieces=3) -> None:
        super().__init__()
        self.pieces, self.linear = pieces, nn.Linear(inputs, outputs * pieces)

    def forward(self, x):
        return self.linear(x).unflatten(-1, (-1, self.pieces)).amax(-1)


class Highway(nn.Module):
    def __init__(self, size=6) -> None:
        super().__init__()
        self.h, self.t = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, x):
        t = torch.sigmoid(self.t(x))
        return torch.relu(self.h(x)) * t + x * (1 - t)


class CoordConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        b, _, h, w = x.shape
        y, x_ = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
        return F.relu(self.conv(torch.cat([x, torch.stack([y, x_]).expand(b, -1, -1, -1)], 1)))


class Fractal(nn.Module):
    """The mean of a short path and of a long one."""

    def __init__(self, depth) -> None:
        super().__init__()
        self.short = cbr(4, 4)
        self.long = nn.Sequential(Fractal(depth - 1), Fractal(depth - 1)) if depth else None

    def forward(self, x):
        return self.short(x) if self.long is None else torch.stack([self.short(x), self.long(x)]).mean(0)


class BlurPool(nn.Module):
    """Anti-aliased subsampling (Zhang 2019)."""

    def __init__(self, channels) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 2.0, 1.0])
        self.register_buffer("kernel", (taps[:, None] * taps / 16).repeat(channels, 1, 1, 1))
        self.pad = nn.ReflectionPad2d(1)

    def forward(self, x):
        return F.conv2d(self.pad(x), self.kernel, stride=2, groups=x.shape[1])


class OctaveConv(nn.Module):
    """High and low frequencies, each informing the other."""

    def __init__(self) -> None:
        super().__init__()
        self.hh, self.hl, self.lh, self.ll = (nn.Conv2d(2, 2, 3, padding=1) for _ in range(4))

    def forward(self, x):
        high, low = x, F.avg_pool2d(x, 2)
        out_high = F.relu(self.hh(high) + F.interpolate(self.lh(low), scale_factor=2, mode="nearest"))
        out_low = F.relu(self.ll(low) + self.hl(F.avg_pool2d(high, 2)))
        return torch.cat([out_high.flatten(1), out_low.flatten(1)], 1)


class HighResolution(nn.Module):
    """HRNet: two resolutions side by side that exchange features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = cbr(3, 4, 3, 2), cbr(4, 6, 3, 2)
        self.high, self.low = basic(4, 4), basic(6, 6)
        self.up, self.across = cbr(6, 4, 1, act=None), cbr(4, 6, 3, 2, act=None)
        self.out = nn.Linear(10, 4)

    def forward(self, x):
        high = self.stem(x)
        low = self.low(self.down(high))
        high = self.high(high)
        fused = F.relu(high + F.interpolate(self.up(low), size=high.shape[2:], mode="bilinear", align_corners=False))
        low = F.relu(low + self.across(high))
        return self.out(torch.cat([fused.mean((2, 3)), low.mean((2, 3))], 1))


class Binarised(nn.Linear):
    def forward(self, x):
        return F.linear(torch.sign(x), torch.sign(self.weight), self.bias)


class Rounded(nn.Module):
    """Quantisation to steps of 1/8 with a straight-through gradient."""

    def forward(self, x):
        return x + (torch.round(x * 8) / 8 - x).detach()


class TemporalShift(nn.Module):
    """A quarter of the channels from the frame before, a quarter from the next (Lin et al. 2019)."""

    def forward(self, x):
        out = torch.zeros_like(x)
        out[:, :1, :-1], out[:, 1:2, 1:], out[:, 2:] = x[:, :1, 1:], x[:, 1:2, :-1], x[:, 2:]
        return out


class SlowFast(nn.Module):
    """A slow path of few frames, a fast one of few channels, and a lateral connection."""

    def __init__(self) -> None:
        super().__init__()
        self.slow, self.fast = cbr(1, 4, (1, 3, 3), dims=3), cbr(1, 2, (3, 3, 3), dims=3)
        self.lateral, self.deep = nn.Conv3d(2, 2, (5, 1, 1), (4, 1, 1), (2, 0, 0)), cbr(6, 4, 3, dims=3)
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        slow, fast = self.slow(x[:, :, ::4]), self.fast(x)
        slow = self.deep(torch.cat([slow, self.lateral(fast)], 1))
        return self.out(torch.cat([slow.mean((2, 3, 4)), fast.mean((2, 3, 4))], 1))


def video(*blocks, channels=4):
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(channels, 3))


def r2plus1d():
    spatial, temporal = cbr(1, 4, (1, 3, 3), dims=3), cbr(4, 4, (3, 1, 1), dims=3)
    return video(spatial, temporal, Residual(cbr(4, 3, (1, 3, 3), dims=3), cbr(3, 4, (3, 1, 1), dims=3)))


RGB = (3, 16, 16)
IMAGES = {
    "LeNet-5": Specimen(lambda: made.LeNet("avg"), (1, 28, 28)),
    "LeNet-5, max pooling": Specimen(lambda: made.LeNet("max"), (1, 28, 28)),
    "AlexNet": Specimen(alexnet, (3, 32, 32)),
    "VGG with BatchNorm": Specimen(lambda: made.VGG((4, "M", 6, "M", 8, 8, "M", 8, "M")), (3, 32, 32)),
    "All-CNN": Specimen(
        lambda: nn.Sequential(
            cbr(3, 4), cbr(4, 4, 3, 2), cbr(4, 6), cbr(6, 6, 3, 2), cbr(6, 4, 1), Apply(lambda x: x.mean((2, 3)))
        ),
        RGB,
    ),
    "Network in Network": Specimen(
        lambda: nn.Sequential(
            cbr(3, 4, 5), cbr(4, 4, 1), nn.MaxPool2d(3, 2, 1), cbr(4, 6), cbr(6, 4, 1), nn.AvgPool2d(8), nn.Flatten()
        ),
        RGB,
    ),
    "ResNet-18": Specimen(resnet18, (3, 32, 32)),
    "ResNet-20, zero-padded shortcuts": Specimen(lambda: made.ResNet(3, "A", 4), RGB),
    "ResNet-50": Specimen(lambda: ResNet((1, 2, 1, 1), 2, 4), (3, 32, 32)),
    "ResNeXt": Specimen(lambda: ResNet((1, 1, 1, 1), 4, 4, groups=2, base=32), (3, 32, 32)),
    "Pre-activation ResNet": Specimen(lambda: preact_resnet(1), RGB),
    "WideResNet": Specimen(lambda: preact_resnet(2, 0.3), RGB),
    "DenseNet": Specimen(lambda: made.DenseNet(2, (2, 2), 4), (1, 8, 8)),
    "FractalNet": Specimen(lambda: nn.Sequential(cbr(3, 4, 3, 2), Fractal(2), head(4)), RGB),
    "SqueezeNet": Specimen(squeezenet, RGB),
    "GoogLeNet": Specimen(googlenet, RGB),
    "Inception v3": Specimen(inception_v3, RGB),
    "Xception": Specimen(xception, RGB),
    "MobileNet v1": Specimen(lambda: nn.Sequential(cbr(3, 4, 3, 2), separable(4, 6), separable(6, 8, 2), head(8)), RGB),
    "MobileNet v2": Specimen(mobilenet, RGB),
    "MobileNet v3 without gates": Specimen(lambda: mobilenet(nn.Hardswish), RGB),
    "MobileNet v3": Specimen(lambda: mobilenet(nn.Hardswish, se=True), RGB),
    "MNASNet": Specimen(lambda: mobilenet(nn.ReLU, kernel=5), RGB),
    "EfficientNet": Specimen(lambda: mobilenet(nn.SiLU, se=True, kernel=5), RGB),
    "EfficientNet-Lite": Specimen(lambda: mobilenet(nn.ReLU6, kernel=5), RGB),
    "RegNetX": Specimen(
        lambda: nn.Sequential(cbr(3, 4, 3, 2), Bottleneck(4, 4, 1, 2, 4, 1), Bottleneck(4, 8, 2, 4, 8, 1), head(8)), RGB
    ),
    "ShuffleNet v1": Specimen(lambda: nn.Sequential(cbr(3, 4, 3, 2), ShuffleUnit1(4, 8), ShuffleUnit1(8, 12), head(12)), RGB),
    "ShuffleNet v2": Specimen(made.ShuffleNet, (1, 8, 8)),
    "GhostNet": Specimen(lambda: nn.Sequential(cbr(3, 4, 3, 2), Ghost(4, 8), Residual(Ghost(8, 8)), head(8)), RGB),
    "RepVGG": Specimen(lambda: nn.Sequential(cbr(3, 4, 3, 2), RepVGGBlock(4), RepVGGBlock(4), head(4)), RGB),
    "HRNet": Specimen(HighResolution, RGB),
    "CoordConv": Specimen(lambda: nn.Sequential(CoordConv(), nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU(), head(4)), (1, 8, 8)),
    "Anti-aliased CNN": Specimen(
        lambda: nn.Sequential(cbr(3, 4), nn.MaxPool2d(2, 1), BlurPool(4), cbr(4, 6), BlurPool(6), head(6)), RGB
    ),
    "Octave convolution": Specimen(lambda: nn.Sequential(nn.Conv2d(1, 2, 3, 2, 1), OctaveConv(), nn.Linear(40, 4)), (1, 8, 8)),
    "Maxout": Specimen(lambda: nn.Sequential(Maxout(8, 6), Maxout(6, 6), nn.Linear(6, 3)), (8,)),
    "ConvMixer": Specimen(convmixer, RGB),
    "ConvNeXt": Specimen(convnext, RGB),
    "PoolFormer": Specimen(lambda: poolformer(lambda: nn.GroupNorm(1, 4)), RGB),
    "PoolFormer with BatchNorm": Specimen(lambda: poolformer(lambda: nn.BatchNorm2d(4)), RGB),
    "MLP-Mixer": Specimen(lambda: Tokens(Residual(nn.LayerNorm(6), mlp(6, 8, 6, act=nn.GELU))), (1, 8, 8)),
    "MLP-Mixer without norms": Specimen(made.MLPMixer, (1, 8, 8)),
    "ResMLP": Specimen(resmlp, (1, 8, 8)),
    "gMLP": Specimen(lambda: Tokens(Residual(nn.Linear(6, 12), nn.GELU(), SpatialGate(), nn.Linear(6, 6))), (1, 8, 8)),
    "Vision transformer": Specimen(lambda: Tokens(Residual(nn.LayerNorm(6), Attention())), (1, 8, 8)),
    "Attention without norms": Specimen(lambda: Tokens(Residual(Attention())), (1, 8, 8)),
    "Highway network": Specimen(lambda: nn.Sequential(Highway(), Highway(), nn.Linear(6, 3)), (6,)),
    "Binarised network": Specimen(lambda: nn.Sequential(nn.Linear(6, 6), Binarised(6, 3)), (6,)),
    "Straight-through quantisation": Specimen(
        lambda: nn.Sequential(nn.Linear(6, 6), Rounded(), nn.ReLU(), nn.Linear(6, 3)), (6,)
    ),
    "C3D": Specimen(
        lambda: video(cbr(1, 4, 3, dims=3), nn.MaxPool3d((1, 2, 2)), cbr(4, 4, 3, dims=3), nn.MaxPool3d(2)), (1, 4, 8, 8)
    ),
    "R(2+1)D": Specimen(r2plus1d, (1, 4, 6, 6)),
    "SlowFast": Specimen(SlowFast, (1, 8, 6, 6)),
    "Temporal shift": Specimen(
        lambda: video(cbr(1, 4, (1, 3, 3), dims=3), TemporalShift(), cbr(4, 4, (1, 3, 3), dims=3)), (1, 4, 6, 6)
    ),
}
