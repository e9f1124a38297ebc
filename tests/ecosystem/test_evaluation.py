"""trainer.validate and trainer.test log the bound and the certified accuracy of the weights that they evaluate."""

from __future__ import annotations

import warnings

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lipguard as lg


class Classifier(LightningModule):
    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        self.net[2].weight.data.mul_(scale)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    validation_step = test_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


DATA = DataLoader(TensorDataset(torch.rand(32, 4), torch.randint(0, 3, (32,))), 16)


def trainer(*callbacks, **options) -> Trainer:
    warnings.simplefilter("ignore")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return Trainer(callbacks=list(callbacks), accelerator="cpu", **quiet, **options)


@pytest.mark.parametrize("name", ["validate", "test"])
def test_the_bound_of_the_evaluated_weights_is_logged(name):
    run = trainer(lg.LipschitzMonitor(), lg.CertifiedAccuracy(eps=0.05))
    for scale in (1.0, 3.0):  # a second module: its own bound, not the first one's
        module = Classifier(scale)
        found = getattr(run, name)(module, DATA, verbose=False)[0]
        expected = lg.bound(module.net, torch.zeros(1, 4)).value
        assert found["lipschitz/upper"] == pytest.approx(expected, rel=1e-3) and found["lipschitz/upper"] >= expected * (1 - 1e-6)
        assert 0 < found["lipschitz/lower"] <= found["lipschitz/upper"]
        assert 0 <= found["lipschitz/certified_accuracy@0.05"] <= 1


def test_an_evaluation_leaves_what_a_training_counts():
    monitor = lg.LipschitzMonitor()
    run, module = trainer(monitor, max_epochs=1), Classifier()
    run.fit(module, DATA)
    before = monitor.measuring_seconds, monitor.training_seconds, monitor.state_dict()["measured_step"]
    run.test(module, DATA, verbose=False)
    assert (monitor.measuring_seconds, monitor.training_seconds, monitor.state_dict()["measured_step"]) == before
