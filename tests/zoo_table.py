"""Reads and bounds the gallery's architectures and writes docs/zoo.md.

OMP_NUM_THREADS=1 python tests/zoo_table.py [names ...]      with names: only shown, nothing is written
"""

from __future__ import annotations

import pathlib
import re
import sys
import time
from dataclasses import dataclass

import torch
from gallery import FAMILIES, GALLERY
from gallery.parts import Specimen
from torch import nn

import lipguard as lg
from lipguard.bounds.choice import default_method
from lipguard.bounds.sampling import Sampling
from lipguard.certificate import Query
from lipguard.errors import LipguardError
from lipguard.network import Network
from lipguard.outward import show_lower, show_upper
from lipguard.programs.rewriting import slope_restricted

PAGE = pathlib.Path(__file__).parents[1] / "docs/zoo.md"

SOLVED = 700
"""Neurons and inputs up to which a semidefinite program is solved here, in a second or so; beyond, layers' norms multiply."""

HEAD = """# The zoo: which architectures are read

{count} architectures as people write them, in plain torch (`tests/gallery`), each at a small size: {read} are read, {refused} are
refused. Written by

```bash
OMP_NUM_THREADS=1 python tests/zoo_table.py
```

Weights are those that torch initialises (seed 0), with random statistics in BatchNorm. A bound is for all inputs, from 2-norm to
2-norm, and verified, and so is the lower bound, a slope that sampling found. The method is what `lipguard.bound` takes by itself
where the network has at most {solved} neurons and inputs, else the product of the layers' norms, "spectral", which costs least
and is loosest. Seconds are those of one core, for reading, checking and both bounds together.

A refusal names the place, the mathematics, or the rule that is missing, and what to do; the whole message is shown.
"""


@dataclass(frozen=True)
class Row:
    """What became of an architecture: its network and bounds, or the message of the refusal."""

    name: str
    network: Network | None
    cells: tuple[str, ...]

    @property
    def read(self) -> bool:
        return self.network is not None

    def __str__(self) -> str:
        return f"| {' | '.join((self.name, *self.cells))} |"


def built(specimen: Specimen) -> nn.Module:
    """The model, with statistics that are not those of the normal distribution."""
    torch.manual_seed(0)
    model = specimen.make().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model


def captured(specimen: Specimen) -> Network:
    """The architecture's network.

    Raises:
        LipguardError: it is refused.
    """
    return lg.capture(built(specimen), torch.zeros(1, *specimen.shape), outputs=specimen.outputs)


def row(name: str) -> Row:
    """An architecture read and bounded."""
    began = time.process_time()
    try:
        network = captured(GALLERY[name])
    except LipguardError as error:
        return Row(name, None, (shown(error),))
    size = slope_restricted(network).neurons + network.inputs
    method = default_method(network, (2.0, 2.0)) if size <= SOLVED else "spectral"
    upper = lg.bound(network, method=method)
    lower, _ = Sampling(starts=4, steps=4)(network, Query())
    assert upper.rigor == lower.rigor == "verified" and lower.value <= upper.value
    sizes = f"{network.inputs} → {network.outputs}", str(network.neurons)
    values = show_upper(upper.value, 4), show_lower(lower.value, 4), f"{time.process_time() - began:.1f}"
    return Row(name, network, (*sizes, upper.method, *values))


def shown(error: LipguardError) -> str:
    """The message, without the line of the gallery where the call stands."""
    return re.sub(r" \(At [^()]*\.py:\d+\.\)", "", str(error)).replace("|", "\\|").replace("\n", " ")


def page(rows: dict[str, Row]) -> str:
    """The document."""
    read = sum(one.read for one in rows.values())
    parts = [HEAD.format(count=len(rows), read=read, refused=len(rows) - read, solved=SOLVED)]
    for family, names in FAMILIES.items():
        found = [rows[name] for name in names]
        parts.append(f"## {family}\n")
        parts.append("| architecture | inputs → outputs | neurons | method | upper | lower | s |\n|---|---|---|---|---|---|---|")
        parts.append("\n".join(str(one) for one in found if one.read) + "\n")
        refused = [str(one) for one in found if not one.read]
        if refused:
            parts.append("| architecture | refused because it |\n|---|---|\n" + "\n".join(refused) + "\n")
    return "\n".join(parts)


def listed(text: str) -> dict[str, bool]:
    """The names in the document, and whether each is read."""
    cells = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ") and "architecture" not in line]
    return {name.strip(): len(rest) > 1 for name, *rest in cells}


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    rows = {}
    for name in names or GALLERY:
        rows[name] = row(name)
        print(rows[name], flush=True)
    if not names:
        PAGE.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
