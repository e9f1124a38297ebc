"""Architectures as people write them: plain torch, nothing of this package, widths small enough for a test."""

from __future__ import annotations

from collections import namedtuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


class LeNet(nn.Module):
    """LeNet-5 for 28 x 28 images, with the pooling given."""

    def __init__(self, pool: str = "avg", width: int = 2) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 5, padding=2)
        self.conv2 = nn.Conv2d(width, 2 * width, 5)
        self.fc1 = nn.Linear(2 * width * 5 * 5, 24)
        self.fc2 = nn.Linear(24, 16)
        self.fc3 = nn.Linear(16, 10)
        self.pool = nn.MaxPool2d(2) if pool == "max" else nn.AvgPool2d(2)

    def forward(self, x):
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


def make_layers(cfg, batch_norm=True):
    layers = []
    in_channels = 3
    for v in cfg:
        if v == "M":
            layers += [nn.MaxPool2d(kernel_size=2, stride=2)]
        elif v == "A":
            layers += [nn.AvgPool2d(kernel_size=2, stride=2)]
        else:
            conv2d = nn.Conv2d(in_channels, v, kernel_size=3, padding=1)
            layers += [conv2d, nn.BatchNorm2d(v), nn.ReLU(inplace=True)] if batch_norm else [conv2d, nn.ReLU(inplace=True)]
            in_channels = v
    return nn.Sequential(*layers)


class VGG(nn.Module):
    """VGG with BatchNorm for 32 x 32 images; "M" in the plan is a max pool, "A" an average pool."""

    def __init__(self, cfg=(4, "A", 8, "A", 8, 8, "A", 8, "A"), num_classes=10) -> None:
        super().__init__()
        self.features = make_layers(cfg)
        self.avgpool = nn.AdaptiveAvgPool2d((3, 3))  # 2 x 2 arrives: windows overlap
        self.classifier = nn.Sequential(nn.Linear(8 * 9, 16), nn.ReLU(True), nn.Dropout(p=0.5), nn.Linear(16, num_classes))
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = self.features(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.classifier(x)


class LambdaLayer(nn.Module):
    def __init__(self, lambd) -> None:
        super().__init__()
        self.lambd = lambd

    def forward(self, x):
        return self.lambd(x)


class BasicBlock(nn.Module):
    """He et al. 2016; option "A" pads the shortcut with zero channels, "B" projects it."""

    expansion = 1

    def __init__(self, in_planes, planes, stride=1, option="A") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, kernel_size=3, stride=1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            if option == "A":
                extra = planes - in_planes
                self.shortcut = LambdaLayer(
                    lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, extra // 2, extra - extra // 2), "constant", 0)
                )
            else:
                self.shortcut = nn.Sequential(
                    nn.Conv2d(in_planes, self.expansion * planes, kernel_size=1, stride=stride, bias=False),
                    nn.BatchNorm2d(self.expansion * planes),
                )

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class ResNet(nn.Module):
    """ResNet for 32 x 32 images: three stages of `blocks` basic blocks, widths w, 2 w, 4 w; 1 block a stage is ResNet-8."""

    def __init__(self, blocks=3, option="A", width=16, num_classes=10, channels=3) -> None:
        super().__init__()
        self.in_planes = width
        self.conv1 = nn.Conv2d(channels, width, kernel_size=3, stride=1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._make_layer(width, blocks, 1, option)
        self.layer2 = self._make_layer(2 * width, blocks, 2, option)
        self.layer3 = self._make_layer(4 * width, blocks, 2, option)
        self.linear = nn.Linear(4 * width, num_classes)

    def _make_layer(self, planes, num_blocks, stride, option):
        strides = [stride] + [1] * (num_blocks - 1)
        layers = []
        for stride in strides:
            layers.append(BasicBlock(self.in_planes, planes, stride, option))
            self.in_planes = planes
        return nn.Sequential(*layers)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer1(out)
        out = self.layer2(out)
        out = self.layer3(out)
        out = F.avg_pool2d(out, out.size()[3])
        out = out.view(out.size(0), -1)
        return self.linear(out)


class DenseLayer(nn.Module):
    def __init__(self, num_input_features, growth_rate, bn_size) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(num_input_features)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(num_input_features, bn_size * growth_rate, kernel_size=1, stride=1, bias=False)
        self.norm2 = nn.BatchNorm2d(bn_size * growth_rate)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(bn_size * growth_rate, growth_rate, kernel_size=3, stride=1, padding=1, bias=False)

    def forward(self, inputs):
        concated_features = torch.cat(inputs, 1)
        bottleneck_output = self.conv1(self.relu1(self.norm1(concated_features)))
        return self.conv2(self.relu2(self.norm2(bottleneck_output)))


class DenseBlock(nn.ModuleDict):
    def __init__(self, num_layers, num_input_features, bn_size, growth_rate) -> None:
        super().__init__()
        for i in range(num_layers):
            self.add_module(f"denselayer{i + 1}", DenseLayer(num_input_features + i * growth_rate, growth_rate, bn_size))

    def forward(self, init_features):
        features = [init_features]
        for _, layer in self.items():
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    """BN-ReLU-conv in this order, concatenation, transitions with an average pool."""

    def __init__(self, growth_rate=2, blocks=(2, 2), init=4, bn_size=2, num_classes=5) -> None:
        super().__init__()
        self.features = nn.Sequential()
        self.features.add_module("conv0", nn.Conv2d(1, init, kernel_size=3, padding=1, bias=False))
        n = init
        for i, layers in enumerate(blocks):
            self.features.add_module(f"denseblock{i + 1}", DenseBlock(layers, n, bn_size, growth_rate))
            n += layers * growth_rate
            if i != len(blocks) - 1:
                transition = nn.Sequential(
                    nn.BatchNorm2d(n), nn.ReLU(inplace=True), nn.Conv2d(n, n // 2, 1, bias=False), nn.AvgPool2d(2, stride=2)
                )
                self.features.add_module(f"transition{i + 1}", transition)
                n //= 2
        self.features.add_module("norm5", nn.BatchNorm2d(n))
        self.classifier = nn.Linear(n, num_classes)

    def forward(self, x):
        features = self.features(x)
        out = F.relu(features, inplace=True)
        out = F.adaptive_avg_pool2d(out, (1, 1))
        out = torch.flatten(out, 1)
        return self.classifier(out)


class MixerBlock(nn.Module):
    """Token mixing, channel mixing, skips, and no LayerNorm."""

    def __init__(self, tokens, channels, tokens_dim, channels_dim) -> None:
        super().__init__()
        self.token_mix = nn.Sequential(nn.Linear(tokens, tokens_dim), nn.GELU(), nn.Linear(tokens_dim, tokens))
        self.channel_mix = nn.Sequential(nn.Linear(channels, channels_dim), nn.GELU(), nn.Linear(channels_dim, channels))

    def forward(self, x):
        y = x.transpose(1, 2)
        y = self.token_mix(y)
        x = x + y.transpose(1, 2)
        return x + self.channel_mix(x)


class MLPMixer(nn.Module):
    def __init__(self, size=8, patch=4, channels=1, dim=6, depth=2, num_classes=4) -> None:
        super().__init__()
        self.patch = patch
        tokens = (size // patch) ** 2
        self.embed = nn.Linear(channels * patch * patch, dim)
        self.blocks = nn.ModuleList([MixerBlock(tokens, dim, 5, 8) for _ in range(depth)])
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x):
        b, c, h, w = x.shape
        p = self.patch
        x = x.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).reshape(b, (h // p) * (w // p), c * p * p)
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=1))


class CausalConv1d(nn.Conv1d):
    def forward(self, x):
        x = F.pad(x, ((self.kernel_size[0] - 1) * self.dilation[0], 0))
        return super().forward(x)


class Chomp1d(nn.Module):
    def __init__(self, chomp_size) -> None:
        super().__init__()
        self.chomp_size = chomp_size

    def forward(self, x):
        return x[:, :, : -self.chomp_size].contiguous()


class TemporalBlock(nn.Module):
    """Dilated causal convolutions, weight normalised, with a residual branch (Bai et al. 2018)."""

    def __init__(self, n_inputs, n_outputs, kernel_size, dilation) -> None:
        super().__init__()
        padding = (kernel_size - 1) * dilation
        self.conv1 = nn.utils.parametrizations.weight_norm(
            nn.Conv1d(n_inputs, n_outputs, kernel_size, padding=padding, dilation=dilation)
        )
        self.chomp1 = Chomp1d(padding)
        self.conv2 = CausalConv1d(n_outputs, n_outputs, kernel_size, dilation=dilation)
        self.net = nn.Sequential(self.conv1, self.chomp1, nn.ReLU(), nn.Dropout(0.2), self.conv2, nn.ReLU(), nn.Dropout(0.2))
        self.downsample = nn.Conv1d(n_inputs, n_outputs, 1) if n_inputs != n_outputs else None
        self.relu = nn.ReLU()

    def forward(self, x):
        out = self.net(x)
        res = x if self.downsample is None else self.downsample(x)
        return self.relu(out + res)


class TCN(nn.Module):
    """Forecast of the next value from the last hidden state of a series (batch, time, features)."""

    def __init__(self, features=2, levels=(4, 4, 3), kernel_size=3) -> None:
        super().__init__()
        layers = []
        for i, n in enumerate(levels):
            layers += [TemporalBlock(features if i == 0 else levels[i - 1], n, kernel_size, dilation=2**i)]
        self.network = nn.Sequential(*layers)
        self.linear = nn.Linear(levels[-1], 1)

    def forward(self, x):
        y = self.network(x.permute(0, 2, 1))
        return self.linear(y[:, :, -1])


class DoubleConv(nn.Module):
    def __init__(self, c_in, c_out) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(c_in, c_out, kernel_size=3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True),
            nn.Conv2d(c_out, c_out, kernel_size=3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True),
        )  # fmt: skip

    def forward(self, x):
        return self.double_conv(x)


class Up(nn.Module):
    def __init__(self, c_in, c_out, bilinear) -> None:
        super().__init__()
        if bilinear:
            self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
            self.conv = DoubleConv(c_in + c_out, c_out)
        else:
            self.up = nn.ConvTranspose2d(c_in, c_out, kernel_size=2, stride=2)
            self.conv = DoubleConv(2 * c_out, c_out)

    def forward(self, x1, x2):
        x1 = self.up(x1)
        dy, dx = x2.size()[2] - x1.size()[2], x2.size()[3] - x1.size()[3]
        x1 = F.pad(x1, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
        x = torch.cat([x2, x1], dim=1)
        return self.conv(x)


class UNet(nn.Module):
    """Autoencoder with skips; the side of its image need not divide by 4."""

    def __init__(self) -> None:
        super().__init__()
        self.inc = DoubleConv(1, 2)
        self.down1 = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), DoubleConv(3, 3))
        self.down2 = nn.Sequential(nn.AvgPool2d(2), DoubleConv(3, 4))
        self.up1, self.up2 = Up(4, 3, bilinear=False), Up(3, 2, bilinear=True)
        self.outc = nn.Conv2d(2, 1, kernel_size=1)

    def forward(self, x):
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        x = self.up1(x3, x2)
        x = self.up2(x, x1)
        return torch.sigmoid(self.outc(x))


ActorCriticOutput = namedtuple("ActorCriticOutput", ["logits", "value"])


class ActorCritic(nn.Module):
    """A shared trunk with two heads, returned as a tuple, a dict or a named tuple."""

    def __init__(self, returns="tuple", observations=8, actions=4) -> None:
        super().__init__()
        self.returns = returns
        self.trunk = nn.Sequential(nn.Linear(observations, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
        self.actor = nn.Linear(16, actions)
        self.critic = nn.Linear(16, 1)

    def forward(self, obs):
        hidden = self.trunk(obs)
        logits, value = self.actor(hidden), self.critic(hidden).squeeze(-1)
        if self.returns == "dict":
            return {"policy": {"logits": logits}, "value": value}
        return ActorCriticOutput(logits, value) if self.returns == "named" else (logits, value)


class DeepONet(nn.Module):
    """Operator network: the branch reads a function at sensors, the trunk a place, their features' product is the value there."""

    def __init__(self, sensors=10, features=6) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(sensors, 12), nn.ReLU(), nn.Linear(12, features))
        self.trunk = nn.Sequential(nn.Linear(1, 12), nn.Tanh(), nn.Linear(12, features), nn.Tanh())
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, u, y):
        return torch.einsum("bf,qf->bq", self.branch(u), self.trunk(y)) + self.bias


class DeepONetAt(nn.Module):
    """The operator network at fixed places: a map of the function alone."""

    def __init__(self, places=5) -> None:
        super().__init__()
        self.net = DeepONet()
        self.register_buffer("places", torch.linspace(0, 1, places)[:, None])

    def forward(self, u):
        return self.net(u, self.places)


class DeepONetJoint(nn.Module):
    """The operator network as a map of both of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = DeepONet()

    def forward(self, x):
        u, y = x[:, :10], x[:, 10:]
        return (self.net.branch(u) * self.net.trunk(y)).sum(-1, keepdim=True)


class Siamese(nn.Module):
    """One encoder for both images (batch, 2, height, width); the head reads the absolute difference."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(16, 6),
        )  # fmt: skip
        self.head = nn.Linear(6, 1)

    def forward(self, pair):
        left, right = pair.unbind(1)
        a, b = self.encoder(left.unsqueeze(1)), self.encoder(right.unsqueeze(1))
        return self.head(torch.abs(a - b))


class SineLayer(nn.Module):
    def __init__(self, in_features, out_features, is_first=False, omega_0=30.0) -> None:
        super().__init__()
        self.omega_0 = omega_0
        self.linear = nn.Linear(in_features, out_features)
        with torch.no_grad():
            bound = 1 / in_features if is_first else (6 / in_features) ** 0.5 / omega_0
            self.linear.weight.uniform_(-bound, bound)

    def forward(self, x):
        return torch.sin(self.omega_0 * self.linear(x))


class Siren(nn.Module):
    """A picture as a function of place, with sines of frequency 30 (Sitzmann et al. 2020)."""

    def __init__(self, hidden=12) -> None:
        super().__init__()
        self.net = nn.Sequential(SineLayer(2, hidden, is_first=True), SineLayer(hidden, hidden), nn.Linear(hidden, 1))

    def forward(self, coords):
        return self.net(coords)


class Critic(nn.Module):
    """WGAN critic of 16 x 16 images: strided convolutions and LeakyReLU, a convolution to one number."""

    def __init__(self, ndf=2) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(3, ndf, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf, ndf * 2, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf * 2, 1, 4, 1, 0, bias=False),
        )  # fmt: skip

    def forward(self, x):
        return self.main(x).view(-1, 1).squeeze(1)


def channel_shuffle(x, groups):
    batchsize, num_channels, height, width = x.size()
    x = x.view(batchsize, groups, num_channels // groups, height, width)
    x = torch.transpose(x, 1, 2).contiguous()
    return x.view(batchsize, -1, height, width)


class ShuffleUnit(nn.Module):
    """ShuffleNet v2: half of the channels pass by, the others go through a depthwise convolution; then both are shuffled."""

    def __init__(self, channels=4) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            nn.Conv2d(half, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(inplace=True),
            nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False), nn.BatchNorm2d(half),
            nn.Conv2d(half, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(inplace=True),
        )  # fmt: skip

    def forward(self, x):
        x1, x2 = x.chunk(2, dim=1)
        out = torch.cat((x1, self.branch(x2)), dim=1)
        return channel_shuffle(out, 2)


class ShuffleNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.units = nn.Sequential(ShuffleUnit(), ShuffleUnit(), nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.Hardswish())
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = self.units(self.conv(x))
        return self.fc(x.mean([2, 3]))


class SuperResolution(nn.Module):
    """Sub-pixel convolution, twice the size (Shi et al. 2016)."""

    def __init__(self, upscale_factor=2) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, (5, 5), (1, 1), (2, 2))
        self.conv2 = nn.Conv2d(4, 3, (3, 3), (1, 1), (1, 1))
        self.conv3 = nn.Conv2d(3, upscale_factor**2, (3, 3), (1, 1), (1, 1), padding_mode="replicate")
        self.pixel_shuffle = nn.PixelShuffle(upscale_factor)

    def forward(self, x):
        y = F.relu(self.conv1(x))
        y = F.relu(self.conv2(y))
        return self.pixel_shuffle(self.conv3(y)) + F.interpolate(x, scale_factor=2, mode="bicubic", align_corners=False)


class UnrolledRNN(nn.Module):
    """An Elman network written as a loop over a series of fixed length (batch, time, features)."""

    def __init__(self, features=2, hidden=5) -> None:
        super().__init__()
        self.cell = nn.RNNCell(features, hidden)
        self.hidden, self.out = hidden, nn.Linear(hidden, 1)

    def forward(self, x):
        h = x.new_zeros(x.size(0), self.hidden)
        states = torch.zeros(x.size(0), x.size(1), self.hidden, dtype=x.dtype, device=x.device)
        for t in range(x.size(1)):
            h = self.cell(x[:, t], h)
            states[:, t] = h
        return self.out(states).squeeze(-1)


class TransformerBlock(nn.Module):
    def __init__(self, dim=8, heads=2) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 16), nn.GELU(), nn.Linear(16, dim))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))
