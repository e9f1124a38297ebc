"""An ONNX model stands on the command line wherever a checkpoint with its class does."""

import json
from pathlib import Path
from typing import Any

import onnx
import onnx_graphs as graphs
import pytest
import torch

import lipguard as lg
from lipguard.cli.main import main


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    onnx.save(graphs.policy().model, "net.onnx")
    return tmp_path


def answer(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, Any]:
    code = main([*options, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_bound_and_exact_and_certify(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = lg.from_onnx("net.onnx")
    code, found = answer(capsys, "bound", "net.onnx", "--norm", "inf", "--domain", "box:-1,1")
    assert code == 0 and found["value"] == lg.bound(module, norm="inf", domain=lg.Box(-1, 1)).value
    onnx.save(graphs.acasxu().model, "acas.onnx")
    code, found = answer(capsys, "exact", "acas.onnx", "--time-limit", "1", "--domain", "ball:0.001")
    assert found["lower"] <= found["upper"] and found["rigor"] == "verified"
    torch.save(
        {
            "samples": torch.zeros(1, 1, 1, 5),
            "labels": torch.tensor([int(lg.from_onnx("acas.onnx")(torch.zeros(1, 1, 1, 5)).argmax())]),
        },
        "data.pt",
    )
    code, found = answer(capsys, "certify", "acas.onnx", "--data", "data.pt", "--eps", "1e-6", "--method", "spectral")
    assert (code, found["certified_accuracy"]) == (0, 1.0)


def test_audit_and_verify_are_tied_to_the_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = answer(capsys, "audit", "net.onnx", "--method", "bounds", "--time-limit", "5")
    assert (code, found["audits"][0]["state"]) == (0, "audited")
    assert main(["verify", "net.onnx"]) == 0
    other = graphs.policy().model
    weight = other.graph.initializer[0]
    weight.CopyFrom(onnx.numpy_helper.from_array(2 * onnx.numpy_helper.to_array(weight), weight.name))
    onnx.save(other, "net.onnx")
    assert main(["verify", "net.onnx"]) == 1


def test_an_open_shape_is_typed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    g = graphs.Graph(("x", ["N", 1, "h", "w"]))
    onnx.save(g.model(g.add("GlobalAveragePool", g.conv("x", 1, 2, 3))), "open.onnx")
    code, found = answer(capsys, "bound", "open.onnx")
    assert code == 2 and "--input-shape" in found["error"]["message"]
    code, found = answer(capsys, "bound", "open.onnx", "--input-shape", "1,1,5,5")
    assert code == 0


def test_one_of_several_inputs_is_chosen(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    g = graphs.Graph(("x", ["N", 4]), ("context", ["N", 3]))
    onnx.save(g.model(g.dense(g.add("Concat", "x", "context", axis=1), 7, 3)), "two.onnx")
    notes = {}
    for options in ([], ["--inputs", "x"], ["--inputs", "context,x"]):
        code, found = answer(capsys, "bound", "two.onnx", *options)
        assert code == 0
        notes[found["note"]] = found["value"]
    assert list(notes) == ["with respect to x, context jointly", "with respect to x", "with respect to context, x jointly"]


def test_refusals_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.onnx").write_bytes(b"\x93garbage" * 9)
    for name, words in (("none.onnx", "is not a file"), ("bad.onnx", "bad.onnx")):
        code, found = answer(capsys, "bound", name)
        assert code == 2 and words in found["error"]["message"]
