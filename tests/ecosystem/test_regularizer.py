"""LipschitzRegularizer: the same steps as a loss written by hand, the target, resuming, and what is refused."""

from __future__ import annotations

import csv
import itertools
import json
import math
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lipguard as lg
from lipguard import LipschitzMonitor, LipschitzRegularizer
from lipguard.errors import InvalidExample, UnsupportedLayer, UnsupportedQuery
from lipguard.penalties import NAMES, LipSDP, build
from lipguard.penalties.control import Discrepancy, Fixed, Target

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*number of training batches"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec."),
]

SAMPLES, BATCH = 48, 8
STEPS = SAMPLES // BATCH


class Classifier(LightningModule):
    def __init__(self, net: nn.Module | None = None, example: bool = True, optimizer=torch.optim.SGD) -> None:
        super().__init__()
        self.net = net or nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
        self.optimizer = optimizer
        if example:
            self.example_input_array = torch.zeros(1, 4)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=0.05)


class ByHand(Classifier):
    """The same penalty in the loss: once for every real step, on the last of its accumulated batches."""

    def __init__(self, name: str, weight: float, accumulate: int = 1, **options) -> None:
        super().__init__()
        self.penalty = build(name, self, torch.zeros(1, 4), **options)
        self.weight, self.accumulate = weight, accumulate

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if (batch_idx + 1) % self.accumulate:
            return loss
        with torch.autocast("cpu", enabled=False):
            # Lightning divides the loss by the number of accumulated batches
            return loss + self.weight * self.accumulate * self.penalty(*batch)


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, 4, generator=generator)
    return TensorDataset(x, (x.sum(1) > 0).long() + (x[:, 0] > 1).long())


def loader(shuffle: bool = False) -> DataLoader:
    return DataLoader(data(), batch_size=BATCH, shuffle=shuffle)


def trainer(folder, *callbacks: Callback, **options) -> Trainer:
    defaults = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(callbacks=list(callbacks), **{**defaults, **options})


def trained(folder, module: LightningModule, *callbacks: Callback, **options) -> list[torch.Tensor]:
    trainer(folder, *callbacks, **options).fit(module, loader())
    return [p.detach().clone() for p in module.parameters()]


def twin(make) -> list[LightningModule]:
    modules = []
    for build_one in make:
        seed_everything(5, verbose=False)
        modules.append(build_one())
    return modules


# The same trajectory as a loss written by hand.


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        # Single precision rounds each step in an order of its own, by up to 1.5e-5 on some processors; that both are the
        # same trajectory is what double precision shows.
        ({}, 4e-5),
        ({"precision": "64-true"}, 1e-12),
        # bfloat16 activations make the loss's own gradient coarse; the penalty's is the same in both
        ({"precision": "bf16-mixed"}, 1e-4),
        ({"accumulate_grad_batches": 3}, 1e-5),
        ({"gradient_clip_val": 0.05}, 1e-5),
        ({"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value", "accumulate_grad_batches": 2}, 1e-5),
    ],
    ids=["32", "64", "bf16-mixed", "accumulate", "clip", "clip-value-accumulate"],
)
@pytest.mark.parametrize("name", ["lipsdp", "spectral"])
def test_trajectory(tmp_path, name, options, tolerance):
    accumulate = options.get("accumulate_grad_batches", 1)
    ours, hand = twin([Classifier, lambda: ByHand(name, 0.3, accumulate)])
    regularizer = LipschitzRegularizer(name, weight=0.3, on_failure="raise")
    first = trained(tmp_path, ours, regularizer, **options)
    second = trained(tmp_path, hand, **options)
    plain = trained(tmp_path, twin([Classifier])[0], **options)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert max(float((a - c).abs().max()) for a, c in zip(first, plain, strict=True)) > 20 * tolerance
    assert regularizer.steps == 2 * STEPS // accumulate


@pytest.mark.parametrize(("name", "given"), [("clip", {"pairs": 4}), ("local", {"radius": 0.3}), ("certified", {"radius": 0.1})])
def test_trajectory_of_penalties_that_read_the_batch(tmp_path, name, given):
    ours, hand = twin([Classifier, lambda: ByHand(name, 0.3, **given)])
    first = trained(tmp_path, ours, LipschitzRegularizer(name, weight=0.3, options=given, on_failure="raise"))
    for a, b in zip(first, trained(tmp_path, hand), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


class Manual(Classifier):
    """Two optimizers, one for each half of the network, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        first, second = self.optimizers()
        first.zero_grad(), second.zero_grad()
        self.manual_backward(loss)
        first.step(), second.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[:2].parameters(), lr=0.05), torch.optim.SGD(self.net[2:].parameters(), lr=0.05)]


class ManualByHand(Manual):
    def __init__(self) -> None:
        super().__init__()
        self.penalty = build("lipsdp", self, torch.zeros(1, 4), every=1)

    def training_step(self, batch, batch_idx):
        loss = Classifier.training_step(self, batch, batch_idx)
        first, second = self.optimizers()
        first.zero_grad(), second.zero_grad()
        self.manual_backward(loss)
        # each half steps on the penalty at the weights of that moment
        for optimizer, part in ((first, self.net[:2]), (second, self.net[2:])):
            value = self.penalty()
            for p, g in zip(
                part.parameters(), torch.autograd.grad(value, list(part.parameters()), allow_unused=True), strict=True
            ):
                if g is not None:
                    p.grad += 0.3 * g
            optimizer.step()


def test_manual_optimization_with_two_optimizers(tmp_path):
    ours, hand = twin([Manual, ManualByHand])
    regularizer = LipschitzRegularizer(weight=0.3, options={"every": 1}, on_failure="raise")
    first = trained(tmp_path, ours, regularizer)
    for a, b in zip(first, trained(tmp_path, hand), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_weight_of_zero_and_a_warmup_leave_the_training_alone(tmp_path):
    plain, zero, warm = twin([Classifier, Classifier, Classifier])
    expected = trained(tmp_path, plain)
    assert all(map(torch.equal, expected, trained(tmp_path, zero, LipschitzRegularizer(weight=0.0))))
    regularizer = LipschitzRegularizer(weight=5.0, warmup_steps=2 * STEPS)
    assert all(map(torch.equal, expected, trained(tmp_path, warm, regularizer)))
    assert regularizer.weight == 5.0


def test_a_skipped_step_stays_skipped(tmp_path):
    class Skipping(Classifier):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    regularizer = LipschitzRegularizer(weight=0.1, on_failure="raise")
    trained(tmp_path, Skipping(), regularizer)
    assert regularizer.steps == STEPS


# The target.


def digits() -> tuple[DataLoader, nn.Module]:
    data = load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
    return DataLoader(TensorDataset(x[:1200], y[:1200]), batch_size=64, shuffle=True), net


class Learner(Classifier):
    def __init__(self, net) -> None:
        super().__init__(net, example=False)
        self.example_input_array = torch.zeros(1, 64)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=2e-3)


@pytest.mark.parametrize(("penalty", "target"), [("lipsdp", 5.0), ("spectral", 5.0)])
def test_the_bound_comes_to_its_target(tmp_path, penalty, target):
    seed_everything(0, verbose=False)
    batches, net = digits()
    module = Learner(net)
    regularizer = LipschitzRegularizer(penalty, target=target, on_failure="raise")
    trainer(tmp_path, regularizer, max_epochs=25).fit(module, batches)
    assert lg.bound(module, torch.zeros(1, 64)).value == pytest.approx(target, rel=0.05)
    assert regularizer.weight > 1e-3  # it was needed


def test_a_bound_that_stays_below_its_target_is_left_alone(tmp_path):
    plain, led = twin([Classifier, Classifier])
    regularizer = LipschitzRegularizer(target=1e3, on_failure="raise")
    for a, b in zip(trained(tmp_path, plain), trained(tmp_path, led, regularizer), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert regularizer.weight == pytest.approx(regularizer.controller.least)


def test_what_is_proved_and_what_is_estimated_are_logged_apart(tmp_path):
    regularizer = LipschitzRegularizer(target=3.0, on_failure="raise")
    module = Classifier()
    monitor = LipschitzMonitor()
    run = trainer(
        tmp_path, regularizer, monitor, max_epochs=3, logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=1
    )
    run.fit(module, loader())
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name in ("weight", "penalty", "estimate", "proved", "failed"):
        assert sum(bool(row.get(f"lipschitz/reg/{name}")) for row in rows) == 3 * STEPS
    # one optimizer step apart
    assert float(run.callback_metrics["lipschitz/reg/estimate"]) == pytest.approx(monitor.last.upper.value, rel=0.05)
    # rounded up on its way, and the same until the next proof
    proved = [float(row["lipschitz/reg/proved"]) for row in rows if row.get("lipschitz/reg/proved")]
    assert proved[-1] >= regularizer._gauge.proved
    assert len(set(proved)) <= 3


def test_controller_finds_the_weight_of_a_simple_plant():
    """A log bound that the loss drives up at a speed and the penalty down at weight: equilibrium where they are equal."""
    for push, target in ((1e-3, 5.0), (1.0, 0.5), (30.0, 100.0)):
        controller, log_bound = Target(target), math.log(target) - 2.0
        for _ in range(3000):
            log_bound += 0.01 * (push - controller.weight) / max(push, controller.weight)
            controller.update(log_bound)
        assert math.exp(log_bound) == pytest.approx(target, rel=0.02)
        assert controller.weight == pytest.approx(push, rel=0.2)


def test_controller_limits_its_rate_and_does_not_wind_up():
    controller = Target(1.0)
    weights = [controller.weight]
    for _ in range(500):
        controller.update(-3.0)  # far below for long
        weights.append(controller.weight)
    assert controller.weight == pytest.approx(controller.least)
    for _ in range(40):
        controller.update(0.3)
        weights.append(controller.weight)
    assert controller.weight > 1.0  # 500 steps below cost nothing
    assert max(abs(math.log(b / a)) for a, b in itertools.pairwise(weights[1:])) <= controller.longest * (1 + 1e-12)
    assert controller.weight < 100.0  # far above is treated as near
    for _ in range(500):
        controller.update(1.0)
    assert controller.weight == pytest.approx(controller.most)
    assert controller.saturated > 100
    for _ in range(60):
        controller.update(-0.5)
    assert controller.weight < 1.0  # nor do 500 steps above
    before = controller.weight
    controller.update(math.nan)
    assert controller.weight == before


def test_discrepancy_rule():
    rule = Discrepancy(0.9, step=0.5, window=2)
    rule.update(0.0, 10, 10)
    assert rule.weight == 0.0
    rule.update(0.0, 9, 10)  # 95 %
    assert rule.weight == 0.5
    for _ in range(4):
        rule.update(0.0, 8, 10)
    assert rule.weight == 0.0


def test_goal_accuracy_of_clip(tmp_path):
    regularizer = LipschitzRegularizer("clip", goal_accuracy=0.4, controller={"window": 2}, on_failure="raise")
    trained(tmp_path, Classifier(), regularizer, max_epochs=4)
    assert regularizer.weight > 0
    assert regularizer.controller.total == 0 or regularizer.controller.steps < 2


# Resuming.


@pytest.mark.parametrize(
    "make",
    [
        lambda: LipschitzRegularizer(target=1.5),
        lambda: LipschitzRegularizer("spectral", target=2.0),
        lambda: LipschitzRegularizer("clip", goal_accuracy=0.5, controller={"window": 3}),
        lambda: LipschitzRegularizer("local", weight=0.1),
        lambda: LipschitzRegularizer(weight=0.3, warmup_steps=7),
    ],
)
def test_resume_bit_for_bit(tmp_path, make):
    whole, half, rest = twin([Classifier, Classifier, Classifier])
    straight = make()
    expected = trained(tmp_path, whole, straight, max_epochs=3)
    trained(tmp_path, half, make(), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), max_epochs=1)
    resumed = make()
    trainer(tmp_path, resumed, max_epochs=3).fit(rest, loader(), ckpt_path=str(tmp_path / "epoch=0.ckpt"))
    assert resumed.steps == straight.steps
    assert resumed.controller == straight.controller
    assert all(map(torch.equal, expected, rest.parameters()))
    assert resumed.state_dict().keys() == straight.state_dict().keys()


# Refusals and failures.


class Cosine(nn.Module):
    def forward(self, x):
        return torch.cos(x)


def frozen() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    net[0].weight.requires_grad_(False), net[2].weight.requires_grad_(False)
    return net


def normalised() -> nn.Module:
    from torch.nn.utils.parametrizations import orthogonal

    return nn.Sequential(orthogonal(nn.Linear(4, 4)), nn.ReLU(), orthogonal(nn.Linear(4, 4)))


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4))

    def forward(self, x):
        return 2 * x + self.branch(x)


@pytest.mark.parametrize(
    ("net", "options", "error", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)), {"weight": 1.0}, UnsupportedLayer, "net.1"),
        (
            lambda: nn.Sequential(nn.Linear(4, 4), nn.Hardshrink()),
            {"penalty": "spectral", "weight": 1.0},
            UnsupportedLayer,
            "Hardshrink",
        ),
        (Skip, {"target": 1.9}, UnsupportedQuery, r"target=1.9 is below what the module can reach.* norm 2"),
        (Skip, {"penalty": "local", "weight": 1.0}, UnsupportedQuery, "joins branches"),
        (normalised, {"target": 0.5}, UnsupportedQuery, r"target=0.5 cannot be reached: no trained weight"),
        (frozen, {"weight": 1.0}, UnsupportedQuery, "no trained weight"),
        (None, {"penalty": "local", "weight": 1.0, "options": {"size": 3}}, Exception, "does not take these options"),
    ],
)
def test_what_cannot_work_raises_before_the_first_step(tmp_path, net, options, error, message):
    module = Classifier(None if net is None else net())
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(error, match=message):
        trained(tmp_path, module, LipschitzRegularizer(**options))
    assert all(map(torch.equal, before, module.parameters()))


def test_a_target_above_the_direct_path_is_allowed(tmp_path):
    seed_everything(0, verbose=False)
    trained(tmp_path, Classifier(Skip()), LipschitzRegularizer(target=2.1, on_failure="raise"))


class Unlabelled(Classifier):
    def training_step(self, batch, batch_idx):
        return self(batch[0]).square().mean()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty": "certified", "weight": 1.0}, "certified penalty needs the batch's labels"),
        ({"penalty": "clip", "goal_accuracy": 0.9}, "goal_accuracy needs the batch's labels"),
    ],
)
def test_missing_labels(tmp_path, options, message):
    with pytest.raises(InvalidExample, match=message):
        trainer(tmp_path, LipschitzRegularizer(**options)).fit(Unlabelled(), DataLoader(TensorDataset(torch.randn(16, 4)), 8))
    known = LipschitzRegularizer(**options, unpack=lambda batch: (batch[0], torch.zeros(len(batch[0]), dtype=torch.int64)))
    trainer(tmp_path, known).fit(Unlabelled(), DataLoader(TensorDataset(torch.randn(16, 4)), 8))


def test_two_regularizers_of_one_module(tmp_path):
    one = LipschitzRegularizer(weight=0.1)
    for other in (
        LipschitzRegularizer(target=3.0, prefix="other"),
        LipschitzRegularizer(target=3.0, prefix="other", submodule="net"),
    ):
        with pytest.raises(UnsupportedQuery, match="two LipschitzRegularizers"):
            trained(tmp_path, Classifier(), one, other)
    with pytest.raises(RuntimeError, match="state_key"):
        trainer(tmp_path, LipschitzRegularizer(weight=0.1), LipschitzRegularizer(weight=0.2))


def test_two_regularizers_of_two_parts(tmp_path):
    class Two(Classifier):
        def __init__(self) -> None:
            super().__init__(
                nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5)), nn.ReLU(), nn.Linear(5, 3))
            )

    parts = [LipschitzRegularizer(weight=0.3, submodule=name, prefix=name, on_failure="raise") for name in ("net.0", "net.2")]
    module = Two()
    run = trainer(tmp_path, *parts)
    run.fit(module, loader())
    for part, name in zip(parts, ("net.0", "net.2"), strict=True):
        assert part.steps == 2 * STEPS
        value = float(run.callback_metrics[f"{name}/penalty"])
        assert value == pytest.approx(math.log(lg.bound(module, torch.zeros(1, 4), submodule=name).value), abs=0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of"),
        ({"weight": 1.0, "target": 2.0}, "not weight and target"),
        ({"weight": -1.0}, "weight=-1.0"),
        ({"target": 0.0}, "target=0.0"),
        ({"target": math.inf}, "target=inf"),
        ({"goal_accuracy": 1.5}, "goal_accuracy=1.5"),
        ({"penalty": "lipsdb", "weight": 1.0}, "There are: lipsdp"),
        ({"penalty": "certified", "target": 2.0}, "stands for no bound"),
        ({"weight": 1.0, "controller": {"gain": 3}}, "controller="),
        ({"weight": 1.0, "warmup_steps": -1}, "warmup_steps"),
        ({"weight": 1.0, "on_failure": "explode"}, "on_failure"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(UnsupportedQuery, match=message):
        LipschitzRegularizer(**options)


def test_lbfgs_is_refused(tmp_path):
    with pytest.raises(UnsupportedQuery, match="LBFGS"):
        trained(tmp_path, Classifier(optimizer=torch.optim.LBFGS), LipschitzRegularizer(weight=0.1))


def test_a_failing_penalty_never_costs_the_training(tmp_path, monkeypatch):
    plain, led, broken = twin([Classifier, Classifier, Classifier])
    expected = trained(tmp_path, plain)
    original, calls = LipSDP.__call__, itertools.count()

    def collapse(self, *args):
        if next(calls) > 0:  # the trial at the start succeeds
            raise RuntimeError("linalg.eigh: did not converge")
        return original(self, *args)

    monkeypatch.setattr(LipSDP, "__call__", collapse)
    regularizer = LipschitzRegularizer(weight=0.3)
    with pytest.warns(UserWarning, match=r"RuntimeError: linalg.eigh.*lipschitz/reg/failed") as caught:
        assert all(map(torch.equal, expected, trained(tmp_path, led, regularizer)))
    assert sum("linalg.eigh" in str(warning.message) for warning in caught) == 1
    assert regularizer.failed == 2 * STEPS
    monkeypatch.setattr(LipSDP, "__call__", lambda self, *args: math.nan * sum(p.sum() for p in broken.parameters()))
    silent = LipschitzRegularizer(weight=0.3, on_failure="ignore")
    silent._check = lambda *args: None
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="LipschitzRegularizer")
        assert all(map(torch.equal, expected, trained(tmp_path, broken, silent)))


def test_a_target_out_of_reach_is_told_in_the_run(tmp_path):
    """A clipped penalty: the optimizer undoes what the penalty does, so that the bound stays where it is."""

    class Stubborn(Classifier):
        def on_train_batch_end(self, *args):
            with torch.no_grad():
                for p, q in zip(self.net.parameters(), self.kept, strict=True):
                    p.copy_(q)

        def on_train_start(self):
            self.kept = [p.detach().clone() for p in self.net.parameters()]

    seed_everything(0, verbose=False)
    regularizer = LipschitzRegularizer(target=1e-3, controller={"rate": 1.0})
    with pytest.warns(UserWarning, match=r"target=0.001 seems out of reach"):
        trained(tmp_path, Stubborn(), regularizer, max_epochs=30)


def test_example_from_the_first_batch(tmp_path):
    regularizer = LipschitzRegularizer(weight=0.1, on_failure="raise")
    trained(tmp_path, Classifier(example=False), regularizer)
    assert regularizer.steps == 2 * STEPS


def test_a_penalty_of_ones_own(tmp_path):
    from lipguard.penalties import Penalty

    class Decay(Penalty):
        def __call__(self, inputs=None, labels=None):
            return sum(p.square().sum() for p in self.network.module.parameters())

    ours, decayed = twin([Classifier, lambda: Classifier(optimizer=lambda p, lr: torch.optim.SGD(p, lr=lr, weight_decay=0.2))])
    first = trained(tmp_path, ours, LipschitzRegularizer(Decay, weight=0.1, on_failure="raise"))
    for a, b in zip(first, trained(tmp_path, decayed), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_lightning_cli_builds_it_from_text():
    cli = LightningCLI(
        Classifier,
        run=False,
        save_config_callback=None,
        args=[
            "--trainer.callbacks+=lipguard.LipschitzRegularizer",
            "--trainer.callbacks.penalty=local",
            "--trainer.callbacks.target=12.5",
            "--trainer.callbacks.options={radius: 0.2}",
            "--trainer.accelerator=cpu",
            "--trainer.logger=false",
        ],
    )
    own = next(callback for callback in cli.trainer.callbacks if isinstance(callback, LipschitzRegularizer))
    assert (own.penalty, own.target, own.options) == ("local", 12.5, {"radius": 0.2})
    assert isinstance(own.controller, Target)
    assert isinstance(LipschitzRegularizer(weight=1).controller, Fixed)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "lipsdp-local"])
def test_every_penalty_by_name(tmp_path, name):
    regularizer = LipschitzRegularizer(name, weight=0.01, on_failure="raise")
    trained(tmp_path, Classifier(), regularizer, max_epochs=1)
    assert regularizer.steps == STEPS


_RANKS = """
import json, sys, warnings
import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lipguard import LipschitzEarlyStopping, LipschitzMonitor, LipschitzProjection, LipschitzRegularizer
warnings.simplefilter("ignore")

class Toy(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
        self.b = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
        self.example_input_array = torch.zeros(1, 3)
    def forward(self, x):
        return self.b(self.a(x))
    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

class Report(pl.Callback):
    def on_train_end(self, trainer, pl_module):
        weights = [p.detach().double().flatten().tolist() for p in pl_module.parameters()]
        state = trainer.callbacks[0].weight, trainer.callbacks[1].steps, trainer.current_epoch
        open(sys.argv[1] + str(trainer.global_rank), "w").write(json.dumps([weights, state]))

if __name__ == "__main__":
    torch.manual_seed(0)
    x = torch.randn(32, 3)
    callbacks = [
        LipschitzRegularizer(target=0.5, submodule="a", prefix="a", on_failure="raise"),
        LipschitzRegularizer("clip", goal_accuracy=0.3, submodule="b", prefix="b", on_failure="raise",
            unpack=lambda batch: (batch[0][:, :2], batch[1])),
        LipschitzMonitor(on_failure="raise"), LipschitzEarlyStopping(1e-6, patience=1), LipschitzProjection(1.5), Report(),
    ]
    trainer = pl.Trainer(max_epochs=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=callbacks, devices=2, strategy="ddp_fork")
    trainer.fit(Toy(), DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=4))
"""


def test_ranks_stay_together(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(_RANKS))
    done = subprocess.run([sys.executable, script, tmp_path / "rank"], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    values = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("rank*"))]
    assert len(values) == 2
    assert values[0] == values[1]
    assert values[0][1][1:] == [8, 2]  # stopped at the end of the second of four epochs
