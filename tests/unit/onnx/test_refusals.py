"""What is not read is refused by the node's name, with what would work; what differs from onnxruntime is never returned."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphs as graphs
import pytest
import torch
from onnx import TensorProto, helper
from test_operators import IMAGE, ROW, model

import lipguard as lg
from lipguard import errors
from lipguard.onnx import comparison
from lipguard.onnx.operators import pooling, table


def test_an_unknown_operator_is_named_and_the_graph_may_end_before_it() -> None:
    g = graphs.Graph(("x", ["N", 4]))
    inner = g.dense("x", 4, 3)
    made = g.model(g.add("Det", g.add("Reshape", inner, g.hold([0, 1, 3]))))
    with pytest.raises(errors.UnsupportedLayer, match=r"node 'Det_2' \(Det, opset 13\).*outputs='reshape1'.*Gemm.*Relu") as found:
        lg.from_onnx(made)
    assert "from_onnx(file, outputs=" in str(found.value)
    assert lg.bound(lg.from_onnx(made, outputs="reshape1"), method="spectral").value > 0


def test_another_domain_and_a_graph_within() -> None:
    g = graphs.Graph(("x", ["N", 4]))
    made = g.model(g.add("Relu", "x", domain="com.example"))
    with pytest.raises(errors.UnsupportedLayer, match=r"node 'Relu_0' \(Relu of the domain 'com\.example'"):
        lg.from_onnx(made)
    g = graphs.Graph(("x", ["N", 4]))
    branch = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "b", [], [helper.make_empty_tensor_value_info("y")])
    made = g.model(g.add("If", g.hold(1), then_branch=branch, else_branch=branch))
    with pytest.raises(errors.UnsupportedLayer, match=r"node 'If_0' \(If\) runs a graph of its own"):
        lg.from_onnx(made)


ROWS: dict[str, tuple[Any, str]] = {
    "attribute": (model("Relu", 13, ROW, [], {"slope": 1.0}), r"'Relu_0'.*attributes that have no reading.*slope"),
    "training": (
        model("BatchNormalization", 14, IMAGE, [np.ones(3)] * 4, {"training_mode": 1}), r"'BatchNormalization_0'.*evaluation mode"
    ),
    "dropout": (model("Dropout", 13, ROW, [np.float32(0.5), np.array(True)], {}), r"'Dropout_0'.*at random"),
    "dropout of opset 6": (model("Dropout", 6, ROW, [], {"ratio": 0.5}), r"is_test is 0"),
    "cubic": (model("Resize", 13, IMAGE, [None, np.array([1.0, 1, 2, 2])], {"mode": "cubic"}), r"'Resize_0'.*nearest and linear"),
    "pool": (
        model("MaxPool", 12, IMAGE, [], {"kernel_shape": [2, 2], "pads": [2, 2, 2, 2]}), r"'MaxPool_0'.*reach beyond a window"
    ),
    "cast": (model("Cast", 13, ROW, [], {"to": TensorProto.STRING}), r"'Cast_0'.*type of floating point"),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_modes_that_have_no_reading(name: str) -> None:
    made, words = ROWS[name]
    with pytest.raises(errors.UnsupportedLayer, match=words):
        lg.from_onnx(made)


def test_further_outputs_are_refused_where_they_are_read() -> None:
    g = graphs.Graph(("x", [1, 1, 4, 4]))
    values, _ = g.add("MaxPool", "x", outputs=2, kernel_shape=[2, 2])
    assert lg.capture(lg.from_onnx(g.model(values))).outputs == 9
    with pytest.raises(errors.UnsupportedLayer, match="indices"):
        lg.from_onnx(g.model(values, "maxpool0_1"))


@pytest.mark.parametrize(("shape", "words"), [
    (["N", 1, "height", 8], r"'x' open \(\?, 1, \?, 8\).*example=torch\.zeros"),
    ([5], r"shape \(5\), without a dimension of samples"),
])  # fmt: skip
def test_open_shapes(shape: list[Any], words: str) -> None:
    g = graphs.Graph(("x", shape))
    made = g.model(g.add("Relu", "x"))
    with pytest.raises(errors.InvalidExample, match=words):
        lg.from_onnx(made)


def test_an_example_settles_an_open_shape() -> None:
    g = graphs.Graph(("x", ["N", 1, "h", "w"]))
    made = g.model(g.add("GlobalAveragePool", g.conv("x", 1, 2, 3)))
    module = lg.from_onnx(made, example=torch.zeros(1, 1, 5, 7))
    assert lg.capture(module).inputs == 35
    with pytest.raises(errors.InvalidExample, match=r"has 1 inputs \(x\), the example has 2"):
        lg.from_onnx(made, example=(torch.zeros(1), torch.zeros(1)))


def test_files(tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidModel, match="is not a file"):
        lg.from_onnx(tmp_path / "none.onnx")
    (tmp_path / "net.onnx").write_bytes(b"\x93garbage" * 9)
    with pytest.raises(errors.InvalidModel, match=r"damaged|no ONNX model|no graph"):
        lg.from_onnx(tmp_path / "net.onnx")
    onnx.save(graphs.policy().model, tmp_path / "net.onnx")
    with pytest.raises(errors.UnknownName, match="no tensor 'logits'; it has"):
        lg.from_onnx(tmp_path / "net.onnx", outputs="logits")
    with pytest.raises(errors.InvalidModel, match="model is int"):
        lg.from_onnx(3)
    with pytest.raises(errors.InvalidModel, match=r"lipguard\.from_onnx\(model\)"):
        lg.bound(graphs.policy().model)


@pytest.mark.parametrize("wrong", [
    lambda x, **options: pooling.average_pool(x, **{**options, "count_include_pad": 1}),
    lambda x, **options: pooling.average_pool(x, **options) + 1e-4,
    lambda x, **options: pooling.average_pool(x, **options) * (1 + 1e-4),
    lambda x, **options: pooling.average_pool(x, **options)[..., :-1],
])  # fmt: skip
def test_a_wrong_table_is_found_by_the_comparison(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = model("AveragePool", 11, IMAGE, [], {"kernel_shape": [2, 2], "pads": [1, 1, 1, 1]})
    assert lg.from_onnx(made) is not None
    monkeypatch.setitem(table._OPERATORS, "AveragePool", [(1, wrong)])
    with pytest.raises(errors.InvalidModel, match=r"the graph is misread: its output"):
        lg.from_onnx(made)


def test_without_onnxruntime_the_reader_says_that_nothing_was_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison.importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=r"not compared with onnxruntime.*lipguard\[onnx\]"):
        lg.from_onnx(graphs.policy().model)


def test_without_onnx_the_message_says_what_to_install() -> None:
    code = "import sys; sys.modules['onnx'] = None\nimport lipguard as lg\nlg.from_onnx('net.onnx')"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'lipguard[onnx]'" in process.stderr
