"""method="toeplitz": above the exact norm, below Frobenius-type bounds, equal to a plain evaluation of its formula."""

from __future__ import annotations

import dataclasses
import math

import architectures as made
import pytest
import torch
from hypothesis import given, settings
from test_capture_convolutions import convolutions, randomised
from torch import Tensor, nn

import lipguard as lg
from lipguard import errors
from lipguard.audit.encoding import certificate_from_json, certificate_json
from lipguard.bounds.sampling import Sampling
from lipguard.bounds.toeplitz import toeplitz_norm
from lipguard.certificate import Factors, Query
from lipguard.network import Affine, Conv
from lipguard.verify.norms import toeplitz
from lipguard.verify.norms.convolution import frequency_bound
from lipguard.verify.norms.toeplitz import toeplitz_bound


def conv(weight: Tensor, size: int, stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1) -> Conv:
    dims = weight.ndim - 2
    small = tuple((size + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for k in weight.shape[2:])
    options = [(number,) * dims for number in (stride, padding, dilation)]
    return Conv(weight.double(), (size,) * dims, small, options[0], options[1], options[2], groups)


def test_bounds_known_by_formula() -> None:
    # One channel each way: |1 + exp(i w)|, 2 at w = 0, which every torus has.
    pair = conv(torch.ones(1, 1, 2), 8)
    assert 2 <= toeplitz_bound(pair) <= 2 + 1e-10
    # Two outputs [1, 1] and [1, -1] of one input. Rows: 2^2 + 2^2 on an even torus; the column: |1 + e|^2 + |1 - e|^2 = 4.
    both = conv(torch.tensor([[[1.0, 1.0]], [[1.0, -1.0]]]), 9)
    assert toeplitz_bound(both) == pytest.approx(2, rel=1e-10)
    assert toeplitz_bound(both.transpose()) == pytest.approx(2, rel=1e-10)
    # Groups are blocks of a diagonal: the larger counts.
    two = conv(torch.tensor([[[1.0, 1.0]], [[3.0, 3.0]]]), 8, groups=2)
    assert toeplitz_bound(two) == pytest.approx(6, rel=1e-10)
    # Stride 2 and taps that do not overlap: phases are channels, |1|^2 + |2|^2.
    assert toeplitz_bound(conv(torch.tensor([[[1.0, 2.0]]]), 8, stride=2)) == pytest.approx(math.sqrt(5), rel=1e-10)
    # One tap: a matrix, whose norm is known.
    weight = torch.randn(4, 3, 1, generator=torch.Generator().manual_seed(0)).double()
    exact = float(torch.linalg.matrix_norm(weight[:, :, 0], 2))
    assert toeplitz_bound(conv(weight, 7)) == pytest.approx(exact, rel=1e-9)
    assert toeplitz_bound(conv(torch.zeros(2, 2, 3), 5)) == 0


@given(case=convolutions())
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_between_the_norm_and_frobenius(case: tuple[nn.Module, tuple[int, ...]]) -> None:
    layer, shape = case
    network = lg.capture(randomised(layer), torch.zeros(shape, dtype=torch.float64))
    operator = next(n.operator for n in network.nodes if isinstance(n, Affine) and isinstance(n.operator, Conv))
    exact = float(torch.linalg.matrix_norm(operator.dense(), 2))
    bound = toeplitz_bound(operator)
    assert exact * (1 - 1e-12) <= bound  # rounding of the yardstick
    # |sum over taps|^2 <= taps times the sum of squares, whatever sums and maxima are exchanged
    taps = math.prod(operator.weight.shape[2:])
    assert bound <= math.sqrt(taps) * float(torch.linalg.vector_norm(operator.weight)) * (1 + 1e-9)
    if 1 not in (taps, math.prod(operator.small)):
        # The prover's Fourier transforms and the checker's correlations are written apart and agree to rounding.
        assert bound == pytest.approx(float(toeplitz_norm(operator)), rel=1e-9)
        assert bound >= frequency_bound(operator) * (1 - 1e-9)  # type: ignore[operator]
    lower, _ = Sampling(starts=4, steps=2)(network, Query())
    assert lower.value <= lg.bound(network, method="toeplitz").value


def test_a_coarse_grid_is_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    # The kernel's largest response lies between the points of a grid of 16: the plain value there is below the norm.
    weight = torch.tensor([[[1.0, -2 * math.cos(2 * math.pi / 32) * 1.1, 1.3]]])
    operator = conv(weight, 96)
    fine = toeplitz_bound(operator)
    monkeypatch.setattr(toeplitz, "_POINTS", 1)
    coarse = toeplitz_bound(operator)
    # 16 n + 1 = 33 points and degree 2: the square is divided by cos(2 pi / 33)
    assert fine <= coarse * (1 + 1e-12) and coarse <= fine / math.sqrt(math.cos(2 * math.pi / 33)) * (1 + 1e-9)
    # The published example of a grid that is no bound: k = 3, S = 10. Divided by the cosine it is one.
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        operator = conv(torch.randn(2, 3, 3, 3, generator=generator), 64)
        exact = float(toeplitz_norm(operator))
        plain = float(toeplitz_norm(operator, grid=10))
        assert plain / math.cos(2 * math.pi / 10) >= exact


@pytest.mark.parametrize("scale", [1e-200, 1e-160, 1e160])
def test_extreme_weights_are_never_understated(scale: float) -> None:
    operator = conv(scale * torch.ones(2, 2, 3, dtype=torch.float64), 6, padding=1)
    assert toeplitz_bound(operator) >= scale * 5


def test_kernels_beyond_the_limit_have_another_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = conv(torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(2)), 8)
    exact = float(torch.linalg.matrix_norm(operator.dense(), 2))
    monkeypatch.setattr(toeplitz, "_SHIFTS", 10)
    assert exact <= toeplitz_bound(operator)


def network(width: int = 4) -> lg.Network:
    torch.manual_seed(0)
    return lg.capture(randomised(made.ResNet(1, "B", width)), torch.zeros(1, 3, 8, 8, dtype=torch.float64))


def test_the_method() -> None:
    net = network()
    certificate = lg.bound(net, method="toeplitz")
    assert (certificate.rigor, certificate.method) == ("verified", "toeplitz")
    assert lg.bound(net, method="spectral").value <= certificate.value
    assert lg.verify(net, certificate).value == certificate.value
    for norm in (1, math.inf):  # row and column sums, as for "spectral"
        assert lg.bound(net, method="toeplitz", norm=norm).value == lg.bound(net, method="spectral", norm=norm).value
    restored = certificate_from_json(certificate_json(certificate))
    assert isinstance(restored.evidence, Factors) and restored.evidence.norms == certificate.evidence.norms
    assert restored.evidence.derivation == "toeplitz"
    assert lg.verify(net, restored).value == certificate.value


def test_corrupted_factors_are_refused() -> None:
    net = network()
    certificate = lg.bound(net, method="toeplitz")
    assert isinstance(certificate.evidence, Factors)
    for node in certificate.evidence.norms:
        if isinstance(net.nodes[node].operator, Conv):  # type: ignore[union-attr]
            norms = certificate.evidence.norms | {node: certificate.evidence.norms[node] * 0.999}
            with pytest.raises(errors.NotCertified, match="Toeplitz bound is"):
                lg.verify(net, dataclasses.replace(certificate, evidence=Factors(norms, "toeplitz")))
    with pytest.raises(errors.NotCertified, match="no factor"):
        lg.verify(net, dataclasses.replace(certificate, evidence=Factors({}, "toeplitz")))
    damaged = certificate_json(certificate)
    damaged["evidence"]["derivation"] = "word of honour"
    with pytest.raises(errors.NotCertified, match="damaged"):
        certificate_from_json(damaged)


def test_no_matrix_is_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(self: Conv) -> Tensor:
        raise AssertionError("the matrix is formed")

    net = network()
    monkeypatch.setattr(Conv, "dense", forbidden)
    assert lg.bound(net, method="toeplitz").rigor == "verified"


def test_the_plain_formula_has_a_gradient() -> None:
    operator = conv(torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(4)), 9, stride=2, padding=1)
    weight = operator.weight.requires_grad_()
    value = toeplitz_norm(dataclasses.replace(operator, weight=weight))
    (gradient,) = torch.autograd.grad(value, weight)
    # homogeneous of degree 1: Euler's identity
    assert float((gradient * weight).sum().detach()) == pytest.approx(float(value.detach()), rel=1e-12)
