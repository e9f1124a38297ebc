"""Norms of convolutions proved from their kernels, without the unrolled matrix."""

from __future__ import annotations

import math

import pytest
import torch
from test_capture_convolutions import randomised
from torch import Tensor, nn

import lipguard as lg
from lipguard import errors
from lipguard.bounds import spectral
from lipguard.network import Conv
from lipguard.verify.norms import convolution, factors
from lipguard.verify.norms.convolution import convolution_bound, frequency_bound, kernel_bound


def conv(weight: Tensor, size: int, stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1) -> Conv:
    """A square convolution."""
    dims = weight.ndim - 2
    small = tuple((size + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for k in weight.shape[2:])
    options = [(number,) * dims for number in (stride, padding, dilation)]
    return Conv(weight.double(), (size,) * dims, small, options[0], options[1], options[2], groups)


def test_bounds_known_by_formula() -> None:
    # [1, 1] on a circle: 1 + exp(i w), 2 at w = 0. As a matrix of one patch: sqrt(2), and every entry lies in two patches.
    pair = conv(torch.ones(1, 1, 2), 8)
    assert frequency_bound(pair) == pytest.approx(2, rel=1e-10) == kernel_bound(pair)
    assert frequency_bound(pair) >= 2
    # [1, -1] has its largest response, 2, at w = pi, and is felt between two points of an odd grid: 2 cos(pi / 2N).
    flip = conv(torch.tensor([[[1.0, -1.0]]]), 9)
    assert frequency_bound(flip) == pytest.approx(2 * math.cos(math.pi / 18), rel=1e-10)
    # Patches that do not overlap: the matrix of one patch is the whole truth, for any stride as long as the kernel.
    weight = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    exact = float(torch.linalg.matrix_norm(weight.double().flatten(1), 2))
    assert kernel_bound(conv(weight, 9, stride=3)) == pytest.approx(exact, rel=1e-9)
    assert frequency_bound(conv(weight, 9, stride=3)) == pytest.approx(exact, rel=1e-9)
    assert convolution_bound(conv(torch.zeros(2, 2, 3), 5)) == 0


@pytest.mark.parametrize("options", [{}, {"padding": 1}, {"stride": 2, "padding": 1}, {"dilation": 2}, {"groups": 2}], ids=str)
def test_bounds_stay_close_to_the_norm(options: dict[str, int]) -> None:
    weight = torch.randn(4, 4 // options.get("groups", 1), 3, 3, generator=torch.Generator().manual_seed(1))
    operator = conv(weight, 12, **options)
    exact = float(torch.linalg.matrix_norm(operator.dense(), 2))
    bound = frequency_bound(operator)
    assert bound is not None
    # Rounding of the yardstick below, the border of a 12 x 12 image above; a dilation of 2 makes four of 6 x 6.
    assert exact * (1 - 1e-12) <= bound <= 1.2 * exact and exact * (1 - 1e-12) <= kernel_bound(operator)
    adjoint = operator.transpose()
    assert frequency_bound(adjoint) == bound


def test_too_much_work_leaves_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = conv(torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(2)), 12)
    monkeypatch.setattr(convolution, "_WORK", 10)
    assert frequency_bound(operator) is None
    assert convolution_bound(operator) == pytest.approx(kernel_bound(operator), rel=1e-9)


@pytest.mark.parametrize("scale", [1e-200, 1e-160, 1e160])
def test_extreme_weights_are_never_understated(scale: float) -> None:
    operator = conv(scale * torch.ones(2, 2, 3, dtype=torch.float64), 6, padding=1)
    # Columns of ones through two channels: at least 2 * 3 on the constant vector of the inner places, less at the border.
    assert convolution_bound(operator) >= scale * 5


def test_large_convolutions_have_bounds_without_their_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomised(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 4, 2, 1, groups=2), nn.ReLU(), nn.Flatten())
    )
    network = lg.capture(model, torch.zeros(1, 3, 10, 10, dtype=torch.float64))
    exact = lg.bound(network, method="spectral").value
    for module in (factors, spectral):
        monkeypatch.setattr(module, "LARGEST_UNROLLED", 10)

    def forbidden(self: Conv) -> Tensor:
        raise AssertionError("the matrix is formed")

    monkeypatch.setattr(Conv, "dense", forbidden)
    cheap = lg.bound(network, method="spectral")
    # The torus differs from the image by the border: a few per cent of each of the two layers at 10 x 10.
    assert cheap.rigor == "verified" and exact <= cheap.value <= 1.2 * exact
    assert lg.bound(network, method="sampling").value <= exact


def test_a_batch_of_256_at_cifar_size_needs_no_matrix() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    )
    model.append(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    network = lg.capture(model, torch.zeros(256, 3, 32, 32))
    assert lg.bound(network, method="spectral").rigor == "verified"
    with pytest.raises(errors.UnsupportedQuery, match="one multiplier a neuron takes"):
        lg.bound(network, method="lipsdp-neuron")
