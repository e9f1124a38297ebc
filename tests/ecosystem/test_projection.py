"""LipschitzProjection: every layer's own norm stays below the limit after real optimizer steps, and nothing else changes."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.utils.data import DataLoader, TensorDataset

import lipguard as lg
from lipguard import LipschitzProjection
from lipguard.capture.capture import capture
from lipguard.errors import InvalidExample, UnknownName, UnsupportedLayer, UnsupportedQuery
from lipguard.penalties.projection import iterated_norm, layers_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*number of training batches"),
]


class Model(LightningModule):
    def __init__(self, net: nn.Module, shape: tuple[int, ...], lr: float = 0.5) -> None:
        super().__init__()
        self.net, self.lr = net, lr
        self.example_input_array = torch.zeros(1, *shape)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return -self(batch[0]).square().mean()  # drives every weight up

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def fit(net: nn.Module, shape: tuple[int, ...], projection: LipschitzProjection, lr: float = 0.5, **options) -> Model:
    torch.manual_seed(0)
    model = Model(net, shape, lr)
    data = DataLoader(TensorDataset(torch.randn(16, *shape, generator=torch.Generator().manual_seed(1))), batch_size=4)
    defaults = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    Trainer(callbacks=[projection], **{**defaults, **quiet, **options}).fit(model, data)
    return model


def norms(model: Model, p: float) -> list[float]:
    """Norm of every layer from its unrolled matrix."""
    network = capture(model, model.example_input_array)
    return [float(torch.linalg.matrix_norm(n.operator.dense(), p)) for n in network.nodes if hasattr(n, "operator")]


def images() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.ReLU(), nn.ConvTranspose2d(4, 3, 2, stride=2), nn.ReLU(),
        nn.Conv2d(3, 3, 3, groups=3, dilation=2, padding_mode="circular", padding=2), nn.ReLU(), nn.Flatten(), nn.Linear(192, 3),
    )  # fmt: skip


@pytest.mark.parametrize("p", [1, 2, math.inf])
@pytest.mark.parametrize("kind", ["dense", "images"])
def test_every_norm_is_within_the_limit(p, kind):
    torch.manual_seed(0)
    if kind == "dense":
        model = fit(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3)), (6,), LipschitzProjection(1.5, norm=p))
        found = norms(model, p)
        assert found == pytest.approx([1.5, 1.5], rel=1e-5)
    else:
        model = fit(images(), (2, 8, 8), LipschitzProjection(0.7, norm=p))
        layers, _ = layers_of(model, model.example_input_array)
        assert len(layers) == 4
        for layer in layers:
            operators = [n.operator for n in capture(layer.module, layer.examples[0]).nodes if hasattr(n, "operator")]
            matrix = torch.eye(operators[0].shape[1], dtype=torch.float64)
            for operator in operators:
                matrix = operator(matrix)
            assert float(torch.linalg.matrix_norm(matrix.T, p)) <= 0.7 * (1 + 1e-5)


def test_a_product_of_limits_bounds_the_network():
    model = fit(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3)), (6,), LipschitzProjection(1.2))
    assert lg.bound(model, model.example_input_array).value <= 1.2**2 * (1 + 1e-5)


def test_layers_below_the_limit_and_biases_are_left_alone():
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    free = fit(nets[0], (6,), LipschitzProjection(1e9), lr=0.01)
    limited = fit(nets[1], (6,), LipschitzProjection(100.0), lr=0.01)
    assert all(map(torch.equal, free.parameters(), limited.parameters()))


class Steps(LipschitzProjection):
    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        before = pl_module.net[0].weight.detach().clone()
        super().on_train_batch_end(trainer, pl_module, *args)
        after = pl_module.net[0].weight.detach()
        self.seen.append((trainer.global_step, not torch.equal(before, after), float(torch.linalg.matrix_norm(after, 2))))


def test_after_every_real_step_and_no_other():
    torch.manual_seed(0)
    steps = Steps(0.5)
    fit(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3)), (6,), steps, lr=1.0, accumulate_grad_batches=2, max_epochs=3)
    assert [changed for _, changed, _ in steps.seen] == [step % 2 == 1 for step in range(12)]
    # after a step: within what a power iteration that ends at 1e-4 leaves
    assert all(norm <= 0.5 * (1 + 2e-3) for _, _, norm in steps.seen)


def test_batchnorm_by_its_running_statistics():
    net = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3))
    model = fit(net, (6,), LipschitzProjection(0.3))
    scale = net[1].weight / (net[1].running_var + net[1].eps).sqrt()
    assert float(scale.abs().max()) <= 0.3 * (1 + 1e-5)
    assert lg.bound(model, torch.zeros(1, 6)).value <= 0.3**3 * (1 + 1e-5)


def test_weight_norm_is_scaled_through_its_parametrization():
    net = nn.Sequential(weight_norm(nn.Linear(6, 9)), nn.ReLU(), nn.Linear(9, 3))
    fit(net, (6,), LipschitzProjection(0.5))
    assert float(torch.linalg.matrix_norm(net[0].weight, 2)) <= 0.5 * (1 + 1e-5)


def test_shared_layers_count_once_and_by_their_largest_input():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv1d(1, 1, 3, padding=1, bias=False), nn.Linear(12, 2)

        def forward(self, x):
            y = torch.relu(self.conv(x))
            return self.head(torch.cat([y.flatten(1), self.conv(y[..., :4]).flatten(1)], 1))

    layers, _ = layers_of(Twice(), torch.zeros(1, 1, 8))
    assert [layer.name for layer in layers] == ["conv", "head"]
    assert [tuple(e.shape) for e in layers[0].examples] == [(1, 1, 8), (1, 1, 4)]
    long = torch.linalg.matrix_norm(capture(layers[0].module, layers[0].examples[0]).nodes[1].operator.dense(), 2)
    assert layers[0].norm(2) == pytest.approx(float(long), rel=1e-6)


def test_iteration_carried_on():
    torch.manual_seed(0)
    operator = capture(nn.Linear(30, 20).double(), torch.zeros(1, 30)).nodes[1].operator
    exact = float(torch.linalg.matrix_norm(operator.weight, 2))
    norm, vector = iterated_norm(operator, None, 1e-9)
    assert norm == pytest.approx(exact, rel=1e-4)
    assert norm <= exact * (1 + 1e-12)
    again, _ = iterated_norm(operator, vector, 1e-4)
    assert norm * (1 - 1e-9) <= again <= exact * (1 + 1e-12)


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.mix = nn.Linear(6, 6), nn.Parameter(torch.eye(6))

    def forward(self, x):
        return self.inner(x) @ self.mix


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (Bare, "holds the matrix 'mix'"),
        (lambda: nn.Sequential(nn.Linear(6, 6), nn.Bilinear(6, 6, 3)), "Bilinear|fails on an example"),
        (lambda: nn.Sequential(spectral_norm(nn.Linear(6, 6))), "fixes the weight's size"),
        (lambda: nn.Sequential(orthogonal(nn.Linear(6, 6))), "takes no weight|fixes the weight's size"),
    ],
)
def test_what_cannot_be_projected_is_refused(net, message):
    with pytest.raises((UnsupportedLayer, InvalidExample), match=message):
        fit(net(), (6,), LipschitzProjection(1.0))


def test_batchnorm_without_weight_is_named():
    with pytest.warns(UserWarning, match=r"net.1 have no weight"):
        fit(
            nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9, affine=False), nn.Linear(9, 3)),
            (6,),
            LipschitzProjection(1.0),
            lr=0.01,
        )


def test_chosen_layers():
    net = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))
    fit(net, (6,), LipschitzProjection(0.2, layers=["net.2"]))
    assert float(torch.linalg.matrix_norm(net[2].weight, 2)) <= 0.2 * (1 + 1e-5)
    assert float(torch.linalg.matrix_norm(net[0].weight, 2)) > 0.5
    with pytest.raises(UnknownName, match=r"no layer 'net.9'; there are net.0, net.2"):
        fit(net, (6,), LipschitzProjection(0.2, layers=["net.9"]))


@pytest.mark.parametrize("options", [{"max_norm": 0.0}, {"max_norm": math.nan}, {"max_norm": 1.0, "norm": 3}])
def test_bad_arguments(options):
    with pytest.raises(UnsupportedQuery):
        LipschitzProjection(**options)
    with pytest.raises(UnsupportedQuery, match="one norm"):
        LipschitzProjection(1.0, norm=(1, 2))
