"""Networks whose Lipschitz constants follow from a formula, stated beside each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

INF = math.inf


@dataclass(frozen=True)
class Known:
    """A network and its constants over all of R^d.

    Attributes:
        constants: by norm: p for p -> p, or (p, q).
        lipsdp: the optimum of the semidefinite program, where it is known in closed form; the slope relaxation may exceed
            the 2-norm constant. None where it is not known.
    """

    make: Callable[[], nn.Module]
    inputs: int
    constants: dict[object, float]
    lipsdp: float | None = None
    dtype: torch.dtype = field(default=torch.float64)

    @property
    def example(self) -> Tensor:
        return torch.zeros(1, self.inputs, dtype=self.dtype)

    @property
    def constant(self) -> float:
        return self.constants[2]


def matrix(rows, dtype=torch.float64) -> Tensor:
    return torch.tensor(rows, dtype=dtype)


def linear(weight, bias=None, dtype=torch.float64) -> nn.Linear:
    weight = torch.as_tensor(weight, dtype=dtype)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=dtype)
    layer.weight.data = weight.clone()
    if bias is not None:
        layer.bias.data = torch.as_tensor(bias, dtype=dtype).clone()
    return layer


def chain(*weights, activation: Callable[[], nn.Module] = nn.ReLU, biases=None, dtype=torch.float64) -> nn.Sequential:
    """Affine maps with activations between them."""
    layers: list[nn.Module] = []
    for k, weight in enumerate(weights):
        layers.append(linear(weight, None if biases is None else biases[k], dtype))
        if k < len(weights) - 1:
            layers.append(activation().to(dtype))
    return nn.Sequential(*layers)


class Residual(nn.Module):
    """x + branch(x), some blocks in a row."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        for branch in self.branches:
            x = x + branch(x)
        return x


class MaxMin(nn.Module):
    """(x, y) -> (max, min) by one ReLU: y + relu(x - y), x - relu(x - y)."""

    def __init__(self) -> None:
        super().__init__()
        self.swap, self.difference, self.back = linear([[0, 1], [1, 0]]), linear([[1, -1]]), linear([[1], [-1]])

    def forward(self, x):
        return self.swap(x) + self.back(torch.relu(self.difference(x)))


class Scaled(nn.Module):
    """outer * inner(inner_scale * x)."""

    def __init__(self, inner: nn.Module, before: float, after: float) -> None:
        super().__init__()
        self.inner, self.before, self.after = inner, before, after

    def forward(self, x):
        return self.after * self.inner(self.before * x)


def hadamard(size: int) -> Tensor:
    """An orthogonal matrix with entries +-1/sqrt(size), exact in floating point for size 4 and 16."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / math.sqrt(size)


# Rows orthogonal, each of length 3.
ORTHOGONAL_ROWS = [[1.0, 2.0, 2.0], [2.0, -2.0, 1.0]]

ZOO: dict[str, Known] = {
    # The matrix itself: singular values 3, row sums 5, column sums 4, column lengths sqrt 8, row lengths 3, entries 2.
    "linear": Known(
        lambda: linear(ORTHOGONAL_ROWS, [1.0, -1.0]), 3, {2: 3, INF: 5, 1: 4, (1, 2): math.sqrt(8), (2, INF): 3, (1, INF): 2}, 3
    ),
    # |x| = relu(x) + relu(-x). With T = t I the program is rho = t subject to 2 t >= lambda_max(11') = 2: optimum 1.
    "absolute": Known(lambda: chain([[1], [-1]], [[1, 1]]), 1, {2: 1, INF: 1, 1: 1, (1, 2): 1, (2, INF): 1}, 1),
    "absolute-float32": Known(
        lambda: chain([[1], [-1]], [[1, 1]], dtype=torch.float32), 1, {2: 1, INF: 1, 1: 1}, 1, torch.float32
    ),
    "absolute-float16": Known(
        lambda: chain([[1], [-1]], [[1, 1]], dtype=torch.float16), 1, {2: 1, INF: 1, 1: 1}, 1, torch.float16
    ),
    # |v| |w| for v relu(w'x): 5 * 3.
    "single-relu": Known(
        lambda: chain([[1.0, 2.0, 2.0]], [[3.0], [4.0]]),
        3,
        {2: 15, INF: 4 * 5, 1: 2 * 7, (1, 2): 2 * 5, (2, INF): 3 * 4, (1, INF): 2 * 4},
        15,
    ),
    # |y|^2 = |x|^2 - 2 w (p - w) with p = x_1 - x_2, w = relu(p): optimum 1 at t = 1, where Z = 0.
    "maxmin": Known(MaxMin, 2, {2: 1, INF: 1, 1: 1}, 1),
    # y = x - 2 W' relu(W x), W W' = I: |x|^2 - |y|^2 = 4 w'(p - w). Optimum 1; J = I where all neurons are off.
    "householder-residual": Known(
        lambda: Residual(*(chain(h, -2 * h.T) for h in (hadamard(4)[:2], hadamard(4)[1:]))), 4, {2: 1}, 1
    ),
    # Every layer orthogonal, and biases that keep all neurons on at 0: J(0) is orthogonal.
    "deep-orthogonal": Known(lambda: chain(*[hadamard(4)] * 6, biases=[[9.0] * 4, *[[99.0] * 4] * 5]), 4, {2: 1}, 1),
    # a sigmoid(b x) has slope a b / 4 at 0.
    "sigmoid": Known(lambda: chain([[6.0]], [[2.0]], activation=nn.Sigmoid), 1, {2: 3, INF: 3, 1: 3}, 3),
    "tanh-orthogonal": Known(lambda: chain(hadamard(4), hadamard(4), activation=nn.Tanh), 4, {2: 1}, 1),
    # Rescaled twins of single-relu and absolute: the function is the same.
    "twin-large": Known(lambda: chain([[2.0**30], [-(2.0**30)]], [[2.0**-30, 2.0**-30]]), 1, {2: 1, INF: 1, 1: 1}, 1),
    "twin-small": Known(lambda: chain([[2.0**-30], [-(2.0**-30)]], [[2.0**30, 2.0**30]]), 1, {2: 1, INF: 1, 1: 1}, 1),
    "twin-uneven": Known(lambda: chain([[2.0**20], [-(2.0**-20)]], [[2.0**-20, 2.0**20]]), 1, {2: 1, INF: 1, 1: 1}, 1),
    # Scalings outside the layers: 1/4 * |8 x| = 2 |x|.
    "scaled": Known(lambda: Scaled(chain([[1], [-1]], [[1, 1]]), 8.0, 0.25), 1, {2: 2, INF: 2, 1: 2}, 2),
    "tiny": Known(lambda: chain([[2.0**-40], [-(2.0**-40)]], [[2.0**-40, 2.0**-40]]), 1, {2: 2.0**-80}, 2.0**-80),
    "huge": Known(lambda: chain([[2.0**40], [-(2.0**40)]], [[2.0**40, 2.0**40]]), 1, {2: 2.0**80}, 2.0**80),
    # Identical slopes: the network is linear, W2 W1 = I, though the layers' norms multiply to 16.
    "prelu-linear": Known(
        lambda: chain([[4, 0], [0, 0.25]], [[0.25, 0], [0, 4]], activation=lambda: nn.PReLU(init=1.0)), 2, {2: 1}, 1
    ),
    "leaky-linear": Known(
        lambda: chain([[4, 0], [0, 0.25]], [[0.25, 0], [0, 4]], activation=lambda: nn.LeakyReLU(1.0)), 2, {2: 1}, 1
    ),
    "identity-slope-zero": Known(
        lambda: chain([[1.0, 2.0, 2.0]], [[3.0], [4.0]], activation=lambda: nn.PReLU(init=0.0)), 3, {2: 15}, 15
    ),
    # PReLU of slope -c is max(1, c)-Lipschitz.
    "prelu-negative": Known(lambda: chain([[1.0]], [[1.0]], activation=lambda: nn.PReLU(init=-0.5)), 1, {2: 1, INF: 1, 1: 1}, 1),
    "prelu-steep": Known(lambda: chain([[1.0]], [[1.0]], activation=lambda: nn.PReLU(init=-2.0)), 1, {2: 2, INF: 2, 1: 2}, 2),
    # Nothing, a layer of zeros, and one dead neuron beside |x|.
    "zero": Known(lambda: chain([[0.0, 0.0]] * 3, [[0.0] * 3] * 2, biases=[[1.0] * 3, [2.0] * 2]), 2, {2: 0, INF: 0, 1: 0}, 0),
    "dead-layer": Known(lambda: chain([[1.0, 2.0]] * 3, [[0.0] * 3] * 3, [[1.0] * 3]), 2, {2: 0, INF: 0, 1: 0}, 0),
    "dead-neuron": Known(lambda: chain([[1], [-1], [0], [5]], [[1, 1, 7, 0]]), 1, {2: 1, INF: 1, 1: 1}, 1),
}
