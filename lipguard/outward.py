"""Bounds on their way to a person or a log: an upper end is never shown below what was proved, a lower end never above.

Nothing here computes with the number shown: a float is a fraction of a power of two, exactly a decimal number, and that
decimal number is rounded to the digits asked for, in the bound's direction.
"""

from __future__ import annotations

import math
from decimal import MAX_EMAX, MIN_EMIN, ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["for_bar", "narrowed", "show", "show_interval", "show_lower", "show_upper"]

End = Literal["upper", "lower"]

_SMALLEST_FIXED = -4
"""Power of ten below which an exponent is written, as by Python's own format "g"."""


def show_upper(value: float, digits: int = 6) -> str:
    """The shortest text of the smallest decimal number >= value with at most `digits` significant digits.

    >>> show_upper(2 / 3, 3)
    '0.667'
    """
    return _shown(value, digits, ROUND_CEILING)


def show_lower(value: float, digits: int = 6) -> str:
    """The shortest text of the largest decimal number <= value with at most `digits` significant digits.

    >>> show_lower(2 / 3, 3)
    '0.666'
    """
    return _shown(value, digits, ROUND_FLOOR)


def show(value: float, side: End, digits: int = 6) -> str:
    """`show_lower` of a lower bound, `show_upper` of everything else: upper bounds, gaps, seconds."""
    return show_lower(value, digits) if side == "lower" else show_upper(value, digits)


def show_interval(lower: float, upper: float, digits: int = 6) -> str:
    """The shown interval holds the true one.

    >>> show_interval(1 / 3, 2 / 3, 3)
    '[0.333, 0.667]'
    """
    return f"[{show_lower(lower, digits)}, {show_upper(upper, digits)}]"


def for_bar(value: float, side: End) -> float:
    """The number that Lightning's progress bars show outward: they print three digits, or three places, to nearest.

    Three significant digits, but none behind the third place: both `%.3g` (the plain bar) and `%.3f` (rich) print it as it is.
    """
    if value == 0 or not math.isfinite(value):
        return value
    rounding = ROUND_FLOOR if side == "lower" else ROUND_CEILING
    digits = _rounded(value, 3, rounding)
    places = max(int(digits.as_tuple().exponent), -3)
    return float(digits.quantize(Decimal(1).scaleb(places), rounding, _context(400, rounding)))


def narrowed(value: float, side: str) -> Tensor:
    """`value` as a float64 tensor that float32 holds exactly, moved up, or down for a lower bound, where it had to move."""
    import torch  # the command line shows its help without it

    exact = torch.tensor(value, dtype=torch.float64, device="cpu")
    narrow = exact.to(torch.float32)
    end = torch.tensor(-math.inf if side == "lower" else math.inf, device="cpu")
    if (narrow.double() > exact) if side == "lower" else (narrow.double() < exact):
        narrow = torch.nextafter(narrow, end)
    # Beyond float32's largest number the float64 value stands: an upper bound may overflow to inf in a float32 sink.
    return narrow.double() if narrow.isfinite() else exact


def _context(digits: int, rounding: str) -> Context:
    return Context(prec=digits, rounding=rounding, Emin=MIN_EMIN, Emax=MAX_EMAX)


def _rounded(value: float, digits: int, rounding: str) -> Decimal:
    # Decimal(float) is exact; `plus` rounds it once, in the direction of the context.
    return _context(digits, rounding).plus(Decimal(float(value)))


def _shown(value: float, digits: int, rounding: str) -> str:
    if digits < 1:
        raise ValueError(f"digits={digits}: at least 1.")
    if not math.isfinite(value):
        return str(float(value))
    if value == 0:
        return "0"
    sign, figures, _ = _rounded(value, digits, rounding).as_tuple()
    power = _rounded(value, digits, rounding).adjusted()
    text = "".join(map(str, figures)).rstrip("0")
    if not _SMALLEST_FIXED <= power < digits:
        mantissa = text if len(text) == 1 else f"{text[0]}.{text[1:]}"
        plain = f"{mantissa}e{power:+03d}"
    elif power < 0:
        plain = f"0.{'0' * (-power - 1)}{text}"
    else:
        whole, rest = text[: power + 1].ljust(power + 1, "0"), text[power + 1 :]
        plain = f"{whole}.{rest}" if rest else whole
    return f"-{plain}" if sign else plain
