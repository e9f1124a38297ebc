"""Certified robustness of a batch: certified <= accuracy under attack <= clean accuracy, and every radius holds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lipguard as lg
from lipguard import errors
from lipguard.bounds.counterexample import nearest_found
from lipguard.bounds.pairs import pair_bounds
from lipguard.verify.domain.pairs import rows_of

F64 = torch.float64
METHODS = ["local", "global", "spectral"]


def blobs(count: int = 240, classes: int = 3, dim: int = 4) -> tuple[Tensor, Tensor]:
    """Points in [0, 1]^dim around one centre for each class, overlapping a little."""
    generator = torch.Generator().manual_seed(0)
    centers = 0.2 + 0.6 * torch.rand(classes, dim, generator=generator)
    y = torch.arange(count) % classes
    x = centers[y] + 0.09 * torch.randn(count, dim, generator=generator)
    return x.clamp(0, 1), y


@pytest.fixture(scope="module", params=["relu", "tanh", "skip"])
def classifier(request) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    activation = nn.Tanh if request.param == "tanh" else nn.ReLU
    model: nn.Module = nn.Sequential(nn.Linear(4, 10), activation(), nn.Linear(10, 8), activation(), nn.Linear(8, 3))
    if request.param == "skip":
        model = _Skip()
    x, y = blobs()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(120):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, x[:15], y[:15]


class _Skip(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = functional.relu(self.first(x))
        return self.last(h + functional.relu(self.inner(h)))


def attacked(model: nn.Module, x: Tensor, y: Tensor, radius: Tensor, steps: int = 40, starts: int = 3, box=None) -> Tensor:
    """Whether projected gradient ascent finds another class within each radius, shape (B,)."""
    model = model.double()
    x, radius = x.double(), radius.double()[:, None]
    found = model(x).argmax(1) != y
    generator = torch.Generator().manual_seed(1)
    for _ in range(starts):
        step = functional.normalize(torch.randn(x.shape, generator=generator, dtype=F64), dim=1) * radius
        for _ in range(steps):
            at = (x + step).requires_grad_(True)
            (gradient,) = torch.autograd.grad(functional.cross_entropy(model(at), y, reduction="sum"), at)
            step = step + 0.2 * radius * functional.normalize(gradient, dim=1)
            step = step * (radius / torch.linalg.vector_norm(step, dim=1, keepdim=True).clamp_min(1e-300)).clamp_max(1.0)
            if box is not None:
                step = (x + step).clamp(*box) - x
            found |= model(x + step).argmax(1) != y
    model.float()
    return found


@pytest.mark.parametrize("method", METHODS)
def test_certified_below_attacked_below_clean(classifier, method):
    model, x, y = classifier
    clean = float((model(x).argmax(1) == y).double().mean())
    assert clean > 0.85
    shares = []
    for eps in (0.01, 0.05, 0.15):
        result = lg.certify(model, x, y, eps, method=method)
        robust = ~attacked(model, x, y, torch.full((len(x),), eps))
        assert not bool((result.certified & ~robust).any())
        assert result.certified_accuracy <= float(robust.double().mean()) <= result.accuracy == clean
        assert torch.equal(result.certified, result.radius >= eps)
        shares.append(result.certified_accuracy)
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.5


@pytest.mark.parametrize("method", METHODS)
def test_no_attack_within_a_radius(classifier, method):
    model, x, y = classifier
    result = lg.certify(model, x, y, 0.05, method=method)
    assert bool(result.complete.all())
    proved = result.radius > 0
    assert not bool(attacked(model, x[proved], y[proved], result.radius[proved]).any())
    assert bool((result.radius[~result.correct] == 0).all()) and bool((result.margin[~result.correct] <= 0).all())
    network = lg.capture(model, x)
    assert bool((result.radius <= nearest_found(network, x.double(), y)).all())


def test_methods_are_ordered(classifier):
    model, x, y = classifier
    local, overall, product = (lg.certify(model, x, y, 0.05, method=method).radius for method in METHODS)
    # Global constants are solved to 1e-4 of their squares; local radii begin from them.
    assert bool((product <= overall * (1 + 1e-4)).all()) and bool((overall <= local).all())
    assert float(local.median()) > 1.05 * float(product.median())


def test_a_box_of_all_inputs_only_helps(classifier):
    model, x, y = classifier
    free, boxed = lg.certify(model, x, y, 0.1), lg.certify(model, x, y, 0.1, box=lg.Box(0.0, 1.0))
    assert bool((boxed.radius >= free.radius * 0.97).all())  # both within tol = 2 % of what can be proved
    robust = ~attacked(model, x, y, boxed.radius, box=(0.0, 1.0))
    assert bool(robust[boxed.radius > 0].all())


def test_linear_classifier_by_formula():
    # f_0 - f_1 = 2 (x_0 - 0.3): the distance to the boundary is |x_0 - 0.3|, whatever the method.
    model = nn.Linear(2, 2, dtype=F64)
    model.weight.data = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=F64)
    model.bias.data = torch.tensor([-0.3, 0.3], dtype=F64)
    x, y = torch.tensor([[0.8, 0.5], [0.25, 0.1], [0.31, 0.0]], dtype=F64), torch.tensor([0, 1, 1])
    for method in METHODS:
        result = lg.certify(model, x, y, 0.1, method=method, tol=1e-4)
        assert result.predicted.tolist() == [0, 1, 0]
        assert result.correct.tolist() == [True, True, False]
        assert result.margin.tolist() == pytest.approx([1.0, 0.1, -0.02], abs=1e-12)
        assert result.radius.tolist() == pytest.approx([0.5, 0.05, 0.0], rel=2e-4)
        assert bool((result.radius <= torch.tensor([0.5, 0.05, 0.0], dtype=F64)).all())
        assert result.certified.tolist() == [True, False, False]
        assert (result.accuracy, result.certified_accuracy) == pytest.approx((2 / 3, 1 / 3))


def test_eps_alone_agrees_with_the_radii(classifier):
    model, x, y = classifier
    for eps in (0.02, 0.1):
        alone, full = lg.certify(model, x, y, eps, radii=False), lg.certify(model, x, y, eps)
        # The constants on R^d that the radii begin from may prove what the ball's program stops short of.
        assert bool((full.certified | ~alone.certified).all())
        assert set(alone.radius.tolist()) <= {0.0, eps}


@pytest.mark.parametrize("method", ["global", "spectral"])
def test_pairs_are_bounds_of_their_functionals(classifier, method):
    model, x, _ = classifier
    network = lg.capture(model, x)
    pairs = torch.tensor([[0, 1], [0, 2], [1, 2]])
    _, values = pair_bounds(network, pairs, method)
    for row, value in zip(rows_of(pairs, network), values.tolist(), strict=True):
        functional_ = network.with_outputs(row[None])
        assert lg.bound(functional_, method="sampling").value <= value
        reference = lg.bound(functional_, method="lipsdp-neuron").value
        assert value >= reference * (1 - 1e-6)
        if method == "global":
            assert value <= reference * (1 + 1e-4)
        else:
            assert value <= lg.bound(network, method="spectral").value * math.sqrt(2) * (1 + 1e-9)


def test_the_model_and_the_random_state_stay(classifier):
    model, x, y = classifier
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    lg.certify(model, x[:5], y[:5], 0.1)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())


def test_out_of_time_is_said(classifier):
    model, x, y = classifier
    result = lg.certify(model, x, y, 0.05, radii=False, time_limit=0.0)
    assert not bool(result.complete[result.correct].any())
    assert not bool(result.certified.any())


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"labels": None}, errors.InvalidExample, "labels are missing"),
        ({"labels": torch.tensor([0, 1])}, errors.InvalidExample, "one integer for each of 3 samples"),
        ({"labels": torch.tensor([0.0, 1.0, 2.0])}, errors.InvalidExample, "dtype torch.float32"),
        ({"labels": torch.tensor([0, 1, 3])}, errors.InvalidExample, "classes 0 to 2"),
        ({"labels": torch.tensor([0, -1, 2])}, errors.InvalidExample, "classes 0 to 2"),
        ({"eps": 0.0}, errors.InvalidDomain, "positive"),
        ({"eps": -0.1}, errors.InvalidDomain, "positive"),
        ({"eps": math.nan}, errors.InvalidDomain, "positive"),
        ({"method": "magic"}, errors.UnknownName, "local, global, spectral"),
        ({"box": lg.Box(1.0, 0.0)}, errors.InvalidDomain, "empty"),
        ({"box": lg.Box(0.4, 0.6)}, errors.InvalidDomain, "sample 0 lies outside"),
        ({"batch": torch.zeros(3, 5)}, errors.LipguardError, "(?i)shape|fit|cannot"),
        ({"batch": torch.full((3, 4), math.nan)}, errors.LipguardError, "nan"),
        ({"model": nn.Linear(4, 1)}, errors.UnsupportedQuery, "at least 2 outputs"),
        ({"tol": 0.0}, errors.UnsupportedQuery, "tol"),
    ],
)
def test_bad_input(change, error, match):
    given = {"model": nn.Linear(4, 3), "batch": torch.zeros(3, 4), "labels": torch.tensor([0, 1, 2]), "eps": 0.1} | change
    with pytest.raises(error, match=match):
        lg.certify(given.pop("model"), given.pop("batch"), given.pop("labels"), given.pop("eps"), **given)
