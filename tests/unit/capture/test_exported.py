"""Programs of torch.export and graphs of torch.fx are read like the modules they were made from."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F  # noqa: N812

import lipguard as lg
from lipguard import errors

Make = Callable[[], nn.Module]


class Images(nn.Module):
    """Convolutions, statistics whose order of arguments ATen changes, pooling, padding, resampling, joining and slicing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.up = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 2, 2, 2)
        self.out = nn.Linear(72, 3)
        for tensor, low, high in ((self.norm.running_mean, -1, 1), (self.norm.running_var, 0.5, 2), (self.norm.weight, 1, 3)):
            tensor.data.uniform_(low, high)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.norm(self.conv(x)), 0.1)
        x = F.interpolate(F.avg_pool2d(F.max_pool2d(x, 2), 2) + F.adaptive_avg_pool2d(F.hardtanh(x), 2), scale_factor=2)
        x = self.up(F.pad(x[:, :, 1:-1], (0, 0, 1, 1), mode="reflect").permute(0, 1, 3, 2)[:, :, :3, :3])
        return self.out(torch.flatten(torch.cat([x, 2 - x], 1), 1)[:, 72:])


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 2))


def activations() -> nn.Module:
    made = [nn.SELU(), nn.Softplus(), nn.GELU(), nn.SiLU(), nn.PReLU(6), nn.ReLU6(), nn.ELU(0.5), nn.CELU(2.0), nn.Hardswish()]
    return nn.Sequential(*(layer for one in made for layer in (nn.Linear(6, 6), one)), nn.Softshrink())


MODULES: dict[str, tuple[Make, tuple[int, ...]]] = {
    "mlp": (mlp, (4,)),
    "images": (Images, (3, 8, 8)),
    "activations": (activations, (6,)),
}
BATCHES = {"one": (1, None), "three": (3, None), "dynamic": (2, 1), "dynamic from five": (6, 5)}


def exported(module: nn.Module, shape: tuple[int, ...], batch: str) -> torch.export.ExportedProgram:
    rows, least = BATCHES[batch]
    dynamic = None if least is None else ({0: torch.export.Dim("rows", min=least)},)
    return torch.export.export(module, (torch.zeros(rows, *shape),), dynamic_shapes=dynamic)


def made(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    make, shape = MODULES[name]
    return make().eval(), shape


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", MODULES)
def test_a_program_computes_what_its_module_does(name: str, batch: str) -> None:
    module, shape = made(name)
    program = exported(module, shape, batch)
    x = torch.randn(4, *shape)
    for network in (lg.capture(program), lg.capture(program.module(), torch.zeros(1, *shape))):
        assert torch.allclose(network(x.flatten(1)), module(x).double(), atol=1e-5)
    assert lg.capture(program).digest == lg.capture(module, x).digest


@pytest.mark.parametrize("name", ["mlp", "images"])
def test_a_decomposed_program(name: str) -> None:
    module, shape = made(name)
    network = lg.capture(exported(module, shape, "dynamic").run_decompositions())
    x = torch.randn(4, *shape)
    assert torch.allclose(network(x.flatten(1)), module(x).double(), atol=1e-5)


def test_every_entry_point_takes_a_program() -> None:
    module, shape = made("mlp")
    program, x = exported(module, shape, "three"), torch.zeros(1, 4)
    assert lg.bound(program).value == lg.bound(module, x).value
    assert (
        lg.bound(program, lg.Query(example=x).example, norm=1, outputs=(0, 1)).value
        == lg.bound(module, x, norm=1, outputs=(0, 1)).value
    )
    assert lg.exact(program).upper == lg.exact(module, x).upper
    assert bool(lg.certify(program, x, torch.tensor([int(module(x).argmax())]), 1e-3).certified.all())


def test_a_graph_of_fx() -> None:
    module, shape = made("images")
    x = torch.zeros(1, *shape)
    assert lg.capture(fx.symbolic_trace(module), x).digest == lg.capture(module, x).digest


def test_the_program_of_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(3, 5)

        def forward(self, x: Tensor, context: Tensor) -> Tensor:
            return torch.relu(self.a(x) + self.b(context))

    module = Two()
    for example in ((torch.zeros(1, 4), torch.ones(1, 3)), (torch.zeros(2, 4), torch.ones(2, 3))):
        program = torch.export.export(module, example)
        assert lg.capture(program).inputs == 7
        x = torch.randn(3, 4)
        expected = module(x, torch.ones(3, 3)).double()
        assert torch.allclose(lg.capture(program, inputs="x")(x), expected, atol=1e-6)


class Mixing(nn.Module):
    """The rows of one batch are mixed: a function of one sample only where the batch has one row."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.flip(0)


class PerRow(nn.Module):
    """Each row has a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(1.0, 7.0).reshape(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


@pytest.mark.parametrize("kind", [Mixing, PerRow])
def test_a_program_for_a_batch_whose_rows_are_not_alike_is_refused(kind: type[nn.Module]) -> None:
    program = torch.export.export(kind(), (torch.zeros(3, 2),))
    with pytest.raises(errors.UnsupportedLayer, match=r"mixes the samples|samples of a batch differently"):
        lg.capture(program)


def test_a_program_for_one_sample_is_a_function_of_it() -> None:
    network = lg.capture(torch.export.export(Mixing(), (torch.zeros(1, 2),)))
    assert torch.equal(network(torch.tensor([[1.0, 2.0]])), torch.tensor([[2.0, 4.0]], dtype=torch.float64))


def test_arguments_are_bound_by_the_overloads_own_names() -> None:
    class Overloads(nn.Module):
        """ATen's order: weight and bias before the statistics; the scale of an elu where torch has `inplace`."""

        def __init__(self) -> None:
            super().__init__()
            self.held = nn.ParameterList(nn.Parameter(torch.rand(2) + i, False) for i in range(4))

        def forward(self, x: Tensor) -> Tensor:
            weight, bias, mean, variance = self.held
            x = torch.ops.aten.batch_norm.default(x, weight, bias, mean, variance, False, 0.1, 1e-3, True)
            return torch.ops.aten.rsub.Scalar(torch.ops.aten.elu(torch.ops.aten.mm(x, torch.ones(2, 2)), 1.0, 2.0), 3.0)

    module, x = Overloads(), torch.randn(5, 2)
    assert torch.allclose(lg.capture(module, x)(x), module(x).double(), atol=1e-6)


def test_refused_overloads_give_their_reasons() -> None:
    for function, words in ((torch.ops.aten.exp.default, "slope"), (torch.ops.aten.cholesky.default, "has no rule")):

        class Refused(nn.Module):
            def forward(self, x: Tensor, function: Any = function) -> Tensor:
                return function(x)

        with pytest.raises(errors.UnsupportedLayer, match=words):
            lg.capture(Refused(), torch.eye(2)[None])


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (torch.jit.script(nn.Linear(3, 2)), r"TorchScript.*load_state_dict\(scripted\.state_dict\(\)\)"),
        (nn.Sequential(torch.jit.trace(nn.Linear(3, 2), torch.zeros(1, 3))), r"model\.0 is a TorchScript module"),
        ("net.onnx", r"model is str; .*from_onnx.*load_module"),
        (nn.Linear, r"the class itself: make an instance, Linear\(\.\.\.\)"),
        (torch.relu, r"A function is given as a module: class F\(torch\.nn\.Module\)"),
        (lambda x: x, r"forward\(self, x\)"),
        (type("Model", (), {"__module__": "keras.models"})(), r"model is Model; .*keras model as ONNX"),
        (3, r"model is int; an nn\.Module"),
    ],
)
def test_what_is_no_module_is_refused_with_the_way_to_one(model: Any, words: str) -> None:
    with pytest.raises((errors.InvalidModel, errors.UnsupportedLayer), match=words):
        lg.bound(model, torch.zeros(1, 3))


def test_the_modules_own_example_is_taken() -> None:
    module = mlp()
    module.example_input_array = torch.zeros(1, 4)
    assert lg.bound(module).value == lg.bound(module, torch.zeros(2, 4)).value
