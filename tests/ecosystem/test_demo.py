"""The demonstration, shortened: what it shows and what it leaves behind."""

from __future__ import annotations

import csv
import io

import pytest
import torch
from rich.console import Console

from lipguard.cli import demo
from lipguard.cli.main import main


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    screen = io.StringIO()
    return demo.run(3, folder, Console(file=screen, width=100)), folder, screen.getvalue()


def test_every_epoch_is_measured(outcome):
    epochs, _, _ = outcome
    assert [epoch.number for epoch in epochs] == [1, 2, 3]
    assert all(0 < epoch.lower <= epoch.upper <= epoch.spectral * (1 + 1e-9) for epoch in epochs)
    assert epochs[-1].accuracy > 0.8


def test_the_folder_holds_log_checkpoint_and_plot(outcome):
    epochs, folder, _ = outcome
    with (folder / "metrics.csv").open() as file:
        uppers = [float(row["lipschitz/upper"]) for row in csv.DictReader(file) if row["lipschitz/upper"]]
    assert uppers == pytest.approx([epoch.upper for epoch in epochs], rel=2**-23)
    assert (folder / "bounds.png").read_bytes().startswith(b"\x89PNG")
    assert torch.load(folder / "digits.ckpt", weights_only=True)["hyper_parameters"]["width"] == 128


def test_the_screen_shows_bounds_and_the_table(outcome):
    _, _, screen = outcome
    for text in ("accuracy", "≤ L ≤", "LipSDP", "product of spectral norms", "witnessed lower bound", "share of training time"):
        assert text in screen
    assert "litlogger" not in screen


def test_the_checkpoint_is_bounded_again_by_the_printed_command(outcome, capsys):
    epochs, folder, screen = outcome
    assert "--model lipguard.cli.demo.DigitsClassifier" in screen
    assert (
        main(["bound", str(folder / "digits.ckpt"), "--model", "lipguard.cli.demo.DigitsClassifier", "--method", "spectral"]) == 0
    )
    assert f"{epochs[-1].spectral:.4f}"[:5] in capsys.readouterr().out


def test_bad_epochs(capsys):
    assert main(["demo", "--epochs", "0"]) == 2
    assert "--epochs 0" in capsys.readouterr().err
