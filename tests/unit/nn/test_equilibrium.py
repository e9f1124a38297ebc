"""Equilibrium layers: modules, implicit nodes, their bounds, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import math

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import nn

import lipguard as lg
from lipguard.audit.encoding import certificate_from_json, certificate_json
from lipguard.audit.recipe import captured, rebuild
from lipguard.bounds.sampling import Sampling
from lipguard.certificate import Magnitudes, Multipliers, Query
from lipguard.errors import InvalidExample, InvalidModel, NotCertified, NotConverged, SlowConvergence, UnsupportedQuery
from lipguard.network import Activation, Affine, Dense, Implicit, Input, Network, activations, smooth
from lipguard.nn import ContractiveEquilibrium, LipschitzEquilibrium
from lipguard.programs.feedback import feedback_of
from lipguard.programs.rewriting import slope_restricted
from lipguard.solvers.threads import one_thread

INF = math.inf
F64 = torch.float64
MODULES = {
    "lipschitz": lambda **kw: LipschitzEquilibrium(4, 6, 3, **kw),
    "lipschitz, unbounded": lambda **kw: LipschitzEquilibrium(4, 6, 3, None, alpha=0.7, **kw),
    "lipschitz, leaky": lambda **kw: LipschitzEquilibrium(4, 6, 3, 2.0, activation="leaky_relu", negative_slope=0.2, **kw),
    "lipschitz, tanh": lambda **kw: LipschitzEquilibrium(4, 6, 3, 0.5, activation="tanh", **kw),
    "contractive": lambda **kw: ContractiveEquilibrium(4, 6, 3, **kw),
    "contractive, tanh": lambda **kw: ContractiveEquilibrium(4, 6, 3, -0.5, activation="tanh", **kw),
}


def matrix(*rows):
    return torch.tensor(rows, dtype=F64)


def implicit(w, u, c, function=None, bias=None):
    """x -> c z, z = function(w z + u x + bias)."""
    w, u, c = (m if isinstance(m, torch.Tensor) else matrix(*m) for m in (w, u, c))
    function = activations.relu() if function is None else function
    nodes = (Input(u.shape[1]), Affine(0, Dense(u), bias), Implicit(1, Dense(w), function, "layer"), Affine(2, Dense(c)))
    return Network(nodes)


def random_lipschitz(seed):
    torch.manual_seed(seed)
    n, d, m = (int(torch.randint(1, high, ())) for high in (40, 20, 10))
    gamma = [0.1, 0.5, 1.0, 5.0, None][seed % 5]
    kind = ["relu", "relu", "leaky_relu", "tanh"][seed % 4]
    dtype = [F64, torch.float32][seed % 2]
    net = LipschitzEquilibrium(d, n, m, gamma, margin=[0.01, 0.1, 1.0][seed % 3], activation=kind, dtype=dtype)
    with torch.no_grad():
        for p in (net.bias, net.log_psi):
            p.normal_()
        for p in (net.factor, net.skew, net.inward, net.outward):
            p *= 10 ** (torch.rand(()) - 0.5)
    return net.eval()


def random_contractive(seed):
    torch.manual_seed(seed)
    n, d, m = (int(torch.randint(1, high, ())) for high in (40, 20, 10))
    kind = ["relu", "relu", "leaky_relu", "tanh"][seed % 4]
    dtype = [F64, torch.float32][seed % 2]
    net = ContractiveEquilibrium(d, n, m, [-2.0, 0.0, 0.5, 0.9, 0.99][seed % 5], activation=kind, dtype=dtype)
    with torch.no_grad():
        for p in (net.bias, net.log_eta):
            p.normal_()
        for p in (net.coupling, net.inward, net.outward):
            p *= 10 ** (torch.rand(()) - 0.5)
        net.coupling *= 3
    return net.eval()


def captured_of(module):
    dtype = module.inward.dtype
    return lg.capture(module, torch.zeros(1, module.inputs, dtype=dtype))


def residual(network, x):
    values = network.values(x)
    node = network.nodes[2]
    return float((values[2] - node.function(node.operator(values[2]) + values[1])).abs().max())


def sampled(network, norm=2, starts=8, steps=12):
    with one_thread():
        query = Query((float(norm), float(norm)))
        return Sampling(starts=starts, steps=steps)(network, query)[0].value


# Modules


@pytest.mark.parametrize("name", MODULES)
def test_gradients_are_those_of_the_equilibrium(name):
    torch.manual_seed(1)
    module = MODULES[name](dtype=F64)
    names, values = zip(*module.named_parameters(), strict=True)
    x = torch.randn(3, 4, dtype=F64, requires_grad=True)

    def run(x, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *values), fast_mode=True)
    assert torch.autograd.gradcheck(module, (x[:1],))


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_ordinary(name):
    torch.manual_seed(2)
    module = MODULES[name]()
    x = torch.randn(5, 4)
    y = module(x)
    twin = copy.deepcopy(module)
    other = MODULES[name]()
    other.load_state_dict(module.state_dict())
    assert torch.equal(twin(x), y) and torch.equal(other(x), y)
    assert module(x.reshape(5, 1, 4)).shape == (5, 1, 3) and module(x[0]).shape == (3,) and module(x[:0]).shape == (0, 3)
    assert torch.allclose(module.double()(x.double()), y.double(), atol=1e-4)
    assert module.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_a_batch_is_solved_sample_by_sample():
    torch.manual_seed(3)
    module = LipschitzEquilibrium(4, 20, 3, dtype=F64).eval()
    x = torch.randn(7, 4, dtype=F64) * torch.logspace(-4, 4, 7, dtype=F64)[:, None]
    alone = torch.cat([module(row[None]) for row in x])
    assert torch.allclose(module(x), alone, rtol=1e-9, atol=0)


def test_compiled_surroundings_and_autocast():
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), LipschitzEquilibrium(4, 6, 4), ContractiveEquilibrium(4, 5, 3))
    x = torch.randn(6, 4)
    y = model(x)
    y.sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    fast = torch.compile(model, backend="eager")
    fast(x).sum().backward()
    assert torch.allclose(fast(x), y, atol=1e-6)
    assert all(torch.allclose(p.grad, g, atol=1e-5) for p, g in zip(model.parameters(), gradients, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(model(x).float(), y, atol=5e-2)
        model(x).sum().backward()


def test_a_layer_used_twice_trains_in_single_precision():
    torch.manual_seed(5)
    layer, head = LipschitzEquilibrium(4, 12, 4, gamma=3.0), nn.Linear(4, 1)
    x = torch.randn(64, 4)
    y = x[:, :1].abs() - x[:, 1:2]
    optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(head(layer(layer(x))), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]
    assert layer.residual < 1e-5
    assert float(torch.linalg.eigvalsh(layer.certificate_matrix().detach())[0]) > 0


def test_weight_has_the_published_form():
    # arXiv:2010.01732, equation (20), with Lambda = Psi^-1, written term by term.
    torch.manual_seed(6)
    m = LipschitzEquilibrium(3, 4, 2, gamma=0.7, margin=0.3, dtype=F64)
    with torch.no_grad():
        m.log_psi.normal_()
        psi, inverse = torch.diag(m.log_psi.exp()), torch.diag((-m.log_psi).exp())
        g, u, v, s = m.outward, m.inward, m.factor, m.skew
        eye = torch.eye(4, dtype=F64)
        inner = g.T @ g / 1.4 + inverse @ u @ u.T @ inverse / 1.4 + v.T @ v + 0.3 * eye + s.T - s
        assert torch.allclose(m.weight(), eye - psi @ inner, rtol=1e-12, atol=1e-12)
        # The certificate is twice V'V + m I.
        assert torch.allclose(m.certificate_matrix(), 2 * (v.T @ v + 0.3 * eye), rtol=1e-9, atol=1e-9)


def test_contractive_measure_is_at_most_its_parameter():
    torch.manual_seed(7)
    m = ContractiveEquilibrium(3, 8, 2, measure=0.4, dtype=F64)
    with torch.no_grad():
        m.log_eta.normal_()
        m.coupling.normal_()
        a, eta = m.weight(), m.log_eta.exp()
        scaled = eta[:, None] * a / eta
        off = scaled - torch.diag(scaled.diagonal())
        measure = (scaled.diagonal() + off.abs().sum(1)).max()
    assert float(measure) <= 0.4 + 1e-12


def test_residual_is_said_where_the_iteration_ends_too_early():
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    for make in (LipschitzEquilibrium, ContractiveEquilibrium):
        torch.manual_seed(8)
        module = make(4, 30, 3, max_iterations=2)
        with pytest.warns(SlowConvergence, match=r"relative residual is 0?\.?\d.* after 2 iterations.*max_iterations"):
            module(x)
        assert module.residual > 1e-4
        with pytest.raises(NotConverged, match=r"relative residual is .* after 2 iterations"):
            module.eval()(x)


def test_bad_arguments_are_refused():
    for make, text in (
        (lambda: LipschitzEquilibrium(0, 3, 2), "every size must be at least 1"),
        (lambda: LipschitzEquilibrium(2, 3, 2, gamma=-1.0), "gamma=-1.0"),
        (lambda: LipschitzEquilibrium(2, 3, 2, margin=0.0), "margin=0.0"),
        (lambda: LipschitzEquilibrium(2, 3, 2, activation="gelu"), "relu, leaky_relu, tanh"),
        (lambda: LipschitzEquilibrium(2, 3, 2, activation="tanh", alpha=2.0), "alpha = 1 only"),
        (lambda: LipschitzEquilibrium(2, 3, 2, activation="leaky_relu", negative_slope=-0.1), "slopes from 0 to 1"),
        (lambda: ContractiveEquilibrium(2, 3, 2, measure=1.0), "below 1"),
        (lambda: ContractiveEquilibrium(2, 3, 2, max_iterations=0), "at least one iteration"),
    ):
        with pytest.raises(InvalidModel, match=text):
            make()
    with pytest.raises(InvalidExample, match="takes 2 features"):
        LipschitzEquilibrium(2, 3, 2)(torch.zeros(1, 3))


# Implicit nodes


def test_a_nilpotent_weight_is_a_feed_forward_network():
    # z_1 = phi(U_1 x), z_2 = phi(V z_1 + U_2 x): an implicit layer with a strictly lower triangular weight.
    torch.manual_seed(9)
    u1, u2, v, c = (torch.randn(5, 3, dtype=F64), torch.zeros(4, 3, dtype=F64), torch.randn(4, 5, dtype=F64), None)
    c = torch.randn(2, 4, dtype=F64)
    for function in (activations.relu(), activations.leaky_relu(0.3), smooth.gelu()):
        plain = Network(
            (
                Input(3),
                Affine(0, Dense(u1)),
                Activation(1, function),
                Affine(2, Dense(v)),
                Activation(3, function),
                Affine(4, Dense(c)),
            )
        )
        w = torch.zeros(9, 9, dtype=F64)
        w[5:, :5] = v
        net = implicit(w, torch.cat([u1, u2]), torch.cat([torch.zeros(2, 5, dtype=F64), c], 1), function)
        x = torch.randn(6, 3, dtype=F64)
        assert torch.allclose(net(x), plain(x), rtol=1e-12, atol=1e-13)
        # The same program, hence the same optimum; both within a gap of 1e-7 of its square.
        for norm in (2, INF, 1):
            a, b = (lg.bound(n, method="lipsdp-neuron", norm=norm).value for n in (net, plain))
            assert a == pytest.approx(b, rel=2e-6)
        # Absolute values multiply out exactly.
        magnitude = [lg.bound(n, method="contraction", norm=INF).value for n in (net, plain)]
        assert magnitude[0] == pytest.approx(magnitude[1], rel=1e-7)


@pytest.mark.parametrize("w", [-3.0, -0.5, 0.0, 0.5, 0.9])
def test_one_neuron_has_a_formula(w):
    # y = 2 phi(w y / 2 + 3 x): slope 6 / (1 - w) where the neuron is active.
    net = implicit([[w]], [[3.0]], [[2.0]])
    constant = 6 / (1 - w)
    assert lg.bound(net).value == pytest.approx(constant, rel=1e-6)
    for norm in (1, INF):
        for method in ("contraction", "lipsdp-neuron"):
            assert lg.bound(net, norm=norm, method=method).value == pytest.approx(constant, rel=1e-6)
    lower = lg.bound(net, method="sampling")
    assert lower.value == pytest.approx(constant, rel=1e-12) and lower.value <= constant * (1 + 1e-15)
    assert lg.bound(net, method="spectral").value >= constant


def test_values_and_derivatives_of_general_activations():
    # Slopes outside [0, 1] go through the change of variables; values are checked in their own equation.
    torch.manual_seed(10)
    w = 0.35 * torch.randn(6, 6, dtype=F64) / math.sqrt(6)
    for function in (smooth.gelu(), activations.absolute(), activations.leaky_relu(-0.4), smooth.tanh()):
        net = implicit(w, torch.randn(6, 3, dtype=F64), torch.randn(2, 6, dtype=F64), function, torch.randn(6, dtype=F64))
        x = torch.randn(20, 3, dtype=F64)
        assert residual(net, x) < 1e-12
        if function.name != "abs":
            assert torch.autograd.gradcheck(net, x[:3].clone().requires_grad_())
        assert sampled(net) <= lg.bound(net).value <= lg.bound(net, method="spectral").value * (1 + 1e-6)
        for norm in (1, INF):
            lower, upper = sampled(net, norm), lg.bound(net, norm=norm, method="lipsdp-neuron")
            assert lower <= upper.value <= lg.bound(net, norm=norm, method="contraction").value * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_bounds_cover_every_slope_pattern(seed):
    # Each D in {0, 1}^n, reached by some input or not, has the Jacobian C (I - D W)^-1 D U; all bounds hold for all of them.
    torch.manual_seed(seed)
    make = (LipschitzEquilibrium, ContractiveEquilibrium)[seed % 2]
    module = make(3, 6, 2, dtype=F64)
    w, u, _, c, _ = (m.detach() for m in module.matrices())
    patterns = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=F64)] * 6)
    jacobians = c @ torch.linalg.solve(torch.eye(6, dtype=F64) - patterns[:, :, None] * w, patterns[:, :, None] * u)
    net = captured_of(module)
    for p in (1, 2, INF):
        largest = float(torch.linalg.matrix_norm(jacobians, p).max())
        for method in ("lipsdp-neuron", "lipsdp-layer", "spectral"):
            assert largest <= lg.bound(net, norm=p, method=method).value
        assert sampled(net, p) <= largest * (1 + 1e-12)


@pytest.mark.parametrize("function", [activations.relu(), activations.leaky_relu(0.3), smooth.gelu()])
def test_program_with_a_diagonal_block_meets_clarabel(function):
    # rho E + sum_j t_j [(e - alpha q)(e - beta q)' + transpose] - C'C >= 0 from the dense matrices, two layers, one implicit.
    torch.manual_seed(15)
    w = 0.4 * torch.randn(5, 5, dtype=F64)
    net = implicit(w, torch.randn(5, 3, dtype=F64), torch.randn(4, 5, dtype=F64), function)
    net = Network((*net.nodes, Activation(3, activations.relu()), Affine(4, Dense(torch.randn(2, 4, dtype=F64)))))
    fb = feedback_of(net)
    a, b, c, d = (m.numpy() for m in fb.dense())
    assert abs(b[:5, :5]).max() > 0
    n, inputs = a.shape
    q, e, y = np.hstack([b, a]), np.hstack([np.eye(n), np.zeros((n, inputs))]), np.hstack([c, d])
    t, rho = cp.Variable(n, nonneg=True), cp.Variable()
    half = (e - fb.alpha.numpy()[:, None] * q).T @ cp.diag(t) @ (e - fb.beta.numpy()[:, None] * q)
    z = rho * np.diag([0.0] * n + [1.0] * inputs) + half + half.T - y.T @ y
    problem = cp.Problem(cp.Minimize(rho), [z >> 0])
    problem.solve(solver="CLARABEL")
    for solver in ("interior-point", "first-order", "clarabel"):
        found = lg.bound(net, solver=solver)
        assert found.method == "lipsdp-neuron"
        assert found.value == pytest.approx(math.sqrt(problem.value), rel=1e-5 if solver != "first-order" else 1e-3)


def test_live_weights_carry_gradients():
    torch.manual_seed(16)
    model = nn.Sequential(LipschitzEquilibrium(3, 6, 2, dtype=F64), nn.Tanh(), ContractiveEquilibrium(2, 4, 2, dtype=F64))
    x = torch.randn(5, 3, dtype=F64)
    lg.capture(model, x, live=True)(x).pow(2).sum().backward()
    through_network = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).pow(2).sum().backward()
    for p, g in zip(model.parameters(), through_network, strict=True):
        assert torch.allclose(p.grad, g, rtol=1e-7, atol=1e-9)


def test_an_equilibrium_inside_a_network():
    torch.manual_seed(11)

    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = LipschitzEquilibrium(3, 8, 4), ContractiveEquilibrium(4, 7, 4, activation="tanh")
            self.norm, self.last = nn.BatchNorm1d(4), nn.Linear(4, 2)

        def forward(self, x):
            h = torch.relu(self.norm(self.first(x)))
            return self.last(h + 0.5 * self.second(h))

    model = Skip()
    net = lg.capture(model, torch.zeros(1, 3))
    x = torch.randn(9, 3)
    assert torch.allclose(net(x), model.eval()(x).double(), atol=1e-5)
    assert slope_restricted(net).neurons == 8 + 4 + 7
    upper, lower = lg.bound(net), sampled(net)
    assert upper.method == "lipsdp-neuron" and lower <= upper.value < lg.bound(net, method="spectral").value
    assert lg.bound(net, method="lipsdp-layer").value >= upper.value * (1 - 1e-6)
    tracker = lg.Tracker(model, torch.zeros(1, 3))
    assert tracker.update()[0] == pytest.approx(upper.value, rel=1e-4) and tracker.last.lower.value <= tracker.last.upper.value


def test_digest_and_recipe_of_an_implicit_network():
    net = implicit([[0.5]], [[3.0]], [[2.0]])
    others = (implicit([[0.25]], [[3.0]], [[2.0]]), implicit([[0.5]], [[3.0]], [[2.0]], smooth.tanh()))
    assert len({n.digest for n in (net, *others)}) == 3
    assert implicit([[0.5]], [[3.0]], [[2.0]]).digest == net.digest
    module = LipschitzEquilibrium(3, 5, 2)
    network, recipe = captured(module, torch.zeros(1, 3))
    assert rebuild(recipe, module.state_dict()).digest == network.digest


def test_a_module_of_ones_own_registers_itself():
    class Own(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.w, self.u = nn.Parameter(scale * torch.eye(3, dtype=F64)), nn.Parameter(torch.eye(3, dtype=F64))

        def forward(self, x):
            z = torch.zeros_like(x)
            for _ in range(200):
                z = torch.relu(z @ self.w.T + x @ self.u.T)
            return z

    @lg.lowers(Own)
    def lower(trace, module, x):
        v = trace.value(trace.affine(x, Dense(trace.constant(module.u, "u"))), x.tensor)
        return trace.implicit(v, Dense(trace.constant(module.w, "w")), activations.relu())

    assert lg.bound(Own(0.5), torch.zeros(1, 3, dtype=F64)).value == pytest.approx(2.0, rel=1e-6)
    # z = relu(1.5 z + x) has no solution for x > 0.
    with pytest.raises(InvalidModel, match=r"model: z = phi\(W z \+ v\) is not known to be well posed.*at most -"):
        lg.bound(Own(1.5), torch.zeros(1, 3, dtype=F64))


# Bounds


def check_lipschitz(seed):
    module = random_lipschitz(seed)
    net = captured_of(module)
    assert float(torch.linalg.eigvalsh(module.certificate_matrix().detach())[0]) > 0
    x = 3 * torch.randn(20, net.inputs, dtype=F64)
    assert residual(net, x) < 1e-6
    upper = lg.bound(net)
    assert (upper.rigor, upper.method) == ("verified", "lipsdp-neuron")
    assert sampled(net) <= upper.value
    assert module.gamma is None or upper.value <= module.gamma * (1 + 1e-6)


def check_contractive(seed):
    module = random_contractive(seed)
    net = captured_of(module)
    formula = float(module.lipschitz_bound().detach())
    single = module.inward.dtype == torch.float32
    bound = {p: lg.bound(net, norm=p, method="contraction").value for p in (1, INF)}
    assert bound[INF] <= formula * (1 + (1e-5 if single else 1e-9))  # the formula is evaluated in the module's type
    for p, value in bound.items():
        sharper = lg.bound(net, norm=p, method="lipsdp-neuron")
        assert sharper.rigor == "verified"
        assert sampled(net, p) <= sharper.value <= value
    # From ten starts the averaged iteration ends in the one fixed point.
    node, w = net.nodes[2], net.nodes[2].operator.weight
    v = net.values(torch.randn(1, net.inputs, dtype=F64))[1]
    z = 10 * torch.randn(10, len(w), dtype=F64)
    step = 1 / (1 - min(0.0, float(w.diagonal().min())))
    for _ in range(60000):
        change = step * (node.function(z @ w.T + v) - z)
        z = z + change
        if float(change.abs().max()) < 1e-14:
            break
    assert float((z - node.value(v)).abs().max()) < 1e-8 * (1 + float(z.abs().max()))


@pytest.mark.parametrize("seed", range(12))
def test_lipschitz_equilibria_stay_below_gamma(seed):
    check_lipschitz(seed)


@pytest.mark.parametrize("seed", range(10))
def test_contractive_equilibria_stay_below_their_bound(seed):
    check_contractive(seed)


@pytest.mark.slow
def test_two_hundred_lipschitz_equilibria():
    for seed in range(1000, 1200):
        check_lipschitz(seed)


@pytest.mark.slow
def test_two_hundred_contractive_equilibria():
    for seed in range(1000, 1200):
        check_contractive(seed)


@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0, 5.0])
def test_trained_equilibria_stay_below_gamma(gamma):
    torch.manual_seed(12)
    x = torch.randn(128, 6)
    y = (x[:, 0] * x[:, 1] > 0).long() + 2 * (x[:, 2] > 0.5).long()
    module = LipschitzEquilibrium(6, 20, 4, gamma)
    optimizer = torch.optim.Adam(module.parameters(), lr=2e-2)
    for _ in range(80):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x), y).backward()
        optimizer.step()
    module.eval()
    net = captured_of(module)
    assert float(torch.linalg.eigvalsh(module.certificate_matrix().detach())[0]) > 0
    assert residual(net, x.double()) < 1e-6
    lower, upper = sampled(net), lg.bound(net)
    assert upper.method == "lipsdp-neuron" and upper.rigor == "verified"
    assert 0.5 * gamma < lower <= upper.value <= gamma * (1 + 1e-6)


@pytest.mark.parametrize("name", MODULES)
def test_evidence_survives_its_record(name):
    torch.manual_seed(13)
    net = captured_of(MODULES[name]())
    for norm, method in ((2, "lipsdp-neuron"), (2, "sampling"), (INF, "spectral"), (INF, "lipsdp-neuron"), (1, "lipsdp-neuron")):
        certificate = lg.bound(net, norm=norm, method=method)
        again = certificate_from_json(certificate_json(certificate))
        assert lg.verify(net, again).value == certificate.value


def test_corrupted_evidence_is_refused():
    torch.manual_seed(14)
    net = captured_of(ContractiveEquilibrium(4, 6, 3, dtype=F64))
    for norm in (1, INF):
        certificate = lg.bound(net, norm=norm, method="contraction")
        y = certificate.evidence.vectors[2]
        for i in range(len(y)):
            smaller = y.clone()
            smaller[i] *= 0.9
            with pytest.raises(NotCertified, match="does not provably contract"):
                lg.verify(net, dataclasses.replace(certificate, evidence=Magnitudes({2: smaller})))
        for bad in (-y, y * math.nan, y[1:]):
            with pytest.raises(NotCertified, match="no positive weights"):
                lg.verify(net, dataclasses.replace(certificate, evidence=Magnitudes({2: bad})))
        with pytest.raises(NotCertified, match="no vector is given"):
            lg.verify(net, dataclasses.replace(certificate, evidence=Magnitudes({})))
        with pytest.raises(NotCertified, match="inf-norm or to the 1-norm"):
            lg.verify(net, dataclasses.replace(certificate, norm=(2.0, 2.0)))
    certificate = lg.bound(net)
    t, rho = certificate.evidence.t, certificate.evidence.rho
    for evidence in (Multipliers(t, 0.5 * rho), Multipliers(0.3 * t, rho), Multipliers(-t, rho), Multipliers(t[1:], rho)):
        with pytest.raises(NotCertified):
            lg.verify(net, dataclasses.replace(certificate, evidence=evidence))


@pytest.mark.parametrize("w", [1.0, 1.5, 4.0])
def test_what_is_not_well_posed_has_no_certificate(w):
    # z = relu(w z + v) with w >= 1 has no or several solutions; W = [[0, 4], [-4, 2]] has, whatever T, a negative diagonal.
    good, bad = implicit([[0.5]], [[1.0]], [[1.0]]), implicit([[w]], [[1.0]], [[1.0]])
    for method, norm in (("lipsdp-neuron", 2), ("contraction", INF), ("contraction", 1), ("spectral", 2), ("sampling", 2)):
        certificate = dataclasses.replace(lg.bound(good, method=method, norm=norm), digest=bad.digest)
        with pytest.raises(NotCertified):
            lg.verify(bad, certificate)
        with pytest.raises((InvalidModel, NotCertified), match=r"well posed|contract"):
            lg.bound(bad, method=method, norm=norm)
    for scale in (1e-6, 1.0, 1e6):
        for rho in (1e-6, 1.0, 1e9):
            proposed = dataclasses.replace(lg.bound(good), digest=bad.digest, evidence=Multipliers(scale * matrix([1.0])[0], rho))
            with pytest.raises(NotCertified):
                lg.verify(bad, proposed)


@pytest.mark.parametrize("w", [-3.0, -0.5, 0.5, 0.9])
def test_no_evidence_proves_less_than_the_truth(w):
    # y = relu(2 z), z = relu(w z + 3 x): constant 6 / (1 - w), alone, doubled by a second implicit layer, and beside a skip.
    single = implicit([[w]], [[3.0]], [[2.0]])
    deeper = Network((*single.nodes, Activation(3, activations.relu())))
    twice = Network((*deeper.nodes, Implicit(4, Dense(matrix([0.5])), activations.leaky_relu(0.1), "second")))
    constant = 6 / (1 - w)
    generator = torch.Generator().manual_seed(0)
    for net, truth in ((single, constant), (deeper, constant), (twice, 2 * constant)):
        proved = lg.bound(net)
        assert proved.value == pytest.approx(truth, rel=1e-5) and proved.value >= truth * (1 - 1e-15)
        for share in (0.1, 0.7, 0.99):
            for _ in range(20):
                t = proved.evidence.t * 10 ** (4 * torch.rand(slope_restricted(net).neurons, dtype=F64, generator=generator) - 2)
                claim = dataclasses.replace(proved, evidence=Multipliers(t, share * truth**2))
                try:
                    assert lg.verify(net, claim).value >= truth * (1 - 1e-15)
                except NotCertified:
                    continue


def test_well_posedness_by_a_scaling_that_is_not_the_identity():
    # T = I fails for this weight (its symmetric part has an eigenvalue above 1), T = diag(1, 100) does.
    net = implicit([[0.0, 0.0], [30.0, 0.0]], [[1.0], [0.0]], [[0.0, 1.0]])
    assert lg.bound(net).value == pytest.approx(30.0, rel=1e-6)
    # Nearly not well posed: the margin decides, and the bound grows as it should.
    near = implicit([[1 - 1e-6]], [[1.0]], [[1.0]])
    assert lg.bound(near).value == pytest.approx(1e6, rel=1e-5)


def test_queries_without_an_answer():
    net = implicit([[0.5]], [[1.0]], [[1.0]])
    with pytest.raises(UnsupportedQuery, match="implicit layer: the exact methods take feed-forward networks only"):
        lg.exact(net)
    with pytest.raises(UnsupportedQuery, match="contraction has no bound for the norms"):
        lg.bound(net, method="contraction", norm=2)
    # Well posed in the 2-norm, but it contracts in no maximum norm: rotations are long there.
    turning = implicit([[0.0, 3.0], [-3.0, 0.0]], [[1.0], [0.0]], [[1.0, 0.0]])
    assert lg.bound(turning).value <= 1 + 1e-6
    with pytest.raises(NotCertified, match="contract"):
        lg.bound(turning, method="contraction", norm=INF)
