"""Functions of groups of entries: maxima over windows, sorting, reflections; each with its norms. See also `contraction`.

None of them has a slope interval entry by entry. `lipguard.programs.rewriting` says how each is made of affine maps and |.|.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lipguard.errors import NotCertified, UnsupportedLayer
from lipguard.network.part import Part
from lipguard.rounding import TINY, UNIT, gamma, sqrt_up

if TYPE_CHECKING:
    from lipguard.network.contraction import Length, LogSumExp, Softmax

T = TypeVar("T")


class Groups(Generic[T]):
    """What an algorithm makes of each kind of function of groups, as `lipguard.network.walk.Walk` says of kinds of nodes."""

    def maxima(self, function: Maxima) -> T:
        """Maxima over windows."""
        return self.other(function)

    def sort(self, function: Sort) -> T:
        """Sorts."""
        return self.other(function)

    def reflection(self, function: Reflection) -> T:
        """Reflections."""
        return self.other(function)

    def softmax(self, function: Softmax) -> T:
        """Twice the probabilities of every group."""
        return self.other(function)

    def log_sum_exp(self, function: LogSumExp) -> T:
        """Logarithms of sums of exponentials."""
        return self.other(function)

    def length(self, function: Length) -> T:
        """Lengths."""
        return self.other(function)

    def other(self, function: Coupling) -> T:
        """A kind that the algorithm does not know.

        Raises:
            UnsupportedLayer: always, unless it says otherwise.
        """
        raise UnsupportedLayer(f"nothing of this kind is known of the function {type(function).__name__}.")


class Coupling(Part, ABC):
    """A function of groups of entries.

    Attributes:
        index: int64, (groups, entries of each): where the entries of each group stand.
    """

    index: Tensor

    @property
    @abstractmethod
    def outputs(self) -> int:
        """Length of the result."""

    @abstractmethod
    def __call__(self, z: Tensor) -> Tensor:
        """Rows (..., entries) to rows (..., outputs)."""

    @abstractmethod
    def norm(self, p: float) -> float:
        """Upper bound of the Lipschitz constant from p-norm to p-norm, p = 1, 2 or inf."""

    def magnitude(self, r: Tensor, size: int | None = None) -> Tensor:
        """Upper bound of |J| r over all Jacobians J, entry by entry; of |J'| r where `size`, the number of inputs, is given.

        Raises:
            NotCertified: none is known.
        """
        raise NotCertified(f"no bound of absolute values is known of the function {type(self).__name__}.")

    def along(self, z: Tensor, t: Tensor) -> Tensor:
        """J(z) t for rows z and t (..., entries), in floating point, of a smooth function.

        Raises:
            UnsupportedLayer: it is piecewise linear, and is to be rewritten.
        """
        raise UnsupportedLayer(f"{type(self).__name__} is piecewise linear: rewrite it before.")

    def back(self, z: Tensor, r: Tensor) -> Tensor:
        """J(z)' r for rows z and r (..., entries), in floating point, of a smooth function.

        Raises:
            UnsupportedLayer: it is piecewise linear, and is to be rewritten.
        """
        raise UnsupportedLayer(f"{type(self).__name__} is piecewise linear: rewrite it before.")

    def meet(self, groups: Groups[T]) -> T:
        """What an algorithm makes of it: it calls the method for its kind; a kind without one is `other`."""
        return groups.other(self)

    @property
    def pieces(self) -> bool:
        """Whether it is piecewise linear, so that it can be made of affine maps and neurons (`lipguard.programs.rewriting`)."""
        return True

    @property
    def tied(self) -> bool:
        """Whether its entries are neurons of which only each group's sum of squares is known not to grow."""
        return False

    def tensors(self) -> tuple[Tensor, ...]:
        """What defines the function, for the digest."""
        return (self.index,)

    def groups(self, size: int) -> Tensor:
        """The group of each of `size` entries, (size,); for functions whose groups do not overlap."""
        label = torch.empty(size, dtype=torch.int64, device=self.index.device)
        label[self.index.flatten()] = torch.arange(len(self.index), device=label.device).repeat_interleave(self.index.shape[1])
        return label

    def _spread(self, grouped: Tensor) -> Tensor:
        """Numbers for the entries of each group, at the places of the entries."""
        return grouped.flatten()[self.index.flatten().argsort()]


@dataclass(frozen=True, eq=False)
class Maxima(Coupling):
    """The largest entry of each window; windows may overlap. An index of -1 is no entry: padding, a window cut short."""

    index: Tensor

    def __post_init__(self) -> None:
        """Refuse a window without entries: its maximum would be -inf."""
        if self.index.ndim != 2 or not bool((self.index >= 0).any(1).all()):
            raise ValueError("a maximum over a window without entries.")

    @property
    def outputs(self) -> int:
        """One entry for each window."""
        return len(self.index)

    def __call__(self, z: Tensor) -> Tensor:
        """Exact: a maximum does not round."""
        # The index -1 reads the appended -inf.
        return F.pad(z, (0, 1), value=-math.inf)[..., self.index].amax(-1)

    def norm(self, p: float) -> float:
        """1 for inf; the largest number of windows c that one entry lies in for 1; sqrt(c) for 2.

        A Jacobian has one 1 in each row, and in the column of an entry at most one for each window it lies in.
        """
        if p == math.inf:
            return 1.0
        read = self.index[self.index >= 0]
        count = int(torch.bincount(read).max())
        return float(count) if p == 1 or count == 1 else sqrt_up(count)

    def magnitude(self, r: Tensor, size: int | None = None) -> Tensor:
        """The largest of each window: exact; back, the sum over the windows that an entry lies in: each may choose it."""
        if size is None:
            return torch.cat([r, r.new_zeros(1)])[self.index].amax(1)
        place = torch.where(self.index < 0, size, self.index)
        total = r.new_zeros(size + 1).index_add(0, place.flatten(), r[:, None].expand_as(self.index).flatten())[:-1]
        return total * (1 + 2 * gamma(self.index.numel() + 2))  # sums of nonnegative numbers, at most one for each place

    def meet(self, groups: Groups[T]) -> T:
        """`Groups.maxima`."""
        return groups.maxima(self)


@dataclass(frozen=True, eq=False)
class Sort(Coupling):
    """Sorts every group: its largest entry goes to the first of its places, its smallest to the last.

    Attributes:
        index: a permutation of all entries, (groups, entries of each).
        centred: the entries of every group sum to 0 (up to rounding, of which nothing depends): what is left of a sort
            when the mean is split off. Only rewriting makes such nodes.
    """

    index: Tensor
    centred: bool = False

    def __post_init__(self) -> None:
        """Refuse groups that overlap or leave an entry out."""
        partition(self.index)

    @property
    def outputs(self) -> int:
        """As many as it reads."""
        return self.index.numel()

    def __call__(self, z: Tensor) -> Tensor:
        """Exact: sorting does not round."""
        ordered = z[..., self.index].sort(-1, descending=True).values
        return ordered.flatten(-2)[..., self.index.flatten().argsort()]

    @property
    def tied(self) -> bool:
        """Where the means are split off: an ordinary sort moves its groups' means, of which a neuron knows nothing."""
        return self.centred

    def norm(self, p: float) -> float:
        """1 for every p: Jacobians are permutations."""
        del p
        return 1.0

    def magnitude(self, r: Tensor, size: int | None = None) -> Tensor:
        """The largest of each group, exactly: any entry may go to any place of its group, forwards and back."""
        return self._spread(r[self.index].amax(1, keepdim=True).expand_as(self.index))

    def meet(self, groups: Groups[T]) -> T:
        """`Groups.sort`."""
        return groups.sort(self)


@dataclass(frozen=True, eq=False)
class Reflection(Coupling):
    """z where v'z > 0, (I - 2 v v') z elsewhere, in every group: a Householder activation.

    Both sides agree where v'z = 0, for any v: the function is continuous and equals z + 2 v max(-v'z, 0), whether or
    not |v| is 1.

    Attributes:
        index: a permutation of all entries, (groups, entries of each).
        directions: v of each group, the shape of `index`, float64.
    """

    index: Tensor
    directions: Tensor

    def __post_init__(self) -> None:
        """Refuse groups that overlap or leave an entry out."""
        partition(self.index)

    @property
    def outputs(self) -> int:
        """As many as it reads."""
        return self.index.numel()

    def __call__(self, z: Tensor) -> Tensor:
        """z + 2 v max(-v'z, 0)."""
        grouped = z[..., self.index]
        beyond = (grouped * self.directions).sum(-1, keepdim=True).neg().clamp_min(0)
        moved = grouped + 2 * self.directions * beyond
        return moved.flatten(-2)[..., self.index.flatten().argsort()]

    def norm(self, p: float) -> float:
        """1 or the norm of a reflection I - 2 v v', whichever is larger; |1 - 2 |v|^2| for p = 2."""
        v = self.directions.detach().abs()
        square = (v * v).sum(1)
        # Each is a sum of at most g + 3 terms, of at most two roundings each.
        grown = 1 + 2 * gamma(v.shape[1] + 8)
        if p == 2:
            return max(1.0, float((2 * square * grown - 1).max()) * grown)
        off = 2 * v * (v.sum(1, keepdim=True) - v) + (1 - 2 * v * v).abs()
        # 1 - 2 v^2 may cancel: its error is relative to 1 + 2 v^2.
        return max(1.0, float((off * grown + 4 * gamma(4) * (1 + 2 * v * v)).max()))

    def magnitude(self, r: Tensor, size: int | None = None) -> Tensor:
        """max(1, |1 - 2 v_i^2|) r_i + sum over the others of 2 |v_i v_j| r_j; its Jacobians are symmetric."""
        v, own = self.directions.abs(), r[self.index]
        # The sum of all less its own term, both rounded: the sum is raised by its error before. 16 roundings at most follow.
        cross = 2 * v * ((v * own).sum(1, keepdim=True) * (1 + 2 * gamma(v.shape[1] + 4)) - v * own).clamp_min(0)
        steepest = torch.maximum(torch.ones_like(v), 2 * v * v - 1)
        return self._spread((steepest * own + cross) * (1 + 16 * UNIT) + TINY)

    def meet(self, groups: Groups[T]) -> T:
        """`Groups.reflection`."""
        return groups.reflection(self)

    def tensors(self) -> tuple[Tensor, ...]:
        """Places and directions."""
        return self.index, self.directions


KINDS: dict[str, type[Coupling]] = {"Maxima": Maxima, "Reflection": Reflection, "Sort": Sort}
"""The kinds that a record may hold, by the name that stands in it."""


def partition(index: Tensor) -> None:
    """Refuse groups that overlap or leave an entry out."""
    places = index.flatten().sort().values
    if index.ndim != 2 or not torch.equal(places, torch.arange(index.numel(), device=index.device)):
        raise ValueError("the groups do not contain every entry once.")


def comparators(size: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """Layers of comparators (i, j), i < j, the larger to i, that sort `size` entries: Knuth's merge exchange (5.2.2 M)."""
    if size < 2:
        return
    top = 1 << max((size - 1).bit_length() - 1, 0)
    p = top
    while p > 0:
        q, r, d = top, 0, p
        while True:
            yield tuple((i, i + d) for i in range(size - d) if i & p == r)
            if q == p:
                break
            d, q, r = q - p, q // 2, p
        p //= 2
