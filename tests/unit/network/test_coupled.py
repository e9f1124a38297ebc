"""Maxima, sorts and reflections: capture, rewritings, bounds, exact values, tied multipliers, and what must be refused."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from fractions import Fraction
from functools import cache

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812
from zoo import linear

import lipguard as lg
from lipguard import errors
from lipguard.audit.recipe import captured, rebuild, recipe_of
from lipguard.bounds.sampling import Sampling
from lipguard.bounds.semidefinite import Semidefinite
from lipguard.bounds.solving import propose
from lipguard.capture.rules.coupled import group_sort, maxmin
from lipguard.certificate import Certificate, Multipliers, Query, Witness
from lipguard.network import Affine, Coupled, Dense, Diagonal, Index, Input, Network, coupled
from lipguard.network.coupled import Maxima, Reflection, Sort
from lipguard.nn import GroupSort, Householder, MaxMin
from lipguard.programs.feedback import feedback_of
from lipguard.programs.lipsdp import lipsdp
from lipguard.programs.rewriting import elementwise, slope_restricted
from lipguard.solvers.threads import one_thread
from lipguard.verify import rewriting as checked
from lipguard.verify.lmi.composed import Composed
from lipguard.verify.lmi.form import feedback_form

DOUBLE = torch.float64
SOLVED = 1 + 2e-6
"""Two solves within a relative gap of 1e-7 of the squared bound each, and the checker's margins."""

HYPOTHESIS = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.filter_too_much],
}


class Spelled(nn.Module):
    """A function of the channels, as people write it."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def halves(x):
    a, b = x.chunk(2, 1)
    return torch.cat([torch.maximum(a, b), torch.minimum(b, a)], 1)


def neighbours(x):
    grouped = x.view(len(x), -1, 2)
    return torch.cat([grouped.max(2)[0], grouped.min(dim=2).values], 1)


def stacked(x):
    a, b = x.split(x.shape[1] // 2, dim=1)
    return torch.stack([torch.max(a, b), torch.min(a, b)], 1).flatten(1)


SPELLINGS = {
    "maximum and minimum": halves,
    "max and min of pairs": neighbours,
    "stack": stacked,
    "sort": lambda x: x.view(len(x), -1, 3).sort(-1, descending=True)[0].flatten(1),
    "sorted columns": lambda x: torch.sort(x.view(len(x), 3, -1), dim=1).values.reshape(len(x), -1),
    "maxout": lambda x: x.view(len(x), -1, 3).amax(2),
    "maxout of all": lambda x: x.max(1, keepdim=True).values,
    "minout": lambda x: x.view(len(x), -1, 3).amin(-1),
    "topk": lambda x: x.topk(4, dim=1).values,
    "smallest": lambda x: torch.topk(x, 2, dim=1, largest=False)[0],
    "unlike values": lambda x: torch.maximum(x, 2 * x.abs()) + torch.minimum(x.flip(1), torch.ones(6, dtype=x.dtype)),
    "pooled": lambda x: F.max_pool1d(x[:, None], 3, 1, 1)[:, 0],
}


def example(*shape, rows=1):
    return torch.zeros(rows, *shape, dtype=DOUBLE)


def points(count, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, *shape, generator=generator, dtype=DOUBLE)
    x[: count // 3] = (2 * x[: count // 3]).round() / 2  # ties
    return x


def agree(module, *shape):
    """Capture equals the module; both rewritings of both sides equal the network."""
    module = module.double().eval()
    with torch.no_grad():
        network = lg.capture(module, example(*shape))
        x = points(12, *shape)
        # A maximum and a sort do not round; affine maps and reflections do, a few units of the largest value.
        expected = module(x).flatten(1)
        tolerance = 1e-13 * (1 + float(expected.abs().max()))
        torch.testing.assert_close(network(x.flatten(1)), expected, rtol=0, atol=tolerance)
        same(network, x.flatten(1), expected, tolerance)
    return network


def same(network, x, expected, tolerance):
    for rewritten in (
        elementwise(network),
        slope_restricted(network),
        checked.neurons_only(network),
        checked.with_tied_neurons(network),
    ):
        torch.testing.assert_close(rewritten(x), expected, rtol=0, atol=tolerance)
    assert not any(isinstance(node, Coupled) for node in elementwise(network).nodes)


def orthogonal(size, generator):
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=DOUBLE))[0]


# Modules


@pytest.mark.parametrize("shape", [(6,), (6, 3), (6, 2, 3)])
def test_modules_compute_their_formulas(shape):
    x = points(5, *shape).requires_grad_()
    a, b = x[:, :3], x[:, 3:]
    torch.testing.assert_close(MaxMin()(x), torch.cat([torch.where(a > b, a, b), torch.where(a > b, b, a)], 1), rtol=0, atol=0)
    grouped = [torch.stack([x[:, i], x[:, i + 1]]).sort(0).values for i in (0, 2, 4)]
    torch.testing.assert_close(GroupSort(2)(x), torch.cat(grouped).transpose(0, 1), rtol=0, atol=0)
    torch.testing.assert_close(GroupSort(None)(x), x.sort(1).values, rtol=0, atol=0)
    start = Householder(6).double()(x)
    # float32's pi/2 as the angle; entries up to 4
    torch.testing.assert_close(start, torch.cat([torch.minimum(a, b), torch.maximum(a, b)], 1), rtol=0, atol=1e-6)
    for module in (MaxMin(), GroupSort(3), Householder(6).double()):
        y = module(x)
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        assert gradient.shape == x.shape
        torch.testing.assert_close(torch.linalg.vector_norm(y), torch.linalg.vector_norm(x), rtol=1e-12, atol=0)


def test_householder_follows_its_angles():
    module = Householder(4).double()
    module.theta.data = torch.tensor([0.3, -2.0], dtype=DOUBLE)
    x = points(9, 4)
    for row, out in zip(x, module(x), strict=True):
        for j in range(2):
            z, v = row[[j, j + 2]], module.directions[j]
            expected = z if v @ z > 0 else z - 2 * v * (v @ z)
            torch.testing.assert_close(out[[j, j + 2]], expected, rtol=0, atol=1e-14)


def test_modules_are_ordinary():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), MaxMin(), GroupSort(2), Householder(4), nn.Flatten(), nn.Linear(4 * 36, 2))
    x = torch.randn(3, 1, 8, 8)
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin(x), model(x))
    assert twin.half()(x.half()).dtype == torch.float16
    assert "theta" in {name.split(".")[-1] for name in model.state_dict()}
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    assert lg.capture(compiled, x).digest == lg.capture(model, x).digest
    model(x).sum().backward()
    assert model[3].theta.grad is not None
    live = lg.capture(model, x, live=True)
    live(torch.randn(2, 64, dtype=DOUBLE)).sum().backward()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: GroupSort(0), ValueError, "whole number >= 1"),
        (lambda: GroupSort(2.5), ValueError, "whole number"),
        (lambda: GroupSort(4)(torch.zeros(1, 6)), ValueError, r"group_size=4\) is given 6 channels"),
        (lambda: GroupSort(2)(torch.zeros(6)), ValueError, r"shape \(6,\)"),
        (lambda: MaxMin()(torch.zeros(1, 5)), ValueError, "5 channels; pairs need an even number"),
        (lambda: Householder(5), ValueError, "pairs of channels need an even number"),
        (lambda: Householder(4)(torch.zeros(1, 6)), ValueError, r"channels=4\) is given 6 channels"),
        (lambda: lg.bound(GroupSort(4), torch.zeros(1, 6)), errors.InvalidExample, "groups of 4.*6 entries.*must divide"),
        (lambda: lg.bound(MaxMin(), torch.zeros(1, 7)), errors.InvalidExample, "pairs.*7 entries"),
        (lambda: Maxima(torch.tensor([[0, 1], [-1, -1]])), ValueError, "without entries"),
        (lambda: Sort(torch.tensor([[0, 1], [1, 2]])), ValueError, "every entry once"),
        (lambda: Reflection(torch.tensor([[0, 2]]), torch.ones(1, 2)), ValueError, "every entry once"),
    ],
)
def test_bad_input_is_one_clear_error(make, error, message):
    with pytest.raises(error, match=message):
        make()


# Capture


@pytest.mark.parametrize("shape", [(6,), (6, 2), (6, 2, 3)])
@pytest.mark.parametrize("module", [MaxMin(), GroupSort(2), GroupSort(3), GroupSort(None), Householder(6)], ids=str)
def test_modules_are_captured(module, shape):
    network = agree(module, *shape)
    assert [type(node).__name__ for node in network.nodes] == ["Input", "Coupled"]
    pairs = math.prod(shape) // 2
    assert slope_restricted(network).neurons == (2 * pairs if network.nodes[1].function.index.shape[1] > 2 else pairs)


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_are_captured(name):
    network = agree(nn.Sequential(nn.Linear(4, 6), Spelled(SPELLINGS[name])), 4)
    assert any(isinstance(node, Coupled) for node in network.nodes)
    if name in ("maximum and minimum", "max and min of pairs", "stack"):
        assert slope_restricted(network).neurons == 3  # the maximum and the minimum share their neuron
        alone = lg.capture(Spelled(SPELLINGS[name]), example(6))
        assert lg.bound(alone, method="spectral").value <= 1 + 1e-12
        assert lg.bound(alone).value <= 1 + 1e-6


def test_other_packages_modules_are_one_line():
    class TheirMaxMin(nn.Module):
        def forward(self, x):
            return maxmin_kernel(x)

    class TheirSort(nn.Module):
        size = 3

        def forward(self, x):
            return sort_kernel(x, self.size)

    # Out of the tracer's reach: kernels of their own.
    def maxmin_kernel(x):
        a, b = np.split(x.detach().numpy(), 2, 1)
        return torch.from_numpy(np.concatenate([np.maximum(a, b), np.minimum(a, b)], 1))

    def sort_kernel(x, size):
        array = x.detach().numpy()
        return torch.from_numpy(-np.sort(-array.reshape(len(array), -1, size), -1).reshape(array.shape))

    with pytest.raises(errors.UnsupportedLayer):
        lg.capture(TheirMaxMin(), example(6))
    lg.lowers(TheirMaxMin)(lambda trace, module, x: maxmin(trace, x))
    lg.lowers(TheirSort)(lambda trace, module, x: group_sort(trace, x, module.size, descending=True))
    network = agree(TheirMaxMin(), 6)
    assert lg.bound(network).value <= 1 + 1e-6
    agree(TheirSort(), 6)


@st.composite
def pools(draw):
    dims = draw(st.integers(1, 3))
    channels = draw(st.integers(1, 2))
    space = [draw(st.integers(3, 8 if dims < 3 else 4)) for _ in range(dims)]

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    if draw(st.booleans()):
        kind = (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)[dims - 1]
        sizes = tuple(draw(st.integers(1, n)) for n in space)
        return kind(sizes if dims > 1 else sizes[0]), (channels, *space)
    kernel, stride, dilation = each(1, 4), each(1, 3), each(1, 2)
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    kind = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[dims - 1]
    return kind(kernel, stride, padding, dilation, ceil_mode=draw(st.booleans())), (channels, *space)


@settings(max_examples=40, **HYPOTHESIS)
@given(pools())
def test_pools_are_captured(made):
    """Padding is -inf and not 0, dilation, ceil_mode, strides beyond the kernel, windows cut short by the border."""
    pool, shape = made
    try:
        expected = pool(example(*shape))
        assume(expected.numel() and bool(expected.isfinite().all()))
    except RuntimeError:
        assume(False)
    network = agree(pool, *shape)
    if not slope_restricted(network).neurons:
        return
    # The product is the root of the largest number of windows that one entry lies in, counted along each dimension.
    product = lg.bound(network, method="spectral")
    assert product.value <= math.sqrt(overlap(pool, shape)) * (1 + 1e-12)
    if slope_restricted(network).neurons <= 16:
        upper = lg.bound(network)
        lower = lg.bound(network, method="sampling")
        assert lower.value <= upper.value <= product.value


def overlap(pool, shape):
    """The largest number of windows an entry lies in: the number of outputs that one large entry reaches."""
    size = math.prod(shape)
    reached = pool(torch.diag(torch.full((size,), 1.0, dtype=DOUBLE)).reshape(size, *shape) - 1.0)
    return int((reached.flatten(1) == 0).sum(1).max())


def test_padding_is_no_zero():
    """All entries negative: a padding of zeros would be the maximum at the border."""
    network = lg.capture(nn.MaxPool1d(3, 2, 1), example(1, 5))
    x = -torch.rand(4, 5, dtype=DOUBLE) - 1
    torch.testing.assert_close(network(x), F.max_pool1d(x[:, None], 3, 2, 1)[:, 0], rtol=0, atol=0)
    assert float(network(x).max()) <= -1


def test_windows_without_entries_are_refused():
    """Places -1 and 3 of three entries: torch answers -inf."""
    with pytest.raises((errors.UnsupportedLayer, errors.InvalidExample, errors.InvalidModel)):
        lg.capture(nn.MaxPool1d(2, 1, 1, dilation=4), torch.zeros(1, 1, 3))


def test_indices_of_a_pool_may_not_be_used():
    class Both(nn.Module):
        def forward(self, x):
            y, places = F.max_pool1d(x, 2, return_indices=True)
            return y + places

    with pytest.raises(errors.UnsupportedLayer, match="has no rule"):
        lg.capture(Both(), example(1, 4))
    network = lg.capture(Spelled(lambda x: F.max_pool1d(x, 2, return_indices=True)[0]), example(1, 4))
    assert slope_restricted(network).neurons == 2


@pytest.mark.parametrize(
    "module", [MaxMin(), GroupSort(3), Householder(6), nn.Sequential(nn.Unflatten(1, (1, 6)), nn.MaxPool1d(3, 1, 1))], ids=repr
)
def test_records_rebuild_the_network(module):
    model = nn.Sequential(nn.Linear(4, 6), module, nn.Linear(6, 2) if not isinstance(module, nn.Sequential) else nn.Flatten())
    network, recipe = captured(model, torch.zeros(1, 4))
    assert rebuild(recipe, model.state_dict()).digest == network.digest == lg.capture(model, torch.zeros(1, 4)).digest
    assert rebuild(recipe_of(network), {}).digest == network.digest


def test_the_digest_tells_functions_apart():
    index = torch.arange(4).reshape(2, 2)
    functions = [
        Sort(index), Sort(index.flip(1)), Sort(index.flip(0)), Sort(index, centred=True), Maxima(index),
        Reflection(index, torch.ones(2, 2, dtype=DOUBLE)), Reflection(index, 2 * torch.ones(2, 2, dtype=DOUBLE)),
    ]  # fmt: skip
    digests = {Network((Input(4), Coupled(0, function))).digest for function in functions}
    assert len(digests) == len(functions)


# Norms and rewritings


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_norms_hold_for_every_jacobian(p):
    generator = torch.Generator().manual_seed(3)
    directions = torch.randn(2, 3, generator=generator, dtype=DOUBLE)
    functions = [
        Sort(torch.tensor([[3, 0, 4], [5, 1, 2]])),
        Maxima(torch.tensor([[0, 1, 2], [1, 2, 3], [2, 3, -1], [5, 4, -1]])),
        Reflection(torch.tensor([[3, 0, 4], [5, 1, 2]]), directions),
        Reflection(torch.tensor([[3, 0, 4], [5, 1, 2]]), directions / 9),
        Reflection(torch.tensor([[3, 0, 4], [5, 1, 2]]), directions / torch.linalg.vector_norm(directions, dim=1, keepdim=True)),
    ]
    for function in functions:
        largest = 0.0
        for x in torch.randn(200, 6, generator=generator, dtype=DOUBLE):
            jacobian = torch.autograd.functional.jacobian(function, x)
            largest = max(largest, float(torch.linalg.matrix_norm(jacobian, p)))
        # 200 points meet every piece; a norm of a matrix in float64 is good to a few units
        assert largest * (1 - 1e-14) <= function.norm(p) <= largest * (1 + 1e-12)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 11])
def test_comparators_sort(size):
    x = torch.tensor(list(itertools.islice(itertools.permutations(range(size)), 2000)))
    for layer in coupled.comparators(size):
        for i, j in layer:
            x[:, i], x[:, j] = torch.maximum(x[:, i], x[:, j]), torch.minimum(x[:, i], x[:, j])
    assert bool((x[:, 1:] <= x[:, :-1]).all())
    checked._proved_comparators(size)


def test_comparators_that_do_not_sort_are_refused(monkeypatch):
    network = lg.capture(GroupSort(4), example(4))
    proposed = list(coupled.comparators(4))
    monkeypatch.setattr(checked, "comparators", lambda size: proposed[:-1])
    with pytest.raises(errors.NotCertified, match="do not sort 4 entries"):
        checked.neurons_only(network)
    monkeypatch.setattr(checked, "comparators", lambda size: [((0, 1), (1, 2)), *proposed])
    with pytest.raises(errors.NotCertified, match="overlap"):
        checked.neurons_only(network)


@st.composite
def networks(draw, smallest=1):
    """Modules (module, inputs): random layers with coupled functions between them, some residual, some behind ReLUs."""
    torch.manual_seed(draw(st.integers(0, 2**31 - 1)))
    inputs = draw(st.integers(2, 5))
    width, layers = inputs, []
    for _ in range(draw(st.integers(smallest, 2))):
        kind = draw(
            st.sampled_from(["maxmin", "sort2", "sort3", "sort4", "full", "householder", "pool", "wide pool", "maxout", "min"])
        )
        after = {"sort3": 6, "sort4": 8, "full": 5, "maxout": 6, "pool": 6, "wide pool": 7, "min": 4}.get(kind, 6)
        layers.append(nn.Linear(width, after))
        width = after
        if draw(st.integers(0, 3)) == 0:
            layers.append(nn.ReLU())
        match kind:
            case "maxmin":
                layers.append(MaxMin())
            case "sort2" | "sort3" | "sort4":
                layers.append(GroupSort(int(kind[-1])))
            case "full":
                layers.append(GroupSort(None))
            case "householder":
                layers.append(Householder(width))
                nn.init.uniform_(layers[-1].theta, -3, 3)
            case "pool":
                layers += [nn.Unflatten(1, (1, 6)), nn.MaxPool1d(2), nn.Flatten()]
                width = 3
            case "wide pool":
                layers += [nn.Unflatten(1, (1, 7)), nn.MaxPool1d(3, 2, 1), nn.Flatten()]
                width = 4
            case "maxout":
                layers.append(Spelled(SPELLINGS["maxout"]))
                width = 2
            case "min":
                layers.append(Spelled(lambda x: torch.minimum(x, x.roll(1, 1))))
    if draw(st.booleans()):
        layers.append(nn.Linear(width, draw(st.integers(1, 3))))
    return nn.Sequential(*layers).double(), inputs


@settings(max_examples=40, **HYPOTHESIS)
@given(networks())
def test_the_checkers_form_is_the_provers(made):
    """Two derivations of one feedback form: the multipliers of one are those of the other."""
    module, inputs = made
    network = agree(module, inputs)
    for own, theirs in (
        (network, checked.with_tied_neurons(network)),
        (elementwise(network), checked.neurons_only(network)),
    ):
        a, b, c, d = feedback_of(own).dense()
        form = feedback_form(theirs)
        # sums of a few dozen products of order 1
        torch.testing.assert_close(form.q.center, torch.cat([b, a], 1), rtol=0, atol=1e-13)
        torch.testing.assert_close(form.y.center, torch.cat([c, d], 1), rtol=0, atol=1e-13)
        assert torch.equal(form.alpha, feedback_of(own).alpha) and torch.equal(form.beta, feedback_of(own).beta)


def rational(matrix):
    return [[Fraction(value) for value in row] for row in matrix.tolist()]


@pytest.mark.parametrize("scale", [1.0, 2.0**-80, 2.0**300], ids=["plain", "small", "beyond the slices"])
def test_composed_maps_enclose_the_exact_product(scale):
    """Long products and sums in rational arithmetic; in twice the working precision unless exponents are extreme."""
    generator = torch.Generator().manual_seed(1)
    maps = [Dense(torch.randn(7, 7, generator=generator, dtype=DOUBLE)) for _ in range(6)]
    maps[2] = Diagonal(torch.randn(7, generator=generator, dtype=DOUBLE) * scale, 7)
    maps[3] = Index(torch.tensor([1, 1, 0, 4, -1, 6, 2]), 7)
    maps[4] = Index(torch.tensor([1, 1, 0, 4, -1, 6, 2]), 7).transpose()
    start = torch.randn(7, 3, generator=generator, dtype=DOUBLE) * scale
    # A map is enclosed by its transpose: operators act on rows.
    enclosed, expected = Composed.of(start.T), rational(start)
    for operator in maps:
        enclosed, before, matrix = enclosed.through(operator), expected, rational(operator.dense())
        expected = [
            [sum(a * b for a, b in zip(row, column, strict=True)) for column in zip(*before, strict=True)] for row in matrix
        ]
        if operator is maps[1]:  # a path beside the map
            enclosed = Composed.sum([enclosed, Composed.of(start.T)])
            expected = [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(expected, rational(start), strict=True)]
    rounded = enclosed.rounded()
    assert rounded.radius is not None
    for i, j in itertools.product(range(7), range(3)):
        assert abs(expected[i][j] - Fraction(float(enclosed.high[j, i])) - Fraction(float(enclosed.low[j, i]))) <= Fraction(
            float(enclosed.radius[j, i])
        )
        assert abs(expected[i][j] - Fraction(float(rounded.center[j, i]))) <= Fraction(float(rounded.radius[j, i]))
    if scale < 2.0**200:
        assert float((enclosed.radius / enclosed.high.abs().amax()).max()) < 2.0**-85
    exact = Composed.of(start.T).through(Diagonal(torch.tensor(0.5, dtype=DOUBLE), 7))
    assert exact.rounded().radius is None


def test_long_linear_paths_keep_the_optimum():
    """Behind ten nearly orthogonal layers the radius of working precision would cost a tenth of the bound."""
    generator = torch.Generator().manual_seed(0)
    layers = []
    for _ in range(10):
        noise = 0.01 * torch.randn(32, 32, generator=generator, dtype=DOUBLE)
        layers += [linear(orthogonal(32, generator) + noise), MaxMin()]
    network = lg.capture(nn.Sequential(*layers), example(32))
    certificate = lg.bound(network)
    proposal = propose("interior-point", lipsdp(feedback_of(network)).program, None, 1e-7, None)
    assert certificate.method == "lipsdp-neuron"
    assert certificate.value == pytest.approx(math.sqrt(proposal.rho), rel=1e-6)
    assert certificate.value < 0.95 * lg.bound(network, method="spectral").value


# Bounds


@settings(max_examples=30, **HYPOTHESIS)
@given(networks())
def test_lower_stays_below_upper(made):
    module, inputs = made
    network = lg.capture(module, example(inputs))
    query = Query()
    with one_thread():
        lower, _ = Sampling(starts=8, steps=8)(network, query)
        neuron, _ = Semidefinite()(network, query)
        layer, _ = Semidefinite(tied=True)(network, query)
        product = lg.bound(network, method="spectral")
    assert {c.rigor for c in (lower, neuron, layer, product)} == {"verified"}
    assert lower.value <= neuron.value <= layer.value * SOLVED
    assert max(neuron.value, layer.value) <= product.value
    for certificate in (lower, neuron, layer, product):
        assert lg.verify(network, certificate).value == certificate.value
    for norm in (1, math.inf, (1, 2), (2, math.inf)):
        below, _ = Sampling(starts=4, steps=4)(network, Query(norm if isinstance(norm, tuple) else (norm, norm)))
        assert below.value <= lg.bound(network, method="spectral", norm=norm).value


ALONE = {
    "maxmin": (MaxMin(), (12,)),
    "sort 2": (GroupSort(2), (12,)),
    "sort 3": (GroupSort(3), (12,)),
    "sort 5": (GroupSort(5), (10,)),
    "full sort": (GroupSort(None), (20,)),
    "householder": (Householder(12), (12,)),
    "maxmin on images": (MaxMin(), (4, 2, 2)),
    "sort on images": (GroupSort(4), (4, 2, 2)),
    "pool": (nn.MaxPool2d(2), (1, 4, 6)),
    "pool with padding": (nn.MaxPool1d(3, 3, 1), (2, 8)),
}


@pytest.mark.parametrize("name", ALONE)
def test_alone_the_bound_is_one(name):
    module, shape = ALONE[name]
    network = lg.capture(module.double(), example(*shape))
    for method in ("lipsdp-neuron", "lipsdp-layer", "spectral"):
        assert 1 <= lg.bound(network, method=method).value <= 1 + 1e-6
    proposal = propose("interior-point", lipsdp(feedback_of(network)).program, None, 1e-8, None)
    assert proposal.rho == pytest.approx(1, abs=1e-6)  # LipSDP itself, without the product beside it
    assert lg.bound(network, method="sampling").value == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("pool", "shape", "squared"),
    [
        (nn.MaxPool1d(3, 1), (1, 9), 3),
        (nn.MaxPool2d(3, 2, 1), (1, 5, 5), 4),
        (nn.MaxPool1d(4, 2), (1, 10), 2),
        (nn.AdaptiveMaxPool1d(2), (1, 5), 2),
        (nn.MaxPool2d((1, 2), (1, 1)), (1, 2, 4), 2),
    ],
)
def test_overlapping_pools_have_the_root_of_the_overlap(pool, shape, squared):
    """The constant is sqrt(overlap): the entry that most windows hold may be the largest of them all."""
    network = lg.capture(pool, example(*shape))
    assert overlap(pool, shape) == squared
    for method in ("lipsdp-neuron", "spectral"):
        assert lg.bound(network, method=method).value == pytest.approx(math.sqrt(squared), rel=1e-6)
    assert lg.bound(network, method="spectral", norm=math.inf).value == 1
    assert lg.bound(network, method="spectral", norm=1).value == pytest.approx(squared, rel=1e-15)
    assert lg.bound(network, method="sampling").value == pytest.approx(math.sqrt(squared), rel=1e-12)


class ReluMaxMin(nn.Module):
    """MaxMin by ReLUs, each a neuron of its own: max(a, b) = relu(a - b) + relu(b) - relu(-b), min(a, b) likewise."""

    def forward(self, x):
        a, b = x.chunk(2, 1)
        largest = torch.relu(a - b) + torch.relu(b) - torch.relu(-b)
        return torch.cat([largest, torch.relu(b) - torch.relu(-b) - torch.relu(b - a)], 1)


@pytest.mark.parametrize(
    "make", [MaxMin, lambda: GroupSort(2), lambda: GroupSort(4), lambda: GroupSort(None), lambda: Householder(8)]
)
def test_orthogonal_networks_have_the_bound_one(make):
    generator = torch.Generator().manual_seed(5)
    layers = []
    for depth in range(1, 11):
        layers += [linear(orthogonal(8, generator)), make().double()]
        if depth in (1, 2, 5, 10):
            model = nn.Sequential(*layers)
            network = lg.capture(model, example(8))
            assert 1 <= lg.bound(network).value <= 1 + 1e-6
            proposal = propose("interior-point", lipsdp(feedback_of(network)).program, None, 1e-8, None)
            assert proposal.rho == pytest.approx(1, abs=1e-6)
            relu = nn.Sequential(*(ReluMaxMin() if isinstance(layer, MaxMin) else layer for layer in layers))
            if make is MaxMin and depth <= 2:
                assert lg.bound(relu, example(8)).value > 1.1


def test_below_the_relu_rewriting():
    """Never larger; at depth 3 at least a tenth smaller in the median."""
    ratios = []
    for seed in range(6):
        torch.manual_seed(seed)
        layers = [nn.Linear(4, 8), MaxMin(), nn.Linear(8, 8), MaxMin(), nn.Linear(8, 8), MaxMin(), nn.Linear(8, 3)]
        own = lg.bound(nn.Sequential(*layers).double(), example(4)).value
        plain = [ReluMaxMin() if isinstance(layer, MaxMin) else layer for layer in layers]
        ratios.append(own / lg.bound(nn.Sequential(*plain).double(), example(4)).value)
    assert max(ratios) <= 1 + 1e-6
    assert sorted(ratios)[len(ratios) // 2] <= 0.9


@pytest.mark.parametrize(("size", "width"), [(2, 6), (3, 6), (4, 8)])
def test_the_constraint_of_pauli_et_al_is_no_stronger(size, width):
    """Their program for W_1 sort(W_0 x), in the variables (x, y = sort(W_0 x)), solved by CVXPY: the same optimum."""
    generator = torch.Generator().manual_seed(size)
    first = torch.randn(width, 4, generator=generator, dtype=DOUBLE)
    last = torch.randn(3, width, generator=generator, dtype=DOUBLE)
    groups = width // size
    lam, gam, nu, tau = (cp.Variable(groups, nonneg=sign) for sign in (True, False, False, False))
    blocks = np.kron(np.eye(groups), np.ones((size, size)))

    def weighted(v):
        return cp.diag(v @ np.kron(np.eye(groups), np.ones((1, size)))) @ blocks

    identity = cp.diag(lam @ np.kron(np.eye(groups), np.ones((1, size))))
    t, s, p = identity + weighted(gam), weighted(nu), weighted(tau)
    w0, w1, rho = first.numpy(), last.numpy(), cp.Variable()
    corner = w0.T @ (t - 2 * s) @ w0
    side = w0.T @ (p + s)
    z = cp.bmat([[rho * np.eye(4) - corner, -side], [-side.T, t + 2 * p - w1.T @ w1]])
    z = (z + z.T) / 2
    cp.Problem(cp.Minimize(rho), [z >> 0]).solve(solver="CLARABEL")
    model = nn.Sequential(linear(first), GroupSort(size), linear(last))
    own = lg.bound(model, example(4))
    assert own.method == "lipsdp-neuron"
    assert own.value == pytest.approx(math.sqrt(rho.value), rel=1e-5)
    comparators = lg.bound(elementwise(lg.capture(model, example(4))))
    assert comparators.value <= own.value * (1 + 1e-5)  # as the telescoping says


@pytest.mark.parametrize("solver", ["clarabel", "first-order", "scs"])
def test_ties_reach_every_solver(solver):
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 6), GroupSort(3), nn.Linear(6, 6), GroupSort(3), nn.Linear(6, 2)).double()
    network = lg.capture(model, example(4))
    own = lg.bound(network)
    other = lg.bound(network, solver=solver)
    assert other.value == pytest.approx(own.value, rel=1e-5 if solver == "clarabel" else 2e-2)
    t = own.evidence.t.reshape(4, 3)
    torch.testing.assert_close(t, t[:, :1].expand(-1, 3), rtol=1e-12, atol=0)


# Tied multipliers


@cache
def _sorter():
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(5, 6), GroupSort(None), nn.Linear(6, 3)).double()
    network = lg.capture(model, example(5))
    return network, lg.bound(network), lg.bound(network, method="sampling")


def test_multipliers_that_differ_within_a_group_prove_nothing_more():
    """Of a sort only the whole length is known: a program with a multiplier for each entry has a smaller, wrong optimum."""
    network, tied, _ = _sorter()
    fb = dataclasses.replace(feedback_of(network), groups=None)
    problem = lipsdp(fb)
    wrong = propose("interior-point", problem.program, None, 1e-8, None)
    assert math.sqrt(wrong.rho) < 0.97 * tied.value
    evidence = Multipliers(problem.to_network(wrong.t, wrong.rho), wrong.rho)
    claim = Certificate(math.sqrt(wrong.rho), "upper", (2.0, 2.0), None, network.digest, "lipsdp-neuron", evidence)
    with pytest.raises(errors.NotCertified, match="not provably positive semidefinite"):
        lg.verify(network, claim)


def test_untied_multipliers_would_be_unsound():
    """For y_1 of a sort, max(x), one multiplier an entry claims less than the constant 1: the checker does not follow."""
    network = lg.capture(nn.Sequential(GroupSort(None), linear([[1.0, 0.0, 0.0, -1.0]])), example(4))
    exact = math.sqrt(2)  # x_(1) - x_(4): the gradient is e_i - e_j
    problem = lipsdp(dataclasses.replace(feedback_of(network), groups=None))
    wrong = propose("interior-point", problem.program, None, 1e-8, None)
    evidence = Multipliers(problem.to_network(wrong.t, wrong.rho), wrong.rho)
    claim = Certificate(math.sqrt(wrong.rho), "upper", (2.0, 2.0), None, network.digest, "lipsdp-neuron", evidence)
    try:
        proved = lg.verify(network, claim).value
    except errors.NotCertified:
        proved = math.inf
    assert proved >= exact
    assert lg.bound(network).value >= exact
    assert lg.bound(network).value == pytest.approx(exact, rel=1e-6)


@settings(max_examples=25, **HYPOTHESIS)
@given(st.lists(st.floats(-2, 2), min_size=6, max_size=6))
def test_corrupted_multipliers_are_repaired_soundly(noise):
    network, tied, lower = _sorter()
    t = tied.evidence.t + torch.tensor(noise, dtype=DOUBLE) * tied.evidence.t.mean()
    claim = dataclasses.replace(tied, evidence=Multipliers(t, tied.evidence.rho))
    try:
        proved = lg.verify(network, claim)
    except errors.NotCertified:
        return
    assert proved.value >= lower.value
    assert proved.value >= tied.value * (1 - 1e-6)  # the optimum over tied multipliers


@pytest.mark.parametrize("change", ["count", "pair", "norm", "factors"])
def test_corrupted_evidence_is_refused(change):
    network = lg.capture(nn.Sequential(nn.Linear(4, 6), MaxMin(), nn.Linear(6, 3)).double(), example(4))
    certificate = lg.bound(network)
    product = lg.bound(network, method="spectral")
    match change:
        case "count":  # the multipliers of the network without its sort
            bad = dataclasses.replace(certificate, evidence=Multipliers(certificate.evidence.t[:-1], certificate.evidence.rho))
        case "pair":
            t = certificate.evidence.t.clone()
            t[0] = -t[0]
            bad = dataclasses.replace(certificate, evidence=Multipliers(t, certificate.evidence.rho))
        case "norm":
            bad = dataclasses.replace(certificate, norm=(1.0, 1.0))
        case _:
            norms = {i: 0.9 * norm for i, norm in product.evidence.norms.items()}
            bad = dataclasses.replace(product, evidence=dataclasses.replace(product.evidence, norms=norms))
    with pytest.raises(errors.NotCertified):
        lg.verify(network, bad)


# Witnesses


def test_witnesses_at_kinks_prove_no_more_than_the_constant():
    """On a tie every order is possible: the slope along the tie is the smallest of theirs."""
    largest = Network((Input(2), Coupled(0, Maxima(torch.tensor([[0, 1]])))))
    ordered = Network((Input(3), Coupled(0, Sort(torch.tensor([[0, 1, 2]]))), Affine(1, Index(torch.tensor([1]), 3))))

    def proved(network, point, direction):
        witness = Witness(torch.tensor(point, dtype=DOUBLE), torch.tensor(direction, dtype=DOUBLE))
        claim = Certificate(1.0, "lower", (2.0, 2.0), None, network.digest, "test", witness)
        return lg.verify(network, claim).value

    assert proved(largest, [2.0, 1.0], [1.0, 0.0]) == pytest.approx(1, abs=1e-14)
    assert proved(largest, [1.0, 2.0], [1.0, 0.0]) == 0
    assert proved(largest, [1.0, 1.0], [1.0, 0.0]) == 0  # (1, 0) or (0, 1)
    assert proved(largest, [1.0, 1.0], [1.0, 1.0]) == pytest.approx(1 / math.sqrt(2), abs=1e-14)
    assert proved(ordered, [3.0, 2.0, 1.0], [0.0, 1.0, 0.0]) == pytest.approx(1, abs=1e-14)
    assert proved(ordered, [3.0, 3.0, 1.0], [0.0, 1.0, 0.0]) == 0
    assert proved(ordered, [3.0, 3.0, 1.0], [1.0, 1.0, 0.0]) == pytest.approx(1 / math.sqrt(2), abs=1e-14)
    v = torch.tensor([[0.6, 0.8]], dtype=DOUBLE)
    mirror = Network((Input(2), Coupled(0, Reflection(torch.tensor([[0, 1]]), v)), Affine(1, Index(torch.tensor([0]), 2))))
    assert proved(mirror, [1.0, 1.0], [1.0, 0.0]) == pytest.approx(1, abs=1e-14)
    assert proved(mirror, [-1.0, -1.0], [1.0, 0.0]) == pytest.approx(1 - 2 * 0.36, abs=1e-12)
    assert proved(mirror, [4.0, -3.0], [1.0, 0.0]) <= 0.28 + 1e-12  # on the mirror: the smaller of 1 and 0.28


# Exact methods


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (lambda: nn.Sequential(nn.Linear(2, 4), MaxMin(), nn.Linear(4, 4), MaxMin(), nn.Linear(4, 2)), 2),
        (lambda: nn.Sequential(nn.Linear(2, 6), GroupSort(3), nn.Linear(6, 2)), 2),
        (lambda: nn.Sequential(nn.Linear(2, 4), Householder(4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), 2),
        (lambda: nn.Sequential(nn.Linear(2, 5), nn.Unflatten(1, (1, 5)), nn.MaxPool1d(3, 1), nn.Flatten(), nn.Linear(3, 2)), 2),
        (lambda: nn.Sequential(nn.Linear(3, 6), nn.ReLU(), Spelled(SPELLINGS["maxout"]), nn.Linear(2, 2)), 3),
    ],
)
def test_exact_methods_enclose_the_same_constant(model, inputs):
    torch.manual_seed(11)
    network = lg.capture(model().double(), example(inputs))
    upper = lg.bound(network)
    box = lg.Box(-1.0, 1.0)
    for domain in (None, box):
        enumerated = lg.exact(network, domain=domain, method="enumeration")
        searched = lg.exact(network, domain=domain, method="branch-and-bound")
        sampled = lg.bound(network, method="sampling", domain=domain)
        assert searched.rigor == "verified"
        assert searched.gap <= 1e-5
        assert enumerated.lower == pytest.approx(searched.lower, rel=1e-6)
        assert sampled.value <= searched.upper * (1 + 1e-12)
        assert searched.upper <= upper.value * (1 + 1e-6)
    assert sampled.value <= enumerated.lower * (1 + 1e-9)


def test_exact_values_by_formula():
    """max(x, y) and the range x_(1) - x_(3) of three numbers: 1 and sqrt 2 in the 2-norm; by MILP in the norm of inf: 1, 2."""
    largest = lg.capture(Spelled(lambda x: x.amax(1, keepdim=True)), example(3))
    assert lg.exact(largest).upper == pytest.approx(1, abs=1e-6)
    span = lg.capture(nn.Sequential(GroupSort(None), linear([[-1.0, 0.0, 1.0]])), example(3))
    assert lg.exact(span).upper == pytest.approx(math.sqrt(2), rel=1e-6)
    box = lg.Box(-1.0, 1.0)
    assert lg.exact(span, domain=box, norm=math.inf).upper == pytest.approx(2, rel=1e-6)
    highs = lg.exact(span, domain=box, norm=math.inf, method="milp", solver="highs")
    assert highs.lower == pytest.approx(2, rel=1e-6)
    assert highs.upper == pytest.approx(2, rel=1e-6)


def test_sorts_of_many_entries_have_bounds_but_no_pieces():
    network = lg.capture(GroupSort(None), example(17))
    assert lg.bound(network).value <= 1 + 1e-6
    with pytest.raises(errors.UnsupportedQuery, match="sort of 17 entries"):
        lg.exact(network, domain=lg.Box(-1.0, 1.0), method="branch-and-bound")


# Warm starts and given slopes


def test_a_tracker_follows_a_sorting_network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), GroupSort(4), nn.Linear(8, 8), MaxMin(), nn.Linear(8, 2))
    tracker = lg.Tracker(model, torch.zeros(1, 4))
    for _ in range(3):
        upper, lower = tracker.update(seconds=0.05)
        assert 0 < lower <= upper <= tracker.last.spectral.value
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)


def test_given_slopes_do_not_untie_a_group():
    module = nn.Sequential(nn.Linear(3, 4), GroupSort(4), nn.Linear(4, 4), nn.LeakyReLU(0.5), nn.Linear(4, 1)).double()
    network = lg.capture(module, example(3))
    narrow = torch.full((8,), 0.9, dtype=DOUBLE), torch.ones(8, dtype=DOUBLE)
    fb = feedback_of(network, narrow)
    assert fb.alpha.tolist() == [-1.0] * 4 + [0.9] * 4
    assert fb.beta.tolist() == [1.0] * 8
    assert fb.groups.tolist() == [0] * 4 + [1, 2, 3, 4]


def test_what_underflows_is_counted() -> None:
    from lipguard.network import Diagonal
    from lipguard.verify.enclosed import Enclosed
    from lipguard.verify.lmi.composed import Composed

    zero, tiny = torch.zeros(1, dtype=torch.float64), torch.full((1,), torch.finfo(torch.float64).tiny, dtype=torch.float64)
    low, high = Enclosed(zero, tiny).ends()
    assert float(low) <= -2 * float(tiny) and float(high) >= 2 * float(tiny)
    assert not any(bool(end) for end in Enclosed(zero, zero).ends())
    half = Diagonal(torch.tensor(0.5, dtype=torch.float64), 1)
    image = Composed(tiny[None], zero[None], zero[None]).through(half)  # subnormal: a flush to zero would lose all of it
    assert float(image.radius) >= float(tiny)
