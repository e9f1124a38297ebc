"""LipschitzMonitor: what it logs, when it measures, what it leaves alone, and how it fails."""

from __future__ import annotations

import csv
import json
import math
import random
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lipguard import Box, LipschitzMonitor
from lipguard.callbacks.example import first_row, leaves
from lipguard.errors import InvalidExample, InvalidModel, LipguardError, UnsupportedLayer, UnsupportedQuery
from lipguard.outward import narrowed

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*number of training batches"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:.*returned `None`"),
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec."),
]

SAMPLES, BATCH = 32, 8
STEPS = SAMPLES // BATCH


class Classifier(LightningModule):
    """A 4-8-6-3 network; dropout uses random numbers in every step."""

    def __init__(self, example: bool = True, activation: nn.Module | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 8), activation or nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)
        )
        if example:
            self.example_input_array = torch.zeros(1, 4)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch
        return nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class DictData(torch.utils.data.Dataset):
    def __len__(self):
        return SAMPLES

    def __getitem__(self, i):
        return {"index": i, "y": i % 3, "x": torch.full((4,), float(i) / SAMPLES)}


def loader(shuffle: bool = False) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, 4, generator=generator)
    return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=BATCH, shuffle=shuffle)


def trainer(folder: Path, *callbacks: Callback, **options) -> Trainer:
    defaults = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": CSVLogger(folder, name="", version=""),
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 2,
    }
    return Trainer(callbacks=list(callbacks), **{**defaults, **options})


def logged(folder: Path, key: str = "lipschitz/upper") -> list[tuple[int, float]]:
    """(step, value) of every row of the CSV log that holds the key."""
    with (folder / "metrics.csv").open() as file:
        return [(int(row["step"]), float(row[key])) for row in csv.DictReader(file) if row.get(key)]


# What is logged.


def test_every_epoch_logs_a_verified_pair(tmp_path):
    monitor = LipschitzMonitor(log_per_layer=True, prog_bar=True)
    run = trainer(tmp_path, monitor)
    run.fit(Classifier(), loader(), loader())
    assert [step for step, _ in logged(tmp_path)] == [STEPS - 1, 2 * STEPS - 1]
    last = monitor.last
    assert last.upper.rigor == last.lower.rigor == "verified"
    upper, lower = logged(tmp_path)[-1][1], logged(tmp_path, "lipschitz/lower")[-1][1]
    assert 0 < lower <= last.lower.value <= last.upper.value <= upper
    # Rounding outward to float32 moves a value by at most one unit in the last place, 2^-23 relative.
    assert upper <= last.upper.value * (1 + 2**-23)
    assert lower >= last.lower.value * (1 - 2**-23)
    assert logged(tmp_path, "lipschitz/gap")[-1][1] == pytest.approx(last.upper.value / last.lower.value - 1, rel=1e-6)
    assert logged(tmp_path, "lipschitz/failed")[-1][1] == 0
    assert logged(tmp_path, "lipschitz/seconds")[-1][1] > 0
    layers = {name: value for name, value in run.logged_metrics.items() if "/layer/" in name}
    assert len(layers) == 3
    assert all(float(layers[f"lipschitz/layer/{name}"]) >= norm for name, norm in last.layers.items())
    assert {"lipschitz/upper", "lipschitz/lower"} <= set(run.progress_bar_metrics)
    assert "lipschitz/gap" not in run.progress_bar_metrics


def test_the_value_is_that_of_the_trained_weights(tmp_path):
    monitor, module = LipschitzMonitor(), Classifier()
    trainer(tmp_path, monitor).fit(module, loader())
    first, second, third = (module.net[i].weight.detach().double() for i in (0, 3, 5))
    product = math.prod(float(torch.linalg.matrix_norm(w, 2)) for w in (first, second, third))
    assert monitor.last.upper.value <= product * (1 + 1e-9)  # the product is a bound; LipSDP is never above it
    x = torch.randn(64, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    jacobian = torch.autograd.functional.jacobian(lambda x: module.double().eval()(x).sum(0), x).permute(1, 0, 2)
    assert float(torch.linalg.matrix_norm(jacobian, 2).max()) <= monitor.last.upper.value * (1 + 1e-9)


@given(st.floats(min_value=0, allow_infinity=False, allow_subnormal=True))
def test_rounding_is_outward_and_fits_float32(value):
    upper, lower = narrowed(value, "upper"), narrowed(value, "lower")
    assert lower.dtype == upper.dtype == torch.float64
    assert float(lower) <= value <= float(upper) < math.inf
    if value <= float(np.finfo(np.float32).max):
        assert upper.float().double() == upper
        assert lower.float().double() == lower


def test_zero_lower_bound_logs_no_gap(tmp_path):
    module = Classifier()
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
        parameter.requires_grad_(False)
    module.configure_optimizers = lambda: None
    module.training_step = lambda batch, batch_idx: None
    run = trainer(tmp_path, LipschitzMonitor(on_failure="raise"), max_epochs=1)
    run.fit(module, loader())
    assert logged(tmp_path, "lipschitz/lower")[0][1] == 0
    assert "lipschitz/gap" not in run.callback_metrics


def test_works_without_a_logger(tmp_path):
    run = trainer(tmp_path, LipschitzMonitor(every_n_train_steps=2), logger=False)
    run.fit(Classifier(), loader())
    assert run.callback_metrics["lipschitz/upper"] >= run.callback_metrics["lipschitz/lower"]


def test_example_comes_from_the_first_batch_or_the_argument(tmp_path):
    for monitor, data in (
        (LipschitzMonitor(on_failure="raise"), loader()),
        (LipschitzMonitor(on_failure="raise"), DataLoader(DictData(), batch_size=BATCH)),
        (LipschitzMonitor(on_failure="raise", submodule="net", example=torch.zeros(1, 4)), loader()),
    ):
        trainer(tmp_path, monitor, max_epochs=1).fit(Classifier(example=False), data)
        assert math.isfinite(monitor.last.upper.value)


def test_the_first_row_of_a_nested_batch():
    batch = {"id": torch.arange(5), "name": "a", "pair": [torch.zeros(2, 2), (torch.ones(5, 3), 1)], "scale": torch.tensor(2.0)}
    row = first_row(batch)
    assert [path for path, _ in leaves(row)] == [("id",), ("pair", 0), ("pair", 1, 0), ("scale",)]
    assert [tuple(tensor.shape) for _, tensor in leaves(row)] == [(5,), (1, 2), (5, 3), ()]
    assert first_row({"x": torch.ones(5, 3), "y": torch.arange(5), "z": [1]})["y"].tolist() == [0]


# When it is measured.


def test_steps_count_optimizer_steps_and_none_is_dropped_by_the_logger(tmp_path):
    monitor = LipschitzMonitor(every_n_epochs=None, every_n_train_steps=2)
    trainer(tmp_path, monitor, max_epochs=4, accumulate_grad_batches=2, log_every_n_steps=50).fit(Classifier(), loader())
    # 4 epochs of 4 batches are 8 optimizer steps; every second one is measured.
    assert len(logged(tmp_path)) == 4


def test_one_step_is_measured_once(tmp_path):
    trainer(tmp_path, LipschitzMonitor(every_n_train_steps=STEPS)).fit(Classifier(), loader())
    assert len(logged(tmp_path)) == 2


def test_every_second_epoch(tmp_path):
    trainer(tmp_path, LipschitzMonitor(every_n_epochs=2), max_epochs=4).fit(Classifier(), loader())
    assert [step for step, _ in logged(tmp_path)] == [2 * STEPS - 1, 4 * STEPS - 1]


def test_fast_dev_run_measures_once(tmp_path):
    monitor = LipschitzMonitor(every_n_epochs=5, every_n_train_steps=1)
    trainer(tmp_path, monitor, fast_dev_run=3).fit(Classifier(), loader(), loader())
    assert monitor.last is not None
    assert monitor.state_dict()["measured_step"] == 3
    assert monitor.state_dict()["triggered_step"] == 0


def test_barebones_measures_nothing():
    monitor = LipschitzMonitor()
    run = Trainer(barebones=True, callbacks=[monitor], max_epochs=1, accelerator="cpu")
    with pytest.warns(UserWarning, match="measures nothing"):
        run.fit(Classifier(), loader())
    assert monitor.last is None


@pytest.mark.parametrize("at_epoch_end", [True, False, None])
def test_early_stopping_sees_the_bound(tmp_path, at_epoch_end):
    stop = EarlyStopping("lipschitz/upper", mode="min", divergence_threshold=1e-6, check_on_train_epoch_end=at_epoch_end)
    run = trainer(tmp_path, stop, LipschitzMonitor(every_n_epochs=3), max_epochs=5)
    run.fit(Classifier(), loader(), loader())
    assert run.current_epoch == 1
    assert stop.stopped_epoch == 0


@pytest.mark.parametrize(("options", "looks"), [({}, 1), ({"check_val_every_n_epoch": 2}, 2), ({"val_check_interval": 0.5}, 1)])
def test_model_checkpoint_keeps_the_smoothest(tmp_path, options, looks):
    best = ModelCheckpoint(
        tmp_path, "{epoch}-{lipschitz/upper:.2f}", "lipschitz/upper", mode="min", auto_insert_metric_name=False
    )
    run = trainer(tmp_path, best, LipschitzMonitor(), max_epochs=4, **options)
    run.fit(Classifier(), loader(), loader())
    assert Path(best.best_model_path).is_file()
    seen = [value for step, value in logged(tmp_path) if (step + 1) % (looks * STEPS) == 0 or options.get("val_check_interval")]
    assert float(best.best_model_score) == min(seen)


def test_time_is_accounted(tmp_path):
    monitor = LipschitzMonitor()
    trainer(tmp_path, monitor).fit(Classifier(), loader())
    assert monitor.measuring_seconds == pytest.approx(sum(v for _, v in logged(tmp_path, "lipschitz/seconds")), rel=0.5)
    assert monitor.overhead == monitor.measuring_seconds / monitor.training_seconds


# What it leaves alone.


def test_training_is_bit_identical_with_and_without(tmp_path):
    def fit(*callbacks):
        seed_everything(3, verbose=False)
        module = Classifier(dropout=0.3)
        trainer(tmp_path, *callbacks, max_epochs=3).fit(module, loader(shuffle=True), loader())
        weights = [parameter.detach().clone() for parameter in module.parameters()]
        numpy = np.random.get_state()[1]  # noqa: NPY002 - Lightning seeds the global generator
        return weights, torch.get_rng_state(), numpy, random.getstate(), module.training

    plain, watched = fit(), fit(LipschitzMonitor(every_n_train_steps=1))
    assert all(torch.equal(a, b) for a, b in zip(plain[0], watched[0], strict=True))
    assert torch.equal(plain[1], watched[1])
    assert np.array_equal(plain[2], watched[2])
    assert plain[3:] == watched[3:]


def test_gradients_and_modes_are_left(tmp_path):
    class Probe(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert pl_module.training
            assert all(parameter.grad is not None and parameter.requires_grad for parameter in pl_module.parameters())

    trainer(tmp_path, LipschitzMonitor(every_n_train_steps=1, on_failure="raise"), Probe()).fit(Classifier(), loader())


def test_resume_continues_the_state(tmp_path):
    class Interrupt(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.should_stop = True

    monitor = LipschitzMonitor()
    run = trainer(tmp_path, monitor, Interrupt(), max_epochs=4)
    run.fit(Classifier(), loader())
    run.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"][monitor.state_key]
    assert saved["tracker"] is not None

    resumed = LipschitzMonitor(on_failure="raise")
    seen = []

    class Restored(Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append(resumed.state_dict())

    trainer(tmp_path / "b", resumed, Restored(), max_epochs=4).fit(Classifier(), loader(), ckpt_path=tmp_path / "last.ckpt")
    assert seen[0]["measured_step"] == saved["measured_step"] == 2 * STEPS
    assert _equal(seen[0]["tracker"], saved["tracker"])
    assert [step for step, _ in logged(tmp_path / "b")] == [3 * STEPS - 1, 4 * STEPS - 1]


def _equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return a == b or (a != a and b != b)


def test_a_second_training_measures_its_own_module(tmp_path):
    monitor = LipschitzMonitor(on_failure="raise")
    for _ in range(2):
        module = Classifier()
        trainer(tmp_path, monitor, max_epochs=1).fit(module, loader())
        product = math.prod(float(torch.linalg.matrix_norm(module.net[i].weight.detach().double(), 2)) for i in (0, 3, 5))
        assert monitor.last.spectral.value == pytest.approx(product, rel=1e-6)


# Bad input and failures.


class Poison(Callback):
    """Makes a weight nan after the second epoch's last step, and heals it an epoch later."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        weight = pl_module.net[0].weight.data
        if trainer.global_step == 2 * STEPS:
            weight[0, 0] = math.nan
        if trainer.global_step == 2 * STEPS + 1:
            pl_module.net.load_state_dict(nn.Sequential(*Classifier().net).state_dict())


def test_nan_weights_are_counted_and_training_goes_on(tmp_path):
    run = trainer(tmp_path, Poison(), LipschitzMonitor(), max_epochs=4)
    with pytest.warns(UserWarning, match=r"logged no bound: InvalidModel: .*nan.*lipschitz/failed") as caught:
        run.fit(Classifier(), loader())
    assert run.current_epoch == 4
    assert sum("logged no bound" in str(warning.message) for warning in caught) == 1
    assert [step for step, _ in logged(tmp_path)] == [STEPS - 1, 3 * STEPS - 1, 4 * STEPS - 1]
    assert [value for _, value in logged(tmp_path, "lipschitz/failed")] == [0, 1, 1, 1]
    for key in ("upper", "lower", "gap"):
        assert all(math.isfinite(value) for _, value in logged(tmp_path, f"lipschitz/{key}"))


class WithoutRule(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)


def test_unsupported_layer(tmp_path):
    module = Classifier(activation=WithoutRule())
    with pytest.warns(UserWarning, match="UnsupportedLayer"):
        trainer(tmp_path, LipschitzMonitor()).fit(module, loader())
    assert [value for _, value in logged(tmp_path, "lipschitz/failed")] == [1, 2]
    assert logged(tmp_path) == []
    with pytest.raises(UnsupportedLayer):
        trainer(tmp_path, LipschitzMonitor(on_failure="raise")).fit(module, loader())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="LipschitzMonitor")
        trainer(tmp_path, LipschitzMonitor(on_failure="ignore")).fit(module, loader())


def test_any_numerical_trouble_is_survived(tmp_path, monkeypatch):
    def collapse(*args, **kwargs):
        raise RuntimeError("linalg.eigh: did not converge")

    monkeypatch.setattr("lipguard.bounds.tracker.Tracker.update", collapse)
    with pytest.warns(UserWarning, match="RuntimeError: linalg.eigh: did not converge"):
        trainer(tmp_path, LipschitzMonitor()).fit(Classifier(), loader())
    assert [value for _, value in logged(tmp_path, "lipschitz/failed")] == [1, 2]


@pytest.mark.parametrize(("pair", "message"), [((math.inf, 1.0), "not finite"), ((1.0, 2.0), "Contradiction")])
def test_no_false_value_is_ever_logged(tmp_path, monkeypatch, pair, message):
    monkeypatch.setattr("lipguard.bounds.tracker.Tracker.update", lambda *args, **kwargs: pair)
    with pytest.warns(UserWarning, match=message):
        trainer(tmp_path, LipschitzMonitor()).fit(Classifier(), loader())
    assert logged(tmp_path) == []


@pytest.mark.parametrize("options", [{"method": "no-such-method"}, {"norm": 3}, {"submodule": "net.nowhere"}])
def test_names_that_do_not_exist(tmp_path, options):
    with pytest.raises(LipguardError):
        trainer(tmp_path, LipschitzMonitor(on_failure="raise", **options)).fit(Classifier(), loader())


def test_example_of_the_wrong_shape(tmp_path):
    with pytest.raises(InvalidExample):
        trainer(tmp_path, LipschitzMonitor(on_failure="raise", example=torch.zeros(1, 5))).fit(Classifier(), loader())


def test_nan_weights_raise_on_request(tmp_path):
    with pytest.raises(InvalidModel, match="nan"):
        trainer(tmp_path, Poison(), LipschitzMonitor(on_failure="raise"), max_epochs=3).fit(Classifier(), loader())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_epochs": 0}, "every_n_epochs=0"),
        ({"every_n_epochs": None}, "never measure"),
        ({"max_overhead": -0.1}, "max_overhead"),
        ({"on_failure": "explode"}, "on_failure"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(UnsupportedQuery, match=message):
        LipschitzMonitor(**options)


# Lightning's other doors.


def test_two_monitors(tmp_path):
    with pytest.raises(RuntimeError, match="state_key"):
        trainer(tmp_path, LipschitzMonitor(), LipschitzMonitor(method="spectral"))
    run = trainer(tmp_path, LipschitzMonitor(), LipschitzMonitor(method="spectral", prefix="product"), max_epochs=1)
    run.fit(Classifier(), loader())
    assert run.callback_metrics["lipschitz/upper"] <= run.callback_metrics["product/upper"] * (1 + 2**-22)


def test_lightning_cli_builds_it_from_text(tmp_path):
    cli = LightningCLI(
        Classifier,
        run=False,
        save_config_callback=None,
        args=[
            "--trainer.callbacks+=lipguard.LipschitzMonitor",
            "--trainer.callbacks.norm=.inf",
            "--trainer.callbacks.every_n_train_steps=10",
            "--trainer.callbacks.max_overhead=0.05",
            '--trainer.callbacks.domain={"class_path": "lipguard.Box", "init_args": {"lower": 0.0, "upper": 1.0}}',
            "--trainer.accelerator=cpu",
            "--trainer.logger=false",
        ],
    )
    monitor = next(callback for callback in cli.trainer.callbacks if isinstance(callback, LipschitzMonitor))
    assert (monitor.norm, monitor.every_n_train_steps, monitor.max_overhead) == (math.inf, 10, 0.05)
    assert isinstance(monitor.domain, Box)


_SCRIPT = """
import json, sys, warnings
{first}
{second}
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
warnings.simplefilter("ignore")

class Toy(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
        self.example_input_array = torch.zeros(1, 3)
    def forward(self, x):
        return self.net(x)
    def training_step(self, batch, batch_idx):
        return self(batch[0]).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
    def on_train_epoch_end(self):
        pass

class Report(pl.Callback):
    def on_train_end(self, trainer, pl_module):
        value = float(trainer.callback_metrics["lipschitz/upper"])
        open(sys.argv[1] + str(trainer.global_rank), "w").write(json.dumps(value))

if __name__ == "__main__":
    torch.manual_seed(0)
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[LipschitzMonitor(on_failure="raise"), Report()], {options})
    trainer.fit(Toy(), DataLoader(TensorDataset(torch.randn(16, 3)), batch_size=4))
    assert isinstance(LipschitzMonitor(), pl.Callback)
"""


def _run_script(folder: Path, first: str, second: str, options: str = "") -> list[float]:
    script = folder / "script.py"
    script.write_text(textwrap.dedent(_SCRIPT).format(first=first, second=second, options=options))
    done = subprocess.run([sys.executable, script, folder / "rank"], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank*"))]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("import pytorch_lightning as pl", "from lipguard import LipschitzMonitor"),
        ("from lipguard import LipschitzMonitor", "import pytorch_lightning as pl"),
        ("sys.modules['lightning'] = None; import pytorch_lightning as pl", "from lipguard import LipschitzMonitor"),
    ],
    ids=["trainer first", "monitor first", "lightning not installed"],
)
def test_pytorch_lightning_family(tmp_path, first, second):
    assert len(_run_script(tmp_path, first, second)) == 1


def test_every_rank_logs_the_same_value(tmp_path):
    options = "devices=2, strategy='ddp_fork'"
    values = _run_script(tmp_path, "import lightning.pytorch as pl", "from lipguard import LipschitzMonitor", options)
    assert len(values) == 2
    assert values[0] == values[1]
