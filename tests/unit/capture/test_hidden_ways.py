"""Ways around a reader: what depends on the input unseen, on earlier calls, on chance, on the batch, on modes of autograd.

`beyond` is zero near every example and has the slope 64 from 1e6 on, where no sample reaches it: what is computed with it must
be followed, or be refused, by construction.
"""

from __future__ import annotations

import _thread
import contextlib
import math
import queue
import random
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import lipguard as lg
from lipguard.capture.comparison import Comparison
from lipguard.errors import InvalidExample, UnsupportedLayer

EXAMPLE = torch.tensor([[0.3, -0.4, 0.5, 0.1], [0.2, 0.6, -0.7, 0.4]])


def beyond(x: Tensor) -> Tensor:
    return 64.0 * F.relu(x - 1e6)


class Do(nn.Module):
    def __init__(self, function: Callable[[Any, Tensor], Tensor], **state: Any) -> None:
        super().__init__()
        self.function = function
        for name, value in state.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def refused(function: Callable[[Any, Tensor], Tensor], reason: str, **state: Any) -> None:
    with pytest.raises(UnsupportedLayer, match=reason):
        lg.capture(Do(function, **state).eval(), EXAMPLE)


def spectral(function: Callable[[Any, Tensor], Tensor], **state: Any) -> float:
    return lg.bound(Do(function, **state).eval(), EXAMPLE, method="spectral").value


# --- the steep part where it may be missed


class Odd(Tensor):
    """A constant that adds the steep part to its products."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [a.as_subclass(Tensor) if isinstance(a, cls) else a for a in args]
        y = func(*plain, **(kwargs or {}))
        return y + beyond(plain[0]) if getattr(func, "__name__", "") == "mul" else y


class Box(Tensor):
    """A tensor around another, whose operations it does itself."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Box:
        made = Tensor._make_wrapper_subclass(cls, inner.size(), dtype=inner.dtype)  # type: ignore[attr-defined]
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*(a.inner if isinstance(a, cls) else a for a in args), **(kwargs or {}))
        return cls(y) if isinstance(y, Tensor) else y


def test_the_code_of_a_tensors_class_is_followed() -> None:
    # x + 64 max(x - 1e6, 0): the slope is 65 beyond 1e6.
    assert spectral(lambda _, x: torch.mul(x, torch.ones(4).to(x).as_subclass(Odd))) == pytest.approx(65.0)
    refused(lambda _, x: x + beyond(Box(x)).inner, "not called where it can be followed")
    refused(lambda _, x: x * Box(torch.ones(4).to(x)), "does its operations itself")


def test_values_in_any_sequence_are_values() -> None:
    pair = namedtuple("pair", "a b")
    # Two copies of 64 max(x - 1e6, 0), side by side: sqrt 2 times 64.
    assert spectral(lambda _, x: torch.cat(pair(beyond(x), beyond(x)), 1)) == pytest.approx(64 * math.sqrt(2))


def test_a_refusal_stays_where_it_is_caught() -> None:
    def caught(_: Any, x: Tensor) -> Tensor:
        with contextlib.suppress(Exception):
            return x * (64 if bool((x > 1e6).any()) else 1)
        return x

    refused(caught, "lets Python read a number")


def test_a_text_may_be_read_by_a_branch() -> None:
    refused(lambda _, x: x * (64 if "e+" in f"{x}" else 1), "into a text")
    refused(lambda _, x: x * (64 if "e+" in str(x) else 1), "into a text")


def test_a_printed_text_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    def printing(_: Any, x: Tensor) -> Tensor:
        print(f"values {x}", x)
        return x * 2

    assert spectral(printing) == 2.0
    assert "a value that depends on the input" in capsys.readouterr().out


def test_swapped_tensors_are_others() -> None:
    def swapped(_: Any, x: Tensor) -> Tensor:
        flat, steep = F.relu(x - 1e6), beyond(x)
        torch.utils.swap_tensors(flat, steep)
        return x + flat

    refused(swapped, "modified in place through another view")


def test_places_that_entries_share_are_not_written() -> None:
    def windows(_: Any, x: Tensor) -> Tensor:
        u = F.relu(x - 1e6).unfold(1, 2, 1)
        u[..., 0] = 64 * u[..., 0]
        return u.flatten(1)

    refused(windows, "several entries share a place")

    def smeared(_: Any, x: Tensor) -> Tensor:
        y = F.relu(x - 1e6)
        y[:, 1:] += y[:, :-1]
        return y

    refused(smeared, "of which it reads other entries")
    # Halves of one tensor share no place: (a, b) -> (a + b, b).
    network = lg.capture(Do(lambda _, x: _coupled(x)).eval(), EXAMPLE)
    assert network(torch.eye(4, dtype=torch.float64)).T.tolist() == [[1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 1]]


def _coupled(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, :2] += y[:, 2:]
    return y


def test_no_thread_is_handed_work() -> None:
    asked: queue.Queue[Any] = queue.Queue()
    answers: queue.Queue[Any] = queue.Queue()

    def work() -> None:
        while (x := asked.get()) is not None:
            with torch.no_grad():
                answers.put(beyond(x))

    threading.Thread(target=work, daemon=True).start()

    def ask(_: Any, x: Tensor) -> Tensor:
        asked.put(x.detach())
        return x + answers.get()

    refused(ask, "hands work to")
    asked.put(None)

    def start(_: Any, x: Tensor) -> Tensor:
        results: list[Tensor] = []
        _thread.start_new_thread(lambda: results.append(beyond(x.detach())), ())
        while not results:
            time.sleep(1e-3)
        return x + results[0]

    refused(start, "starts a thread")


# --- earlier calls, chance


def test_what_is_kept_of_earlier_inputs_is_no_constant() -> None:
    def previous(self: Any, x: Tensor) -> Tensor:
        y = x + beyond(self.kept)
        self.kept = x.detach().mean()
        return y

    refused(previous, "an earlier call, of which the module keeps it", kept=torch.zeros(()))

    def logging(self: Any, x: Tensor) -> Tensor:
        self.kept = x.detach().mean()
        return 2 * x

    assert spectral(logging, kept=None) == 2.0


def test_calls_that_are_counted_matter() -> None:
    def counted(self: Any, x: Tensor) -> Tensor:
        self.calls += 1
        return x * (64 if self.calls > 15 else 1)

    refused(counted, "misreads", calls=0)


def test_random_numbers_are_followed() -> None:
    refused(lambda _, x: x * (64 if float(torch.rand(())) < 1e-6 else 1), "uses random numbers")
    refused(lambda _, x: x * torch.where(torch.rand(4) < 1e-6, 64.0, 1.0).to(x), "uses random numbers")
    refused(lambda _, x: x * (1 + 64 * torch.bernoulli(torch.full((4,), 1e-6)).to(x)), "uses random numbers")
    refused(lambda _, x: x * (64 if random.random() < 0.2 else 1), "misreads|computes one function|mixes")
    # Seeded in forward, or not used, they are no chance.
    w = torch.randn(4, generator=torch.Generator().manual_seed(3))
    seeded = spectral(lambda _, x: x * torch.randn(4, generator=torch.Generator().manual_seed(3)).to(x))
    assert seeded == pytest.approx(float(w.abs().max()))
    assert spectral(lambda _, x: (torch.rand(3), random.random(), 2 * x)[-1]) == 2.0
    assert spectral(lambda self, x: 2 * self.layer(x), layer=nn.RReLU()) == pytest.approx(2.0)


def test_everything_a_module_holds_is_as_before() -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        self.cache[x.dtype] = 2.0
        self.log.append(len(x))
        self.inner["seen"].add(len(x))
        self.count += 1
        return 2 * x

    model = Do(run, cache={}, log=[7], inner={"seen": set()}, count=torch.zeros(())).eval()
    assert lg.bound(model, EXAMPLE, method="spectral").value == 2.0
    assert (model.cache, model.log, model.inner, float(model.count)) == ({}, [7], {"seen": set()}, 0.0)  # type: ignore[arg-type]


# --- the batch, modes of autograd


@pytest.mark.parametrize("size", [4, 5, 8, 16, 64])
def test_batches_of_other_sizes_are_looked_at(size: int) -> None:
    refused(lambda _, x: x * (64 if len(x) == size else 1), f"on {size} random inputs")


def test_samples_stay_apart() -> None:
    # The sum of all samples, far away, where the samples were joined with another dimension.
    refused(lambda _, x: x + beyond(x.reshape(-1).sum()).clamp(max=1e-3), "mixes the samples|misreads")
    refused(lambda _, x: x + beyond(x.reshape(-1) * len(x) ** 2).view_as(x), "misreads")
    assert spectral(lambda _, x: 2 * F.relu(x.reshape(-1, 2)).reshape(len(x), -1)) == 2.0


def test_an_example_that_fails_for_one_sample_is_no_sample() -> None:
    def several(_: Any, x: Tensor) -> Tensor:
        if len(x) < 2:
            raise ValueError("one sample")
        return x * len(x)

    with pytest.raises(InvalidExample, match="one sample"):
        lg.capture(Do(several).eval(), EXAMPLE)


@pytest.mark.parametrize("mode", [torch.is_grad_enabled, torch.is_inference_mode_enabled])
def test_modes_of_autograd_do_not_matter(mode: Callable[[], bool]) -> None:
    refused(lambda _, x: x * (64 if mode() else 1), "gradients")
    refused(lambda _, x: x * (64 if x.requires_grad else 1), "gradients")


def test_one_sample_in_each_column() -> None:
    w = torch.tensor([[3.0, 0.0, 0.0, 0.0], [4.0, 0.0, 0.0, 1.0]])
    # W W' = [[9, 12], [12, 17]]: its larger eigenvalue is 13 + sqrt(160).
    value = spectral(lambda self, x: F.relu(self.w @ x.T).T, w=nn.Parameter(w))
    assert value == pytest.approx(math.sqrt(13 + math.sqrt(160)))


# --- the comparison, expressions


def test_errors_of_large_masks_end_where_a_function_is_flat() -> None:
    mask = torch.tensor([True, False, False, False])
    network = lg.capture(Do(lambda _, x: x.masked_fill(mask, -1e9).clamp(min=-1)).eval(), EXAMPLE)
    x = EXAMPLE.double()
    comparison = Comparison(network, network, x, [torch.float32], {})
    assert comparison.disagreement(network(x).float(), torch.float32) is None
    assert comparison.disagreement(network(x).float() + 0.01 * mask, torch.float32) == pytest.approx(0.01, rel=1e-3)


def test_what_was_compared_is_moved_once() -> None:
    # Each entry of relu twice, in another order: sqrt 2.
    assert spectral(lambda _, x: (x * (x > 0)).flip(1)[:, [0, 0, 1, 1]]) == pytest.approx(math.sqrt(2))
