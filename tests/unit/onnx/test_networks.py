"""Networks as the competition of verifiers has them: equal to onnxruntime, bounded like modules written by hand."""

from pathlib import Path

import numpy as np
import onnx
import onnx_graphs as graphs
import onnxruntime
import pytest
import torch
from torch import Tensor

import lipguard as lg


def runtime(model: onnx.ModelProto, *inputs: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feed = {one.name: x.numpy() for one, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.as_tensor(result) for result in session.run(None, feed)]


def samples(made: graphs.Made, module: torch.fx.GraphModule) -> Tensor:
    """Three samples where the graph takes any number, else one."""
    like = module.example_input_array
    assert isinstance(like, Tensor)
    rows = 3 if made.model.graph.input[0].type.tensor_type.shape.dim[0].dim_param else 1
    return torch.randn(rows, *like.shape[1:], generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", graphs.NETWORKS)
def test_the_module_and_the_network_give_what_onnxruntime_gives(name: str) -> None:
    made = graphs.NETWORKS[name]()
    module = lg.from_onnx(made.model)
    x = samples(made, module)
    (expected,) = runtime(made.model, x)
    scale = max(1.0, float(expected.abs().max()))
    assert torch.allclose(module(x), expected, atol=2e-6 * scale, rtol=1e-6)
    network = lg.capture(module)
    assert torch.allclose(network(x.flatten(1)), expected.flatten(1).double(), atol=2e-6 * scale, rtol=1e-6)


@pytest.mark.parametrize("name", graphs.NETWORKS)
def test_the_bound_is_that_of_the_module_written_by_hand(name: str) -> None:
    made = graphs.NETWORKS[name]()
    module = lg.from_onnx(made.model)
    bound = lg.bound(module, method="spectral")
    assert bound.rigor == "verified" and bound.value >= lg.bound(module, method="sampling", time_limit=0.2).value > 0
    if made.module is not None:
        by_hand = lg.bound(made.module, torch.zeros_like(module.example_input_array), method="spectral")
        assert bound.value == pytest.approx(by_hand.value, rel=1e-5)


@pytest.mark.parametrize("name", ["acasxu", "leaky relu", "tanh"])
def test_the_tight_bound_as_well(name: str) -> None:
    made = graphs.NETWORKS[name]()
    assert made.module is not None
    module = lg.from_onnx(made.model)
    box = lg.Box(-0.1, 0.1)
    by_hand = lg.bound(made.module, torch.zeros_like(module.example_input_array), domain=box)
    assert lg.bound(module, domain=box).value == pytest.approx(by_hand.value, rel=1e-4)


def test_a_file_and_a_model_are_one(tmp_path: Path) -> None:
    made = graphs.policy()
    onnx.save(made.model, tmp_path / "net.onnx")
    assert lg.capture(lg.from_onnx(tmp_path / "net.onnx")).digest == lg.capture(lg.from_onnx(made.model)).digest


def test_weights_in_a_file_of_their_own(tmp_path: Path) -> None:
    made = graphs.mnistfc()
    digest = lg.capture(lg.from_onnx(made.model)).digest
    onnx.save(made.model, tmp_path / "net.onnx", save_as_external_data=True, location="net.bin", size_threshold=0)
    assert lg.capture(lg.from_onnx(tmp_path / "net.onnx")).digest == digest


def test_the_graph_may_end_at_an_inner_tensor_and_parts_of_it_be_bounded() -> None:
    made = graphs.mnistfc()
    last = made.model.graph.node[-1]
    inner = lg.from_onnx(made.model, outputs=last.input[0])
    assert made.module is not None
    x = torch.randn(2, 784, 1)
    assert torch.allclose(inner(x), made.module[:5](x), atol=1e-5)
    both = lg.from_onnx(made.model, outputs=[last.input[0], last.output[0]])
    assert set(both(x)) == {last.input[0], last.output[0]}
    assert lg.capture(both, outputs=last.input[0]).digest == lg.capture(inner).digest
    whole = lg.from_onnx(made.model)
    assert lg.bound(whole, submodule="Gemm_5").value == pytest.approx(lg.bound(made.module[5], torch.zeros(1, 64)).value)


def test_several_inputs_and_several_outputs() -> None:
    g = graphs.Graph(("x", ["N", 4]), ("context", ["N", 3]))
    joined = g.add("Concat", "x", "context", axis=1)
    head, value = g.dense(joined, 7, 3), g.dense(joined, 7, 1)
    module = lg.from_onnx(g.model(head, value))
    a = torch.from_numpy(np.array(onnx.numpy_helper.to_array(g.weights[0]))).double()
    joint = lg.exact(module, outputs=head)
    assert joint.upper == pytest.approx(torch.linalg.matrix_norm(a, 2).item(), rel=1e-6)
    of_x = lg.exact(module, outputs=head, inputs="x")
    assert of_x.upper == pytest.approx(torch.linalg.matrix_norm(a[:, :4], 2).item(), rel=1e-6)
    assert of_x.choice.endswith("With respect to x.")


def test_an_open_batch_with_a_constant_reshape_is_a_function_of_one_sample() -> None:
    g = graphs.Graph(("x", ["N", 2, 3]))
    module = lg.from_onnx(g.model(g.dense(g.add("Reshape", "x", g.hold([1, 6])), 6, 2)))
    assert lg.capture(module).inputs == 6


def test_weights_are_parameters_that_may_be_trained() -> None:
    module = lg.from_onnx(graphs.policy().model)
    assert not any(p.requires_grad for p in module.parameters())
    module.requires_grad_(True)
    network = lg.capture(module, live=True)
    network(torch.zeros(1, 4)).sum().backward()
    assert any(p.grad is not None for p in module.parameters())
