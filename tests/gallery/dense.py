"""Images to images, to maps and to boxes; and models that make images."""

from __future__ import annotations

import architectures as made
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from gallery.images import SqueezeExcite, basic
from gallery.parts import Apply, Residual, Several, Specimen, cbr, mlp


class FCN(nn.Module):
    """FCN-16s: scores of two depths, the deeper one transposed up and cropped."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.late = nn.Sequential(cbr(3, 4), nn.MaxPool2d(2)), nn.Sequential(cbr(4, 6), nn.MaxPool2d(2))
        self.score1, self.score2 = nn.Conv2d(4, 2, 1), nn.Conv2d(6, 2, 1)
        self.up2, self.up1 = nn.ConvTranspose2d(2, 2, 4, 2, bias=False), nn.ConvTranspose2d(2, 2, 4, 2, bias=False)

    def forward(self, x):
        early = self.early(x)
        up = self.up2(self.score2(self.late(early)))
        score = self.score1(early)
        fused = score + up[:, :, 1 : 1 + score.shape[2], 1 : 1 + score.shape[3]]
        return self.up1(fused)[:, :, 1 : 1 + x.shape[2], 1 : 1 + x.shape[3]]


class ASPP(nn.Module):
    """DeepLab v3's head: dilated convolutions, and the image's mean, side by side."""

    def __init__(self, channels=4) -> None:
        super().__init__()
        self.branches = nn.ModuleList([cbr(channels, 2, 1), *(cbr(channels, 2, 3, dilation=d) for d in (2, 3))])
        self.pool, self.project = nn.Sequential(nn.AdaptiveAvgPool2d(1), cbr(channels, 2, 1)), cbr(8, 3, 1)

    def forward(self, x):
        pooled = F.interpolate(self.pool(x), size=x.shape[-2:], mode="bilinear", align_corners=False)
        return self.project(torch.cat([*(branch(x) for branch in self.branches), pooled], 1))


class PyramidPool(nn.Module):
    def __init__(self, channels=4) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(n), nn.Conv2d(channels, 1, 1), nn.ReLU()) for n in (1, 2, 3)
        )

    def forward(self, x):
        size = x.shape[2:]
        pools = [F.interpolate(stage(x), size, mode="bilinear", align_corners=True) for stage in self.stages]
        return torch.cat([x, *pools], 1)


class Resized(nn.Module):
    """A segmenter at lower resolution, its scores resized."""

    def __init__(self, *layers) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return F.interpolate(self.layers(x), size=x.shape[-2:], mode="bilinear", align_corners=False)


class SegNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = cbr(1, 2), cbr(2, 2)
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)

    def forward(self, x):
        pooled, places = self.pool(self.encode(x))
        return self.decode(self.unpool(pooled, places))


class FPN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c2, self.c3, self.c4 = cbr(3, 4, 3, 2), cbr(4, 5, 3, 2), cbr(5, 6, 3, 2)
        self.lateral = nn.ModuleList(nn.Conv2d(c, 3, 1) for c in (4, 5, 6))
        self.smooth = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

    def forward(self, x):
        c2 = self.c2(x)
        c3 = self.c3(c2)
        p4 = self.lateral[2](self.c4(c3))
        p3 = self.lateral[1](c3) + F.interpolate(p4, scale_factor=2, mode="nearest")
        p2 = self.lateral[0](c2) + F.interpolate(p3, scale_factor=2, mode="nearest")
        return {f"p{i + 2}": smooth(p) for i, (smooth, p) in enumerate(zip(self.smooth, (p2, p3, p4), strict=True))}


class Hourglass(nn.Module):
    def __init__(self, depth, channels=3) -> None:
        super().__init__()
        self.skip, self.down, self.up = basic(channels, channels), basic(channels, channels), basic(channels, channels)
        self.inner = Hourglass(depth - 1, channels) if depth else nn.Identity()

    def forward(self, x):
        low = self.up(self.inner(self.down(F.max_pool2d(x, 2))))
        return self.skip(x) + F.interpolate(low, scale_factor=2)


class SSD(nn.Module):
    """Boxes and classes from two feature maps."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Sequential(cbr(3, 4, 3, 2), cbr(4, 4, 3, 2)), cbr(4, 6, 3, 2)
        self.boxes = nn.ModuleList(nn.Conv2d(c, 2 * 4, 3, padding=1) for c in (4, 6))
        self.classes = nn.ModuleList(nn.Conv2d(c, 2 * 3, 3, padding=1) for c in (4, 6))

    def forward(self, x):
        maps = [self.first(x)]
        maps.append(self.second(maps[0]))
        boxes = [f(m).permute(0, 2, 3, 1).reshape(len(x), -1, 4) for f, m in zip(self.boxes, maps, strict=True)]
        classes = [f(m).permute(0, 2, 3, 1).reshape(len(x), -1, 3) for f, m in zip(self.classes, maps, strict=True)]
        return torch.cat(boxes, 1), torch.cat(classes, 1)


class YOLO(nn.Module):
    """A grid of boxes: centres within their cell by a sigmoid, sizes and objectness beside."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(cbr(3, 4, 3, 2, act=lambda: nn.LeakyReLU(0.1)), cbr(4, 6, 3, 2, act=lambda: nn.LeakyReLU(0.1)))
        self.out = nn.Conv2d(6, 7, 1)
        grid = torch.stack(torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij"))
        self.register_buffer("grid", grid[None])

    def forward(self, x):
        y = self.out(self.trunk(x))
        return torch.cat([(torch.sigmoid(y[:, :2]) + self.grid) / 4, F.softplus(y[:, 2:4]), torch.sigmoid(y[:, 4:])], 1)


class EDSR(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.tail = nn.Conv2d(1, 4, 3, padding=1), nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.PixelShuffle(2))
        block = [nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(True), nn.Conv2d(4, 4, 3, padding=1)]
        self.body = Residual(Residual(*block, scale=0.1), nn.Conv2d(4, 4, 3, padding=1))

    def forward(self, x):
        return self.tail(self.body(self.head(x - 0.5))) + 0.5


class DnCNN(nn.Module):
    """The noise is predicted and taken away."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), cbr(4, 4), nn.Conv2d(4, 1, 3, padding=1))

    def forward(self, y):
        return y - self.noise(y)


class SpatialTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.locate = nn.Sequential(nn.Flatten(), nn.Linear(36, 6))

    def forward(self, x):
        grid = F.affine_grid(self.locate(x).view(-1, 2, 3), list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, align_corners=False)


class Warp(nn.Module):
    """A rotation by 30 degrees."""

    def forward(self, x):
        theta = torch.tensor([[[0.866, -0.5, 0.0], [0.5, 0.866, 0.0]]]).expand(len(x), -1, -1)
        return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)


class VNet(nn.Module):
    """Volumes: strided down, transposed up, PReLU, a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.down = cbr(1, 2, 3, dims=3, act=nn.PReLU), nn.Conv3d(2, 4, 2, 2)
        self.deep, self.up = Residual(cbr(4, 4, 3, dims=3, act=nn.PReLU)), nn.ConvTranspose3d(4, 2, 2, 2)
        self.out = nn.Conv3d(4, 1, 1)

    def forward(self, x):
        first = self.enter(x)
        return self.out(torch.cat([first, self.up(self.deep(F.elu(self.down(first))))], 1))


def autoencoder():
    encoder = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 1), nn.ReLU())
    decoder = [nn.ConvTranspose2d(6, 4, 3, 2, 1, 1), nn.ReLU(), nn.ConvTranspose2d(4, 1, 3, 2, 1, 1), nn.Sigmoid()]
    return nn.Sequential(encoder, *decoder)


def dcgan():
    def up(c_in, c_out, stride, padding):
        return [nn.ConvTranspose2d(c_in, c_out, 4, stride, padding, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(True)]

    last = [nn.ConvTranspose2d(4, 1, 4, 2, 1, bias=False), nn.Tanh()]
    return nn.Sequential(nn.Unflatten(1, (8, 1, 1)), *up(8, 6, 1, 0), *up(6, 4, 2, 1), *last)


def discriminator(wrap=lambda layer: layer, norm=True):
    layers = [wrap(nn.Conv2d(1, 4, 4, 2, 1)), nn.LeakyReLU(0.2), wrap(nn.Conv2d(4, 6, 4, 2, 1))]
    layers += [nn.BatchNorm2d(6)] if norm else []
    return nn.Sequential(*layers, nn.LeakyReLU(0.2), wrap(nn.Conv2d(6, 1, 4, 1, 0)), nn.Flatten())


def sn_resnet():
    def block(c_in, c_out):
        convs = [
            nn.ReLU(),
            spectral_norm(nn.Conv2d(c_in, c_out, 3, 1, 1)),
            nn.ReLU(),
            spectral_norm(nn.Conv2d(c_out, c_out, 3, 1, 1)),
        ]
        shortcut = nn.Sequential(spectral_norm(nn.Conv2d(c_in, c_out, 1)), nn.AvgPool2d(2))
        return Residual(*convs, nn.AvgPool2d(2), shortcut=shortcut)

    return nn.Sequential(block(1, 3), block(3, 4), nn.ReLU(), Apply(lambda x: x.sum((2, 3))), spectral_norm(nn.Linear(4, 1)))


class Additive(nn.Module):
    """NICE: y_1 = x_1 + m(x_2), halves exchanged."""

    def __init__(self, half=3) -> None:
        super().__init__()
        self.m = mlp(half, 8, half)

    def forward(self, x):
        a, b = x.chunk(2, 1)
        return torch.cat([b, a + self.m(b)], 1)


class RealNVP(Additive):
    def __init__(self, half=3) -> None:
        super().__init__(half)
        self.s = mlp(half, 8, half, act=nn.Tanh)

    def forward(self, x):
        a, b = x.chunk(2, 1)
        return torch.cat([b, a * torch.exp(self.s(b)) + self.m(b)], 1)


class IRevNet(nn.Module):
    """Reversible, with invertible downsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = (
            nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1)) for _ in range(2)
        )

    def forward(self, x):
        a, b = F.pixel_unshuffle(x, 2).chunk(2, 1)
        a = a + self.f(b)
        b = b + self.g(a)
        return torch.cat([a, b], 1)


class Planar(nn.Module):
    def __init__(self, size=4) -> None:
        super().__init__()
        self.w, self.u, self.b = nn.Parameter(torch.randn(size)), nn.Parameter(torch.randn(size)), nn.Parameter(torch.zeros(1))

    def forward(self, z):
        return z + self.u * torch.tanh(z @ self.w + self.b).unsqueeze(-1)


class Masked(nn.Linear):
    """MADE: a mask keeps the order of the variables."""

    def __init__(self, size, strict) -> None:
        super().__init__(size, size)
        self.register_buffer("mask", torch.ones(size, size).tril(-1 if strict else 0))

    def forward(self, x):
        return F.linear(x, self.weight * self.mask, self.bias)


class MaskedConv(nn.Conv2d):
    def __init__(self, c_in, c_out, kernel, strict) -> None:
        super().__init__(c_in, c_out, kernel, padding=kernel // 2)
        mask = torch.ones_like(self.weight)
        mask[:, :, kernel // 2, kernel // 2 + (not strict) :] = 0
        mask[:, :, kernel // 2 + 1 :] = 0
        self.register_buffer("mask", mask)

    def forward(self, x):
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=self.padding)


class VQ(nn.Module):
    """The nearest word of a code book."""

    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Embedding(5, 4)

    def forward(self, z):
        return self.code(torch.cdist(z, self.code.weight).argmin(1))


class Denoiser(nn.Module):
    """A diffusion model's denoiser at one time step, its embedding held fixed."""

    def __init__(self, step=7) -> None:
        super().__init__()
        angles = step * torch.exp(-torch.arange(4.0))
        self.register_buffer("time", torch.cat([angles.sin(), angles.cos()]))
        self.embed, self.enter, self.out = mlp(8, 12, 12, act=nn.SiLU), nn.Linear(6, 12), mlp(12, 12, 6, act=nn.SiLU)

    def forward(self, x):
        return self.out(F.silu(self.enter(x) + self.embed(self.time)))


GREY = (1, 8, 8)
DENSE = {
    "U-Net": Specimen(made.UNet, GREY),
    "FCN": Specimen(FCN, (3, 8, 8)),
    "DeepLab v3": Specimen(lambda: Resized(cbr(3, 4, 3, 2), ASPP(), nn.Conv2d(3, 2, 1)), (3, 12, 12)),
    "PSPNet": Specimen(lambda: Resized(cbr(3, 4, 3, 2), PyramidPool(), cbr(7, 3), nn.Conv2d(3, 2, 1)), (3, 12, 12)),
    "SegNet": Specimen(SegNet, GREY),
    "Feature pyramid": Specimen(FPN, (3, 16, 16), "p3"),
    "Hourglass for poses": Specimen(lambda: nn.Sequential(cbr(3, 3, 3, 2), Hourglass(1), nn.Conv2d(3, 2, 1)), (3, 16, 16)),
    "SSD, boxes": Specimen(SSD, (3, 16, 16), 0),
    "SSD, classes": Specimen(SSD, (3, 16, 16), 1),
    "YOLO grid": Specimen(YOLO, (3, 16, 16)),
    "ESPCN super-resolution": Specimen(made.SuperResolution, (1, 5, 5)),
    "EDSR super-resolution": Specimen(EDSR, (1, 6, 6)),
    "Squeeze and excitation": Specimen(lambda: nn.Sequential(cbr(3, 4), SqueezeExcite(4)), (3, 6, 6)),
    "DnCNN denoiser": Specimen(DnCNN, GREY),
    "Style transfer with InstanceNorm": Specimen(
        lambda: nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.ReLU()), (3, 6, 6)
    ),
    "Warp by a fixed grid": Specimen(lambda: nn.Sequential(cbr(1, 2), Warp()), (1, 6, 6)),
    "Spatial transformer": Specimen(SpatialTransformer, (1, 6, 6)),
    "V-Net of volumes": Specimen(VNet, (1, 4, 4, 4)),
    "Autoencoder": Specimen(lambda: mlp(16, 10, 4, 10, 16), (16,)),
    "Convolutional autoencoder": Specimen(autoencoder, GREY),
    "VAE encoder, mean": Specimen(
        lambda: Several(mlp(16, 12, last=True), mean=nn.Linear(12, 3), logvar=nn.Linear(12, 3)), (16,), "mean"
    ),
    "VAE decoder": Specimen(lambda: nn.Sequential(mlp(3, 12, 16), nn.Sigmoid(), nn.Unflatten(1, (1, 4, 4))), (3,)),
    "VQ-VAE code book": Specimen(lambda: nn.Sequential(nn.Linear(6, 4), VQ()), (6,)),
    "DCGAN generator": Specimen(dcgan, (8,)),
    "DCGAN discriminator": Specimen(lambda: nn.Sequential(discriminator(), nn.Sigmoid()), (1, 16, 16)),
    "WGAN critic": Specimen(made.Critic, (3, 16, 16)),
    "SN-GAN critic": Specimen(lambda: discriminator(spectral_norm, norm=False), (1, 16, 16)),
    "SN-ResNet critic": Specimen(sn_resnet, GREY),
    "Weight-normalised critic": Specimen(lambda: discriminator(weight_norm, norm=False), (1, 16, 16)),
    "NICE": Specimen(lambda: nn.Sequential(Additive(), Additive(), Additive()), (6,)),
    "RealNVP": Specimen(RealNVP, (6,)),
    "i-RevNet": Specimen(IRevNet, (1, 6, 6)),
    "i-ResNet": Specimen(
        lambda: nn.Sequential(
            *(
                Residual(nn.ELU(), spectral_norm(nn.Linear(6, 8)), nn.ELU(), spectral_norm(nn.Linear(8, 6)), scale=0.9)
                for _ in range(3)
            )
        ),
        (6,),
    ),
    "Planar flow": Specimen(lambda: nn.Sequential(Planar(), Planar(), Planar()), (4,)),
    "MADE": Specimen(lambda: nn.Sequential(Masked(6, True), nn.ReLU(), Masked(6, False), nn.ReLU(), Masked(6, False)), (6,)),
    "PixelCNN": Specimen(
        lambda: nn.Sequential(MaskedConv(1, 3, 5, True), nn.ReLU(), MaskedConv(3, 3, 3, False), nn.ReLU(), nn.Conv2d(3, 2, 1)),
        GREY,
    ),
    "Diffusion denoiser": Specimen(Denoiser, (6,)),
}
