"""Random modules against the reader: what it accepts may have no slope above its bound, what is honest should be accepted.

    python -m tests.hostile.modules --draws 5000         # all of them; --seed 17 --draws 1 runs draw 17 again

Each draw composes one to four ingredients with random layers between them. An accepted module is evaluated at inputs of many
sizes and in batches of 1, 2, 3, 5 and 8, with gradients on and off, call after call: pairs of inputs must not be further apart
behind it than the bound says, a change of one sample must not move another, and the network's values must be its values.
"""

from __future__ import annotations

import argparse
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __package__:  # run as tests.hostile.modules
    sys.path.insert(0, str(Path(__file__).parent))

import batches  # noqa: F401 - registers its ingredients, as others do
import branches  # noqa: F401
import hidden
import honest  # noqa: F401
import kept  # noqa: F401
import numpy as np
import spellings  # noqa: F401
import torch
from ingredients import INGREDIENTS, Draw, Ingredient
from torch import Tensor, nn

import lipguard as lg
from lipguard.errors import LipguardError

BATCHES = (1, 2, 3, 5, 8)
SWITCHES = (1e2, 1e4, 1e6)


@dataclass
class Verdict:
    """What became of one draw.

    Attributes:
        value: the bound; None where it was refused.
        reason: of the refusal.
        faults: what must not be.
    """

    seed: int
    names: list[str]
    harmless: bool
    value: float | None = None
    reason: str = ""
    faults: list[str] = field(default_factory=list)


def drawn(seed: int) -> tuple[nn.Module, Draw, list[Ingredient]]:
    """The module of a draw, in training or evaluation mode."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    draw = Draw(rng, n=rng.choice([4, 6]), switch=rng.choice(SWITCHES))
    hidden._Odd.switch = draw.switch
    good = [i for i in INGREDIENTS.values() if i.harmless]
    bad = [i for i in INGREDIENTS.values() if not i.harmless]
    chosen = rng.choices(good, k=rng.randint(0 if seed % 2 else 1, 3))
    if seed % 2:
        chosen.insert(rng.randint(0, len(chosen)), rng.choice(bad))
    layers: list[nn.Module] = [draw.linear()] if rng.random() < 0.7 else []
    for ingredient in chosen:
        layers.append(ingredient.make(draw))
        if rng.random() < 0.5:
            layers += [draw.linear()]
        if rng.random() < 0.2:
            layers += [nn.ReLU()]
    return nn.Sequential(*layers).train(rng.random() < 0.4), draw, chosen


def judge(seed: int) -> Verdict:
    """Draw, bound, and try to refute."""
    module, draw, chosen = drawn(seed)
    verdict = Verdict(seed, [i.name for i in chosen], all(i.harmless for i in chosen))
    try:
        example = torch.randn(draw.rng.choice([1, 1, 2, 4]), draw.n, generator=torch.Generator().manual_seed(seed))
        before = (fingerprint(module), *_generators())
        try:
            network = lg.capture(module, example)
            verdict.value = lg.bound(network, method="spectral").value
        except LipguardError as error:
            verdict.reason = f"{type(error).__name__}: {error}"
        except Exception as error:  # any other error is a fault
            verdict.faults.append(f"crash {type(error).__name__}: {error}")
        if (fingerprint(module), *_generators()) != before:
            verdict.faults.append("left a change in the module or in the random state")
        if verdict.value is not None:
            precise, dtype, undo = _precise(seed)
            draw.undo += undo
            verdict.faults += refuted(precise, dtype, network, verdict.value, draw, any(i.coarse for i in chosen))
    finally:
        for function in draw.undo:
            function()
    return verdict


def refuted(module: nn.Module, dtype: torch.dtype, network: lg.Network, bound: float, draw: Draw, coarse: bool) -> list[str]:
    """What contradicts a bound: at most one line."""
    generator = torch.Generator().manual_seed(draw.rng.getrandbits(32))
    for scale in (1e-3, 1.0, 1e3, draw.switch, 30 * draw.switch):
        for rows in BATCHES:
            x = torch.randn(rows, draw.n, generator=generator, dtype=torch.float64) * scale
            far = torch.randn(rows, draw.n, generator=generator, dtype=torch.float64) * scale
            near = x + far * 1e-3
            one = x.clone()
            one[-1] = near[-1]
            try:
                fx, *others = (_output(module, z.to(dtype)) for z in (x, far, near, one))
            except _TwoResults as error:
                return [str(error)]
            except Exception as error:
                return [f"fails for {rows} rows of size {scale:g}: {type(error).__name__}: {error}"]
            if not all(bool(y.isfinite().all()) for y in (fx, *others)):
                continue
            # What rounding may do: of values of the inner size, seen in the larger of input and output.
            size = max(float(x.abs().max()) * max(bound, 1.0), float(fx.abs().max()), 1.0)
            noise = size * (1e-1 if coarse else 1e-4 if dtype == torch.float32 else 1e-6)
            for z, y in zip((far, near, one), others, strict=True):
                if float((y - fx).norm()) > bound * (1 + 1e-6) * float((z - x).norm()) + noise:
                    return [f"slope {float((y - fx).norm() / (z - x).norm()):.4g} > {bound:.4g}: {rows} rows, size {scale:g}"]
            if rows > 1 and float((others[2][:-1] - fx[:-1]).abs().max()) > noise:
                return [f"mixes samples: {rows} rows, size {scale:g}"]
            if not coarse and float((network(x) - fx).abs().max()) > 10 * noise:
                return [f"misread by {float((network(x) - fx).abs().max()):.4g}: {rows} rows, size {scale:g}"]
    return []


def _precise(seed: int) -> tuple[nn.Module, torch.dtype, list[Callable[[], Any]]]:
    """The module of a draw once more, in float64 where it computes in it; and what undoes it."""
    undo: list[Callable[[], Any]] = []
    for dtype in (torch.float64, torch.float32):
        module, draw, _ = drawn(seed)
        undo += draw.undo
        try:
            module = module.to(dtype).eval()
            if dtype == torch.float32 or module(torch.ones(2, draw.n, dtype=dtype)).dtype == dtype:
                break
        except Exception:
            continue
    return module, dtype, undo


class _TwoResults(Exception):
    """A module gave two results for one input."""


def _output(module: nn.Module, x: Tensor) -> Tensor:
    """The module's result, (rows, m), with gradients or without.

    Raises:
        _TwoResults: it is no function.
    """
    with torch.enable_grad():
        y = module(x.clone().requires_grad_()).detach()
    with torch.no_grad():
        again = module(x.clone())
    if not torch.allclose(y, again, rtol=1e-3, atol=1e-6 * float(y.nan_to_num().abs().max()), equal_nan=True):
        raise _TwoResults(f"gives two results for {len(x)} rows of size {float(x.abs().max()):.3g}")
    return y.double().reshape(len(x), -1)


def fingerprint(value: Any, seen: set[int] | None = None) -> Any:
    """All that a module holds, as something to compare."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        with torch.no_grad():
            numbers = value.detach().double().nan_to_num().flatten().tolist()
            return str(value.dtype), value.requires_grad, tuple(value.shape), numbers
    if isinstance(value, np.ndarray):
        return value.tolist()
    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return value
    if id(value) in seen:
        return id(value)
    seen.add(id(value))
    if isinstance(value, dict):
        return [(str(k), fingerprint(v, seen)) for k, v in value.items()]
    if isinstance(value, list | tuple | set):
        return [fingerprint(v, seen) for v in value]
    if isinstance(value, nn.Module):
        return [type(value).__name__, fingerprint(value.__dict__, seen)]
    return id(value)


def _generators() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), [str(p) for p in np.random.get_state()]  # noqa: NPY002


def judged(seeds: Iterator[int] | range) -> list[Verdict]:
    """The verdicts of many draws."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [judge(seed) for seed in seeds]


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Random modules against the reader.")
    parser.add_argument("--draws", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0, help="of the first draw")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    verdicts = judged(range(arguments.seed, arguments.seed + arguments.draws))
    faulty = [v for v in verdicts if v.faults]
    for v in faulty:
        print(f"seed {v.seed}: {' + '.join(v.names)}: {'; '.join(v.faults)}")
    honest_ones = [v for v in verdicts if v.harmless]
    refused = [v for v in honest_ones if v.value is None]
    for v in refused if arguments.draws == 1 else ():
        print(v.reason)
    alone = Counter(name for v in refused for name in set(v.names))
    total = Counter(name for v in honest_ones for name in set(v.names))
    worst = sorted((-alone[n] / total[n], n) for n in alone)[:12]
    print("harmless, refused most often:", ", ".join(f"{n} {-share:.0%} of {total[n]}" for share, n in worst))
    print(f"accepted {sum(v.value is not None for v in verdicts)} of {len(verdicts)}, faulty {len(faulty)}")
    print(f"harmless refused {len(refused)} of {len(honest_ones)} ({len(refused) / max(len(honest_ones), 1):.1%})")
    return 1 if faulty or len(refused) > 0.1 * len(honest_ones) else 0


if __name__ == "__main__":
    raise SystemExit(main())
