"""What is proved of each sample of a batch: its radius, with the evidence from which the checker proves it again."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from torch import Tensor

from lipguard.certificate import Ball, Box, PairBound, Radius, RadiusCertificate
from lipguard.outward import show_lower, show_upper
from lipguard.rendering import line, table

Method = Literal["local", "global", "spectral"]


@dataclass(frozen=True, eq=False)
class Constants:
    """Proved constants of differences on R^d: `values` (m, m), inf where none is known, and their evidence (i < j)."""

    values: Tensor
    evidence: dict[tuple[int, int], PairBound]


@dataclass(frozen=True, eq=False)
class Proofs:
    """What proves the radii of a batch.

    Attributes:
        digest: of the network.
        x, y, box: samples (B, d), classes (B,), and the box of all possible inputs.
        constants: on R^d; None where there are none.
        reached: radii that the constants prove of each difference, (B, m - 1).
        multipliers: for each sample by the other class, (n,).
    """

    digest: str
    x: Tensor
    y: Tensor
    box: Box | None
    constants: Constants | None
    reached: Tensor
    multipliers: list[dict[int, Tensor]]

    def certificate(self, i: int, radius: float) -> RadiusCertificate:
        """The statement of sample i."""
        y = int(self.y[i])
        others = [j for j in range(self.reached.shape[1] + 1) if j != y]
        by_constants = [j for j, reach in zip(others, self.reached[i].tolist(), strict=True) if reach >= radius]
        known = {} if self.constants is None else self.constants.evidence
        evidence = Radius(
            {j: known[min(y, j), max(y, j)] for j in by_constants if (min(y, j), max(y, j)) in known},
            {j: t for j, t in self.multipliers[i].items() if j not in by_constants},
        )
        return RadiusCertificate(Ball(self.x[i], radius, 2.0, self.box), y, self.digest, evidence, "verified")


@dataclass(frozen=True, eq=False, repr=False)
class Robustness:
    """What is proved of each sample of a batch, shape (B,) each.

    Attributes:
        predicted: class of the largest output at the sample, in float64.
        correct: whether that is the label.
        margin: lower bound of f_label - max of the others at the sample; negative or 0 where it is not correct.
        radius: 2-norm radius in which every input has the label for its class; 0 where nothing is proved.
        certified: whether that is proved for the radius `eps`. Where `complete` is False it is so only of `radius`.
        complete: whether the sample was treated in full before the time limit.
        eps, method: as asked.
        seconds: spent.
        proofs: what proves the radii.
    """

    predicted: Tensor
    correct: Tensor
    margin: Tensor
    radius: Tensor
    certified: Tensor
    complete: Tensor
    eps: float
    method: Method
    seconds: float
    proofs: Proofs = field(repr=False)

    @cached_property
    def certificates(self) -> tuple[RadiusCertificate | None, ...]:
        """One statement for each sample with its evidence, which `lipguard.verify.verify_radius` proves; None without a class.

        A radius of 0 says that the sample itself has its class.
        """
        stated = (self.correct & (self.margin > 0)).tolist()
        return tuple(
            self.proofs.certificate(i, radius) if good else None
            for i, (good, radius) in enumerate(zip(stated, self.radius.tolist(), strict=True))
        )

    @property
    def accuracy(self) -> float:
        """Share of correct samples."""
        return float(self.correct.double().mean())

    @property
    def certified_accuracy(self) -> float:
        """Share of samples that are correct on their whole eps-ball: a lower bound of the accuracy under any attack there."""
        return float(self.certified.double().mean())

    def __repr__(self) -> str:
        samples = [f"{len(self.correct)} samples", f"{int(self.correct.sum())} correct", f"{int(self.certified.sum())} certified"]
        late = len(self.complete) - int(self.complete.sum())
        radii = f"median radius {show_lower(float(self.radius.median()))}" if len(self.radius) else ""
        return line("Robustness", [*samples, f"eps {self.eps:g}", radii, self.method, f"{late} unfinished" if late else ""])

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        rows = [
            ("samples", str(len(self.correct))),
            ("correct", f"{int(self.correct.sum())} ({self.accuracy:.1%})"),
            (f"certified at eps {self.eps:g}", f"{int(self.certified.sum())} ({show_lower(100 * self.certified_accuracy, 3)}%)"),
            ("median radius", show_lower(float(self.radius.median())) if len(self.radius) else "none"),
            ("unfinished", str(len(self.complete) - int(self.complete.sum()))),
            ("method", self.method),
            ("seconds", show_upper(self.seconds, 3)),
        ]
        return table("Certified robustness", rows)
