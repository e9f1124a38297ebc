"""CheckpointAuditor: which checkpoints it audits, what it logs, what it leaves alone, and how it fails."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from test_monitor import STEPS, Classifier, WithoutRule, loader, logged, trainer

from lipguard import Box, CheckpointAuditor, capture
from lipguard.audit import read_record, record_path, verify_record
from lipguard.audit.pending import fail, pending_path
from lipguard.audit.pool import Pool
from lipguard.errors import InvalidDomain, LimitExceeded, UnknownName, UnsupportedQuery

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*number of training batches"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec."),
    pytest.mark.filterwarnings("ignore:.*You defined a `validation_step`"),
]

BOX = Box(-1.0, 1.0)


def auditor(**options) -> CheckpointAuditor:
    return CheckpointAuditor(**{"domain": BOX, "time_limit": 10.0, "method": "bounds", **options})


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def digest_of(weights: dict[str, torch.Tensor]) -> str:
    module = Classifier()
    module.load_state_dict(weights)
    return capture(module, torch.zeros(1, 4)).digest


def audited(path: Path) -> str:
    """The digest of the network that the intact record beside a checkpoint is about; it is the checkpoint's own."""
    record = read_record(record_path(path))
    found = verify_record(record, path)
    assert found.lower <= found.upper
    assert record.network["digest"] == digest_of(torch.load(path, weights_only=True)["state_dict"])
    return record.network["digest"]


def workers() -> list[str]:
    """Processes at work for this one."""
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if f"lipguard.audit.worker {os.getpid()}" in line]


# Which checkpoints.


def test_top_k_last_and_manual_saves_are_audited(tmp_path):
    class Manual(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "by hand" / "two.ckpt", weights_only=True)

    folder, watch = tmp_path / "saved", auditor(method="enumeration")
    best = ModelCheckpoint(folder, "{epoch}", "accuracy", save_last=True, save_top_k=2)
    run = trainer(tmp_path, watch, best, Manual(), max_epochs=4)
    run.fit(Classifier(), loader(), loader())
    assert workers() == []
    kept = sorted(folder.glob("*.ckpt"))
    assert len(kept) == 3
    assert files(folder) == sorted([p.name for p in kept] + [record_path(p).name for p in kept])
    assert [audited(path) for path in kept]
    audited(tmp_path / "by hand" / "two.ckpt")
    assert read_record(record_path(tmp_path / "by hand" / "two.ckpt")).step == 2
    # Values are logged at the step of the save, outward.
    rows = dict(logged(tmp_path, "lipschitz/audit/upper"))
    for record in watch.records.values():
        assert record.upper <= rows[record.step] <= record.upper * (1 + 2**-23)
    assert {value for _, value in logged(tmp_path, "lipschitz/audit/status")} == {0.0}
    steps = {step for step, _ in logged(tmp_path, "lipschitz/audit/lower")}
    assert all(r.enclosure["claimed_upper"] <= r.lower * (1 + 1e-6) for r in watch.records.values())
    assert steps >= {record.step for record in watch.records.values()} >= {2, STEPS}
    # A save after the training is audited as well, before save_checkpoint returns.
    run.save_checkpoint(tmp_path / "late.ckpt")
    audited(tmp_path / "late.ckpt")
    assert workers() == []


@pytest.mark.filterwarnings("ignore:.*configure_model")
def test_averaged_weights_and_asynchronous_saves(tmp_path):
    watch = auditor()
    ema = EMAWeightAveraging(decay=0.9)
    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
    run = trainer(tmp_path, watch, ema, saves, plugins=[AsyncCheckpointIO()])
    run.fit(Classifier(), loader())
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) == 2
    for path in paths:
        payload = torch.load(path, weights_only=True)
        assert audited(path) != digest_of(payload["current_model_state"])
    assert not list(tmp_path.glob("*.pending.json"))


def test_every_second_save_and_a_stale_record(tmp_path):
    watch = auditor(every_n_checkpoints=2)
    saves = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_last=True)
    trainer(tmp_path, watch, saves, max_epochs=3).fit(Classifier(), loader())
    # last.ckpt was audited after the second epoch and then replaced by a version that is not: its record is gone.
    assert [name for name in files(tmp_path) if name.endswith(".lipguard.json")] == ["epoch=1.ckpt.lipguard.json"]


def test_fast_dev_run_does_nothing(tmp_path):
    watch = auditor()
    run = trainer(tmp_path, watch, fast_dev_run=True)
    run.fit(Classifier(), loader(), loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert files(tmp_path) == ["a.ckpt"]


def test_a_linear_constant_by_formula(tmp_path):
    watch = auditor(submodule="net.0", norm=float("inf"), example=torch.zeros(1, 4))
    trainer(tmp_path, watch, ModelCheckpoint(tmp_path, "a"), max_epochs=1).fit(Classifier(example=False), loader())
    weight = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]["net.0.weight"].double()
    # The constant of x -> W x + b from l-infinity to l-infinity is the largest absolute row sum.
    assert watch.records[tmp_path / "a.ckpt"].upper == pytest.approx(float(weight.abs().sum(1).max()), rel=1e-12)


# What it leaves alone.


def test_training_is_bit_identical_with_and_without(tmp_path):
    def fit(name, *callbacks):
        seed_everything(3, verbose=False)
        module = Classifier(dropout=0.3)
        saves = ModelCheckpoint(tmp_path / name, every_n_train_steps=1, save_top_k=-1)
        trainer(tmp_path / name, *callbacks, saves, max_epochs=2).fit(module, loader(shuffle=True), loader())
        return [parameter.detach().clone() for parameter in module.parameters()], torch.get_rng_state(), module.training

    watch = auditor()
    plain, watched = fit("a"), fit("b", watch)
    assert all(torch.equal(a, b) for a, b in zip(plain[0], watched[0], strict=True))
    assert torch.equal(plain[1], watched[1])
    assert plain[2] == watched[2]
    assert len(watch.records) == 2 * STEPS
    assert watch.preparing_seconds < 0.5 * len(watch.records)  # the training waits for the capture only, milliseconds each


def test_a_failing_training_leaves_no_process_and_the_next_one_finishes(tmp_path):
    class Fault(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                raise RuntimeError("out of coffee")

    saves = {"filename": "{epoch}", "save_top_k": -1, "save_on_exception": False}
    with pytest.raises(RuntimeError, match="out of coffee"):
        trainer(tmp_path, auditor(), ModelCheckpoint(tmp_path, **saves), Fault()).fit(Classifier(), loader())
    assert workers() == []
    first = tmp_path / "epoch=0.ckpt"
    assert record_path(first).exists() or pending_path(first).exists()
    second = auditor()
    trainer(tmp_path, second, ModelCheckpoint(tmp_path, **saves), max_epochs=2).fit(Classifier(), loader(), ckpt_path=first)
    audited(first)
    audited(tmp_path / "epoch=1.ckpt")
    assert not list(tmp_path.glob("*.pending.json"))
    assert second.state_dict()["saves"] == 2


# The limit.


def test_a_violation_warns_and_says_whether_it_is_certain(tmp_path):
    certain, undecided = auditor(max_lipschitz=1e-3), auditor()
    with pytest.warns(UserWarning, match=r"at least .*, exceeds the limit 0\.001"):
        trainer(tmp_path, certain, ModelCheckpoint(tmp_path, "a"), max_epochs=1).fit(Classifier(), loader())
    record = certain.records[tmp_path / "a.ckpt"]
    undecided.max_lipschitz = (record.lower + record.upper) / 2
    with pytest.warns(UserWarning, match=r"in \[.*\] is not shown to keep to .*: undecided"):
        undecided._judge(record)
    undecided.max_lipschitz = record.upper
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        undecided._judge(record)


class Patience(Callback):
    """Gives the worker time to answer before the training is over."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        time.sleep(0.02)


def test_a_violation_stops_the_training(tmp_path):
    watch = auditor(max_lipschitz=1e-3, on_violation="stop")
    run = trainer(tmp_path, watch, Patience(), ModelCheckpoint(tmp_path, "a"), max_epochs=150)
    with pytest.warns(UserWarning, match="exceeds the limit"):
        run.fit(Classifier(), loader())
    assert run.current_epoch < 150


def test_a_violation_raises(tmp_path):
    watch = auditor(max_lipschitz=1e-3, on_violation="raise")
    with pytest.raises(LimitExceeded, match=r"a\.ckpt.*exceeds the limit"):
        trainer(tmp_path, watch, ModelCheckpoint(tmp_path, "a"), max_epochs=1).fit(Classifier(), loader())
    assert workers() == []


# Bad input and failures.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"domain": Box(1.0, 0.0)}, InvalidDomain, "empty"),
        ({"method": "magic"}, UnknownName, "magic"),
        ({"solver": "magic"}, UnknownName, "magic"),
        ({"max_workers": 0}, UnsupportedQuery, "max_workers"),
        ({"every_n_checkpoints": 0}, UnsupportedQuery, "every_n_checkpoints"),
        ({"on_violation": "cry"}, UnsupportedQuery, "on_violation"),
        ({"max_lipschitz": float("nan")}, UnsupportedQuery, "max_lipschitz"),
    ],
)
def test_arguments_without_meaning_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        auditor(**options)


def test_two_auditors_are_refused(tmp_path):
    with pytest.raises(UnsupportedQuery, match="same <checkpoint>"):
        trainer(tmp_path, auditor(), auditor(prefix="b")).fit(Classifier(), loader())


@pytest.mark.parametrize(
    ("module", "options", "reason"),
    [
        (lambda: Classifier(activation=WithoutRule()), {}, "UnsupportedLayer"),
        (lambda: Classifier(activation=torch.nn.Tanh()), {"method": "auto"}, "not piecewise|piecewise linear"),
        (Classifier, {"domain": Box([0.0, 0.0], [1.0, 1.0])}, "network has 4 inputs"),
        (lambda: Classifier(example=False), {"example": torch.zeros(1, 5)}, "InvalidExample"),
    ],
    ids=["no rule", "smooth", "dimension", "example"],
)
def test_a_failure_is_recorded_and_the_training_goes_on(tmp_path, module, options, reason):
    watch = auditor(**options)
    run = trainer(tmp_path, watch, ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), max_epochs=2)
    with pytest.warns(UserWarning, match="CheckpointAuditor") as caught:
        run.fit(module(), loader())
    assert run.current_epoch == 2
    record = read_record(record_path(tmp_path / "epoch=1.ckpt"))
    assert any(part in record.failure for part in reason.split("|")), record.failure
    assert record.status == ("bounds only" if "method" in options else "failed")
    assert logged(tmp_path, "lipschitz/audit/status")[-1][1] == record.code
    assert sum(str(w.message).startswith("CheckpointAuditor") for w in caught) <= 2  # once of a kind, not once a save


def test_a_worker_that_dies_twice_is_a_recorded_failure(tmp_path, monkeypatch):
    monkeypatch.setattr("lipguard.audit.pool.sys.executable", "/bin/false")
    watch = auditor()
    with pytest.warns(UserWarning, match="ended by itself"):
        trainer(tmp_path, watch, ModelCheckpoint(tmp_path, "a"), max_epochs=1).fit(Classifier(), loader())
    record = read_record(record_path(tmp_path / "a.ckpt"))
    assert record.status == "failed"
    assert "ended by itself (exit code 1)" in record.failure


def test_an_audit_beyond_its_time_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("lipguard.audit.pool.GRACE", 0.0)
    watch = auditor(time_limit=0.05)  # shorter than the start of a process
    with pytest.warns(UserWarning, match="did not end within"):
        trainer(tmp_path, watch, ModelCheckpoint(tmp_path, "a"), max_epochs=1).fit(Classifier(), loader())
    assert read_record(record_path(tmp_path / "a.ckpt")).status == "failed"
    assert workers() == []


def test_sharded_strategies_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr("lipguard.callbacks.auditor.bypassed", lambda trainer: "FSDPStrategy")
    with pytest.warns(UserWarning, match="FSDPStrategy shards the network.*lipguard audit --model"):
        trainer(tmp_path, auditor(), ModelCheckpoint(tmp_path, "a"), max_epochs=1).fit(Classifier(), loader())
    assert "a.ckpt" in files(tmp_path)
    assert not list(tmp_path.glob("*lipguard*"))


def test_a_pool_without_work_starts_nothing():
    pool = Pool(3)
    pool.wait(0.1)
    assert pool.collect() == []
    pool.close()
    with pytest.raises(Exception, match="damaged"):
        fail(Path("absent.ckpt.lipguard.pending.json"), "no reason")


# Settings.


def test_lightning_cli_builds_it(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        textwrap.dedent(
            """
            trainer:
              accelerator: cpu
              callbacks:
                - class_path: lipguard.CheckpointAuditor
                  init_args:
                    domain: {class_path: lipguard.Box, init_args: {lower: 0.0, upper: 1.0}}
                    max_lipschitz: 10
                    on_violation: stop
            """
        )
    )
    cli = LightningCLI(Classifier, run=False, args=["--config", str(config)], save_config_callback=None)
    (watch,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, CheckpointAuditor)]
    assert watch.options.domain.upper == 1.0
    assert watch.on_violation == "stop"


def test_state_keys_are_unique():
    Trainer(callbacks=[auditor(prefix="a")], logger=False, accelerator="cpu")
    assert auditor(prefix="a").state_key != auditor(prefix="b").state_key


def test_pytorch_lightning(tmp_path):
    code = f"""
        import torch, pytorch_lightning as pl
        from lipguard import Box, CheckpointAuditor
        class Net(pl.LightningModule):
            example_input_array = torch.zeros(1, 3)
            def __init__(self):
                super().__init__()
                self.net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
            def forward(self, x):
                return self.net(x)
            def training_step(self, batch, batch_idx):
                return self(batch).square().mean()
            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.01)
        # No `if __name__ == "__main__"`: a worker that imported this script would train again.
        auditor = CheckpointAuditor(domain=Box(0.0, 1.0), method="bounds", max_workers=2)
        saves = pl.callbacks.ModelCheckpoint({str(tmp_path)!r}, "{{epoch}}", save_top_k=-1)
        run = pl.Trainer(max_epochs=2, callbacks=[auditor, saves], logger=False, accelerator="cpu", enable_progress_bar=False)
        run.fit(Net(), torch.utils.data.DataLoader(torch.rand(8, 3)))
        print(len(auditor.records))
    """
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(code))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("2")
    assert len(list(tmp_path.glob("*.lipguard.json"))) == 2
