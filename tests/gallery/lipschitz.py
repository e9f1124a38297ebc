"""Layers of known constant, as their papers and the packages deel-torchlip and orthogonium write them."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.parametrizations import orthogonal, spectral_norm

from gallery.parts import Apply, Residual, Specimen, mlp


class GroupSort2(nn.Module):
    """Pairs sorted, as deel-torchlip does for groups of two."""

    def forward(self, x):
        a, b = x.unflatten(1, (-1, 2)).unbind(2)
        return torch.stack([torch.minimum(a, b), torch.maximum(a, b)], 2).flatten(1, 2)


class FullSort(nn.Module):
    def forward(self, x):
        return x.sort(dim=1).values


class MaxMin(nn.Module):
    """Halves compared, as Anil et al. 2019 write it."""

    def forward(self, x):
        a, b = x.chunk(2, 1)
        return torch.cat([torch.max(a, b), torch.min(a, b)], 1)


class HouseHolder(nn.Module):
    """A reflection where it points to the other side (Singla et al. 2022): z if v'z > 0, else z - 2 v v'z."""

    def __init__(self, channels) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.rand(channels // 2))

    def forward(self, x):
        a, b = x.chunk(2, 1)
        sin, cos = torch.sin(self.theta / 2), torch.cos(self.theta / 2)
        side = F.relu(sin * a - cos * b) - F.relu(cos * b - sin * a) - (sin * a - cos * b).abs()
        return torch.cat([a - sin * side, b + cos * side], 1)


class Bjorck(nn.Linear):
    """Björck's iteration towards orthogonal weights (Anil et al. 2019)."""

    def forward(self, x):
        w = self.weight / torch.linalg.matrix_norm(self.weight, 2)
        for _ in range(15):
            w = 1.5 * w - 0.5 * w @ w.T @ w
        return F.linear(x, w, self.bias)


class Cayley(nn.Linear):
    """(I - A)(I + A)^-1 of a skew A (Trockman, Kolter 2021)."""

    def forward(self, x):
        a = self.weight - self.weight.T
        eye = torch.eye(len(a), dtype=a.dtype)
        return F.linear(x, torch.linalg.solve(eye + a, eye - a), self.bias)


class CayleyConv(nn.Module):
    """The same of every frequency of a circular convolution, by the Fourier transform."""

    def __init__(self, channels=2, size=4) -> None:
        super().__init__()
        self.weight, self.size = nn.Parameter(torch.randn(channels, channels, 3, 3) / 3), size

    def forward(self, x):
        n = self.size
        w = torch.fft.rfft2(self.weight, (n, n)).permute(2, 3, 0, 1)
        a = w - w.mH
        eye = torch.eye(a.shape[-1], dtype=a.dtype)
        q = torch.linalg.solve(eye + a, eye - a)
        z = torch.fft.rfft2(x).permute(2, 3, 1, 0)
        return torch.fft.irfft2((q @ z).permute(3, 2, 0, 1), (n, n))


class SOC(nn.Module):
    """The exponential of a skew convolution by its series (Singla, Feizi 2021)."""

    def __init__(self, channels=2, terms=6) -> None:
        super().__init__()
        self.weight, self.terms = nn.Parameter(torch.randn(channels, channels, 3, 3) / 10), terms

    def forward(self, x):
        skew = self.weight - self.weight.transpose(0, 1).flip(2, 3)
        total = term = x
        for k in range(1, self.terms):
            term = F.conv2d(term, skew, padding=1) / k
            total = total + term
        return total


class BCOP(nn.Module):
    """Orthogonal: (1 - P) + P z for projections P, along both directions, times an orthogonal map (Li et al. 2019)."""

    def __init__(self, channels=2) -> None:
        super().__init__()
        self.q, self.p = nn.Parameter(torch.randn(channels, channels)), nn.Parameter(torch.randn(2, channels, 1))

    def forward(self, x):
        q, _ = torch.linalg.qr(self.q)
        p = self.p / self.p.norm(dim=1, keepdim=True)
        p = p @ p.transpose(1, 2)
        rest = torch.eye(len(q)) - p
        rows = F.pad(x, (0, 0, 0, 1), mode="circular")
        x = F.conv2d(rows, torch.stack([rest[0], p[0]], -1).unsqueeze(-1))
        columns = F.pad(x, (0, 1, 0, 0), mode="circular")
        return F.conv2d(F.conv2d(columns, torch.stack([rest[1], p[1]], -1).unsqueeze(-2)), q[:, :, None, None])


class AOL(nn.Linear):
    """W diag(sum_j |W'W|_ij)^-1/2 (Prach, Lampert 2022)."""

    def forward(self, x):
        w = self.weight
        return F.linear(x * (w.T @ w).abs().sum(1).clamp(min=1e-12).rsqrt(), w, self.bias)


class AOLConv(nn.Conv2d):
    def forward(self, x):
        w = self.weight
        k = w.shape[-1]
        gram = F.conv2d(w.transpose(0, 1), w.transpose(0, 1), padding=k - 1)
        scale = gram.abs().sum((1, 2, 3)).clamp(min=1e-12).rsqrt()
        return F.conv2d(x, w * scale[None, :, None, None], self.bias, padding=k // 2)


class SLL(nn.Module):
    """x - 2 W T^-1 relu(W'x + b), T = diag(sum_j |W'W|_ij q_j / q_i) (Araujo et al. 2023)."""

    def __init__(self, size=4, width=6) -> None:
        super().__init__()
        self.w, self.b, self.q = (
            nn.Parameter(torch.randn(size, width)),
            nn.Parameter(torch.zeros(width)),
            nn.Parameter(torch.rand(width)),
        )

    def forward(self, x):
        q = self.q.exp()
        t = 2 / ((self.w.T @ self.w).abs() * q / q[:, None]).sum(1)
        return x - (t * F.relu(x @ self.w + self.b)) @ self.w.T


class CPL(nn.Module):
    """x - 2 / |W|^2 W' relu(W x + b): a gradient step on a convex potential (Meunier et al. 2022)."""

    def __init__(self, size=4, width=6) -> None:
        super().__init__()
        self.linear = nn.Linear(size, width)

    def forward(self, x):
        w = self.linear.weight
        return x - 2 / torch.linalg.matrix_norm(w, 2) ** 2 * F.relu(self.linear(x)) @ w


class Sandwich(nn.Module):
    """sqrt 2 A' D phi(sqrt 2 D^-1 B x + b), (A, B) from a Cayley transform (Wang, Manchester 2023)."""

    def __init__(self, inputs=4, outputs=4) -> None:
        super().__init__()
        self.xy, self.d, self.b = (
            nn.Parameter(torch.randn(inputs + outputs, outputs) / 2),
            nn.Parameter(torch.zeros(outputs)),
            nn.Parameter(torch.zeros(outputs)),
        )
        self.outputs = outputs

    def forward(self, x):
        u, v = self.xy[: self.outputs], self.xy[self.outputs :]
        eye = torch.eye(self.outputs)
        z = u - u.T + v.T @ v
        inverse = torch.linalg.inv(eye + z)
        a, b = inverse @ (eye - z), -2 * v @ inverse
        h = F.relu(math.sqrt(2) * torch.exp(-self.d) * (x @ b) + self.b)
        return math.sqrt(2) * (h * torch.exp(self.d)) @ a


class L2Pool(nn.Module):
    """Lengths of windows, as deel-torchlip's ScaledL2NormPool2D."""

    def forward(self, x):
        return torch.sqrt(F.avg_pool2d(x**2, 2) * 4)


class GlobalL2(nn.Module):
    def forward(self, x):
        return x.flatten(2).norm(dim=2)


class LinfDistance(nn.Module):
    """y_j = |x - w_j|_inf + b_j (Zhang et al. 2021)."""

    def __init__(self, inputs, outputs) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(outputs, inputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return (x[:, None] - self.w).abs().amax(-1) + self.b


class Parseval(nn.Module):
    """Convex combination of a value and an orthogonal layer of it (Cissé et al. 2017)."""

    def __init__(self, size=4) -> None:
        super().__init__()
        self.layer, self.alpha = orthogonal(nn.Linear(size, size)), nn.Parameter(torch.zeros(()))

    def forward(self, x):
        a = torch.sigmoid(self.alpha)
        return a * x + (1 - a) * torch.relu(self.layer(x))


class Monotone(nn.Module):
    """LBEN: z = relu(W z + U x + b), 2 I - W - W' > 0 by parametrisation, solved by a fixed number of steps."""

    def __init__(self, size=4, steps=8) -> None:
        super().__init__()
        self.v, self.u, self.steps = nn.Parameter(torch.randn(size, size) / 4), nn.Linear(3, size), steps

    def forward(self, x):
        w = torch.eye(len(self.v)) - self.v.T @ self.v - 0.5 * torch.eye(len(self.v))
        z = torch.zeros(len(x), len(self.v))
        for _ in range(self.steps):
            z = torch.relu(0.5 * z + 0.5 * (z @ w.T + self.u(x)))
        return z


def frozen():
    """deel-torchlip's vanilla export: plain layers with the normalised weights written in."""
    layers = []
    for layer in mlp(6, 8, 8, 2, act=GroupSort2):
        if isinstance(layer, nn.Linear):
            layer.weight.data /= torch.linalg.matrix_norm(layer.weight.data, 2)
        layers.append(layer)
    return nn.Sequential(*layers)


def stack(layer, act, *, last: int = 4):
    return nn.Sequential(layer(), act(), layer(), act(), nn.Linear(last, 3))


LIPSCHITZ = {
    "GroupSort, Björck": Specimen(lambda: stack(lambda: Bjorck(4, 4), GroupSort2), (4,)),
    "Full sort, orthogonal": Specimen(lambda: stack(lambda: orthogonal(nn.Linear(4, 4)), FullSort), (4,)),
    "MaxMin, Cayley": Specimen(lambda: stack(lambda: Cayley(4, 4), MaxMin), (4,)),
    "Householder, Cayley": Specimen(lambda: stack(lambda: Cayley(4, 4), lambda: HouseHolder(4)), (4,)),
    "Vanilla export of a 1-Lipschitz network": Specimen(frozen, (6,)),
    "Cayley convolution": Specimen(
        lambda: nn.Sequential(CayleyConv(), MaxMin(), CayleyConv(), nn.Flatten(), nn.Linear(32, 3)), (2, 4, 4)
    ),
    "Skew orthogonal convolution": Specimen(
        lambda: nn.Sequential(SOC(), MaxMin(), SOC(), nn.Flatten(), nn.Linear(32, 3)), (2, 4, 4)
    ),
    "BCOP convolution": Specimen(lambda: nn.Sequential(BCOP(), MaxMin(), BCOP(), nn.Flatten(), nn.Linear(32, 3)), (2, 4, 4)),
    "AOL": Specimen(lambda: stack(lambda: AOL(4, 4), MaxMin), (4,)),
    "AOL convolution": Specimen(
        lambda: nn.Sequential(AOLConv(2, 4, 3), MaxMin(), AOLConv(4, 4, 3), nn.Flatten(), nn.Linear(64, 3)), (2, 4, 4)
    ),
    "SLL": Specimen(lambda: nn.Sequential(SLL(), SLL(), SLL()), (4,)),
    "Convex potential layers": Specimen(lambda: nn.Sequential(CPL(), CPL(), CPL()), (4,)),
    "Sandwich layers": Specimen(lambda: nn.Sequential(Sandwich(), Sandwich(), nn.Linear(4, 2)), (4,)),
    "Parseval network": Specimen(lambda: nn.Sequential(Parseval(), Parseval(), nn.Linear(4, 2)), (4,)),
    "LBEN, iterated": Specimen(Monotone, (3,)),
    "Scaled residual": Specimen(
        lambda: nn.Sequential(*(Residual(spectral_norm(nn.Linear(4, 4)), nn.ReLU(), scale=0.5) for _ in range(3))), (4,)
    ),
    "L-infinity distance network": Specimen(lambda: nn.Sequential(LinfDistance(4, 5), LinfDistance(5, 3)), (4,)),
    "Invertible downsampling": Specimen(
        lambda: nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4, 4, 1), MaxMin(), nn.Flatten(), nn.Linear(16, 2)), (1, 4, 4)
    ),
    "Scaled average pooling": Specimen(
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 3, padding=1), Apply(torch.abs), nn.AvgPool2d(2), Apply(lambda x: 2 * x), nn.Flatten()
        ),
        (1, 4, 4),
    ),
    "L2-norm pooling": Specimen(
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.LPPool2d(2, 2), nn.Flatten(), nn.Linear(8, 2)), (1, 4, 4)
    ),
    "L2-norm pooling, written out": Specimen(
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), L2Pool(), nn.Flatten()), (1, 4, 4)
    ),
    "Global L2-norm pooling": Specimen(
        lambda: nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), GlobalL2(), nn.Linear(3, 2)), (1, 4, 4)
    ),
}
