"""Constants folded along the data path: exact where they can be, enclosed where they round, apart where they leave the range."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import nn

import lipguard as lg
from lipguard.capture.constants import Constant, number, reciprocals
from lipguard.errors import InvalidModel, LipguardError, NotCertified
from lipguard.network import Affine, Conv, Dense, Diagonal, Index
from lipguard.rounding import TINY, UNIT, compounded, flushes_denormals, gamma, powers_of_two


class Apply(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, x):
        return self.call(x)


def only_node(call, size: int = 2) -> Affine:
    network = lg.capture(Apply(call), torch.ones(1, size, dtype=torch.float64))
    assert len(network.nodes) == 2 and isinstance(network.nodes[1], Affine)
    return network.nodes[1]


W = torch.tensor([[0.3, -0.7], [1.1, 0.2]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "rho"),
    [
        (lambda x: x * 0.1, 0.0),
        (lambda x: x * 3, 0.0),
        (lambda x: x * (2**53 + 1), UNIT),
        (lambda x: x / 4, 0.0),
        (lambda x: x / 3, UNIT),
        (lambda x: x * 0.1 * 8, 0.0),
        (lambda x: x * 0.1 * 0.1, UNIT),
        (lambda x: x / 3 * 0.1, compounded(UNIT, UNIT)),
        (lambda x: x @ W.T, 0.0),
        (lambda x: x @ W.T / 2, 0.0),
        (lambda x: x @ W.T * 0.0, 0.0),
        (lambda x: x @ W.T * 0.1, UNIT),
        (lambda x: x @ W.T / 3, compounded(UNIT, UNIT)),
        (
            lambda x: x * torch.tensor([2.0, -0.5], dtype=torch.float64) @ W.T * torch.tensor([4.0, 0.0], dtype=torch.float64),
            None,
        ),
        (lambda x: x * torch.tensor([0.3, 0.7], dtype=torch.float64) * torch.tensor([0.3, 1.0], dtype=torch.float64), UNIT),
        (lambda x: x / torch.tensor([2.0, 3.0], dtype=torch.float64), UNIT),
        (lambda x: x.mean(1), 0.0),
    ],
)
def test_the_radius_of_each_fold(call, rho):
    network = lg.capture(Apply(call), torch.ones(1, 2, dtype=torch.float64))
    radii = [node.operator.rho for node in network.nodes if isinstance(node, Affine)]
    assert max(radii) == (0.0 if rho is None else rho)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_convolution_behind_a_batch_norm_is_enclosed(transposed):
    torch.manual_seed(0)
    conv = (nn.ConvTranspose1d if transposed else nn.Conv1d)(2, 4, 3, groups=2).double()
    norm = nn.BatchNorm1d(4).double()
    for tensor in (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data):
        tensor.uniform_(0.5, 2.0)
    x = torch.zeros(1, 2, 5, dtype=torch.float64)
    plain, folded = lg.capture(conv, x).nodes[1], lg.capture(nn.Sequential(conv, norm).eval(), x).nodes[1]
    assert isinstance(folded.operator, Conv) and 0 < folded.operator.rho < 1e-14
    rows, places = plain.operator.dense().tolist(), plain.operator.shape[0] // 4
    held, bias, radius = folded.operator.dense().tolist(), folded.bias.tolist(), folded.bias_radius.tolist()
    rho = Fraction(folded.operator.rho)
    for i, row in enumerate(rows):
        c = i // places
        mean, variance, weight, shift = (
            Fraction(t.tolist()[c]) for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        )
        # The scale as the root of a fraction: |s w - h| <= rho |h| by its square, between whose ends it lies.
        square = weight**2 / (variance + Fraction(norm.eps))
        for w, h in zip(row, held[i], strict=True):
            low, high = (abs(Fraction(h)) * (1 + sign * rho) for sign in (-1, 1))
            assert low**2 <= square * Fraction(w) ** 2 <= high**2
        # (b - mean) s + beta within the radius of the bias: s lies between (t -+ r - beta) / (b - mean).
        inner = Fraction(float(plain.bias[i])) - mean
        ends = sorted((Fraction(bias[i]) + sign * Fraction(radius[i]) - shift) / inner for sign in (-1, 1))
        assert ends[0] > 0 and ends[0] ** 2 <= square <= ends[1] ** 2
        assert radius[i] < 1e-14


def test_a_bias_keeps_no_radius_where_nothing_rounds():
    one = torch.tensor([1.0, 0.5], dtype=torch.float64)
    assert only_node(lambda x: (x + one) * 2 + one).bias_radius is None
    assert only_node(lambda x: (x + one) * 0.1).bias_radius is not None
    assert only_node(lambda x: (x + 0.1) + 0.7).bias_radius is not None
    node = only_node(lambda x: torch.add(x, 2**53 + 1, alpha=3))
    assert abs(Fraction(float(node.bias[0])) - 3 * (2**53 + 1)) <= Fraction(float(node.bias_radius[0]))


@pytest.mark.parametrize("operator", [Dense(W), Diagonal(torch.tensor(0.3, dtype=torch.float64), 2), Diagonal(W[0], 2, 1e-10)])
def test_a_moved_constant_holds_the_exact_one(operator):
    center, radius = torch.tensor([0.1, -0.7], dtype=torch.float64), torch.tensor([0.0, 1e-12], dtype=torch.float64)
    moved = Constant(center, radius).through(operator) + Constant(torch.tensor([0.3, 1e17], dtype=torch.float64))
    rows = operator.dense().tolist()
    for factor in (Fraction(1), 1 + Fraction(operator.rho), 1 - Fraction(operator.rho)):
        for sign in (-1, 0, 1):
            x = [Fraction(c) + sign * Fraction(r) for c, r in zip(center.tolist(), radius.tolist(), strict=True)]
            for row, c, r, b in zip(rows, moved.center.tolist(), moved.radius.tolist(), (0.3, 1e17), strict=True):
                true = sum(factor * Fraction(w) * v for w, v in zip(row, x, strict=True)) + Fraction(b)
                assert abs(true - Fraction(c)) <= Fraction(r)


def test_moved_entries_and_powers_of_two_are_exact():
    constant = Constant(torch.tensor([0.1, 0.2], dtype=torch.float64))
    assert constant.through(Index(torch.tensor([1, 0, -1]), 2)).radius is None
    assert constant.through(Diagonal(torch.tensor([-4.0, 0.25], dtype=torch.float64), 2)).radius is None
    # below the normal range a power of two rounds
    small = Constant(torch.tensor([3 * 2.0**-1074, 1.0], dtype=torch.float64)).through(
        Diagonal(torch.tensor(0.5, dtype=torch.float64), 2)
    )
    assert small.radius is not None and float(small.radius[0]) >= 2.0**-1075 and float(small.radius[1]) == 0


def test_products_that_leave_the_range_stay_apart():
    """In front of a layer that brings them back, so that what the module computes is what is captured."""
    network = lg.capture(Apply(lambda x: (x * 1e-200).relu() * 1e-200 * 1e150), torch.ones(1, 2, dtype=torch.float64))
    scales = [node.operator for node in network.nodes if isinstance(node, Affine)]
    assert [float(s.scale) for s in scales] == pytest.approx([1e-200, 1e-50])
    apart = lg.capture(Apply(lambda x: (x * 1e300) * 1e-10 * 1e-290), torch.ones(1, 2, dtype=torch.float64))
    assert [float(n.operator.scale) for n in apart.nodes[1:]] == pytest.approx([1.0])
    assert Dense(W).scaled(torch.tensor(1e-308, dtype=torch.float64)) is None
    assert Diagonal(W[0], 2).scaled(torch.tensor(1e309, dtype=torch.float64)) is None
    # The maps of a fold that is not made stand behind each other: the bound is one of their product.
    tiny = lg.capture(Apply(lambda x: x * 1e-160 * 1e-160), torch.ones(1, 2, dtype=torch.float64) * 1e300)
    assert len(tiny.nodes) == 3
    assert Fraction(lg.bound(tiny, method="spectral").value) >= Fraction(1e-160) ** 2


def test_the_largest_denormal_product_is_bounded():
    small, large = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    small.weight.data.fill_(1e-40)
    large.weight.data.fill_(1e38)
    true = Fraction(small.weight.item()) * Fraction(large.weight.item())
    assert Fraction(lg.bound(nn.Sequential(small, large), torch.zeros(1, 1)).value) >= true


@pytest.mark.parametrize("divisor", [0, 0.0, 1e-310, 1e308, 10**400, torch.tensor([1.0, 0.0])])
def test_quotients_outside_the_range_are_refused(divisor):
    with pytest.raises(InvalidModel):
        lg.capture(Apply(lambda x: x / divisor), torch.ones(1, 2, dtype=torch.float64))


@pytest.mark.parametrize("equation", ["bi,ij,jk->bk", "bi,ij,kl->bj", "bi,ij,j->bj"])
def test_constants_of_an_einsum_are_maps_of_their_own(equation):
    torch.manual_seed(0)
    sizes = {"i": 3, "j": 4, "k": 5, "l": 2}
    held = [torch.randn([sizes[c] for c in term], dtype=torch.float64) for term in equation.split("->")[0].split(",")[1:]]
    x = torch.randn(2, 3, dtype=torch.float64)
    network = lg.capture(Apply(lambda x: torch.einsum(equation, x, *held)), x)
    torch.testing.assert_close(network(x), torch.einsum(equation, x, *held))
    weights = [node.operator.tensors()[0].flatten() for node in network.nodes if isinstance(node, Affine)]
    known = torch.cat([torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64), *(t.flatten() for t in held)])
    assert all(bool(torch.isin(w, known).all()) for w in weights)


def test_average_pools_say_what_their_quotient_rounds():
    x = torch.zeros(1, 1, 6, 6)
    radii = [lg.capture(nn.AvgPool2d(k), x).nodes[1].operator.rho for k in (2, 3)]
    assert radii == [0.0, UNIT]
    assert lg.capture(nn.AdaptiveAvgPool2d(4), x).nodes[1].operator.rho == gamma(4)


def test_a_cell_with_a_held_state_encloses_what_it_adds():
    torch.manual_seed(0)
    cell, state = nn.RNNCell(3, 2).double(), torch.randn(1, 2, dtype=torch.float64)
    network = lg.capture(Apply(lambda x: cell(x, state.expand(len(x), 2))), torch.zeros(1, 3, dtype=torch.float64))
    node = network.nodes[1]
    for i in range(2):
        true = sum(Fraction(float(w)) * Fraction(float(h)) for w, h in zip(cell.weight_hh[i], state[0], strict=True))
        true += Fraction(float(cell.bias_hh[i])) + Fraction(float(cell.bias_ih[i]))
        assert abs(true - Fraction(float(node.bias[i]))) <= Fraction(float(node.bias_radius[i]))


def test_weights_that_the_forward_computes_are_taken_bit_for_bit():
    layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    node = lg.capture(layer, torch.zeros(1, 3)).nodes[1]
    assert node.operator.rho == 0 and torch.equal(node.operator.dense(), layer.weight.double()) and node.bias_radius is None


def test_flushing_is_refused_by_reader_and_checker():
    module, x = nn.Linear(2, 2), torch.zeros(1, 2)
    certificate = lg.bound(module, x, method="spectral")
    network = lg.capture(module, x)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        assert flushes_denormals()
        with pytest.raises(LipguardError, match=r"set_flush_denormal\(False\)"):
            lg.capture(module, x)
        with pytest.raises(NotCertified, match=r"set_flush_denormal\(False\)"):
            lg.verify(network, certificate)
    finally:
        torch.set_flush_denormal(False)
    assert not flushes_denormals()
    lg.verify(network, certificate)


def test_helpers():
    assert compounded() == 0.0 and compounded(0.0, 0.25, 0.0) == 0.25 and compounded(0.5, 0.5) >= 1.25
    assert number(2**53) == (2.0**53, 0.0) and number(2**53 + 1)[1] == UNIT
    found = reciprocals(torch.tensor([3.0, -0.25], dtype=torch.float64))
    assert found is not None and found[1] == UNIT
    assert abs(Fraction(1, 3) - Fraction(float(found[0][0]))) <= Fraction(UNIT) * Fraction(float(found[0][0]))
    assert reciprocals(torch.tensor([2.0**1023], dtype=torch.float64)) is None
    assert powers_of_two(torch.tensor([0.0, -2.0, 0.5, TINY], dtype=torch.float64)) and not powers_of_two(torch.tensor([3.0]))
