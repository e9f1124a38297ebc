"""Harmless ingredients: what people write."""

from __future__ import annotations

import copy
import functools
import types
from typing import Any

import numpy as np
import torch
from ingredients import Draw, Layer, harmless
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrizations, parametrize, prune


@harmless
def matrix(draw: Draw) -> nn.Module:
    return draw.linear()


@harmless
def conv(draw: Draw) -> nn.Module:
    layer = nn.Conv1d(1, 1, 3, padding=1, padding_mode=draw.rng.choice(["zeros", "circular", "reflect"]))
    return nn.Sequential(nn.Unflatten(1, (1, draw.n)), layer, nn.Flatten())


@harmless
def batch_norm(draw: Draw) -> nn.Module:
    norm = nn.BatchNorm1d(draw.n)
    norm.running_var.copy_(draw.tensor(draw.n).abs() + 0.3)
    norm.running_mean.copy_(draw.tensor(draw.n))
    return norm


@harmless
def dropout(draw: Draw) -> nn.Module:
    return draw.rng.choice([nn.Dropout(0.4), nn.AlphaDropout(0.3), nn.Identity()])


@harmless
def prelu(draw: Draw) -> nn.Module:
    return nn.PReLU(draw.n)


@harmless
def hook_changes(draw: Draw) -> nn.Module:
    layer = draw.linear()
    layer.register_forward_hook(lambda _, args, y: F.relu(y) + args[0])
    return layer


@harmless
def hook_with_kwargs(draw: Draw) -> nn.Module:
    layer = draw.linear()
    layer.register_forward_hook(lambda _, args, kwargs, y: y * 2, with_kwargs=True, always_call=True)
    layer.register_forward_pre_hook(lambda _, args, kwargs: ((args[0] * 0.5,), kwargs), with_kwargs=True)
    return layer


@harmless
def pre_hook(draw: Draw) -> nn.Module:
    layer = draw.linear()
    layer.register_forward_pre_hook(lambda _, args: (F.relu(args[0]),))
    return layer


@harmless
def hook_looks(draw: Draw) -> nn.Module:
    layer, seen = draw.linear(), []
    layer.register_forward_hook(lambda _, args, y: seen.append((y.shape, y.dtype, y.device)))
    return layer


@harmless
def global_hook(draw: Draw) -> nn.Module:
    layer = draw.linear()
    handle = nn.modules.module.register_module_forward_hook(lambda m, _, y: y * 2 if m is layer else None)
    draw.undo.append(handle.remove)
    return layer


@harmless
def keeps_activation(draw: Draw) -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        self.last = F.relu(x).detach()
        return x * 2

    return Layer(run)


@harmless
def call_count(draw: Draw) -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        self.calls += 1
        return x * 2

    return Layer(run, calls=0)


@harmless
def normed(draw: Draw) -> nn.Module:
    kind = draw.rng.choice(
        [nn.utils.weight_norm, parametrizations.weight_norm, nn.utils.spectral_norm, parametrizations.spectral_norm]
    )
    return kind(draw.linear())


@harmless
def orthogonal(draw: Draw) -> nn.Module:
    return parametrizations.orthogonal(draw.linear(), orthogonal_map=draw.rng.choice(["cayley", "matrix_exp", "householder"]))


@harmless
def parametrized(draw: Draw) -> nn.Module:
    layer = draw.linear()
    parametrize.register_parametrization(layer, "weight", Layer(lambda _, w: (w + w.T) / w.abs().sum()))
    return layer


@harmless
def pruned(draw: Draw) -> nn.Module:
    layer = draw.linear()
    prune.random_unstructured(layer, "weight", 0.3)
    if draw.rng.random() < 0.5:
        prune.custom_from_mask(layer, "bias", torch.arange(draw.n) % 2)
    return layer


@harmless
def custom_pruning(draw: Draw) -> nn.Module:
    class Halved(prune.BasePruningMethod):
        PRUNING_TYPE = "unstructured"

        def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
            return default_mask * (t.abs() > t.abs().median())

    layer = draw.linear()
    Halved.apply(layer, "weight")
    return layer


@harmless
def weight_from_forward(draw: Draw) -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        w = self.raw / torch.linalg.norm(self.raw)
        u = torch.ones_like(w[0])
        for _ in range(3):
            u = F.normalize(w.T @ (w @ u), dim=0)
        return F.linear(x, torch.softmax(self.raw, 1) - w / (w @ u).norm())

    return Layer(run, raw=nn.Parameter(draw.tensor(draw.n, draw.n)))


@harmless
def weight_by_fourier(draw: Draw) -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        return x @ torch.fft.irfft(torch.fft.rfft(self.raw) * 0.5, n=self.raw.shape[1])

    return Layer(run, raw=nn.Parameter(draw.tensor(draw.n, draw.n)))


@harmless
def cached_weight(draw: Draw) -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        if self.training or self.kept is None:
            self.kept = self.raw / self.raw.norm()
        return F.linear(x, self.kept)

    return Layer(run, raw=nn.Parameter(draw.tensor(draw.n, draw.n)), kept=None)


@harmless
def cached_in_dict(draw: Draw) -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        key = (x.shape[1], x.dtype)
        if key not in self.kept:
            self.kept[key] = torch.eye(x.shape[1]).to(x) * 3
        return x @ self.kept[key]

    return Layer(run, kept={})


class _Merging(nn.Linear):
    """A low-rank change of the weight that evaluation mode adds to it."""

    merged = False

    def __init__(self, draw: Draw) -> None:
        super().__init__(draw.n, draw.n)
        self.down, self.up = nn.Parameter(draw.tensor(2, draw.n)), nn.Parameter(draw.tensor(draw.n, 2))

    def train(self, mode: bool = True) -> _Merging:
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * (self.up @ self.down).data
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y if self.merged else y + x @ self.down.T @ self.up.T


@harmless
def merging(draw: Draw) -> nn.Module:
    return _Merging(draw).train(draw.rng.random() < 0.5)


@harmless
def shared(draw: Draw) -> nn.Module:
    layer = draw.linear()
    return nn.Sequential(layer, nn.ReLU(), layer)


@harmless
def tied(draw: Draw) -> nn.Module:
    a, b = draw.linear(), draw.linear()
    a.weight = b.weight
    return nn.Sequential(a, nn.Tanh(), b)


@harmless
def patched_instance(draw: Draw) -> nn.Module:
    layer = draw.linear()
    layer.forward = types.MethodType(lambda self, x: F.linear(x, self.weight * 2), layer)
    return layer


@harmless
def patched_class(draw: Draw) -> nn.Module:
    class Own(nn.Linear):
        pass

    Own.forward = lambda self, x: F.relu(F.linear(x, self.weight)) * 2
    own = Own(draw.n, draw.n)
    own.load_state_dict(draw.linear().state_dict())
    return own


@harmless
def own_call(draw: Draw) -> nn.Module:
    class Called(nn.Linear):
        def __call__(self, x: Tensor) -> Tensor:
            return 2 * super().__call__(x) - x

    return Called(draw.n, draw.n)


@harmless
def forwards_names(draw: Draw) -> nn.Module:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.inner, name)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight, self.bias)

    return Wrapper(draw.linear())


@harmless
def constants(draw: Draw) -> nn.Module:
    a = np.asarray(draw.tensor(draw.n, draw.n))
    return Layer(lambda _, x: x @ torch.from_numpy(a).to(x) + x.new_tensor(a[0]) + torch.as_tensor(a[1], dtype=x.dtype))


@harmless
def copied_weight(draw: Draw) -> nn.Module:
    return Layer(lambda self, x: F.linear(x, copy.deepcopy(self.raw).data.clone()), raw=draw.linear().weight)


@harmless
def lru(draw: Draw) -> nn.Module:
    @functools.lru_cache
    def kernel(n: int, dtype: torch.dtype) -> Tensor:
        return torch.triu(torch.ones(n, n, dtype=dtype)) / n

    return Layer(lambda _, x: x @ kernel(x.shape[1], x.dtype))


@harmless
def functional(draw: Draw) -> nn.Module:
    inner = draw.linear()
    return Layer(lambda self, x: torch.func.functional_call(self.inner, {"weight": self.inner.weight * 2}, (x,)), inner=inner)


@harmless
def gathered(draw: Draw) -> nn.Module:
    order = torch.tensor(draw.rng.sample(range(draw.n), draw.n))
    return Layer(lambda _, x: x[:, order] + x.gather(1, order.expand(len(x), -1)) + x.index_select(1, order))


@harmless
def einsum(draw: Draw) -> nn.Module:
    return Layer(lambda self, x: torch.einsum("bi,oi->bo", x, self.raw), raw=draw.linear().weight)


@harmless
def written(draw: Draw) -> nn.Module:
    def run(_: Any, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[:, ::2] = F.relu(x[:, ::2])
        y[:, 1::2] = x[:, 1::2] * 2
        return y

    return Layer(run)


@harmless
def coupled_halves(draw: Draw) -> nn.Module:
    inner = draw.linear(draw.n // 2)

    def run(self: Any, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a, b + F.relu(self.inner(a))), dim=-1)

    return Layer(run, inner=inner)


@harmless
def recurrent(draw: Draw) -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), x.shape[1])
        for _ in range(2):
            h = self.cell(x, h)
        return h

    return Layer(run, cell=nn.RNNCell(draw.n, draw.n))


@harmless
def seeded_features(draw: Draw) -> nn.Module:
    def run(_: Any, x: Tensor) -> Tensor:
        return x @ torch.randn(x.shape[1], x.shape[1], generator=torch.Generator().manual_seed(3)).to(x)

    return Layer(run)


@harmless
def column_batch(draw: Draw) -> nn.Module:
    return Layer(lambda self, x: (self.raw @ x.T).T, raw=draw.linear().weight)


@harmless
def one_output_of_many(draw: Draw) -> nn.Module:
    inner = Layer(lambda _, x: {"y": F.relu(x), "aside": x.exp(), "more": (x, x > 0)})
    return Layer(lambda self, x: self.inner(x)["y"] * 2, inner=inner)


@harmless
def masked(draw: Draw) -> nn.Module:
    mask = torch.arange(draw.n) % 3 == 0
    return Layer(lambda _, x: x.masked_fill(mask, -1e9).clamp(min=-1) + torch.where(mask, 0.0, x))
