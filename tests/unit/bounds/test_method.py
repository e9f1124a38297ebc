"""Methods state what they take: options that have no use, values out of range and wrong sides are refused at the call."""

from __future__ import annotations

import dataclasses
import math
import sys
import types

import pytest
import torch
from torch import nn

import lipguard as lg
from lipguard import registry
from lipguard.bounds.method import PAIRS, Method, check_options
from lipguard.bounds.semidefinite import Semidefinite
from lipguard.bounds.spectral import Spectral
from lipguard.errors import LipguardError, UnknownName, UnsupportedQuery

EXAMPLE = torch.zeros(1, 4)
BOX = lg.Box(0.0, 1.0)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def conv() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3)), torch.zeros(1, 1, 6, 6)


VALUES = {
    "solver": "interior-point", "tol": 1e-3, "time_limit": 5.0, "chordal": True, "pieces": 2, "jobs": 1, "starts": 4, "steps": 2,
    "seed": 3, "granularity": "layer",
}  # fmt: skip


@pytest.mark.parametrize("option", list(VALUES))
@pytest.mark.parametrize("name", list(registry.METHODS))
def test_every_option_of_every_method_is_taken_or_refused_by_name(name, option):
    net, example = conv() if name == "lipsdp-channel" else (model(), EXAMPLE)
    value = "low-rank" if (name, option) == ("lipsdp-channel", "solver") else VALUES[option]
    given = {option: value} | ({"solver": "scs"} if option == "chordal" and name.startswith("lipsdp") else {})
    if option in registry.method(name).takes():
        assert lg.bound(net, example, method=name, norm=math.inf if name == "contraction" else 2, **given).rigor == "verified"
    else:
        with pytest.raises(UnsupportedQuery, match=rf"has no use: method='{name}' does not take it; it takes"):
            lg.bound(net, example, method=name, **given)


@pytest.mark.parametrize(
    ("option", "wrong"),
    [
        ("tol", -1.0), ("tol", 0.0), ("tol", 1.0), ("tol", math.nan), ("tol", "1e-3"), ("tol", True), ("time_limit", -3.0),
        ("time_limit", "10"), ("time_limit", math.nan), ("pieces", 0), ("pieces", 1.5), ("jobs", -7), ("jobs", True),
        ("chordal", 1), ("solver", 3), ("starts", 0), ("steps", -1),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused_whatever_the_method(option, wrong):
    for name in (None, "spectral", "lipsdp-split", "sampling"):
        with pytest.raises(UnsupportedQuery, match=rf"{option}={wrong!r}"):
            lg.bound(model(), EXAMPLE, method=name, **{option: wrong})


def test_a_solver_that_nothing_has_is_refused_by_every_method():
    for name in (None, *registry.METHODS):
        with pytest.raises(LipguardError, match=r"solver"):
            lg.bound(model(), EXAMPLE, method=name, solver="nonsense")
    with pytest.raises(UnknownName, match=r"Did you mean 'interior-point'\?"):
        lg.bound(model(), EXAMPLE, solver="interior-poin")
    with pytest.raises(UnknownName, match=r"Did you mean 'spectral'\?"):
        lg.bound(model(), EXAMPLE, method="spectrl")


def test_what_auto_has_no_use_for_is_said():
    certificate = lg.bound(model(), EXAMPLE, norm=(math.inf, 1), tol=1e-3, solver="scs", time_limit=3)
    assert certificate.method == "spectral" and "no use for tol=0.001, solver='scs'" in certificate.note
    assert "time_limit" not in certificate.note  # a bound without a search keeps to every limit
    assert lg.bound(model(), EXAMPLE, tol=1e-3, time_limit=3).note == ""


def test_chordal_is_refused_where_there_is_no_such_form():
    for given in ({"domain": BOX}, {"norm": math.inf}, {"solver": "interior-point"}, {"solver": "low-rank"}):
        with pytest.raises(UnsupportedQuery, match="chordal"):
            lg.bound(model(), EXAMPLE, method="lipsdp-neuron", chordal=True, **given)


def test_a_method_object_is_taken_as_it_is():
    made = Semidefinite(solver="interior-point", tol=1e-9)
    assert lg.bound(model(), EXAMPLE, method=made).value == lg.bound(model(), EXAMPLE, solver="interior-point", tol=1e-9).value
    assert lg.bound(model(), EXAMPLE, method=Spectral(), domain=BOX).value <= lg.bound(model(), EXAMPLE, method="spectral").value
    with pytest.raises(UnsupportedQuery, match=r"Give Semidefinite\(tol=0.001\)"):
        lg.bound(model(), EXAMPLE, method=made, tol=1e-3)
    with pytest.raises(UnsupportedQuery, match="give a name"):
        lg.bound(model(), EXAMPLE, method=3)
    upper, lower = lg.Tracker(model(), EXAMPLE, method=made).update()
    assert lower <= upper == pytest.approx(lg.bound(model(), EXAMPLE).value, rel=1e-6)


def test_lower_bounds_are_refused_where_an_upper_one_is_wanted():
    with pytest.raises(UnsupportedQuery, match="wants an upper bound; sampling bounds the constant from below"):
        lg.Tracker(model(), EXAMPLE, method="sampling")


@pytest.mark.parametrize(
    "given",
    [{"method": "spectral", "solver": "scs"}, {"method": "spectral", "tol": 1e-3}, {"tol": -1}, {"solver": "nonsense"},
     {"method": "lipsdp-channel", "solver": "scs"}, {"method": "contraction"}, {"method": "lipsdp-channel", "norm": 1}],
)  # fmt: skip
def test_a_tracker_refuses_when_it_is_made(given):
    with pytest.raises(LipguardError):
        lg.Tracker(model(), EXAMPLE, **given)


@pytest.mark.parametrize("name", list(registry.METHODS))
def test_methods_answer_the_norms_that_they_state(name):
    net, example = conv() if name == "lipsdp-channel" else (model(), EXAMPLE)
    method = registry.method(name).build()
    assert isinstance(method, Method) and method.name == name
    network = lg.capture(net, example)
    for norm in PAIRS:
        query = lg.Query(norm)
        if norm in method.norms:
            certificate, _ = method(network, query, None)
            assert certificate.side == method.side and certificate.rigor == "verified"
            assert math.isfinite(method.cost(network, query))
            if norm in method.local:
                (local,) = method.on(network, query, [lg.Ball(torch.zeros(network.inputs), 1e-3)])
                assert local.value <= certificate.value * (1 + 1e-9)
        else:
            assert method.cost(network, query) == math.inf
            with pytest.raises(UnsupportedQuery, match=r"Use method='"):
                method(network, query, None)


@pytest.mark.parametrize("name", ["lipsdp-neuron", "lipsdp-layer", "lipsdp-channel"])
def test_a_state_goes_through_a_checkpoint(name, tmp_path):
    net, example = conv() if name == "lipsdp-channel" else (model(), EXAMPLE)
    tracker = lg.Tracker(net, example, method=name)
    tracker.update()
    torch.save(tracker.state_dict(), tmp_path / "state.pt")
    other = lg.Tracker(net, example, method=name)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    upper, lower = other.update(0.0, floor=0.0)
    # The first measurement pulls the multipliers of channels well inside the cone before it goes on from them.
    assert lower <= upper <= tracker.last.upper.value * (1.02 if name == "lipsdp-channel" else 1 + 1e-3)


# --- methods and solvers of another package -------------------------------------------------------------------------------------

GOT: dict[str, object] = {}


@dataclasses.dataclass(frozen=True)
class Doubled:
    """A method that knows nothing of lipguard's base class."""

    solver: str = "auto"
    tol: float = 1e-7
    time_limit: float | None = None
    strength: float = 2.0

    def __call__(self, network, query, state=None):
        GOT.update(solver=self.solver, tol=self.tol, time_limit=self.time_limit, strength=self.strength, state=state)
        return dataclasses.replace(Spectral()(network, query)[0], method="doubled"), (0 if state is None else state) + 1


@dataclasses.dataclass(frozen=True)
class Proposer:
    """A solver that hands on to the package's own and remembers what it was asked."""

    tol: float = 1e-2

    def __call__(self, program, start=None, deadline=math.inf):
        GOT.update(solver_tol=self.tol, deadline=deadline)
        return registry.solver("interior-point").build(tol=self.tol)(program, start, deadline)


def solve(program, *, time_limit=None, gap=1e-6, threads=1):
    GOT.update(mip=(time_limit, gap, threads))
    return registry.solver("highs").load()(program, time_limit=time_limit, gap=gap, threads=threads)


@pytest.fixture
def foreign(monkeypatch):
    module = types.ModuleType("foreign_package")
    for part in (Doubled, Proposer, solve):
        setattr(module, part.__name__, part)
    monkeypatch.setitem(sys.modules, "foreign_package", module)
    monkeypatch.setitem(registry.METHODS, "doubled", registry.Entry("doubled", "foreign_package:Doubled"))
    monkeypatch.setitem(registry.SOLVERS, "mysdp", registry.Entry("mysdp", "foreign_package:Proposer", solves=("sdp",)))
    monkeypatch.setitem(registry.SOLVERS, "mymip", registry.Entry("mymip", "foreign_package:solve", solves=("milp",)))
    GOT.clear()


@pytest.mark.usefixtures("foreign")
def test_a_foreign_method_gets_what_was_asked():
    found = lg.bound(model(), EXAMPLE, method="doubled", solver="scs", tol=1e-3, time_limit=5, strength=3.0)
    assert found.method == "doubled" and GOT == {"solver": "scs", "tol": 1e-3, "time_limit": 5, "strength": 3.0, "state": None}
    with pytest.raises(UnsupportedQuery, match=r"weight=1 has no use.*it takes solver, tol, time_limit, strength"):
        lg.bound(model(), EXAMPLE, method="doubled", weight=1)
    tracker = lg.Tracker(model(), EXAMPLE, method="doubled")
    tracker.update()
    tracker.update()
    assert GOT["state"] == 1  # what the first measurement left


@pytest.mark.usefixtures("foreign")
def test_a_foreign_solver_gets_the_tolerance_and_the_time():
    value = lg.bound(model(), EXAMPLE, solver="mysdp", tol=1e-5, time_limit=60).value
    assert value == pytest.approx(lg.bound(model(), EXAMPLE).value, rel=1e-4)
    assert GOT["solver_tol"] == 1e-5 and math.isfinite(GOT["deadline"])
    with pytest.raises(UnsupportedQuery, match="no chordal form"):
        lg.bound(model(), EXAMPLE, method="lipsdp-neuron", solver="mysdp", chordal=True)


@pytest.mark.usefixtures("foreign")
def test_a_foreign_mixed_integer_solver_is_called():
    pytest.importorskip("highspy")
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    asked = {"domain": lg.Box(-1, 1), "norm": math.inf}
    found = lg.exact(net, torch.zeros(1, 2), method="milp", solver="mymip", threads=2, **asked)
    assert found.solver == "mymip" and GOT["mip"][2] == 2
    assert found.upper == pytest.approx(lg.exact(net, torch.zeros(1, 2), **asked).upper, rel=1e-5)
    with pytest.raises(UnsupportedQuery, match="'mymip' solves MILP, not MIQCQP"):
        lg.exact(net, torch.zeros(1, 2), method="miqcqp", solver="mymip", domain=lg.Box(-1, 1))


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"method": "branch-and-bound", "solver": "highs"}, UnsupportedQuery),
        ({"method": "enumeration", "threads": 2}, UnsupportedQuery),
        ({"method": "branch-and-bound", "region": "closed"}, UnsupportedQuery),
        ({"solver": "nonsense"}, UnknownName), ({"method": "milp", "region": "open"}, UnknownName),
        ({"method": "nonsense"}, UnknownName), ({"gap": -1}, UnsupportedQuery), ({"gap": 1.0}, UnsupportedQuery),
        ({"time_limit": -1}, UnsupportedQuery), ({"time_limit": "10"}, UnsupportedQuery), ({"threads": 0}, UnsupportedQuery),
        ({"method": "milp", "solver": "scs"}, UnsupportedQuery),
    ],
)  # fmt: skip
def test_exact_refuses_what_has_no_use(given, error):
    with pytest.raises(error):
        lg.exact(model(), EXAMPLE, domain=BOX, norm=math.inf, **given)


def test_exact_takes_a_method_object_and_says_what_auto_has_no_use_for():
    from lipguard.exact.methods import BranchAndBound

    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    found = lg.exact(net, torch.zeros(1, 2), domain=lg.Box(-1, 1), method=BranchAndBound(gap=1e-4))
    assert found.status == "closed" and found.rigor == "verified"
    with pytest.raises(UnsupportedQuery, match="states its own options"):
        lg.exact(net, torch.zeros(1, 2), domain=lg.Box(-1, 1), method=BranchAndBound(), gap=1e-4)
    assert "no use for threads=2" in lg.exact(net, torch.zeros(1, 2), domain=lg.Box(-1, 1), threads=2).choice


def test_options_are_checked_where_a_method_is_made():
    with pytest.raises(UnsupportedQuery, match=r"Semidefinite: tol=-1"):
        Semidefinite(tol=-1)
    with pytest.raises(UnsupportedQuery, match="time_limit"):
        check_options({"time_limit": -1}, "here")
