"""Functions and operators of physics, unrolled algorithms, networks of constrained shape, sets and graphs."""

from __future__ import annotations

import math

import architectures as made
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from gallery.parts import Apply, Residual, Specimen, mlp
from lipguard.nn.equilibrium import LipschitzEquilibrium


class Sine(nn.Module):
    def forward(self, x):
        return torch.sin(x)


class Encoding(nn.Module):
    """NeRF: sines and cosines of 2^k pi x."""

    def __init__(self, octaves=3) -> None:
        super().__init__()
        self.frequencies = [2.0**k * math.pi for k in range(octaves)]

    def forward(self, x):
        return torch.cat([x, *(f(w * x) for w in self.frequencies for f in (torch.sin, torch.cos))], -1)


class FourierFeatures(nn.Module):
    def __init__(self, inputs=2, features=6) -> None:
        super().__init__()
        self.register_buffer("b", torch.randn(features, inputs))

    def forward(self, x):
        x = 2 * math.pi * x @ self.b.T
        return torch.cat([torch.cos(x), torch.sin(x)], dim=-1)


class HatKAN(nn.Module):
    """A Kolmogorov-Arnold layer: each edge a function by hats relu(1 - |x - k| / h), and a base branch."""

    def __init__(self, inputs, outputs, knots=5) -> None:
        super().__init__()
        self.register_buffer("knots", torch.linspace(-1, 1, knots))
        self.h, self.base = 2 / (knots - 1), nn.Linear(inputs, outputs)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, knots) / inputs)

    def forward(self, x):
        hats = F.relu(1 - (x.unsqueeze(-1) - self.knots).abs() / self.h)
        return self.base(F.silu(x)) + torch.einsum("bik,oik->bo", hats, self.weight)


class SplineKAN(nn.Module):
    """The same by B-splines of Cox and de Boor's recursion, as efficient-kan writes it."""

    def __init__(self, inputs, outputs, grid=3, order=2) -> None:
        super().__init__()
        self.order = order
        self.register_buffer("grid", (torch.arange(-order, grid + order + 1) * 2.0 / grid - 1).expand(inputs, -1))
        self.weight = nn.Parameter(torch.randn(outputs, inputs * (grid + order)) / inputs)

    def forward(self, x):
        x, g = x.unsqueeze(-1), self.grid
        bases = ((x >= g[:, :-1]) & (x < g[:, 1:])).to(x.dtype)
        for k in range(1, self.order + 1):
            left = (x - g[:, : -(k + 1)]) / (g[:, k:-1] - g[:, : -(k + 1)]) * bases[..., :-1]
            bases = left + (g[:, k + 1 :] - x) / (g[:, k + 1 :] - g[:, 1:-k]) * bases[..., 1:]
        return F.linear(bases.flatten(1), self.weight)


class RadialKAN(nn.Module):
    """FastKAN: Gaussian bumps exp(-((x - k) / h)^2) in place of splines."""

    def __init__(self, inputs, outputs, knots=4) -> None:
        super().__init__()
        self.register_buffer("knots", torch.linspace(-2, 2, knots))
        self.h, self.linear = 4 / (knots - 1), nn.Linear(inputs * knots, outputs)

    def forward(self, x):
        return self.linear(torch.exp(-(((x[..., None] - self.knots) / self.h) ** 2)).flatten(1))


class RadialBasis(nn.Module):
    """Cones relu(2 - d) of the distances d to learned centres."""

    def __init__(self, inputs, centres) -> None:
        super().__init__()
        self.centres, self.out = nn.Parameter(torch.randn(centres, inputs)), nn.Linear(centres, 2)

    def forward(self, x):
        return self.out(F.relu(2 - torch.cdist(x, self.centres)))


class Spectral1d(nn.Module):
    """FNO: the lowest modes mixed by complex weights (Li et al. 2021)."""

    def __init__(self, channels=3, modes=3) -> None:
        super().__init__()
        self.modes, self.weight = modes, nn.Parameter(torch.randn(channels, channels, modes, dtype=torch.cfloat) / channels)
        self.local = nn.Conv1d(channels, channels, 1)

    def forward(self, x):
        ft = torch.fft.rfft(x)
        out = torch.zeros_like(ft)
        out[:, :, : self.modes] = torch.einsum("bix,iox->box", ft[:, :, : self.modes], self.weight)
        return F.gelu(torch.fft.irfft(out, n=x.size(-1)) + self.local(x))


class Spectral2d(nn.Module):
    def __init__(self, channels=2, modes=2) -> None:
        super().__init__()
        self.modes = modes
        self.w1, self.w2 = (
            nn.Parameter(torch.randn(channels, channels, modes, modes, dtype=torch.cfloat) / channels) for _ in range(2)
        )

    def forward(self, x):
        m, ft = self.modes, torch.fft.rfft2(x)
        out = torch.zeros_like(ft)
        out[:, :, :m, :m] = torch.einsum("bixy,ioxy->boxy", ft[:, :, :m, :m], self.w1)
        out[:, :, -m:, :m] = torch.einsum("bixy,ioxy->boxy", ft[:, :, -m:, :m], self.w2)
        return torch.fft.irfft2(out, s=x.shape[-2:])


class ODE(nn.Module):
    """Steps of x' = f(x), by Euler or by the classical scheme of Runge and Kutta."""

    def __init__(self, order=1, steps=4, h=0.25) -> None:
        super().__init__()
        self.f, self.order, self.steps, self.h = mlp(3, 8, 3, act=nn.Tanh), order, steps, h

    def forward(self, x):
        h = self.h
        for _ in range(self.steps):
            k1 = self.f(x)
            if self.order == 1:
                x = x + h * k1
                continue
            k2 = self.f(x + h / 2 * k1)
            k3 = self.f(x + h / 2 * k2)
            k4 = self.f(x + h * k3)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return x


class SympNet(nn.Module):
    """Gradient modules K' diag(a) sigma(K q + b), alternately added to p and to q (Jin et al. 2020)."""

    def __init__(self, size=2, width=6, layers=4) -> None:
        super().__init__()
        self.k = nn.ParameterList(torch.randn(width, size) / 2 for _ in range(layers))
        self.a, self.b = (nn.ParameterList(torch.randn(width) / 2 for _ in range(layers)) for _ in range(2))

    def forward(self, x):
        p, q = x.chunk(2, 1)
        for i, (k, a, b) in enumerate(zip(self.k, self.a, self.b, strict=True)):
            if i % 2:
                p = p + (a * torch.tanh(q @ k.T + b)) @ k
            else:
                q = q + (a * torch.tanh(p @ k.T + b)) @ k
        return torch.cat([p, q], 1)


class HyperNetwork(nn.Module):
    """A network whose weights another one makes, of a context that is held fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.hyper = nn.Linear(3, 8 * 4 + 8)
        self.register_buffer("context", torch.randn(3))
        self.out = nn.Linear(8, 2)

    def forward(self, x):
        weights = self.hyper(self.context)
        return self.out(torch.relu(F.linear(x, weights[:32].view(8, 4), weights[32:])))


class LISTA(nn.Module):
    """Sparse coding by learned steps of a soft threshold (Gregor, LeCun 2010); with a dictionary, ISTA unrolled."""

    def __init__(self, steps=3, dictionary=False) -> None:
        super().__init__()
        d = torch.randn(5, 8) / 3
        size = float(torch.linalg.matrix_norm(d, 2)) ** 2
        self.w, self.s = nn.Linear(5, 8, bias=False), nn.Linear(8, 8, bias=False)
        if dictionary:
            self.w.weight.data, self.s.weight.data = d.T / size, torch.eye(8) - d.T @ d / size
        self.theta, self.steps = nn.Parameter(torch.full((8,), 0.1)), steps

    def shrink(self, x):
        return torch.sign(x) * F.relu(x.abs() - self.theta)

    def forward(self, y):
        b = self.w(y)
        x = self.shrink(b)
        for _ in range(self.steps):
            x = self.shrink(b + self.s(x))
        return x


class SoftISTA(LISTA):
    """The threshold written by two ReLUs."""

    def shrink(self, x):
        return F.relu(x - self.theta) - F.relu(-x - self.theta)


class PrimalDual(nn.Module):
    """Learned primal-dual: a fixed operator and its adjoint between small networks (Adler, Öktem 2018)."""

    def __init__(self, steps=2) -> None:
        super().__init__()
        self.register_buffer("a", torch.randn(4, 6) / 3)
        self.primal, self.dual = (
            nn.ModuleList(mlp(12, 8, 6) for _ in range(steps)),
            nn.ModuleList(mlp(12, 8, 4) for _ in range(steps)),
        )

    def forward(self, y):
        x, z = torch.zeros(len(y), 6), torch.zeros(len(y), 4)
        for primal, dual in zip(self.primal, self.dual, strict=True):
            z = z + dual(torch.cat([z, x @ self.a.T, y], 1))
            x = x + primal(torch.cat([x, z @ self.a], 1))
        return x


class FixedPoint(nn.Module):
    """A deep equilibrium model that iterates until it stands still."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.enter = nn.Linear(4, 4), nn.Linear(3, 4)

    def forward(self, x):
        z = torch.zeros(len(x), 4)
        for _ in range(50):
            new = torch.tanh(0.3 * self.inner(z) + self.enter(x))
            if torch.norm(new - z) < 1e-6:
                break
            z = new
        return z


class ICNN(nn.Module):
    """Convex in its input: weights of hidden layers are made nonnegative (Amos et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.skip = nn.ModuleList(nn.Linear(4, n) for n in (8, 8, 1))
        self.hidden = nn.ModuleList(nn.Linear(8, n, bias=False) for n in (8, 1))

    def forward(self, x):
        z = F.relu(self.skip[0](x))
        for skip, layer in zip(list(self.skip)[1:], self.hidden, strict=True):
            z = F.relu(skip(x) + F.linear(z, F.softplus(layer.weight)))
        return z


class Monotone(nn.Module):
    """Weights exp(w) (or a minimum of maxima of such functions, Sill 1998), increasing in every input."""

    def __init__(self, groups=False) -> None:
        super().__init__()
        self.a, self.b, self.groups = nn.Linear(3, 9), nn.Linear(9, 1), groups

    def forward(self, x):
        z = F.linear(x, torch.exp(self.a.weight - 1), self.a.bias)
        if self.groups:
            return z.view(-1, 3, 3).max(2).values.min(1, keepdim=True).values
        return F.linear(torch.sigmoid(z), torch.exp(self.b.weight - 1), self.b.bias)


class Dilation(nn.Module):
    """A morphological layer: y_j = max_i (x_i + w_ij)."""

    def __init__(self, inputs, outputs) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(outputs, inputs))

    def forward(self, x):
        return (x.unsqueeze(1) + self.w).amax(-1)


class ExpertsOfPowers(nn.Module):
    """A Pi-network: products of linear forms."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.out(self.a(x) * self.b(x) + self.a(x))


class DeepSets(nn.Module):
    """Points (batch, points, features), each alone, pooled, then together."""

    def __init__(self, pool) -> None:
        super().__init__()
        self.phi, self.pool = mlp(3, 8, 6, last=True), pool
        self.rho = nn.LazyLinear(2)
        self.rho(pool(torch.zeros(1, 5, 6)))

    def forward(self, x):
        return self.rho(self.pool(self.phi(x)))


class PointNet(nn.Module):
    """Shared convolutions of width 1, the maximum over points, joined to each point again for a segmentation."""

    def __init__(self) -> None:
        super().__init__()
        self.local = nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.ReLU())
        self.deep, self.out = nn.Sequential(nn.Conv1d(4, 6, 1), nn.BatchNorm1d(6), nn.ReLU()), nn.Conv1d(10, 2, 1)

    def forward(self, x):
        local = self.local(x)
        whole = torch.max(self.deep(local), 2, keepdim=True)[0]
        return self.out(torch.cat([local, whole.expand(-1, -1, x.shape[2])], 1))


EDGES = torch.tensor([[0, 0, 1, 2, 3, 3, 4, 1, 2, 2, 3, 4, 0, 0], [1, 2, 2, 3, 4, 0, 0, 0, 0, 1, 2, 3, 3, 4]])
"""A graph of five nodes: from, to."""


def adjacency(loops=True):
    a = torch.zeros(5, 5)
    a[EDGES[1], EDGES[0]] = 1.0
    return a + torch.eye(5) if loops else a


class GCN(nn.Module):
    """D^-1/2 (A + I) D^-1/2 X W (Kipf, Welling 2017)."""

    def __init__(self, hops=1) -> None:
        super().__init__()
        a = adjacency()
        d = a.sum(1).rsqrt()
        self.register_buffer("a", torch.linalg.matrix_power(d[:, None] * a * d, hops))
        self.w1, self.w2 = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x):
        x = F.relu(self.a @ self.w1(x))
        return self.a @ self.w2(x)


class Sage(nn.Module):
    """GraphSAGE: a node's own features beside the mean, or the maximum, of its neighbours'."""

    def __init__(self, aggregate="mean") -> None:
        super().__init__()
        a = adjacency(loops=False)
        self.register_buffer("mean", a / a.sum(1, keepdim=True))
        self.neighbours = [EDGES[0][EDGES[1] == i] for i in range(5)]
        self.own, self.other, self.pool, self.aggregate = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(3, 3), aggregate

    def forward(self, x):
        if self.aggregate == "mean":
            around = torch.matmul(self.mean, x)
        else:
            h = F.relu(self.pool(x))
            around = torch.stack([h[:, n].amax(1) for n in self.neighbours], 1)
        return F.relu(self.own(x) + self.other(around))


class GIN(nn.Module):
    """MLP((1 + eps) x + sum of neighbours), summed over the graph; sums by index_add."""

    def __init__(self) -> None:
        super().__init__()
        self.eps, self.mlp, self.out = nn.Parameter(torch.tensor(0.1)), mlp(3, 6, 4), nn.Linear(4, 2)

    def forward(self, x):
        around = torch.zeros_like(x).index_add(1, EDGES[1], x[:, EDGES[0]])
        return self.out(F.relu(self.mlp((1 + self.eps) * x + around)).sum(1))


class Cheb(nn.Module):
    """Chebyshev polynomials of the scaled Laplacian (Defferrard et al. 2016)."""

    def __init__(self, order=3) -> None:
        super().__init__()
        a = adjacency(loops=False)
        self.register_buffer("l", -a / a.sum(1, keepdim=True))
        self.w = nn.ModuleList(nn.Linear(3, 4) for _ in range(order))

    def forward(self, x):
        t = [x, self.l @ x]
        while len(t) < len(self.w):
            t.append(2 * self.l @ t[-1] - t[-2])
        return F.relu(sum(w(z) for w, z in zip(self.w, t, strict=True)))


class GAT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(4, 1)
        self.register_buffer("mask", adjacency() == 0)

    def forward(self, x):
        h = self.w(x)
        e = F.leaky_relu(self.a(h) + self.b(h).transpose(1, 2), 0.2).masked_fill(self.mask, -torch.inf)
        return torch.softmax(e, -1) @ h


class APPNP(nn.Module):
    """A network of each node, then personalised PageRank steps (Gasteiger et al. 2019)."""

    def __init__(self) -> None:
        super().__init__()
        a = adjacency()
        self.mlp = mlp(3, 6, 2)
        self.register_buffer("a", a / a.sum(1, keepdim=True))

    def forward(self, x):
        z = h = self.mlp(x)
        for _ in range(4):
            z = 0.9 * torch.einsum("ij,bjf->bif", self.a, z) + 0.1 * h
        return z


class Interactions(nn.Module):
    """Messages of pairs along fixed edges, gathered at the nodes (Battaglia et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.update = mlp(6, 8, 4, last=True), mlp(7, 6, 2)
        self.register_buffer("gather", F.one_hot(EDGES[1], 5).T.float())

    def forward(self, x):
        m = self.message(torch.cat([x.index_select(1, EDGES[0]), x.index_select(1, EDGES[1])], -1))
        return self.update(torch.cat([x, self.gather @ m], -1))


class TwoTower(nn.Module):
    """Similarity of two embeddings as their inner product."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = mlp(3, 6, 4), mlp(3, 6, 4)

    def forward(self, x):
        a, b = x.chunk(2, 1)
        return (self.left(a) * self.right(b)).sum(1)


SCIENCE = {
    "PINN, tanh": Specimen(lambda: mlp(2, 16, 16, 16, 1, act=nn.Tanh), (2,)),
    "PINN, sine": Specimen(lambda: mlp(2, 16, 16, 1, act=Sine), (2,)),
    "SIREN": Specimen(made.Siren, (2,)),
    "NeRF with positional encoding": Specimen(lambda: nn.Sequential(Encoding(), mlp(21, 16, 16, 4)), (3,)),
    "Fourier features": Specimen(lambda: nn.Sequential(FourierFeatures(), mlp(12, 12, 1)), (2,)),
    "KAN of hat functions": Specimen(lambda: nn.Sequential(HatKAN(2, 4), HatKAN(4, 1)), (2,)),
    "KAN of B-splines": Specimen(lambda: SplineKAN(2, 2, grid=2), (2,)),
    "KAN of Gaussians": Specimen(lambda: nn.Sequential(RadialKAN(2, 4), RadialKAN(4, 1)), (2,)),
    "Radial basis functions": Specimen(lambda: RadialBasis(3, 5), (3,)),
    "Fourier neural operator, 1-d": Specimen(lambda: nn.Sequential(nn.Conv1d(1, 3, 1), Spectral1d(), nn.Conv1d(3, 1, 1)), (1, 8)),
    "Fourier neural operator, 2-d": Specimen(
        lambda: nn.Sequential(nn.Conv2d(1, 2, 1), Residual(Spectral2d()), nn.GELU(), nn.Conv2d(2, 1, 1)), (1, 6, 6)
    ),
    "DeepONet at fixed places": Specimen(made.DeepONetAt, (10,)),
    "DeepONet of function and place": Specimen(made.DeepONetJoint, (11,)),
    "Neural ODE, Euler": Specimen(ODE, (3,)),
    "Neural ODE, Runge-Kutta": Specimen(lambda: ODE(4, 2), (3,)),
    "SympNet": Specimen(SympNet, (4,)),
    "Hypernetwork, context fixed": Specimen(HyperNetwork, (4,)),
    "LISTA": Specimen(SoftISTA, (5,)),
    "LISTA, sign times ReLU": Specimen(LISTA, (5,)),
    "ISTA, unrolled": Specimen(lambda: SoftISTA(3, dictionary=True), (5,)),
    "Learned primal-dual": Specimen(PrimalDual, (4,)),
    "Equilibrium network, monotone": Specimen(lambda: LipschitzEquilibrium(4, 8, 2), (4,)),
    "Equilibrium by iteration": Specimen(FixedPoint, (3,)),
    "Input-convex network": Specimen(ICNN, (4,)),
    "Monotone network": Specimen(Monotone, (3,)),
    "Minimum of maxima": Specimen(lambda: Monotone(groups=True), (3,)),
    "Morphological network": Specimen(lambda: nn.Sequential(Dilation(4, 6), nn.Linear(6, 3)), (4,)),
    "Deep linear network": Specimen(lambda: nn.Sequential(*(nn.Linear(5, 5) for _ in range(4))), (5,)),
    "Pi-network": Specimen(ExpertsOfPowers, (4,)),
    "Deep sets": Specimen(lambda: DeepSets(lambda h: h.sum(1)), (5, 3)),
    "Set pooling, mean and maximum": Specimen(lambda: DeepSets(lambda h: torch.cat([h.mean(1), h.max(1)[0]], 1)), (5, 3)),
    "PointNet": Specimen(PointNet, (3, 6)),
    "GCN": Specimen(GCN, (5, 3)),
    "SGC": Specimen(lambda: GCN(3), (5, 3)),
    "GraphSAGE, mean": Specimen(Sage, (5, 3)),
    "GraphSAGE, maximum": Specimen(lambda: Sage("max"), (5, 3)),
    "GIN": Specimen(GIN, (5, 3)),
    "ChebNet": Specimen(Cheb, (5, 3)),
    "APPNP": Specimen(APPNP, (5, 3)),
    "Interaction network": Specimen(Interactions, (5, 3)),
    "GAT": Specimen(GAT, (5, 3)),
    "Siamese difference": Specimen(made.Siamese, (2, 8, 8)),
    "Two towers": Specimen(TwoTower, (6,)),
    "Normalised embedding": Specimen(lambda: nn.Sequential(mlp(4, 8, 3), Apply(lambda x: F.normalize(x, dim=1))), (4,)),
    "Softmax classifier": Specimen(lambda: nn.Sequential(mlp(4, 8, 3), nn.Softmax(1)), (4,)),
}
