"""LipschitzEarlyStopping, and Lightning's own EarlyStopping on the monitor's values."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lipguard import LipschitzEarlyStopping, LipschitzMonitor
from lipguard.errors import LipguardError, UnsupportedQuery

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*number of training batches"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:LipschitzMonitor logged no bound"),
]

STEPS = 4


class Growing(LightningModule):
    """|W| grows by a given factor every step: its bound is 0.01 factor^(steps)."""

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2, bias=False)
        self.net.weight.data = 0.01 * torch.eye(2)
        self.automatic_optimization = False
        self.factor = factor
        self.example_input_array = torch.zeros(1, 2)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.net.weight.mul_(self.factor)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(0.0 * self(batch[0]).sum())
        optimizer.step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(*callbacks, module=None, **options) -> Trainer:
    defaults = {"max_epochs": 6, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    run = Trainer(callbacks=list(callbacks), **{**defaults, **quiet, **options})
    run.fit(module or Growing(), DataLoader(TensorDataset(torch.zeros(STEPS, 2)), batch_size=1))
    return run


# After epoch k the bound is 0.01 * 2^(4 k): 0.16, 2.56, 40.96, 655.


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(("limit", "patience", "epochs"), [(1.0, 0, 2), (1.0, 1, 3), (1.0, 3, 5), (1e9, 0, 6), (0.0, 0, 1)])
def test_stops_after_the_epoch_in_which_the_limit_is_passed(order, limit, patience, epochs):
    stopping = LipschitzEarlyStopping(limit, patience)
    run = fit(*[LipschitzMonitor(on_failure="raise"), stopping][::order])
    assert run.current_epoch == epochs
    assert stopping.stopped_step == (None if epochs == 6 else STEPS * epochs)


def test_stops_within_an_epoch():
    stopping = LipschitzEarlyStopping(1.0)
    run = fit(stopping, LipschitzMonitor(every_n_epochs=None, every_n_train_steps=1))
    assert run.global_step == 7  # 0.01 * 2^7 = 1.28
    assert stopping.stopped_step == 7


def test_only_fresh_measurements_count():
    """Measured every second epoch: 2.56 after 2, 655 after 4; three epochs without a measurement are not patience."""
    run = fit(LipschitzMonitor(every_n_epochs=2), LipschitzEarlyStopping(1.0, patience=1))
    assert run.current_epoch == 4


def test_a_failed_measurement_is_none(monkeypatch):
    from lipguard.bounds.tracker import Tracker

    original, calls = Tracker.update, []

    def update(self, *args, **options):
        calls.append(1)
        if len(calls) in (2, 3):
            raise LipguardError("no value today")
        return original(self, *args, **options)

    monkeypatch.setattr(Tracker, "update", update)
    run = fit(LipschitzMonitor(), LipschitzEarlyStopping(1.0))
    assert run.current_epoch == 4


def test_below_the_limit_again_starts_anew():
    class Swinging(Growing):
        def on_train_epoch_start(self):
            with torch.no_grad():
                self.net.weight.copy_((0.1 if self.current_epoch % 2 else 10.0) * torch.eye(2))

    assert fit(LipschitzMonitor(), LipschitzEarlyStopping(1.0, patience=1), module=Swinging(1.0)).current_epoch == 6


def test_min_epochs_is_respected():
    assert fit(LipschitzMonitor(), LipschitzEarlyStopping(1e-3), min_epochs=3).current_epoch == 3


def test_state():
    stopping, other = LipschitzEarlyStopping(1.0, patience=5), LipschitzEarlyStopping(1.0, patience=5)
    fit(LipschitzMonitor(), stopping, max_epochs=3)
    assert stopping.state_dict() == {"above": 2}
    other.load_state_dict(stopping.state_dict())
    assert other.above == 2


def test_needs_a_monitor_of_its_prefix():
    with pytest.raises(UnsupportedQuery, match=r"no LipschitzMonitor with prefix='lipschitz'"):
        fit(LipschitzEarlyStopping(1.0))
    with pytest.raises(UnsupportedQuery, match=r"There are: other"):
        fit(LipschitzEarlyStopping(1.0), LipschitzMonitor(prefix="other"))
    assert fit(LipschitzEarlyStopping(1.0, prefix="other"), LipschitzMonitor(prefix="other")).current_epoch == 2


def test_no_stopping_in_a_dry_run():
    assert fit(LipschitzEarlyStopping(0.0), LipschitzMonitor(), fast_dev_run=3).global_step == 3


@pytest.mark.parametrize("options", [{"limit": -1.0}, {"limit": math.inf}, {"limit": math.nan}, {"limit": 1.0, "patience": -1}])
def test_bad_arguments(options):
    with pytest.raises(UnsupportedQuery):
        LipschitzEarlyStopping(**options)


@pytest.mark.parametrize("order", [1, -1])
def test_lightnings_own_early_stopping(order):
    """Threshold and patience of Lightning's callback, on a value measured every epoch."""
    stop = EarlyStopping("lipschitz/upper", mode="min", divergence_threshold=1.0)
    assert fit(*[LipschitzMonitor(), stop][::order]).current_epoch == 2
    # 0.16 is the best; two epochs without improvement end it
    patient = EarlyStopping("lipschitz/upper", mode="min", patience=2)
    assert fit(*[LipschitzMonitor(), patient][::order]).current_epoch == 3
