"""With respect to what: some of several input tensors, the others held, all of them, or a linear map in front."""

from collections.abc import Mapping
from typing import Any

import architectures as made
import pytest
import torch
from torch import Tensor, nn

import lipguard as lg
from lipguard import errors
from lipguard.capture import network_of


class Two(nn.Module):
    """relu(A x + B c), a function of a state and a context."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b = nn.Linear(4, 5), nn.Linear(3, 5, bias=False)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor, context: Tensor, scale: float = 1.0) -> Tensor:
        return self.head(torch.relu(self.a(x) + scale * self.b(context)))


class OfDict(nn.Module):
    """A function of a mapping of tensors, one of them nested."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.fc = nn.Linear(5, 2)

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        return self.fc(torch.cat([batch["image"], batch["meta"]["place"]], 1))


def columns(network: lg.Network) -> Tensor:
    """The Jacobian of an affine network, (m, d)."""
    zero = torch.zeros(1, network.inputs)
    return (network(torch.eye(network.inputs)) - network(zero)).T


X, C = torch.randn(1, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([[1.0, -2.0, 0.5]])


@pytest.mark.parametrize(("which", "size"), [("x", 4), (0, 4), ("context", 3), (1, 3)])
@pytest.mark.parametrize("form", ["tuple", "list", "dict"])
def test_one_of_several_tensors_the_other_held_at_the_examples_value(which: int | str, size: int, form: str) -> None:
    net = Two()
    example = {"tuple": (X, C), "list": [X, C], "dict": {"x": X, "context": C}}[form]
    if form == "dict" and isinstance(which, int):
        with pytest.raises(errors.UnsupportedQuery, match=r"no input \d; it has 'x', 'context'. Choose one of these with"):
            lg.capture(net, example, inputs=which)
        return
    network = lg.capture(net, example, inputs=which)
    assert network.inputs == size
    moved = torch.randn(6, size)
    expected = net(moved, C.expand(6, -1)) if size == 4 else net(X.expand(6, -1), moved)
    assert torch.allclose(network(moved), expected.double(), atol=1e-6)


def test_a_batch_holds_its_first_row_and_other_values_pass_as_they_are() -> None:
    net = Two()
    network = lg.capture(net, (torch.randn(8, 4), C.repeat(8, 1) + torch.arange(8)[:, None], 2.0), inputs="x")
    moved = torch.randn(3, 4)
    assert torch.allclose(network(moved), net(moved, C.expand(3, -1), 2.0).double(), atol=1e-6)


def test_a_tensor_that_is_no_batch_is_held_whole() -> None:
    net, u, places = made.DeepONet().eval(), torch.randn(1, 10), torch.linspace(0, 1, 5)[:, None]
    network = lg.capture(net, (u, places), inputs="u")
    assert (network.inputs, network.outputs) == (10, 5)
    assert torch.allclose(network(u), net(u, places).double(), atol=1e-6)
    assert lg.bound(network).value > 0


def test_nested_mappings_are_named_by_dotted_paths() -> None:
    net = OfDict()
    example = {"image": torch.zeros(1, 3), "meta": {"place": torch.ones(1, 2), "name": "x"}}
    assert torch.allclose(columns(lg.capture(net, example, inputs="image")), net.fc.weight[:, :3].double(), atol=1e-6)
    assert torch.allclose(columns(lg.capture(net, example, inputs="meta.place")), net.fc.weight[:, 3:].double(), atol=1e-6)
    assert torch.allclose(columns(lg.capture(net, example)), net.fc.weight.double(), atol=1e-6)


class OfThree(nn.Module):
    """A (x, c, t) with one matrix, whose blocks tell which input is read; t is a number for each sample."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor, c: Tensor, t: Tensor, place: Tensor | None = None) -> Tensor:
        return self.fc(torch.cat([x.flatten(1), c, t[:, None]], 1))


THREE = (torch.ones(1, 2, 2), torch.full((1, 3), 2.0), torch.tensor([3.0]))


@pytest.mark.parametrize(
    ("chosen", "order"),
    [
        (None, [0, 1, 2, 3, 4, 5, 6, 7]),
        (("c", "x"), [4, 5, 6, 0, 1, 2, 3]),
        (["t", 0], [7, 0, 1, 2, 3]),
        ("x,t", [0, 1, 2, 3, 7]),
        ("0,1", [0, 1, 2, 3, 4, 5, 6]),
        ("t", [7]),
    ],
)
def test_several_jointly_in_the_order_named_and_the_others_held(chosen: Any, order: list[int]) -> None:
    net = OfThree()
    network = lg.capture(net, (*THREE, torch.zeros(1, 2, dtype=torch.int64)), inputs=chosen)
    assert torch.allclose(columns(network), net.fc.weight[:, order].double(), atol=1e-6)
    whole = torch.cat([part.flatten() for part in THREE])
    assert torch.allclose(network(whole[None, order]), net(*THREE).double(), atol=1e-6)


def test_the_joint_constant_of_an_affine_map_is_the_norm_of_all_its_columns_and_the_statement_says_so() -> None:
    net = OfThree().double()
    whole = torch.linalg.matrix_norm(net.fc.weight, 2).item()
    joint, of_two = lg.bound(net, THREE), lg.exact(net, THREE, inputs=("c", "t"))
    assert joint.value == pytest.approx(whole, rel=1e-9) and joint.note == "with respect to x, c, t jointly"
    assert of_two.upper == pytest.approx(torch.linalg.matrix_norm(net.fc.weight[:, 4:], 2).item(), rel=1e-9)
    assert lg.bound(net, THREE, inputs=("c", "t")).note == "with respect to c, t jointly"
    assert lg.bound(net, THREE, inputs="c").note == "with respect to c"
    assert of_two.choice.endswith("With respect to c, t jointly.")
    assert lg.bound(net.fc, torch.zeros(1, 8)).note == ""


def test_a_joint_domain_is_in_the_order_of_the_inputs() -> None:
    net = Two()
    low, high = torch.tensor([0.0, 0, 0, 0, 1, 1, 1]), torch.tensor([1.0, 1, 1, 1, 2, 2, 2])
    network = lg.capture(net, (X, C))
    by_hand = lg.exact(network, domain=lg.Box(low, high)).upper
    assert lg.exact(net, {"context": C, "x": X}, domain=lg.Box(low, high), inputs="x,context").upper == by_hand


def test_a_submodule_of_several_arguments() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.net = nn.Linear(4, 4), Two()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(self.first(x), context=x[:, :3])

    whole = Whole()
    network = lg.capture(whole, X, submodule="net", inputs="context")
    moved = torch.randn(5, 3)
    assert torch.allclose(network(moved), whole.net(whole.first(X).expand(5, -1), moved).double(), atol=1e-6)
    joint = lg.capture(whole, X, submodule="net")
    assert torch.allclose(joint(torch.cat([X, C], 1)), whole.net(X, C).double(), atol=1e-6)


def test_weights_that_arrive_at_a_submodule_are_held_whole() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return x * weight.sum(0) + bias

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.tensor([[1.0, 2.0]])), nn.Buffer(torch.ones(2))
            self.scaled = Scaled()

        def forward(self, x: Tensor) -> Tensor:
            return self.scaled(x, self.weight, self.bias)

    network = lg.capture(Whole(), torch.zeros(1, 2), submodule="scaled")
    assert torch.equal(columns(network), torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64)))


def test_a_matrix_in_front() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    matrix = torch.randn(4, 2, dtype=torch.float64)
    network = lg.capture(net, X, inputs=matrix)
    z = torch.randn(7, 2, dtype=torch.float64)
    assert torch.allclose(network(z), net.double()(z @ matrix.T), atol=1e-6)
    assert lg.capture(lg.capture(net, X), inputs=matrix).digest == lg.capture(net, X, inputs=matrix).digest
    linear = nn.Linear(4, 3, dtype=torch.float64)
    product = torch.linalg.matrix_norm(linear.weight @ matrix, 2).item()
    assert lg.exact(lg.capture(linear, X, inputs=matrix)).upper == pytest.approx(product, rel=1e-9)


def test_both_a_matrix_and_outputs_through_one_query() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    query = lg.Query(inputs=torch.eye(4)[:, :2], outputs=(0, 2), example=X)
    network = network_of(net, query)
    assert (network.inputs, network.outputs) == (2, 1)
    z = torch.randn(3, 2)
    y = net(torch.cat([z, torch.zeros(3, 2)], 1)).double()
    assert torch.allclose(network(z)[:, 0], y[:, 0] - y[:, 2], atol=1e-6)


REFUSED = {
    "of two batches": (made.DeepONet(), (torch.zeros(1, 10), torch.zeros(5, 1)), {}, errors.InvalidExample,
        r"2 input tensors \(u, y\).*'u' has 1 rows, 'y' has 5\. Choose with inputs=\.\.\., of 'u', 'y'"),
    "named twice": (Two(), (X, C), {"inputs": ("x", 0)}, errors.UnsupportedQuery, "names one input twice"),
    "one of several unknown": (Two(), (X, C), {"inputs": ("x", "z")}, errors.UnsupportedQuery, "no input 'z'; it has 'x'"),
    "unknown": (Two(), (X, C), {"inputs": "y"}, errors.UnsupportedQuery, "no input 'y'; it has 'x', 'context'"),
    "one given": (Two(), X, {}, errors.InvalidExample, r"takes 2 inputs \(x, context\).*example=\(x, context\).*inputs='x'"),
    "whole numbers": (Two(), (X, C.long()), {"inputs": 1}, errors.InvalidExample, "input '1' is torch.int64; a bound needs real"),
    "matrix of another size": (Two().a, X, {"inputs": torch.eye(3)}, errors.UnsupportedQuery, r"finite matrix \(4, k\)"),
    "not finite": (Two().a, X, {"inputs": torch.full((4, 1), torch.inf)}, errors.UnsupportedQuery, "finite matrix"),
    "no tensors": (Two().a, (1, 4), {}, errors.InvalidExample, "holds no tensor"),
    "a network": (lg.capture(Two().a, X), None, {"inputs": "x"}, errors.UnsupportedQuery, "inputs='x' chooses among"),
    "a network's part": (lg.capture(Two().a, X), None, {"submodule": "a"}, errors.UnsupportedQuery, "submodule='a' chooses"),
    "sum of two": (Two(), (X, C[:, :2]), {"inputs": "x"}, errors.InvalidExample, r"fails on an example of 2 tensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    model, example, options, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        lg.capture(model, example, **options)


def test_the_module_stays_as_it_was_and_weights_may_live() -> None:
    net = Two().train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    network = lg.capture(net, (X, C), inputs="context", live=True)
    network(C).sum().backward()
    assert net.b.weight.grad is not None and net.training
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
