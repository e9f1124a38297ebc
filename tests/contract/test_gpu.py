"""On a GPU every bound runs on the model's device and equals the CPU's within rounding: `pytest -m gpu` where there is one."""

from __future__ import annotations

import math
from collections.abc import Callable

import architectures as made
import pytest
import torch
from lightning.pytorch import Trainer
from test_capture_convolutions import randomised
from test_monitor import Classifier, loader
from torch import nn

import lipguard as lg
from lipguard.bounds.toeplitz import toeplitz_norm
from lipguard.network import Affine, Conv

pytestmark = pytest.mark.gpu

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)), (1, 8)),
    "resnet": (lambda: made.ResNet(1, "B", 2), (1, 3, 8, 8)),
    "unet": (made.UNet, (1, 1, 4, 4)),
    "mlp-mixer": (made.MLPMixer, (1, 1, 8, 8)),
    "siren": (made.Siren, (1, 2)),
    "prelu": (lambda: nn.Sequential(nn.Linear(5, 6), nn.PReLU(6), nn.Linear(6, 6), nn.Hardsigmoid(), nn.Linear(6, 2)), (1, 5)),
}


def on_gpu(name: str) -> tuple[nn.Module, torch.Tensor, lg.Network]:
    """The model and an example on the GPU, and the network captured from its twin on the CPU."""
    build, shape = MODELS[name]
    torch.manual_seed(0)
    model, example = randomised(build()), torch.zeros(shape, dtype=torch.float64)
    network = lg.capture(model, example)
    return model.cuda(), example.cuda(), network


@pytest.mark.parametrize("name", MODELS)
def test_capture(name: str) -> None:
    model, example, network = on_gpu(name)
    captured = lg.capture(model, example)
    assert captured.device.type == "cuda"
    # BatchNorm is folded on the model's device: square roots and quotients are rounded correctly on both
    assert captured.digest == network.digest
    x = torch.randn(4, network.inputs, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = captured(x.cuda())
    assert y.is_cuda
    torch.testing.assert_close(y.cpu(), network(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["spectral", "toeplitz", "lipsdp-neuron", "lipsdp-layer"])
def test_upper_bounds_and_their_verification(name: str, method: str) -> None:
    model, example, network = on_gpu(name)
    ours, theirs = lg.bound(model, example, method=method), lg.bound(network, method=method)
    # the solver's gap of the squared bound, 1e-7, on both sides; the products of norms agree to the proofs' inflations
    assert ours.rigor == "verified" and ours.value == pytest.approx(theirs.value, rel=1e-6)
    captured = lg.capture(model, example)
    # evidence from either device proves the bound on the other
    assert lg.verify(captured, theirs).value == pytest.approx(theirs.value, rel=1e-6)
    assert lg.verify(network, ours).value == pytest.approx(ours.value, rel=1e-6)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("norm", [1, 2, math.inf])
def test_lower_bounds(name: str, norm: float) -> None:
    model, example, network = on_gpu(name)
    for domain in (None, lg.Box(-1.0, 1.0), lg.Ball(0.0, 1.0)):
        lower = lg.bound(model, example, method="sampling", norm=norm, domain=domain)
        # an ascent may part at a kink: not the value, but what it proves is the same on both devices
        assert lg.verify(network, lower).value == pytest.approx(lower.value, rel=1e-9)
        assert 0 <= lower.value <= lg.bound(network, method="spectral", norm=norm).value


def test_exact() -> None:
    model, example, _ = on_gpu("prelu")
    relu = nn.Sequential(model[0], nn.ReLU(), model[2], nn.ReLU(), model[4])
    enclosure = lg.exact(relu, example, domain=lg.Box(-1.0, 1.0), time_limit=30)
    same = lg.exact(relu.cpu(), example.cpu(), domain=lg.Box(-1.0, 1.0), time_limit=30)
    assert enclosure.lower <= same.upper and same.lower <= enclosure.upper
    assert enclosure.upper == pytest.approx(same.upper, rel=1e-3)


def test_tracker() -> None:
    model, example, network = on_gpu("mlp")
    tracker = lg.Tracker(model, example)
    for _ in range(3):
        upper, lower = tracker.update(0.5)
        assert lower <= upper
    state = tracker.state_dict()
    assert all(not value.is_cuda for value in state.values() if isinstance(value, torch.Tensor))
    resumed = lg.Tracker(model, example)
    resumed.load_state_dict(state)
    assert resumed.update(0.5)[0] == pytest.approx(lg.bound(network).value, rel=1e-3)


def test_monitor(tmp_path) -> None:
    monitor = lg.LipschitzMonitor(on_failure="raise")
    trainer = Trainer(max_epochs=2, accelerator="gpu", devices=1, callbacks=[monitor], default_root_dir=tmp_path, logger=False,
        enable_checkpointing=False, enable_progress_bar=False)  # fmt: skip
    trainer.fit(Classifier(), loader())
    assert monitor.last is not None and monitor.last.network.device.type == "cuda"
    assert 0 < float(trainer.callback_metrics["lipschitz/lower"]) <= float(trainer.callback_metrics["lipschitz/upper"])


def test_the_plain_toeplitz_formula_and_its_gradient() -> None:
    model, example, _ = on_gpu("resnet")
    for node in lg.capture(model, example, live=True).nodes:
        if isinstance(node, Affine) and isinstance(node.operator, Conv) and node.operator.weight.requires_grad:
            value = toeplitz_norm(node.operator)
            value.backward(retain_graph=True)
            assert value.is_cuda
    assert all(p.grad is not None and p.grad.is_cuda for n, p in model.named_parameters() if "conv" in n and n.endswith("weight"))
