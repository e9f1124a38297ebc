"""Architectures as people write them: capture equals the module, bounds enclose the constant, refusals explain themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import architectures as made
import pytest
import torch
from test_capture_convolutions import randomised
from torch import Tensor, nn

import lipguard as lg
from lipguard import errors
from lipguard.audit.recipe import captured, rebuild
from lipguard.bounds.sampling import Sampling
from lipguard.certificate import Query
from lipguard.programs.rewriting import slope_restricted

Case = tuple[Callable[[], nn.Module], tuple[int, ...], Any]

CASES: dict[str, Case] = {
    "lenet": (lambda: made.LeNet("avg"), (1, 1, 28, 28), None),
    "vgg-bn": (made.VGG, (1, 3, 32, 32), None),
    "resnet-8-A": (lambda: made.ResNet(1, "A", 4), (1, 3, 32, 32), None),
    "resnet-8-B": (lambda: made.ResNet(1, "B", 2), (1, 3, 8, 8), None),
    "resnet-20": (lambda: made.ResNet(3, "A", 16), (1, 3, 32, 32), None),
    "densenet": (lambda: made.DenseNet(1, (2, 1), 2), (1, 1, 4, 4), None),
    "mlp-mixer": (made.MLPMixer, (1, 1, 8, 8), None),
    "temporal": (made.TCN, (1, 8, 2), None),
    "unet": (made.UNet, (1, 1, 6, 6), None),
    "actor-critic tuple": (made.ActorCritic, (1, 8), 0),
    "actor-critic value": (lambda: made.ActorCritic("named"), (1, 8), "value"),
    "actor-critic dict": (lambda: made.ActorCritic("dict"), (1, 8), ("policy.logits", (0, 1))),
    "deeponet at fixed places": (made.DeepONetAt, (1, 10), None),
    "siamese": (made.Siamese, (1, 2, 8, 8), None),
    "siren": (made.Siren, (1, 2), None),
    "wgan critic": (made.Critic, (1, 3, 16, 16), None),
    "shufflenet": (made.ShuffleNet, (1, 1, 8, 8), None),
    "super-resolution": (made.SuperResolution, (1, 1, 5, 5), None),
    "unrolled rnn": (made.UnrolledRNN, (1, 5, 2), None),
}
SOLVED = 700
"""Neurons and inputs up to which the dense program is solved here: about a second."""


def chosen(module: nn.Module, x: Tensor, outputs: Any) -> Tensor:
    """The output meant, computed by the module itself."""
    y = module(x)
    if isinstance(outputs, tuple):
        path, (i, j) = outputs
        for name in path.split("."):
            y = y[name]
        return (y[:, i] - y[:, j])[:, None]
    if outputs is not None:
        y = getattr(y, outputs) if isinstance(outputs, str) else y[outputs]
    return y.reshape(len(x), -1)


@pytest.mark.parametrize("name", CASES)
def test_captured_and_bounded(name: str) -> None:
    build, shape, outputs = CASES[name]
    torch.manual_seed(0)
    model = randomised(build())
    network = lg.capture(model, torch.zeros(shape, dtype=torch.float64), outputs=outputs)
    x = torch.randn(3, *shape[1:], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        expected = chosen(model, x.clone(), outputs)
    # sums of some hundred products a layer, in float64, through some ten layers
    torch.testing.assert_close(network(x.flatten(1)), expected, rtol=1e-10, atol=1e-10)
    lower, _ = Sampling(starts=4, steps=4)(network, Query())
    product = lg.bound(network, method="spectral")
    assert (lower.rigor, product.rigor) == ("verified", "verified")
    assert 0 <= lower.value <= product.value < math.inf
    if slope_restricted(network).neurons + network.inputs <= SOLVED:
        neuron = lg.bound(network, method="lipsdp-neuron")
        assert neuron.rigor == "verified" and 0 < lower.value <= neuron.value <= product.value * (1 + 1e-6)


@pytest.mark.parametrize("name", ["unet", "siren", "mlp-mixer", "densenet", "unrolled rnn"])
def test_records_rebuild_them(name: str) -> None:
    build, shape, outputs = CASES[name]
    torch.manual_seed(0)
    model = randomised(build())
    network, recipe = captured(model, torch.zeros(shape, dtype=torch.float64), outputs=outputs)
    assert rebuild(recipe, model.state_dict()).digest == network.digest


MAX_POOLED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "lenet": (lambda: made.LeNet("max"), (1, 1, 28, 28)),
    "vgg": (lambda: made.VGG((4, "M", 8, "M", 8, 8, "M", 8, "M")), (1, 3, 32, 32)),
}


@pytest.mark.parametrize("name", MAX_POOLED)
def test_max_pools(name: str) -> None:
    build, shape = MAX_POOLED[name]
    model = randomised(build())
    network = lg.capture(model, torch.zeros(shape, dtype=torch.float64))
    x = torch.randn(3, *shape[1:], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(network(x.flatten(1)), model(x), rtol=1e-10, atol=1e-10)
    lower, _ = Sampling(starts=4, steps=4)(network, Query())
    assert 0 <= lower.value <= lg.bound(network, method="spectral").value


def test_an_output_is_chosen_by_place_key_or_name() -> None:
    example = torch.zeros(1, 8)
    model = made.ActorCritic("tuple").eval()
    by_place = lg.capture(model, example, outputs=0)
    assert by_place.outputs == 4 and lg.capture(model, example, outputs=1).outputs == 1
    model.returns = "named"
    assert lg.capture(model, example, outputs="logits").digest == by_place.digest
    model.returns = "dict"
    assert lg.capture(model, example, outputs="policy.logits").digest == by_place.digest
    difference = lg.capture(model, example, outputs=("policy.logits", (2, 0)))
    x = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(difference(x)[:, 0], by_place(x)[:, 2] - by_place(x)[:, 0])
    assert lg.bound(model, example, outputs="value").value > 0
    # the trunk alone
    assert lg.capture(model, example, submodule="trunk").outputs == 16
    with pytest.raises(errors.UnsupportedQuery, match=r"has no output 'logits'; it has 'policy\.logits', 'value'"):
        lg.capture(model, example, outputs="logits")
    with pytest.raises(errors.UnsupportedQuery, match="returns one tensor"):
        lg.capture(model.actor, torch.zeros(1, 16), outputs=0)
    with pytest.raises(errors.UnsupportedQuery, match="a Network has one"):
        lg.capture(by_place, outputs=0)


class Steps(nn.Module):
    """An iteration that stops when the state no longer changes."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(4, 4)

    def forward(self, x):
        h = torch.zeros_like(x)
        while True:
            new = torch.tanh(self.step(h) + x)
            if (new - h).norm() < 1e-3:
                return new
            h = new


class Series(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.rnn = kind(2, 3, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0]


class Scaled(nn.Module):
    def forward(self, x):
        return x / x.norm(dim=1, keepdim=True)


REFUSED: dict[str, tuple[nn.Module, tuple[int, ...], type[Exception], str]] = {
    # the place, what the mathematics is, and what to do
    "layer norm": (made.TransformerBlock(), (1, 3, 8), errors.UnsupportedLayer,
        r"^model\.norm1 \(LayerNorm\) .*316.*at least s, the bound is 1 / s.*submodule"),
    "attention": (nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, norm_first=False)), (1, 3, 8),
        errors.UnsupportedLayer, r"^model\.1\.self_attn \(MultiheadAttention\) .*no global Lipschitz.*radius R.*submodule"),
    "group norm": (nn.Sequential(nn.GroupNorm(2, 4)), (1, 4, 3), errors.UnsupportedLayer, r"^model\.0 \(GroupNorm\) .*BatchNorm"),
    "instance norm": (nn.InstanceNorm1d(4), (1, 4, 3), errors.UnsupportedLayer, "eps = 1e-05.*track_running_stats=True"),
    "rms norm": (nn.RMSNorm(4), (1, 4), errors.UnsupportedLayer, "root mean square of the sample"),
    "lstm": (Series(nn.LSTM), (1, 4, 2), errors.UnsupportedLayer, r"^model\.rnn \(LSTM\) .*gates that multiply.*nn\.RNNCell"),
    "gru": (Series(nn.GRU), (1, 4, 2), errors.UnsupportedLayer, r"^model\.rnn \(GRU\) .*gates that multiply"),
    "control flow": (Steps(), (1, 4), errors.UnsupportedLayer,
        r"^model \(Steps\): Tensor\.__bool__ lets Python read .*the branch it takes.*Where all inputs of a domain take one"),
    "own length": (Scaled(), (1, 4), errors.UnsupportedLayer,
        r"^model \(Scaled\): torch\.div divides by the sample's own length.*no bound near zero.*1 / r"),
    "glu": (nn.GLU(), (1, 4), errors.UnsupportedLayer, r"gate.*quadratic.*1 \+ A / 4"),
    "power": (nn.Sequential(nn.LPPool1d(3, 2)), (1, 1, 4), errors.UnsupportedLayer, "power"),
    "deeponet of both": (made.DeepONetJoint(), (1, 11), errors.UnsupportedLayer,
        r"^model \(DeepONetJoint\): torch\.mul .*B Lip\(a\) \+ A Lip\(b\).*constant"),
    "deeponet": (made.DeepONet(), (1, 10), errors.InvalidExample, r"takes 2 inputs \(u, y\).*example=\(u, y\).*inputs='u'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_explain_the_mathematics(name: str) -> None:
    model, shape, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        lg.capture(model.eval(), torch.ones(shape))


def test_what_a_refusal_advises_works() -> None:
    example = torch.zeros(1, 10)
    net = made.DeepONet().eval()
    # the factors of the product rule; the trunk and the branch are called in a forward of two inputs: give their own
    assert lg.bound(net, example, submodule="branch").value > 0
    assert lg.bound(net, torch.zeros(1, 1), submodule="trunk").value > 0
    # sequences of a fixed length, as a loop
    assert lg.bound(made.UnrolledRNN().eval(), torch.zeros(1, 4, 2)).rigor == "verified"
    # an instance norm with running statistics is an affine map
    fixed = nn.Sequential(nn.InstanceNorm1d(3, affine=True, track_running_stats=True), nn.ReLU()).eval()
    fixed[0].running_var.copy_(torch.tensor([4.0, 1.0, 0.25]))
    # gamma / sqrt(var + eps) = 2 / sqrt(1 + 4e-5) in the last channel
    assert lg.bound(fixed, torch.zeros(1, 3, 5)).value == pytest.approx(2 / math.sqrt(1 + 4e-5), rel=1e-5)
