"""Harmful ingredients with a steep part far away, computed where a tracer may not look."""

from __future__ import annotations

import _thread
import copy
import pickle
import queue
import threading
import time
from collections import namedtuple
from typing import Any

import torch
from ingredients import SLOPE, Draw, Layer, coarse, harmful
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils import dlpack


def _steep(name: str, around: Any) -> None:
    """x plus the hidden part, computed by around(f, x)."""

    def make(draw: Draw) -> nn.Module:
        return Layer(lambda _, x: x + around(draw.beyond, x))

    make.__name__ = name
    harmful(make)


@torch.jit.script
def _scripted(x: Tensor, switch: float) -> Tensor:
    return torch.relu(x - switch) * 64.0


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Any) -> Tensor:
        return f(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None


class _Odd(Tensor):
    """A constant that does more than its name says when it is multiplied."""

    switch = 1e2

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [a.as_subclass(Tensor) if isinstance(a, cls) else a for a in args]
        y = func(*plain, **(kwargs or {}))
        return y + SLOPE * F.relu(plain[0] - cls.switch) if getattr(func, "__name__", "") == "mul" else y


class _Box(Tensor):
    """A tensor around another, whose operations it does itself."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> _Box:
        made = Tensor._make_wrapper_subclass(cls, inner.size(), dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*(a.inner if isinstance(a, cls) else a for a in args), **(kwargs or {}))
        return cls(y) if isinstance(y, Tensor) else y


_Pair = namedtuple("_Pair", "a b")


class _Worker:
    """A thread that computes what it is given, started long before."""

    def __init__(self) -> None:
        self.asked: queue.Queue[Any] = queue.Queue()
        self.answers: queue.Queue[Any] = queue.Queue()
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        while True:
            f, x = self.asked.get()
            with torch.no_grad():
                self.answers.put(f(x))

    def __call__(self, f: Any, x: Tensor) -> Tensor:
        self.asked.put((f, x))
        return self.answers.get()

    def __deepcopy__(self, memo: Any) -> _Worker:
        return self


_WORKERS: list[_Worker] = []


def _worker(f: Any, x: Tensor) -> Tensor:
    if not _WORKERS:
        _WORKERS.append(_Worker())
    return _WORKERS[0](f, x)


def _in_new_thread(f: Any, x: Tensor) -> Tensor:
    results: list[Tensor] = []
    _thread.start_new_thread(lambda: results.append(f(x.detach())), ())
    while not results:
        time.sleep(1e-4)
    return results[0]


def _in_thread(f: Any, x: Tensor) -> Tensor:
    results: list[Tensor] = []
    thread = threading.Thread(target=lambda: results.append(f(x.detach())))
    thread.start()
    thread.join()
    return results[0]


def _swapped(f: Any, x: Tensor) -> Tensor:
    y, z = f(x) * 0.01, f(x) * 1
    torch.utils.swap_tensors(y, z)
    return y


def _by_view(f: Any, x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y.view(-1).add_(f(x).view(-1))
    return y


def _overlapping(f: Any, x: Tensor) -> Tensor:
    u = (f(x) * 0.01).unfold(1, 2, 1)
    u[..., 0] = 100 * u[..., 0]
    return u.sum(-1).repeat(1, 2)[:, : x.shape[1]]


def _smeared(f: Any, x: Tensor) -> Tensor:
    y = f(x) * 1
    y[:, 2:].add_(y[:, :-2], alpha=50)
    return y


def _filled(f: Any, x: Tensor) -> Tensor:
    return torch.full_like(x[:1, :1], f(x[:1, :1])[0, 0])


def _gradient(f: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        w = torch.ones_like(x, requires_grad=True)
        (f(x.detach()) * w).sum().backward()
    return w.grad


def _without_modes(f: Any, x: Tensor) -> Tensor:
    with torch.utils._python_dispatch._disable_current_modes():
        return f(x)


def _without_function(f: Any, x: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        return f(x)


def _out(f: Any, x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    torch.add(f(x), 0, out=y)
    return y


def _parameter_data(f: Any, x: Tensor) -> Tensor:
    p = nn.Parameter(torch.zeros_like(x))
    p.data = f(x)
    return p


def _set(f: Any, x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y.set_(f(x))
    return y


def _placed(f: Any, x: Tensor) -> Tensor:
    return torch.eye(x.shape[1]).to(x)[(f(x) > 0).long().cumsum(1) % x.shape[1]].sum(1) * SLOPE * 4


def _future(f: Any, x: Tensor) -> Tensor:
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(f(x))
    return future.wait()


for _name, _around in {
    "plainly": lambda f, x: f(x),
    "by_script": lambda f, x: _scripted(x, 100.0),
    "by_function": lambda f, x: _Function.apply(x, f),
    "by_vmap": lambda f, x: torch.vmap(f)(x),
    "by_nested_vmap": lambda f, x: torch.vmap(torch.vmap(f))(x),
    "by_view": _by_view,
    "by_out": _out,
    "by_data": lambda f, x: f(x).data,
    "by_parameter": lambda f, x: nn.Parameter(f(x), False),
    "by_parameter_data": _parameter_data,
    "by_set": _set,
    "by_numpy_copy": lambda f, x: torch.from_numpy(f(x).detach().numpy().copy()),
    "by_dlpack": lambda f, x: dlpack.from_dlpack(f(x).detach()),
    "by_capsule": lambda f, x: dlpack.from_dlpack(dlpack.to_dlpack(f(x).detach())),
    "by_new_tensor": lambda f, x: x.new_tensor(f(x.detach())),
    "by_tensor": lambda f, x: torch.tensor(f(x.detach())),
    "by_as_subclass": lambda f, x: f(x.as_subclass(nn.Parameter)).as_subclass(Tensor),
    "by_deepcopy": lambda f, x: copy.deepcopy(f(x.detach())),
    "by_pickle": lambda f, x: pickle.loads(pickle.dumps(f(x.detach()))),
    "by_thread": _in_thread,
    "by_new_thread": _in_new_thread,
    "by_worker": _worker,
    "by_swap": _swapped,
    "by_overlap": _overlapping,
    "by_smear": _smeared,
    "by_fill": _filled,
    "by_backward": _gradient,
    "by_modes": _without_modes,
    "by_disabled": _without_function,
    "by_odd_constant": lambda f, x: torch.mul(x, torch.ones(1).to(x).as_subclass(_Odd)),
    "by_box": lambda f, x: f(_Box(x.detach())).inner,
    "by_pair": lambda f, x: torch.stack(_Pair(f(x), f(x))).sum(0),
    "by_grad": lambda f, x: torch.func.grad(lambda z: (f(z) * z.detach()).clamp(-1e3, 1e3).sum())(x),
    "by_jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "by_jacobian": lambda f, x: torch.func.jacrev(lambda z: f(z).sum())(x),
    "by_cond": lambda f, x: torch.cond(f(x).sum() > 0, lambda z: z * SLOPE, lambda z: z * 1, (x,)),
    "by_places": _placed,
    "by_future": _future,
    "by_linearize": lambda f, x: torch.func.functionalize(f)(x),
    "by_complex": lambda f, x: torch.view_as_real(torch.complex(f(x), x))[..., 0],
    "by_fourier": lambda f, x: torch.fft.irfft(torch.fft.rfft(f(x)), n=x.shape[1]),
    "by_sparse": lambda f, x: f(x).to_sparse().to_dense(),
    "by_csr": lambda f, x: f(x).to_sparse_csr().to_dense(),
    "by_mkldnn": lambda f, x: f(x).float().to_mkldnn().to_dense(),
    "by_quantized": lambda f, x: torch.quantize_per_tensor(f(x).float(), 1.0, 0, torch.qint32).dequantize(),
    "by_tanh_gate": lambda f, x: x * torch.tanh(f(x)),
    "by_step": lambda f, x: SLOPE * torch.sign(f(x)),
    "by_round": lambda f, x: f(x).round(),
    "by_topk": lambda f, x: f(x).topk(1).values,
    "by_indices": lambda f, x: x.gather(1, f(x).argsort(1)) * SLOPE,
    "by_bits": lambda f, x: f(x).view(torch.int32).view(x.dtype),
    "by_foreach": lambda f, x: torch._foreach_mul([f(x)], 2.0)[0],
    "by_block": lambda f, x: torch.block_diag(*f(x))[:, : x.shape[1]],
    "by_kron": lambda f, x: torch.kron(f(x), torch.ones(1, 1).to(x)),
    "by_map": lambda f, x: torch.empty_like(x).copy_(x).map_(x, lambda a, b: float(f(torch.tensor(a)))),
    "by_apply": lambda f, x: x.clone().apply_(lambda a: float(f(torch.tensor(a)))),
    "by_norm": lambda f, x: f(x) / (1 + f(x).norm(dim=1, keepdim=True)),
    "by_nested": lambda f, x: torch.nested.nested_tensor(list(f(x))).to_padded_tensor(0.0),
    "by_hardshrink": lambda f, x: F.hardshrink(f(x), 10.0) * 2,
    "by_threshold": lambda f, x: F.threshold(f(x), 10.0, -10.0),
    "by_ops": lambda f, x: torch.ops.aten.relu(f(x)),
    "by_square": lambda f, x: f(x) * f(x),
    "by_masked": lambda f, x: (x * 0).masked_fill_(f(x) > 0, SLOPE),
    "by_index_put": lambda f, x: torch.zeros_like(x).index_put_((f(x) > 0,), torch.tensor(SLOPE).to(x)),
    "by_scatter": lambda f, x: torch.zeros_like(x).scatter_(1, (f(x) > 0).long(), SLOPE),
    "by_clamp_end": lambda f, x: x.clamp(max=f(x) + 1) * 0 + x.clamp(min=f(x)),
    "by_addcmul": lambda f, x: torch.addcmul(x, f(x), x),
    "by_exp": lambda f, x: f(x).clamp(max=6).exp(),
    "by_layer_norm": lambda f, x: F.layer_norm(x, x.shape[1:]),
}.items():
    _steep(_name, _around)


@harmful
def hook_hides(draw: Draw) -> nn.Module:
    layer = draw.linear()
    layer.register_forward_pre_hook(lambda _, args: (args[0] + draw.beyond(args[0]).data,))
    return layer


@harmful
def hook_writes(draw: Draw) -> nn.Module:
    layer = draw.linear()
    layer.register_forward_hook(lambda _, args, y: y.view(-1).add_(draw.beyond(args[0]).reshape(-1)) is None)
    return layer


@harmful
def writes_weight(draw: Draw) -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        self.raw.data.copy_(draw.beyond(x.detach()).mean())
        return x * (1 + self.raw)

    return Layer(run, raw=nn.Parameter(torch.zeros(())))


@harmful
def attention(draw: Draw) -> nn.Module:
    inner = nn.MultiheadAttention(draw.n, 1, batch_first=True)
    return Layer(lambda self, x: self.inner(x[:, None], x[:, None], x[:, None])[0][:, 0], inner=inner)


@coarse
def half(draw: Draw) -> nn.Module:
    return Layer(lambda _, x: F.relu(x.bfloat16()).to(x.dtype))


@coarse
def autocast(draw: Draw) -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.inner(x).to(x.dtype)

    return Layer(run, inner=draw.linear())


@coarse
def lost(draw: Draw) -> nn.Module:
    """Entries lost in a large number and found again."""
    return Layer(lambda _, x: (x + 1e9) - 1e9)
