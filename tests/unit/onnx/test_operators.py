"""Every operator of the table, in the opsets where its meaning changed: as onnxruntime computes it, and as it is captured."""

from typing import Any

import numpy as np
import onnx_graphs as graphs
import pytest
import torch
from test_networks import runtime

import lipguard as lg
from lipguard import errors
from lipguard.onnx.operators import known

IMAGE, ROW = (2, 3, 6, 5), (2, 4)
ROWS: list[tuple[str, int, tuple[int, ...], list[Any], dict[str, Any]]] = []
"""Operator, opset, shape of the input, further inputs, attributes."""


def case(kind: str, *opsets: int, shape: tuple[int, ...] = ROW, read: list[Any] | None = None, **attributes: Any) -> None:
    ROWS.extend((kind, opset, shape, read or [], attributes) for opset in opsets)


for _name in ("Abs", "Cos", "Identity", "Neg", "Relu", "Sigmoid", "Sin", "Softplus", "Softsign", "Tanh"):
    case(_name, 7, 13)
case("HardSwish", 14)
case("Mish", 18)
case("LeakyRelu", 7, 16, alpha=0.3)
case("Elu", 7, alpha=0.7)
case("Celu", 12, alpha=1.5)
case("Selu", 7)
case("Selu", 13, alpha=1.2, gamma=0.9)
case("HardSigmoid", 7, alpha=0.3, beta=0.4)
case("Gelu", 20)
case("Gelu", 20, approximate="tanh")
case("PRelu", 9, read=[[0.1, 0.2, 0.3, 0.4]])
case("PRelu", 16, shape=IMAGE, read=[np.full((3, 1, 1), 0.2)])
case("PRelu", 16, shape=IMAGE, read=[[0.1, 0.2, 0.3, 0.4, 0.5]])
case("PRelu", 16, read=[[0.25]])
case("Clip", 7, min=-0.5, max=0.25)
case("Clip", 7, min=-0.5)
case("Clip", 13, read=[np.float32(-0.5), np.float32(0.5)])
case("Clip", 13, read=[None, np.float32(0.5)])
case("Dropout", 7, 10, ratio=0.4)
case("Dropout", 13, read=[np.float32(0.4)])
for _name in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean"):
    case(_name, 8, 13, read=[[1.5, -2.0, 0.5, 3.0]])
    case(_name, 13, shape=IMAGE, read=[np.arange(1.0, 4.0).reshape(3, 1, 1)])
for _name in ("Softmax", "LogSoftmax"):
    case(_name, 11, 13)
    case(_name, 11, shape=(2, 3, 2), axis=1)
    case(_name, 13, shape=(2, 3, 2), axis=1)
case("MatMul", 9, read=[np.arange(12.0).reshape(4, 3) / 10])
case("Gemm", 9, 13, read=[np.arange(12.0).reshape(3, 4) / 10, [1.0, 2.0, 3.0]], transB=1, alpha=0.5, beta=2.0)
case("Gemm", 11, read=[np.arange(12.0).reshape(4, 3) / 10])
_STATISTICS = [[1.0, 2.0, 3.0], [0.1, 0.2, 0.3], [0.5, -0.5, 0.0], [1.0, 2.0, 0.5]]
case("BatchNormalization", 7, 9, 14, 15, shape=IMAGE, read=_STATISTICS, epsilon=1e-2)
case("ReduceMean", 11, 13, shape=IMAGE, axes=[2, 3])
case("ReduceMean", 11, shape=IMAGE, axes=[-1], keepdims=0)
case("ReduceMean", 18, shape=IMAGE, read=[np.array([1, 3])], keepdims=0)
case("ReduceMean", 18, shape=(1, 5))
case("ReduceSum", 11, shape=IMAGE, axes=[1])
case("ReduceSum", 13, shape=IMAGE, read=[np.array([1])], keepdims=1)
case("ReduceSum", 13, shape=IMAGE, noop_with_empty_axes=1)
case("ReduceMax", 13, shape=IMAGE, axes=[2])
case("ReduceMin", 18, shape=IMAGE, read=[np.array([3])])
_KERNEL = np.random.default_rng(0).normal(size=(4, 3, 3, 2)) / 3
case("Conv", 8, 11, shape=IMAGE, read=[_KERNEL, [1.0, 2, 3, 4]], pads=[1, 0, 2, 1], strides=[2, 1])
case("Conv", 11, shape=IMAGE, read=[_KERNEL], auto_pad="SAME_UPPER", strides=[2, 2])
case("Conv", 11, shape=IMAGE, read=[_KERNEL], auto_pad="SAME_LOWER")
case("Conv", 11, shape=IMAGE, read=[_KERNEL], auto_pad="VALID", dilations=[2, 1])
case("Conv", 11, shape=(2, 3, 8), read=[_KERNEL[..., 0]], pads=[1, 1])
case("Conv", 11, shape=(1, 3, 4, 4, 4), read=[np.random.default_rng(1).normal(size=(3, 1, 2, 2, 2))], group=3)
_TRANSPOSED = np.random.default_rng(0).normal(size=(3, 2, 3, 3)) / 3
case(
    "ConvTranspose", 8, 11, shape=IMAGE, read=[_TRANSPOSED, [1.0, 2.0]], strides=[2, 2], pads=[1, 0, 0, 1], output_padding=[1, 0]
)
case("ConvTranspose", 11, shape=IMAGE, read=[_TRANSPOSED], strides=[2, 3], output_shape=[12, 15])
case("ConvTranspose", 11, shape=IMAGE, read=[_TRANSPOSED], strides=[2, 2], auto_pad="SAME_UPPER")
case("ConvTranspose", 11, shape=IMAGE, read=[_TRANSPOSED], strides=[2, 2], auto_pad="SAME_LOWER")
case("ConvTranspose", 11, shape=IMAGE, read=[_TRANSPOSED], dilations=[2, 1], auto_pad="VALID")
case("ConvTranspose", 11, shape=(1, 3, 5), read=[_TRANSPOSED[..., 0]], pads=[1, 1])
case("MaxPool", 8, 12, shape=IMAGE, kernel_shape=[2, 3], strides=[2, 1], pads=[1, 1, 1, 1])
case("MaxPool", 12, shape=IMAGE, kernel_shape=[3, 3], pads=[0, 1, 2, 0], strides=[2, 2])
case("MaxPool", 12, shape=IMAGE, kernel_shape=[2, 2], dilations=[2, 1], ceil_mode=1, strides=[2, 2])
case("MaxPool", 12, shape=IMAGE, kernel_shape=[3, 2], auto_pad="SAME_LOWER", strides=[2, 2])
case("MaxPool", 12, shape=(2, 3, 9), kernel_shape=[3], strides=[3])
case("AveragePool", 7, 11, 19, shape=IMAGE, kernel_shape=[3, 2], strides=[2, 1], pads=[1, 1, 1, 1])
case("AveragePool", 11, shape=IMAGE, kernel_shape=[3, 2], pads=[0, 1, 2, 0])
case("AveragePool", 11, shape=IMAGE, kernel_shape=[3, 2], pads=[0, 1, 2, 0], count_include_pad=1)
case("AveragePool", 11, shape=IMAGE, kernel_shape=[2, 2], auto_pad="SAME_UPPER", strides=[2, 2])
case("GlobalAveragePool", 7, shape=IMAGE)
case("GlobalMaxPool", 7, shape=IMAGE)
case("DepthToSpace", 13, shape=(2, 8, 2, 3), blocksize=2)
case("DepthToSpace", 13, shape=(2, 8, 2, 3), blocksize=2, mode="CRD")
case("SpaceToDepth", 13, shape=(2, 2, 4, 6), blocksize=2)
case("Cast", 9, 13, to=11)
case("Flatten", 7, 13, shape=IMAGE)
case("Flatten", 13, shape=IMAGE, axis=-3)
case("Reshape", 8, 14, shape=IMAGE, read=[np.array([0, -1, 5])])
case("Transpose", 7, 13, shape=IMAGE, perm=[0, 2, 3, 1])
case("Transpose", 13, shape=(1, 1, 1))
case("Squeeze", 7, shape=(2, 1, 3, 1), axes=[1])
case("Squeeze", 13, shape=(2, 1, 3, 1), read=[np.array([-1])])
case("Squeeze", 13, shape=(2, 1, 3, 1))
case("Unsqueeze", 7, axes=[1, 3])
case("Unsqueeze", 13, read=[np.array([-1, 1])])
case("Concat", 7, 13, read=[np.ones((2, 3))], axis=1)
case("Concat", 13, read=[np.ones((2, 3))], axis=-1)
case("Slice", 9, shape=IMAGE, starts=[1, -3], ends=[3, 9000], axes=[1, 3])
case("Slice", 10, 13, shape=IMAGE, read=[np.array([1, 0]), np.array([3, 5]), np.array([1, 2]), np.array([1, 2])])
case("Slice", 13, shape=IMAGE, read=[np.array([-1]), np.array([-9000]), np.array([3]), np.array([-2])])
case("Slice", 13, shape=IMAGE, read=[np.array([0, 1]), np.array([9000, 3])])
case("Gather", 11, 13, shape=IMAGE, read=[np.array([[0, -1], [2, 1]])], axis=1)
case("Gather", 13, shape=IMAGE, read=[np.array(-2)], axis=3)
case("Expand", 13, shape=(2, 1, 3), read=[np.array([2, 4, 1])])
case("Tile", 13, shape=(2, 3), read=[np.array([1, 2])])
case("Pad", 7, shape=IMAGE, pads=[0, 0, 1, 2, 0, 0, 0, -1], value=0.5)
case("Pad", 13, shape=IMAGE, read=[np.array([0, 0, 1, 2, 0, 0, 0, -1]), np.float32(0.5)])
case("Pad", 13, shape=IMAGE, read=[np.array([0, 0, 2, 1, 0, 1, 3, 4])], mode="reflect")
case("Pad", 13, shape=IMAGE, read=[np.array([0, 1, 2, 1, 0, 0, 3, 4])], mode="edge")
case("Pad", 19, shape=IMAGE, read=[np.array([2, 1, 3, 2]), None, np.array([2, 3])], mode="wrap")
case("Upsample", 7, shape=IMAGE, scales=[1.0, 1.0, 2.0, 3.0], mode="nearest")
case("Upsample", 9, shape=IMAGE, read=[np.array([1, 1, 2, 1.5])], mode="nearest")
case("Resize", 10, shape=IMAGE, read=[np.array([1, 1, 2.0, 0.5])], mode="nearest")
_SCALES = [None, np.array([1, 1, 1.7, 0.6])]
_ROI = np.zeros(0)
for _mode in ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"):
    case("Resize", 13, shape=IMAGE, read=_SCALES, mode="linear", coordinate_transformation_mode=_mode)
    for _nearest in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil"):
        case("Resize", 11, shape=IMAGE, read=[_ROI, _SCALES[1]], coordinate_transformation_mode=_mode, nearest_mode=_nearest)
case("Resize", 13, shape=IMAGE, read=[None, None, np.array([2, 3, 7, 11])])
case("Resize", 13, shape=IMAGE, read=[None, None, np.array([2, 3, 12, 10])], mode="linear")
case("Resize", 19, shape=IMAGE, read=_SCALES, coordinate_transformation_mode="half_pixel_symmetric")


def model(kind: str, opset: int, shape: tuple[int, ...], read: list[Any], attributes: dict[str, Any], **options: Any) -> Any:
    g = graphs.Graph(("x", list(shape)))
    others = ["" if value is None else g.hold(value) for value in read]
    return g.model(g.add(kind, "x", *others, **attributes), opset=opset, **options)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}-{row[1]}")
def test_an_operator(row: tuple[str, int, tuple[int, ...], list[Any], dict[str, Any]]) -> None:
    made, shape = model(*row), row[2]
    module = lg.from_onnx(made)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    (expected,) = runtime(made, x)
    ours = module(x)
    assert ours.shape == expected.shape and torch.allclose(ours.double(), expected.double(), atol=1e-5)
    network = lg.capture(module)
    assert torch.allclose(network(x.flatten(1)), expected.double().flatten(1), atol=1e-5)


def test_every_operator_of_the_table_is_tried() -> None:
    constants = {"ConstantOfShape", "Range", "Shape", "Size", "And", "Or", "Not", "Equal", "Greater", "Less", "GreaterOrEqual",
                 "LessOrEqual", "Where", "Split"}  # fmt: skip
    refused = {"Exp", "Log", "Sqrt", "Reciprocal", "Sign", "Floor", "Ceil", "Round", "Pow"}
    assert {row[0] for row in ROWS} | constants | refused == set(known())


@pytest.mark.parametrize(("kind", "words"), [
    ("Exp", "slope"), ("Log", "slope"), ("Sqrt", "slope"), ("Reciprocal", "divides"), ("Sign", "jumps"),
    ("Floor", "step"), ("Ceil", "step"), ("Pow", "power"), ("Round", "step"),
])  # fmt: skip
def test_mathematics_refuses(kind: str, words: str) -> None:
    module = lg.from_onnx(model(kind, 13, ROW, [np.float32(2.0)] if kind == "Pow" else [], {}))
    with pytest.raises(errors.UnsupportedLayer, match=rf"model.*{words}"):
        lg.capture(module)


@pytest.mark.parametrize("opset", [9, 13])
def test_sizes_are_constants(opset: int) -> None:
    """What exporters write for x.view(x.shape[0] * 2 // 2, -1) and its kin."""
    g = graphs.Graph(("x", ["N", 3, 4]))
    n = g.add("Gather", g.add("Shape", "x"), g.hold(0))
    same = g.add("Div", g.add("Mul", n, g.hold(2)), g.hold(2))
    short = {"axes": [0]} if opset < 13 else {}
    rows = g.add("Unsqueeze", same, *([] if opset < 13 else [g.hold([0])]), **short)
    ones = g.add("ConstantOfShape", g.hold([1]), value=graphs.numpy_helper.from_array(np.array([-1])))
    shape = g.add("Concat", rows, ones, axis=0)
    asked = g.add("Where", g.add("Equal", shape, g.hold([5])), shape, shape)
    made = g.model(g.dense(g.add("Reshape", "x", asked), 12, 2), opset=opset)
    x = torch.randn(3, 3, 4)
    assert torch.allclose(lg.capture(lg.from_onnx(made))(x.flatten(1)), runtime(made, x)[0].double(), atol=1e-6)


@pytest.mark.parametrize(("opset", "read", "attributes"), [
    (11, [], {"split": [1, 3]}), (11, [], {}), (13, [np.array([1, 3])], {}), (18, [], {"num_outputs": 2}),
])  # fmt: skip
def test_split(opset: int, read: list[Any], attributes: dict[str, Any]) -> None:
    g = graphs.Graph(("x", ["N", 4]))
    a, b = g.add("Split", "x", *(g.hold(one) for one in read), outputs=2, axis=1, **attributes)
    made = g.model(g.add("Concat", b, a, axis=1), opset=opset)
    x = torch.randn(3, 4)
    assert torch.allclose(lg.capture(lg.from_onnx(made))(x), runtime(made, x)[0].double())
