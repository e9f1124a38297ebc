"""The callback: what it logs, and that it leaves the training as it was."""

from __future__ import annotations

import warnings

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import lipguard as lg
from lipguard import errors


class Classifier(LightningModule):
    def __init__(self, outputs=3):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, outputs))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        y = self(batch[0])
        return functional.cross_entropy(y, batch[1] % y.shape[1])

    def validation_step(self, batch, batch_idx):
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.05)


def data(count=90):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(count) % 3
    x = torch.eye(3, 4)[y] + 0.15 * torch.randn(count, 4, generator=generator)
    return TensorDataset(x, y)


def fit(*callbacks, epochs=3, outputs=3, labels=True, **options):
    seed_everything(0, verbose=False)
    model = Classifier(outputs)
    loader = DataLoader(data(), batch_size=15, shuffle=True)
    held = data(40)
    if not labels:
        model.validation_step = lambda batch, batch_idx: None  # type: ignore[method-assign]
        held = TensorDataset(held.tensors[0])
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*num_workers.*")
        warnings.filterwarnings("ignore", message=".*log_every_n_steps.*")
        trainer.fit(model, loader, DataLoader(held, batch_size=15))
    return trainer, model


@pytest.mark.parametrize("method", ["local", "global", "spectral"])
def test_logged_shares_are_those_of_certify(method):
    callback = lg.CertifiedAccuracy(eps=(0.3, 0.05), method=method, seconds=60.0, on_failure="raise")
    trainer, model = fit(callback)
    metrics = trainer.callback_metrics
    x, y = data(40).tensors
    for eps in (0.05, 0.3):
        expected = lg.certify(model, x, y, eps, method=method, radii=False).certified_accuracy
        assert float(metrics[f"lipschitz/certified_accuracy@{eps:g}"]) == pytest.approx(expected)
        assert expected <= float(metrics["accuracy"]) + 1e-6
    assert float(metrics["lipschitz/certified_accuracy@0.05"]) > 0.5
    assert metrics["lipschitz/certified_samples"] == 40


def test_training_is_the_same_with_and_without():
    _, plain = fit()
    _, observed = fit(lg.CertifiedAccuracy(0.1, on_failure="raise"))
    for a, b in zip(plain.parameters(), observed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_only_every_nth_epoch_and_the_first_samples():
    callback = lg.CertifiedAccuracy(0.1, every_n_epochs=2, max_samples=20, on_failure="raise")
    trainer, _ = fit(callback, epochs=1)
    assert "lipschitz/certified_samples" not in trainer.callback_metrics
    trainer, _ = fit(callback, epochs=2)
    assert trainer.callback_metrics["lipschitz/certified_samples"] == 20


def test_validate_alone_is_certified_as_well():
    trainer, model = fit(epochs=1)
    trainer = Trainer(
        callbacks=[lg.CertifiedAccuracy(0.1, on_failure="raise")], accelerator="cpu", logger=False, enable_progress_bar=False
    )
    (metrics,) = trainer.validate(model, DataLoader(data(40), batch_size=15), verbose=False)
    assert metrics["lipschitz/certified_samples"] == 40


def test_a_short_budget_counts_the_samples_done(monkeypatch, caplog):
    callback = lg.CertifiedAccuracy(0.1, seconds=5.0, on_failure="raise")
    ticks = iter(range(10**6))
    # The clock moves a second at every look: the first chunks of 16 are begun within five.
    monkeypatch.setattr("lipguard.callbacks.certified.time.perf_counter", lambda: 1.0 * next(ticks))

    def unlimited(*given, time_limit, **options):
        return lg.certify(*given, **options)

    monkeypatch.setattr("lipguard.callbacks.certified.certify", unlimited)
    with caplog.at_level("INFO", "lipguard.callbacks"):
        values, count = callback._certified(Classifier().eval(), [data(40).tensors])  # type: ignore[arg-type]
    assert 0 < count < 40 and count % 16 == 0
    assert values["certified_samples"] == count
    assert f"for {count} of 40 samples" in caplog.text


def test_trouble_warns_once_and_training_goes_on():
    with pytest.warns(UserWarning, match="at least 2 outputs") as caught:
        trainer, _ = fit(lg.CertifiedAccuracy(0.1), outputs=1, epochs=2)
    assert sum("CertifiedAccuracy" in str(w.message) for w in caught) == 1
    assert "lipschitz/certified_accuracy@0.1" not in trainer.callback_metrics
    with pytest.warns(UserWarning, match="select="):
        fit(lg.CertifiedAccuracy(0.1), labels=False, epochs=1)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"eps": 0.0}, errors.InvalidDomain),
        ({"eps": ()}, errors.InvalidDomain),
        ({"eps": (0.1, -1.0)}, errors.InvalidDomain),
        ({"method": "magic"}, errors.UnknownName),
        ({"max_samples": 0}, errors.UnsupportedQuery),
        ({"seconds": 0.0}, errors.UnsupportedQuery),
        ({"on_failure": "shout"}, errors.UnsupportedQuery),
    ],
)
def test_bad_options(options, error):
    with pytest.raises(error, match="CertifiedAccuracy"):
        lg.CertifiedAccuracy(**options)
