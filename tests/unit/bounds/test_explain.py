"""Shares of a bound: derivatives of the bound itself, taken by differences of bounds of networks with scaled weights."""

import copy
import json
import math
import pickle
import sys
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import lipguard as lg
from lipguard.bounds.explain import explain
from lipguard.errors import UnsupportedQuery


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(3, 8), nn.Linear(8, 2)
        self.body = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x):
        x = self.stem(x)
        for layer in self.body:
            x = x + torch.relu(layer(x))
        return self.head(x)


def chain() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 2))


def linears(module):
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def differences(module, step=1e-3, **query):
    """d log(bound^2) / d log(weights) of every linear layer, with lg.bound and torch's weights alone."""
    shares = []
    for i in range(len(linears(module))):
        ends = []
        for factor in (1 + step, 1 - step):
            changed = copy.deepcopy(module).double()
            linears(changed)[i].weight.data *= factor
            ends.append(lg.bound(changed, torch.zeros(1, 3, dtype=torch.float64), **query).value)
        shares.append(2 * math.log(ends[0] / ends[1]) / math.log((1 + step) / (1 - step)))
    return shares


def made(kind, seed=0):
    torch.manual_seed(seed)
    module = kind().double().eval()
    return module, torch.zeros(1, 3, dtype=torch.float64)


@pytest.mark.parametrize("kind", [chain, Residual])
@pytest.mark.parametrize("seed", [0, 1])
def test_shares_from_multipliers_are_the_derivatives_of_the_bound(kind, seed):
    module, x = made(kind, seed)
    found = lg.bound(module, x, method="lipsdp-neuron").explain()
    assert found.how == "from the multipliers"
    expected = differences(module, method="lipsdp-neuron")
    # The modules of Residual are registered stem, head, body; the network has them in the order of the forward.
    assert sorted(row.share for row in found.rows) == pytest.approx(sorted(expected), abs=1e-3)
    assert found.total == pytest.approx(sum(expected), abs=3e-3)
    if kind is chain:
        assert [row.share for row in found.rows] == pytest.approx([2.0] * 3, abs=1e-3)


def test_shares_on_a_domain_are_differences_and_say_so():
    module, x = made(chain)
    found = lg.bound(module, x, domain=lg.Box(-1.0, 1.0)).explain()
    assert found.how.startswith("estimate")
    assert [row.share for row in found.rows] == pytest.approx(differences(module, domain=lg.Box(-1.0, 1.0)), abs=1e-3)


def test_shares_of_a_product_are_logarithms_of_norms():
    module, x = made(chain)
    certificate = lg.bound(module, x, method="spectral")
    found = certificate.explain()
    norms = [float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) for layer in linears(module)]
    assert [row.norm for row in found.rows[:3]] == pytest.approx(norms, rel=1e-6)
    assert all(row.norm >= norm for row, norm in zip(found.rows, norms, strict=False))
    assert [row.share for row in found.rows[:3]] == pytest.approx([math.log(n) for n in norms], abs=1e-6)
    assert found.rows[3].share == pytest.approx(math.log(0.25), abs=1e-6)  # the sigmoid's slope
    assert found.total == pytest.approx(math.log(certificate.value), abs=1e-9)


def test_shares_of_a_witness_are_those_of_the_slope_at_its_point():
    module, x = made(chain)
    certificate = lg.bound(module, x, method="sampling")
    found = certificate.explain()
    assert found.how == "estimate: differences at the witness"
    assert found.rows[-1].share == pytest.approx(2.0, abs=1e-6)  # nothing follows the last layer
    assert found.side == "lower"


def test_exact_ends_are_explained_by_a_bound_on_the_same_domain():
    module, x = made(lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 1)))
    result = lg.exact(module, x, domain=lg.Box(-1.0, 1.0), method="branch-and-bound", time_limit=20)
    found = result.upper_certificate.explain(lg.capture(module, x))
    assert found.how.startswith("estimate")
    assert len(found.rows) == 2


def test_the_network_is_kept_in_this_process_and_neither_pickled_nor_saved(tmp_path):
    module, x = made(chain)
    certificate = lg.bound(module, x)
    network = certificate.network
    assert network.digest == certificate.digest
    for other in (pickle.loads(pickle.dumps(certificate)), copy.copy(certificate)):
        assert other.network is None
        with pytest.raises(UnsupportedQuery, match=r"certificate\.explain\(lipguard\.capture\(model, example\)\)"):
            other.explain()
        assert repr(other.explain(network)) == repr(certificate.explain())
    certificate.save(tmp_path / "a.json")
    assert repr(lg.explain(lg.load(tmp_path / "a.json"), network)) == repr(certificate.explain())
    with pytest.raises(UnsupportedQuery, match="is of network"):
        certificate.explain(lg.capture(nn.Linear(3, 2), torch.zeros(1, 3)))


def test_a_bound_of_zero_has_no_shares():
    layer = nn.Linear(3, 2)
    layer.weight.data.zero_()
    with pytest.raises(UnsupportedQuery, match="no shares"):
        explain(lg.bound(layer, torch.zeros(1, 3)))


def test_an_explanation_is_shown_as_a_table_and_as_plain_values():
    module, x = made(Residual)
    found = lg.bound(module, x).explain()
    lines = repr(found).splitlines()
    assert lines[0].startswith("upper bound ") and "d log(bound^2) / d log(weights)" in lines[0]
    assert [line.split()[0] for line in lines[1:]] == ["layer", *(row.layer for row in found.rows), "sum"]
    ElementTree.fromstring(found._repr_html_())
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert sum(row["share"] for row in plain["rows"]) == pytest.approx(plain["total"])


def test_the_picture_has_a_bar_for_each_layer_as_wide_as_its_share(tmp_path):
    pytest.importorskip("matplotlib")
    module, x = made(Residual)
    for certificate in (lg.bound(module, x), lg.bound(module, x, method="spectral")):
        found = certificate.explain()
        figure = found.plot(tmp_path / "shares.png")
        assert (tmp_path / "shares.png").read_bytes().startswith(b"\x89PNG")
        axes = figure.axes[0]
        assert "share of" in axes.get_xlabel() and f"{found.total:.4g}" in axes.get_xlabel()
        widths = [bar.get_width() for bar in axes.patches]
        whole = sum(abs(row.share) for row in found.rows)
        for row in found.rows:
            assert any(width == pytest.approx(abs(row.share) / whole) for width in widths)
        assert widths[0] == 1.0


def test_without_matplotlib_the_error_says_what_to_type(monkeypatch):
    module, x = made(chain)
    for name in ("matplotlib", "matplotlib.backends", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnsupportedQuery, match=r"pip install"):
        lg.bound(module, x).explain().plot()
