"""kill -9 at random moments: every checkpoint keeps a finished or resumable audit, and no record is ever truncated."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lipguard.audit import read_record, record_path, verify_record
from lipguard.audit.pending import finish, pending_in, pending_path, up_to_date

SCRIPT = """
import sys, warnings
import torch
warnings.simplefilter("ignore")
import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lipguard import Box, CheckpointAuditor

class Net(pl.LightningModule):
    example_input_array = torch.zeros(1, 3)
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(3, 6), torch.nn.BatchNorm1d(6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
    def forward(self, x):
        return self.net(x)
    def training_step(self, batch, batch_idx):
        return (self(batch) - 1).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)

folder, epochs = sys.argv[1], int(sys.argv[2])
auditor = CheckpointAuditor(domain=Box(-1.0, 1.0), method="enumeration", time_limit=20)
saves = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_last=True)
run = pl.Trainer(max_epochs=epochs, callbacks=[auditor, saves], logger=False, accelerator="cpu", enable_progress_bar=False,
                 enable_model_summary=False)
print("ready", flush=True)
run.fit(Net(), torch.utils.data.DataLoader(torch.rand(64, 3), batch_size=8), ckpt_path="last" if len(sys.argv) > 3 else None)
print("done", flush=True)
"""


def started(folder: Path, epochs: int, *more: str) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)  # a training killed early has not made it yet
    script = folder.with_suffix(".py")
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, script, folder, str(epochs), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
    )
    assert process.stdout.readline().strip() == "ready", process.stderr.read()
    return process


def workers_of(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()[1:]]
    return [int(row[0]) for row in rows if int(row[1]) == pid and "lipguard.audit.worker" in row[2]]


def orphans(pid: int) -> list[str]:
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if f"lipguard.audit.worker {pid}" in line]


def check_all_covered(folder: Path) -> tuple[int, int]:
    """(finished, pending): every record is whole, every checkpoint has a record of its present version or a marker."""
    for record in folder.glob("*.lipguard.json"):
        read_record(record)
    finished = pending = 0
    for path in folder.glob("*.ckpt"):
        if up_to_date(path) is not None:
            finished += 1
        else:
            assert pending_path(path).exists(), f"{path.name} has neither record nor marker"
            pending += 1
    return finished, pending


def check_resumed(folder: Path) -> None:
    """After resuming, every checkpoint has a verified record and nothing else lies about."""
    for marker in pending_in([folder]):
        finish(marker)
    paths = sorted(folder.glob("*.ckpt"))
    for path in paths:
        verify_record(read_record(record_path(path)), path)
    names = sorted([p.name for p in paths] + [record_path(p).name for p in paths])
    left = [p.name for p in folder.iterdir() if ".lipguard." in p.name or p.suffix == ".ckpt"]
    # A kill before the first marker of a checkpoint leaves a file of its writing, which goes after an hour.
    markers = [n for n in left if n.endswith(".tmp") and not any(n.startswith(f".{p.name}.") for p in paths)]
    assert sorted(set(left) - set(markers)) == names
    assert len(markers) <= 1


def kill_training(folder: Path, seconds: float) -> tuple[int, int]:
    process = started(folder, 1000)
    time.sleep(seconds)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while orphans(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert orphans(process.pid) == []
    covered = check_all_covered(folder)
    check_resumed(folder)
    return covered


def kill_worker(folder: Path, seconds: float) -> None:
    process = started(folder, 12)
    deadline = time.monotonic() + 30
    time.sleep(seconds)
    while process.poll() is None and time.monotonic() < deadline:
        for worker in workers_of(process.pid)[:1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
            deadline = 0
        time.sleep(0.02)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "done" in out
    assert check_all_covered(folder)[1] == 0
    check_resumed(folder)


@pytest.mark.parametrize("seconds", [0.3, 2.2])
def test_training_killed(tmp_path, seconds):
    finished, pending = kill_training(tmp_path / "saved", seconds)
    assert finished + pending > 0 or seconds < 1


def test_worker_killed(tmp_path):
    kill_worker(tmp_path / "saved", 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_random(tmp_path, seed):
    chance = random.Random(seed)
    if seed % 4 == 3:
        kill_worker(tmp_path / "saved", chance.uniform(0.0, 3.0))
        return
    kill_training(tmp_path / "saved", chance.uniform(0.0, 6.0))


@pytest.mark.slow
def test_a_killed_training_is_resumed_by_the_next(tmp_path):
    folder = tmp_path / "saved"
    process = started(folder, 1000)
    while len(list(folder.glob("*.ckpt"))) < 3:
        time.sleep(0.05)
    process.kill()
    process.wait()
    done = len(list(folder.glob("epoch=*.ckpt")))
    process = started(folder, done + 2, "resume")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "done" in out
    assert not list(folder.glob("*.pending.json"))
    check_resumed(folder)
