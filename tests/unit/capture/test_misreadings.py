"""Ways in which published tools have read a model wrongly: each is captured rightly here, or refused, never dropped.

The yardstick is the Jacobian of the captured `Network` by autograd: at every point its norm is a lower bound of the
Lipschitz constant, and each case has a closed form that the misreading misses by far.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import lipguard as lg
from lipguard import errors
from lipguard.network import Affine, Network
from lipguard.programs.feedback import feedback_of
from lipguard.programs.rewriting import slope_restricted


def jacobian_norm(network: Network, x: Tensor) -> float:
    """Spectral norm of the network's Jacobian at one point, (d,)."""
    jacobian = torch.autograd.functional.jacobian(lambda z: network(z[None])[0], x.double())
    assert isinstance(jacobian, Tensor)
    return float(torch.linalg.matrix_norm(jacobian, 2))


def largest(network: Network, points: Tensor) -> float:
    return max(jacobian_norm(network, x) for x in points)


def scaled(factor: float, size: int) -> nn.Linear:
    layer = nn.Linear(size, size)
    with torch.no_grad():
        layer.weight.copy_(factor * torch.eye(size))
        layer.bias.zero_()
    return layer


def test_batchnorm_is_not_dropped() -> None:
    norm = nn.BatchNorm1d(3, eps=0.0)
    with torch.no_grad():
        norm.running_var.copy_(torch.tensor([0.01, 1.0, 4.0]))  # type: ignore[union-attr]
        norm.weight.copy_(torch.tensor([2.0, 1.0, 1.0]))
    # x -> gamma / sqrt(var) x: the constant is 2 / 0.1 = 20, not 1; var = 0.01 is rounded to float32.
    network = lg.capture(nn.Sequential(scaled(1.0, 3), norm), torch.zeros(1, 3))
    assert jacobian_norm(network, torch.zeros(3)) == pytest.approx(20.0, rel=1e-6)


def test_batchnorm_takes_running_statistics_even_while_training() -> None:
    norm = nn.BatchNorm1d(2, eps=0.0, affine=False).train()
    with torch.no_grad():
        norm.running_var.fill_(0.25)  # type: ignore[union-attr]
    # The example's own batch has variance 100: in training mode its normalisation would give 0.1.
    example = torch.tensor([[-10.0, 10.0], [10.0, -10.0]])
    network = lg.capture(norm, example)
    assert jacobian_norm(network, example[0]) == pytest.approx(2.0)
    assert norm.training and norm.running_var.tolist() == [0.25, 0.25]  # type: ignore[union-attr]
    with pytest.raises(errors.UnsupportedLayer, match="statistics of the batch"):
        lg.capture(nn.BatchNorm1d(2, track_running_stats=False), example)


class Skip(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def test_skips_are_not_dropped() -> None:
    # x + 0.02 relu(x) has constant 1.02; without the skip it is 0.02.
    network = lg.capture(Skip(nn.Sequential(scaled(0.02, 4), nn.ReLU())), torch.zeros(1, 4))
    assert jacobian_norm(network, torch.ones(4)) == pytest.approx(1.02, rel=1e-6)
    # x - x = 0: the two paths are told apart by sign.
    cancel = lg.capture(Skip(scaled(-1.0, 4)), torch.zeros(1, 4))
    assert jacobian_norm(cancel, torch.ones(4)) == 0.0


def test_inplace_skips_are_not_dropped() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            y += x
            torch.relu_(y)
            return y.add_(x)

    # relu(3 x) + x: 4 on the positive side, 1 on the negative.
    network = lg.capture(InPlace(), torch.zeros(1, 3))
    assert jacobian_norm(network, torch.ones(3)) == pytest.approx(4.0)
    assert jacobian_norm(network, -torch.ones(3)) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(1, 2, 3), (1, 1, 8)),
        (nn.Conv2d(1, 2, 3, padding=1), (1, 1, 6, 6)),
        (nn.ConvTranspose2d(1, 2, 3), (1, 1, 6, 6)),
    ],
)
def test_convolutions_are_exact(layer: nn.Module, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(layer, nn.ReLU(), nn.Flatten())
    network = lg.capture(model, torch.zeros(shape))
    x = torch.randn(4, *shape[1:], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(network(x.flatten(1)), model(x).double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["spectral", "lipsdp-neuron"])
def test_a_flattened_kernel_is_not_the_convolution(method: str) -> None:
    layer = nn.Conv1d(1, 1, 2, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    # The unrolled matrix is bidiagonal, (7, 8), of ones: eigenvalues of W W' are 2 + 2 cos(pi k / 8). The flattened kernel
    # [1, 1] has norm sqrt(2) only.
    network = lg.capture(layer, torch.zeros(1, 1, 8))
    constant = math.sqrt(2 + 2 * math.cos(math.pi / 8))
    assert jacobian_norm(network, torch.zeros(8)) == pytest.approx(constant, rel=1e-12)
    value = lg.bound(network, method=method).value
    assert constant <= value == pytest.approx(constant, rel=1e-9) and value > 1.38 * math.sqrt(2)


def test_a_convolution_by_hand_keeps_its_norm() -> None:
    """The same kernel at overlapping places, as a matrix: norm near 2, where the flattened kernel [1, 1] has sqrt 2."""

    class ByHand(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            columns = torch.nn.functional.pad(self.kernel, (0, 6)).repeat(8)[:56].view(7, 8)
            shifts = torch.stack([torch.roll(columns[0], i) for i in range(7)])
            return x @ shifts.T

    network = lg.capture(ByHand(), torch.zeros(1, 8))
    # Bidiagonal (7, 8) matrix of ones: eigenvalues of W W' are 2 + 2 cos(pi k / 8).
    assert jacobian_norm(network, torch.zeros(8)) == pytest.approx(math.sqrt(2 + 2 * math.cos(math.pi / 8)), rel=1e-12)


def test_shared_weights_count_every_time() -> None:
    layer = scaled(2.0, 3)
    # 2 x three times: 8; counted once: 2.
    network = lg.capture(nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), layer), torch.zeros(1, 3))
    assert sum(isinstance(node, Affine) for node in network.nodes) == 3
    assert jacobian_norm(network, torch.ones(3)) == pytest.approx(8.0)
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight = nn.Parameter(2 * torch.eye(3))
    assert jacobian_norm(lg.capture(tied, torch.zeros(1, 3)), torch.ones(3)) == pytest.approx(4.0)


@pytest.mark.parametrize(("slope", "constant"), [(0.25, 1.0), (3.0, 3.0), (-5.0, 5.0)])
def test_prelu_slope_counts(slope: float, constant: float) -> None:
    network = lg.capture(nn.PReLU(init=slope), torch.zeros(1, 2))
    low, high = slope_restricted(network).slopes()
    assert low.tolist() == [min(slope, 1.0)] * 2 and high.tolist() == [max(slope, 1.0)] * 2
    assert largest(network, torch.tensor([[-1.0, -1.0], [1.0, 1.0]])) == pytest.approx(constant)


def test_prelu_slopes_by_channel() -> None:
    layer = nn.PReLU(3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([-2.0, 0.5, 4.0]))
    low, high = slope_restricted(lg.capture(layer, torch.zeros(1, 3))).slopes()
    assert low.tolist() == [-2.0, 0.5, 1.0] and high.tolist() == [1.0, 1.0, 4.0]
    by_position = lg.capture(nn.Sequential(layer, nn.Flatten()), torch.zeros(1, 3, 2))
    assert slope_restricted(by_position).slopes()[0].tolist() == [-2.0, -2.0, 0.5, 0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    ("layer", "place", "overshoot"),
    [
        (nn.GELU(), 2**0.5, 1.12890414518515),
        (nn.GELU("tanh"), 1.41850400879, 1.12899306865877),
        (nn.SiLU(), 2.39935728052, 1.09983932012886),
        (nn.Mish(), 1.49057117949, 1.08849816125172),
        (nn.Hardswish(), 3.0 - 1e-12, 1.5),
    ],
    ids=["gelu", "gelu-tanh", "silu", "mish", "hardswish"],
)
def test_overshoot_counts(layer: nn.Module, place: float, overshoot: float) -> None:
    network = lg.capture(layer, torch.zeros(1, 1))
    attained = jacobian_norm(network, torch.tensor([place], dtype=torch.float64))
    low, high = (float(end) for end in slope_restricted(network).slopes())
    # The extremum is attained to the digits of the place, and the interval holds it, with its negative counterpart.
    assert attained == pytest.approx(overshoot, abs=1e-11)
    assert overshoot <= high < overshoot + 2e-12
    assert low < -0.09


def test_first_layer_is_not_ignored() -> None:
    # W_1 = 5 I, W_2 = I: the constant is 5, 1 without W_1. (5 is exact in float32.)
    network = lg.capture(nn.Sequential(scaled(5.0, 3), nn.ReLU(), scaled(1.0, 3)), torch.zeros(1, 3))
    assert jacobian_norm(network, torch.ones(3)) == 5.0
    assert torch.equal(feedback_of(network).rows[0][-1], 5 * torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.MaxPool1d(3, 1), (1, 1, 8)), (nn.MaxPool2d(3, 2), (1, 1, 7, 7)), (nn.MaxPool2d(2), (1, 1, 6, 6))],
)
def test_max_pooling_is_refused_or_exact(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """Overlapping windows are not 1-Lipschitz in l2: the maximum may be copied into several outputs."""
    refuse_or_agree(nn.Sequential(layer, nn.Flatten()), shape)


@pytest.mark.parametrize("layer", [nn.LayerNorm(4), nn.Hardshrink(), nn.GLU(1)], ids=str)
def test_unknown_layers_are_never_skipped(layer: nn.Module) -> None:
    with pytest.raises(errors.UnsupportedLayer, match=r"model\.1 \("):
        lg.capture(nn.Sequential(nn.Linear(4, 4), layer), torch.zeros(1, 4))


def refuse_or_agree(model: nn.Module, shape: tuple[int, ...]) -> None:
    try:
        network = lg.capture(model, torch.zeros(shape))
    except errors.UnsupportedLayer as error:
        assert "model.0" in str(error)  # noqa: PT017 - either outcome is right
        return
    x = torch.randn(4, *shape[1:], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(network(x.flatten(1)), model(x).double(), rtol=1e-5, atol=1e-5)
