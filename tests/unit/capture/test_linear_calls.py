"""Linear calls: the captured network computes what the module does, and its bound is the norm of its matrix."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import lipguard as lg
from lipguard import errors


class Of(nn.Module):
    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


def matrix(f: Callable[[Tensor], Tensor], example: Tensor) -> Tensor:
    """The linear part of f, on one sample."""
    flat = example[0].double().flatten()

    def own(x: Tensor) -> Tensor:
        return f(x.reshape(1, *example.shape[1:])).flatten()

    zero = own(torch.zeros_like(flat))
    return torch.stack([own(row) - zero for row in torch.eye(len(flat), dtype=torch.float64)], 1)


def like(x: Tensor, t: Tensor) -> Tensor:
    return t.to(torch.complex64 if x.dtype == torch.float32 else torch.complex128) if t.is_complex() else t.to(x)


torch.manual_seed(0)
C, W = torch.arange(4.0) + 1, torch.randn(4, 4)
Z, K = torch.randn(4, dtype=torch.complex128), torch.randn(3, 3, 2, dtype=torch.complex128)
SRC, DST = torch.tensor([0, 1, 1, 2]), torch.tensor([1, 0, 2, 1])
X4, GRAPH, ROWS, IMAGE = torch.zeros(1, 4), torch.zeros(1, 3, 2), torch.zeros(1, 3, 6), torch.zeros(1, 2, 4, 4)


def spectral_layer(x: Tensor) -> Tensor:
    """Two modes of a Fourier neural operator."""
    modes = torch.fft.rfft(x)
    out = torch.zeros(len(x), 3, 4, dtype=modes.dtype)
    out[:, :, :2] = torch.einsum("bix,iox->box", modes[:, :, :2], like(x, K))
    return torch.fft.irfft(out, n=6)


CASES: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "lerp": (lambda x: torch.lerp(x, like(x, C), 0.3), X4),
    "lerp by a value": (lambda x: torch.lerp(like(x, C), 2 * like(x, C), x), X4),
    "lerp by a tensor": (lambda x: torch.lerp(x, 2 * x, like(x, C)), X4),
    "addcmul": (lambda x: torch.addcmul(like(x, C), x, like(x, C), value=0.5), X4),
    "addcdiv": (lambda x: torch.addcdiv(x, x, like(x, C), value=0.5), X4),
    "addmm": (lambda x: torch.addmm(x, x, like(x, W), beta=0.5, alpha=2), X4),
    "addmv": (lambda x: torch.addmv(like(x, torch.zeros(1)), x, like(x, C)), X4),
    "addr": (lambda x: torch.addr(x.new_zeros(len(x), 4), x[:, 0], like(x, C)), X4),
    "baddbmm": (lambda x: torch.baddbmm(like(x, C).view(1, 1, 4), x[:, None], like(x, W).expand(len(x), 4, 4)), X4),
    "matmul of a stack": (lambda x: x.view(-1, 1, 1, 4) @ like(x, torch.stack([W, 2 * W])), X4),
    "mv": (lambda x: torch.mv(x, like(x, C)), X4),
    "inner": (lambda x: torch.inner(x, like(x, W)), X4),
    "outer": (lambda x: torch.outer(x[:, 0], like(x, C)), X4),
    "vecdot": (lambda x: torch.linalg.vecdot(x, like(x, C)), X4),
    "tensordot": (lambda x: torch.tensordot(x.view(-1, 2, 2), like(x, W).view(2, 2, 4), dims=([1, 2], [1, 0])), X4),
    "kron": (lambda x: torch.kron(like(x, torch.tensor([[1.0, 2.0]])), x), X4),
    "cross": (lambda x: torch.linalg.cross(like(x, C[:3])[None], x[:, :3]), X4),
    "multi_dot": (lambda x: torch.linalg.multi_dot([x, like(x, W), like(x, W)]), X4),
    "trapezoid": (lambda x: torch.trapezoid(x, like(x, C * C)), X4),
    "cumulative trapezoid": (lambda x: torch.cumulative_trapezoid(x, dx=0.5), X4),
    "diff": (lambda x: torch.diff(x, prepend=x[:, :1]), X4),
    "cumsum": (lambda x: x.cumsum(-1), X4),
    "sum of two dimensions": (lambda x: torch.sum(x.view(-1, 2, 2), (1, 2), keepdim=True), X4),
    "broadcast": (lambda x: torch.broadcast_tensors(x, like(x, C))[0] * like(x, C), X4),
    "repeated and scaled": (lambda x: x[..., None] * like(x, torch.ones(1, 4, 7) * C[None, :, None]), X4),
    "repeated and shifted": (lambda x: x[:, :1] + like(x, C), X4),
    "constants like a value": (lambda x: x * C.type_as(x) + C.to(x) + C.expand_as(x) + torch.full_like(x, 2.0), X4),
    "diag_embed": (torch.diag_embed, X4),
    "index_add": (lambda x: torch.zeros_like(x).index_add(1, DST, x[:, SRC]), GRAPH),
    "index_add in place": (lambda x: torch.zeros_like(x).index_add_(1, DST, x[:, SRC], alpha=2.0), GRAPH),
    "index_add to itself": (lambda x: x.index_add(1, DST, x[:, SRC]), GRAPH),
    "scatter_add": (
        lambda x: torch.zeros_like(x).scatter_add(1, DST.view(1, -1, 1).expand_as(x[:, SRC]), x[:, SRC]), GRAPH,
    ),
    "scatter": (lambda x: x.scatter(1, torch.tensor([[1, 2]]).expand(len(x), 2), 3 * x[:, :2]), X4),
    "scatter a number": (lambda x: x.scatter(1, torch.tensor([[1, 2]]).expand(len(x), 2), 0.7), X4),
    "index_copy": (lambda x: x.index_copy(1, torch.tensor([3, 0]), 2 * x[:, :2]), X4),
    "index_fill": (lambda x: x.index_fill(1, torch.tensor([3, 0]), 1.5), X4),
    "index_put": (
        lambda x: x.index_put((torch.arange(len(x))[:, None], torch.tensor([1, 1])), x[:, 2:], accumulate=True), X4,
    ),
    "slice_scatter": (lambda x: x.slice_scatter(2 * x[:, :2], 1, 1, 3), X4),
    "grid_sample": (
        lambda x: F.grid_sample(
            x.view(-1, 1, 2, 2), like(x, torch.tensor([[[[0.1, 0.2]]]])).expand(len(x), 1, 1, 2), align_corners=False
        ),
        X4,
    ),
    "grid_sample of pixels": (
        lambda x: F.grid_sample(
            x.view(-1, 1, 2, 2), like(x, torch.tensor([[[[0.1, 0.2]]]])).expand(len(x), 1, 1, 2), "nearest", align_corners=False
        ),
        X4,
    ),
    "copied": (lambda x: torch.empty_like(x).copy_(2 * x[:, :1]), X4),
    "filter": (lambda x: torch.fft.irfft(torch.fft.rfft(x) * 0.5, n=4), X4),
    "complex filter": (lambda x: torch.fft.ifft(torch.fft.fft(x, norm="ortho") * like(x, Z), norm="ortho").imag, X4),
    "fft2": (lambda x: torch.fft.ifft2(torch.fft.fft2(x) * 2j).imag, IMAGE),
    "rfftn": (lambda x: torch.fft.irfftn(torch.fft.rfftn(x, dim=(1, 2, 3)), s=(2, 4, 4), dim=(1, 2, 3)), IMAGE),
    "hfft": (lambda x: torch.fft.hfft(torch.fft.rfft(x)), X4),
    "conjugate": (lambda x: (torch.fft.fft(x).conj() * like(x, Z)).real, X4),
    "complex of parts": (lambda x: (torch.complex(x[:, :2], x[:, 2:]) / (1 + 1j)).real, X4),
    "complex matrix": (lambda x: torch.view_as_real(torch.fft.fft(x.view(-1, 2, 2)) @ like(x, Z.view(2, 2))), X4),
    "shifted spectrum": (lambda x: torch.view_as_real(torch.fft.fftshift(torch.fft.fft(x), dim=-1)), X4),
    "spectral layer": (spectral_layer, ROWS),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_linear_call_has_the_norm_of_its_matrix(name: str) -> None:
    f, example = CASES[name]
    dense = matrix(f, example)
    network = lg.capture(Of(f), example.double())
    x = torch.randn(3, dense.shape[1], dtype=torch.float64)
    zero = f(torch.zeros_like(example, dtype=torch.float64)).flatten()
    torch.testing.assert_close(network(x), x @ dense.T + zero, rtol=1e-12, atol=1e-12)
    expected = float(torch.linalg.matrix_norm(dense, 2))
    value = lg.bound(network).value
    assert expected * (1 - 1e-12) <= value <= expected * (1 + 1e-6)


def test_a_complex_length_has_the_constant_of_what_is_before_it() -> None:
    value = lg.bound(Of(lambda x: torch.fft.fft(x, norm="ortho").abs()), X4).value
    assert 1 <= value <= 1 + 1e-6


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "fill": (lambda x: x * (1 + torch.full_like(x, (x > 100).any())), "asks a question of values"),
    "copied fill": (lambda x: x * x.new_tensor(x[:, :1] * 1.0), "depends on the input"),
    "angle": (lambda x: torch.fft.fft(x).angle(), "jumps where the number crosses"),
    "complex product": (lambda x: (torch.fft.fft(x) * torch.fft.fft(x)).real, "quadratic"),
    "transform of the batch": (lambda x: torch.fft.fft(x, dim=0).real, "mixes the samples"),
    "no complex rule": (lambda x: torch.fft.fft(x).tanh().real, "has no rule"),
    "sum over the stack": (lambda x: torch.addbmm(torch.zeros(4, 4), x[:, None].mT, x[:, None]), "mixes the samples"),
    "cross": (lambda x: torch.cross(x.view(-1, 1, 4)[..., :3].expand(-1, 3, 3), torch.ones(1, 3, 3)), "Give dim=-1"),
    "scattered products": (
        lambda x: x.scatter_reduce(1, torch.zeros(len(x), 4, dtype=torch.int64), x, "prod"), "reduces by 'prod'",
    ),
    "spread": (lambda x: x / x.var(1, keepdim=True), "of the sample itself"),
    "logcumsumexp": (lambda x: x.logcumsumexp(1), "groups that overlap"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_linear_is_refused(name: str) -> None:
    f, message = REFUSED[name]
    with pytest.raises(errors.UnsupportedLayer, match=message):
        lg.capture(Of(f), torch.ones(1, 4))


def test_nearest_pixels_are_those_that_the_kernel_of_the_type_reads() -> None:
    up = nn.Upsample(size=74)  # in float32 place 37 reads pixel 2, in float64 pixel 3
    x = torch.eye(6)[:, None]
    for dtype in (torch.float32, torch.float64):
        network = lg.capture(Of(lambda v: up(v[:, None])[:, 0]), torch.zeros(1, 6, dtype=dtype))
        assert torch.equal(network(torch.eye(6, dtype=torch.float64)), up(x.to(dtype))[:, 0].double())


@settings(max_examples=20, deadline=None)
@given(value=st.floats(-10, 10))
def test_a_padding_value_is_not_rounded(value: float) -> None:
    network = lg.capture(Of(lambda x: F.pad(x, (0, 1), value=value)), torch.zeros(1, 1).double())
    assert float(network(torch.zeros(1, 1))[0, 1]) == value


def test_a_sort_of_one_entry_is_the_identity() -> None:
    for f in (lambda x: x[:, :1].topk(1, 1)[0], lambda x: x.view(-1, 4, 1).sort(2)[0], lambda x: x.view(-1, 4, 1).max(2)[0]):
        for options in ({}, {"domain": lg.Box(0.0, 1.0)}):
            assert lg.bound(Of(f), X4.double(), **options).value == pytest.approx(1, abs=1e-9)
        assert lg.exact(Of(f), X4.double(), domain=lg.Box(0.0, 1.0)).upper == pytest.approx(1, abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(shape=st.lists(st.integers(1, 3), min_size=1, max_size=3), seed=st.integers(0, 99), data=st.data())
def test_values_and_constants_broadcast_both_ways(shape: list[int], seed: int, data: st.DataObject) -> None:
    kept = [data.draw(st.booleans()) for _ in shape]
    given_shape = [n if keep else 1 for n, keep in zip(shape, kept, strict=True)]
    constant = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    network = lg.capture(Of(lambda x: x * constant), torch.zeros(1, *given_shape).double())
    x = torch.randn(2, *given_shape, dtype=torch.float64)
    assert torch.equal(network(x.flatten(1)), (x * constant).flatten(1))
    # Every entry of the value meets the constants along the dimensions in which it is repeated.
    repeated = [d for d, keep in enumerate(kept) if not keep]
    lengths = torch.linalg.vector_norm(constant, dim=repeated) if repeated else constant.abs()
    assert lg.bound(network).value == pytest.approx(float(lengths.max()), rel=1e-6)


def test_series_of_an_elman_network_are_written_out() -> None:
    torch.manual_seed(1)
    for layers, both in ((1, False), (2, True)):
        rnn = nn.RNN(2, 4, layers, batch_first=True, bidirectional=both).double()
        network = lg.capture(rnn, torch.zeros(1, 3, 2).double(), outputs=0)
        x = torch.randn(3, 3, 2, dtype=torch.float64)
        torch.testing.assert_close(network(x.flatten(1)), rnn(x)[0].flatten(1), rtol=1e-9, atol=1e-9)
    linear = nn.RNN(1, 1, nonlinearity="relu", batch_first=True).double()
    with torch.no_grad():
        for p in linear.parameters():
            p.fill_(0.0)
        linear.weight_ih_l0.fill_(1.0)
        linear.weight_hh_l0.fill_(0.5)
    # Where all inputs are positive the states are sums with weights 0.5^k.
    steps = torch.tensor([[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.25, 0.5, 1.0]], dtype=torch.float64)
    value = lg.bound(linear, torch.zeros(1, 3, 1).double(), outputs=0).value
    assert float(torch.linalg.matrix_norm(steps, 2)) * (1 - 1e-9) <= value <= math.sqrt(3) * 1.75
