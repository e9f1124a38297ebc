"""Networks as the competition of verifiers has them, written with onnx.helper, with modules of torch beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

FLOAT = TensorProto.FLOAT


class Graph:
    """Nodes one after the other: `add` gives the name of what a node makes."""

    def __init__(self, *inputs: tuple[str, list[Any]], seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.inputs = [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in inputs]
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def hold(self, value: Any, name: str | None = None) -> str:
        """A weight: an array of numbers, whole ones as they are."""
        array = np.asarray(value)
        array = array.astype(np.int64 if array.dtype.kind in "iu" else np.float32)
        name = name or f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def random(self, *shape: int, scale: float | None = None) -> str:
        fan = int(np.prod(shape[1:])) if len(shape) > 1 else shape[0]
        return self.hold(self.rng.normal(size=shape) * (scale or 1 / np.sqrt(fan)))

    def add(self, kind: str, *read: str, outputs: int = 1, **attributes: Any) -> Any:
        names = [f"{kind.lower()}{len(self.nodes)}" + (f"_{i}" if outputs > 1 else "") for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(read), names, name=f"{kind}_{len(self.nodes)}", **attributes))
        return names[0] if outputs == 1 else names

    def model(self, *outputs: str, opset: int = 13) -> onnx.ModelProto:
        results = [helper.make_empty_tensor_value_info(name) for name in outputs]
        graph = helper.make_graph(self.nodes, "net", self.inputs, results, self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)

    def dense(self, x: str, n: int, m: int, kind: str = "Gemm") -> str:
        if kind == "Gemm":
            return self.add("Gemm", x, self.random(m, n), self.random(m, scale=0.3), transB=1)
        return self.add("Add", self.add("MatMul", x, self.random(n, m, scale=1 / np.sqrt(n))), self.random(m, scale=0.3))

    def conv(self, x: str, c: int, k: int, size: int, **attributes: Any) -> str:
        return self.add("Conv", x, self.random(k, c, size, size), self.random(k, scale=0.3), **attributes)

    def norm(self, x: str, c: int) -> str:
        rows = [self.rng.uniform(0.5, 2, c), self.rng.normal(size=c), self.rng.normal(size=c), self.rng.uniform(0.5, 2, c)]
        return self.add("BatchNormalization", x, *(self.hold(row) for row in rows), epsilon=1e-3)


@dataclass
class Made:
    """A model, and a module of torch that computes the same, where one was written by hand."""

    model: onnx.ModelProto
    module: nn.Module | None = None
    bounded: bool = True


def weights(model: onnx.ModelProto) -> list[Tensor]:
    return [torch.from_numpy(numpy_helper.to_array(one).copy()) for one in model.graph.initializer]


def acasxu() -> Made:
    """5-50x6-5: inputs are normalised by a mean and a range, outputs scaled back."""
    g = Graph(("input", [1, 1, 1, 5]))
    mean, span = np.array([19791.0, 0, 0, 650, 600]), np.array([60261.0, 6.28318531, 6.28318531, 1100, 1200])
    x = g.add("Flatten", g.add("Div", g.add("Sub", "input", g.hold(mean)), g.hold(span)), axis=1)
    for n, m in zip([5, 50, 50, 50, 50, 50], [50] * 6, strict=True):
        x = g.add("Relu", g.dense(x, n, m, "MatMul"))
    x = g.add("Add", g.add("Mul", g.dense(x, 50, 5, "MatMul"), g.hold(373.9499200)), g.hold(7.51888402))
    model = g.model(x)
    held = weights(model)

    class Acas(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList()
            for w, b in zip(held[2:16:2], held[3:16:2], strict=True):
                layer = nn.Linear(*w.shape)
                layer.weight.data, layer.bias.data = w.T.contiguous(), b
                self.layers.append(layer)

        def forward(self, x: Tensor) -> Tensor:
            x = ((x - held[0]) / held[1]).flatten(1)
            for layer in self.layers[:-1]:
                x = torch.relu(layer(x))
            return self.layers[-1](x) * held[-2] + held[-1]

    return Made(model, Acas())


def mnistfc() -> Made:
    """784-64-64-10 with an open number of samples."""
    g = Graph(("image", ["N", 784, 1]))
    x = g.add("Flatten", "image")
    x = g.add("Relu", g.dense(x, 784, 64))
    x = g.add("Relu", g.dense(x, 64, 64))
    model = g.model(g.dense(x, 64, 10), opset=9)
    held = weights(model)
    module = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    for layer, w, b in zip([module[1], module[3], module[5]], held[::2], held[1::2], strict=True):
        layer.weight.data, layer.bias.data = w, b
    return Made(model, module)


def conv_big() -> Made:
    """Four convolutions, three dense layers; the number of samples goes through Shape, Gather, Concat and Reshape."""
    g = Graph(("x", ["N", 1, 12, 12]))
    x = g.add("Relu", g.conv("x", 1, 4, 3, pads=[1, 1, 1, 1]))
    x = g.add("Relu", g.conv(x, 4, 4, 4, strides=[2, 2], pads=[1, 1, 1, 1]))
    x = g.add("Relu", g.conv(x, 4, 6, 3, pads=[1, 1, 1, 1]))
    x = g.add("Relu", g.conv(x, 6, 6, 4, strides=[2, 2], pads=[1, 1, 1, 1]))
    rows = g.add("Unsqueeze", g.add("Gather", g.add("Shape", x), g.hold(0)), g.hold([0]))
    x = g.add("Reshape", x, g.add("Concat", rows, g.hold([-1]), axis=0))
    for n, m in ((54, 16), (16, 16)):
        x = g.add("Relu", g.dense(x, n, m))
    model = g.model(g.dense(x, 16, 10))
    held = weights(model)
    convs = [(1, 4, 3, 1), (4, 4, 4, 2), (4, 6, 3, 1), (6, 6, 4, 2)]
    layers: list[nn.Module] = []
    for c, k, size, stride in convs:
        layers += [nn.Conv2d(c, k, size, stride, 1), nn.ReLU()]
    layers += [nn.Flatten(), nn.Linear(54, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10)]
    module = nn.Sequential(*layers)
    tensors = [one for one in held if one.is_floating_point()]
    for parameter, tensor in zip(module.parameters(), tensors, strict=True):
        parameter.data = tensor
    return Made(model, module)


def conv_small() -> Made:
    """Two convolutions in steps, with constants that are nodes, opset 7."""
    g = Graph(("x", [1, 3, 8, 8]))
    kernel = numpy_helper.from_array(g.rng.normal(size=(4, 3, 4, 4)).astype(np.float32) / 7, "k")
    x = g.add("Relu", g.add("Conv", "x", g.add("Constant", value=kernel), strides=[2, 2], kernel_shape=[4, 4]))
    x = g.add("Relu", g.conv(x, 4, 8, 2))
    x = g.add("Reshape", g.add("Dropout", x, ratio=0.3), g.hold([1, -1]))
    return Made(g.model(g.dense(x, 32, 10), opset=7))


def resnet() -> Made:
    """Two residual blocks with batch normalisation, a shortcut with a kernel of one, global averages."""
    g = Graph(("x", [1, 3, 8, 8]))
    stem = g.add("Relu", g.norm(g.conv("x", 3, 4, 3, pads=[1, 1, 1, 1]), 4))
    y = g.norm(g.conv(g.add("Relu", g.norm(g.conv(stem, 4, 4, 3, pads=[1, 1, 1, 1]), 4)), 4, 4, 3, pads=[1, 1, 1, 1]), 4)
    x = g.add("Relu", g.add("Add", y, stem))
    y = g.norm(
        g.conv(g.add("Relu", g.norm(g.conv(x, 4, 6, 3, strides=[2, 2], pads=[1, 1, 1, 1]), 6)), 6, 6, 3, pads=[1, 1, 1, 1]), 6
    )
    x = g.add("Relu", g.add("Sum", y, g.conv(x, 4, 6, 1, strides=[2, 2])))
    model = g.model(g.dense(g.add("Flatten", g.add("GlobalAveragePool", x)), 6, 10))
    held = iter(weights(model))

    class Block(nn.Module):
        def __init__(self, c: int, k: int, stride: int) -> None:
            super().__init__()
            self.a, self.an = nn.Conv2d(c, k, 3, stride, 1), nn.BatchNorm2d(k, eps=1e-3)
            self.b, self.bn = nn.Conv2d(k, k, 3, 1, 1), nn.BatchNorm2d(k, eps=1e-3)
            self.short = nn.Conv2d(c, k, 1, stride) if stride > 1 else None

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(self.b(torch.relu(self.an(self.a(x)))))
            return torch.relu(y + (x if self.short is None else self.short(x)))

    module = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.BatchNorm2d(4, eps=1e-3), nn.ReLU(), Block(4, 4, 1), Block(4, 6, 2))
    module += nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10))
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.weight.data, layer.bias.data = next(held), next(held)
        elif isinstance(layer, nn.BatchNorm2d):
            layer.weight.data, layer.bias.data, layer.running_mean, layer.running_var = (next(held) for _ in range(4))
    return Made(model, module.eval())


def chain(kind: str, **attributes: Any) -> Callable[[], Made]:
    """6-20-20-3 with one kind of activation."""

    def make() -> Made:
        g = Graph(("x", ["batch", 6]))
        x = g.add(kind, g.dense("x", 6, 20), **attributes)
        x = g.add(kind, g.dense(x, 20, 20), **attributes)
        model = g.model(g.dense(x, 20, 3))
        activation = {"Sigmoid": nn.Sigmoid, "Tanh": nn.Tanh, "LeakyRelu": lambda: nn.LeakyReLU(0.2)}[kind]
        module = nn.Sequential(nn.Linear(6, 20), activation(), nn.Linear(20, 20), activation(), nn.Linear(20, 3))
        for parameter, tensor in zip(module.parameters(), weights(model), strict=True):
            parameter.data = tensor
        return Made(model, module)

    return make


def asymmetric() -> Made:
    """Paddings that differ between the sides, both forms of SAME, groups, dilations."""
    g = Graph(("x", ["N", 2, 9, 7]))
    x = g.add("Relu", g.conv("x", 2, 4, 3, pads=[0, 2, 1, 0], strides=[2, 1]))
    x = g.add("Relu", g.conv(x, 4, 4, 2, auto_pad="SAME_UPPER", strides=[2, 2]))
    x = g.add("Relu", g.add("Conv", x, g.random(4, 2, 2, 2), auto_pad="SAME_LOWER", group=2))
    x = g.add("Relu", g.conv(x, 4, 4, 2, pads=[0, 1, 1, 1], dilations=[1, 2]))
    x = g.add("Pad", x, g.hold([0, 0, 1, 0, 0, 0, 0, 2]), g.hold(0.5))
    return Made(g.model(g.dense(g.add("Flatten", x), 4 * 3 * 6, 3)))


def max_pools() -> Made:
    """Maxima and averages over windows of every kind."""
    g = Graph(("x", ["N", 2, 11, 11]))
    x = g.conv("x", 2, 3, 3, pads=[1, 1, 1, 1])
    x = g.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    x = g.add("MaxPool", g.conv(x, 3, 3, 2), kernel_shape=[3, 2], auto_pad="SAME_UPPER", strides=[1, 1])
    x = g.add("AveragePool", x, kernel_shape=[2, 2], pads=[0, 0, 1, 1], strides=[2, 2])
    x = g.add("MaxPool", x, kernel_shape=[2, 2], ceil_mode=1, strides=[2, 2])
    return Made(g.model(g.dense(g.add("Flatten", x), 12, 3)))


def generator() -> Made:
    """From 5 numbers to an image, as a GAN's: transposed convolutions and nearest upsampling, opset 11; then a classifier."""
    g = Graph(("z", [1, 5]))
    x = g.add("Reshape", g.dense("z", 5, 32), g.hold([0, 8, 2, 2]))
    x = g.norm(x, 8)
    x = g.add("Relu", g.add("ConvTranspose", x, g.random(8, 6, 4, 4), g.random(6), strides=[2, 2], pads=[1, 1, 1, 1]))
    x = g.add("ConvTranspose", x, g.random(6, 4, 3, 3), strides=[2, 2], pads=[0, 1, 1, 0], output_padding=[1, 0])
    x = g.add("Resize", g.add("Relu", x), g.hold(np.zeros(0)), g.hold([1.0, 1.0, 2.0, 2.0]), mode="nearest", nearest_mode="floor",
              coordinate_transformation_mode="asymmetric")  # fmt: skip
    x = g.add("Tanh", g.conv(x, 4, 1, 3, strides=[2, 2]))
    return Made(g.model(g.add("Flatten", x), opset=11))


def policy() -> Made:
    """A controller: two states in, a clipped force out; constants before and behind, opset 17."""
    g = Graph(("state", ["N", 4]))
    x = g.add("Tanh", g.dense(g.add("Mul", "state", g.hold([0.4, 0.3, 4.8, 0.3])), 4, 24))
    x = g.dense(g.add("Tanh", g.dense(x, 24, 24)), 24, 2)
    left, right = g.add("Split", x, g.hold([1, 1]), outputs=2, axis=1)
    x = g.add("Clip", g.add("Sub", left, g.add("Neg", right)), g.hold(-1.0), g.hold(1.0))
    return Made(g.model(g.add("Mul", x, g.hold([[10.0]])), opset=17))


NETWORKS: dict[str, Callable[[], Made]] = {
    "acasxu": acasxu,
    "mnistfc": mnistfc,
    "conv big": conv_big,
    "conv small": conv_small,
    "resnet": resnet,
    "sigmoid": chain("Sigmoid"),
    "tanh": chain("Tanh"),
    "leaky relu": chain("LeakyRelu", alpha=0.2),
    "asymmetric pads": asymmetric,
    "max pools": max_pools,
    "generator": generator,
    "policy": policy,
}
