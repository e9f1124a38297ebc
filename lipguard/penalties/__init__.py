"""Differentiable penalties on a network's Lipschitz constant, for any loss.

Each comes twice: as a plain function of a captured network, `capture(model, example, live=True)`, and as a `Penalty`,
a small object that carries what the next step starts from (multipliers, singular vectors, pairs):

    from lipguard.penalties import LipSDP

    penalty = LipSDP(model, x[:1])
    loss = cross_entropy(model(x), y) + 0.01 * penalty()

A penalty is not a bound: nothing in it is verified. What the trained network's constant is, `lipguard.bound` proves.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lipguard.errors import UnknownName
from lipguard.network import Network
from lipguard.penalties.base import Penalty
from lipguard.penalties.certified import Certified, certified_cross_entropy, pair_bounds, worst_logits
from lipguard.penalties.clip import CLIP, clip
from lipguard.penalties.lipsdp import LipSDP, lipsdp
from lipguard.penalties.lipsdp_local import LipSDPLocal, lipsdp_local
from lipguard.penalties.local import Local, local
from lipguard.penalties.spectral import Spectral, spectral
from lipguard.penalties.toeplitz import Toeplitz, toeplitz

__all__ = [
    "CLIP",
    "Certified",
    "LipSDP",
    "LipSDPLocal",
    "Local",
    "Penalty",
    "Spectral",
    "Toeplitz",
    "build",
    "certified_cross_entropy",
    "clip",
    "lipsdp",
    "lipsdp_local",
    "local",
    "pair_bounds",
    "spectral",
    "toeplitz",
    "worst_logits",
]

NAMES: dict[str, type[Penalty]] = {
    "lipsdp": LipSDP,
    "lipsdp-local": LipSDPLocal,
    "spectral": Spectral,
    "toeplitz": Toeplitz,
    "local": Local,
    "certified": Certified,
    "clip": CLIP,
}
"""Penalties by the name under which callbacks and configuration files ask for them."""


def build(name: str, model: nn.Module | Network, example: Any = None, submodule: str | None = None, **options: Any) -> Penalty:
    """The penalty of a name, with its options.

    Raises:
        UnknownName: there is no such penalty, or it has no such option.
    """
    kind = NAMES.get(name.replace("_", "-"))
    if kind is None:
        raise UnknownName(f"no penalty is called {name!r}. There are: {', '.join(NAMES)}.")
    try:
        return kind(model, example=example, submodule=submodule, **options)
    except TypeError as error:
        raise UnknownName(f"the {name} penalty does not take these options: {error}.") from error
