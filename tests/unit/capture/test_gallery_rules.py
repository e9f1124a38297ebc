"""Rules that the gallery's architectures need: their networks are the module, by values and by formulas."""

from __future__ import annotations

import math

import pytest
import torch
from gallery.lipschitz import CayleyConv
from gallery.science import SplineKAN
from torch import nn
from torch.nn import functional as F  # noqa: N812

import lipguard as lg
from lipguard import errors


class Distances(nn.Module):
    def __init__(self, centres: list[list[float]], p: float = 2.0) -> None:
        super().__init__()
        self.register_buffer("centres", torch.tensor(centres, dtype=torch.float64))
        self.p = p

    def forward(self, x):
        return torch.cdist(x, self.centres, p=self.p)


class Grid(nn.Module):
    def forward(self, theta):
        return F.affine_grid(theta, [len(theta), 1, 3, 5], align_corners=False)


def test_distances_to_constant_points() -> None:
    # One distance has the constant 1, two of them sqrt 2: along the line through both centres both change by as much.
    one = Distances([[1.0, 2.0, 3.0]])
    x = torch.randn(6, 3, dtype=torch.float64)
    assert lg.bound(one, x).value == pytest.approx(1, rel=1e-6)
    two = Distances([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    assert lg.bound(two, x).value == pytest.approx(math.sqrt(2), rel=1e-6)
    for p in (1.0, 2.0, math.inf):
        model = Distances([[0.5, -1.0, 2.0], [1.0, 1.0, 0.0]], p)
        torch.testing.assert_close(lg.capture(model, x)(x), model(x), rtol=1e-12, atol=1e-12)


def test_distances_among_values() -> None:
    class Among(nn.Module):
        def forward(self, x):
            return torch.cdist(x, x).flatten(1)

    x = torch.randn(2, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(lg.capture(Among(), x)(x.flatten(1)), Among()(x), rtol=1e-7, atol=1e-7)


def test_a_grid_is_linear_in_its_coefficients() -> None:
    theta = torch.randn(2, 2, 3, dtype=torch.float64)
    network = lg.capture(Grid(), theta)
    torch.testing.assert_close(network(theta.flatten(1)), Grid()(theta).flatten(1), rtol=1e-12, atol=1e-12)
    # Places are theta (x, y, 1)': A'A has the sums of squares of x = +-0.4, +-0.8, 0 (3 rows each), of y = +-2/3, 0, and 15.
    assert lg.bound(network).value == pytest.approx(math.sqrt(15), rel=1e-6)


def test_splines_of_slices_of_one_variable() -> None:
    torch.manual_seed(0)
    model = SplineKAN(1, 1, grid=2, order=2).double()
    network = lg.capture(model, torch.zeros(1, 1, dtype=torch.float64))
    x = torch.linspace(-4, 4, 1001, dtype=torch.float64)[:, None]
    torch.testing.assert_close(network(x), model(x), rtol=1e-10, atol=1e-10)
    # Knots -3 to 3: on [k, k + 1] the slope of a quadratic spline goes from one difference of its coefficients to the next.
    c = F.pad(model.weight.detach().flatten(), (1, 1))
    assert lg.bound(network).value >= float(c.diff().abs().max()) * (1 - 1e-9)


def test_an_orthogonal_convolution_by_frequencies() -> None:
    torch.manual_seed(0)
    model = CayleyConv().double()
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    network = lg.capture(model, x)
    torch.testing.assert_close(network(x.flatten(1)), model(x).flatten(1), rtol=1e-10, atol=1e-10)
    assert lg.bound(network).value == pytest.approx(1, rel=1e-6)


def test_an_infinite_mask_is_refused() -> None:
    class Masked(nn.Module):
        def forward(self, x):
            return torch.softmax(x.masked_fill(torch.eye(3) > 0, -torch.inf), -1).flatten(1)

    with pytest.raises(errors.UnsupportedLayer, match=r"infinite numbers beside values.*Select the entries"):
        lg.capture(Masked(), torch.zeros(1, 3, 3))
