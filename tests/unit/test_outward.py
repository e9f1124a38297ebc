"""What is shown of a bound is a bound: exact fractions say so."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lipguard.outward import for_bar, narrowed, show, show_interval, show_lower, show_upper

FLOATS = st.floats(allow_nan=False, allow_infinity=False)
DIGITS = st.integers(1, 20)


def significant(text: str) -> int:
    return len(text.lstrip("-").split("e")[0].replace(".", "").strip("0")) or 1


@given(FLOATS, DIGITS)
@settings(max_examples=600, deadline=None)
@example(0.0, 3)
@example(-0.0, 3)
@example(5e-324, 6)
@example(-5e-324, 6)
@example(1.7976931348623157e308, 1)
@example(-1.7976931348623157e308, 1)
@example(0.1, 17)
@example(999999.5, 6)
@example(0.00099999999, 3)
@example(1e22, 3)
def test_the_text_is_the_nearest_on_the_right_side(value, digits):
    exact = Fraction(value)
    above, below = show_upper(value, digits), show_lower(value, digits)
    assert Fraction(below) <= exact <= Fraction(above)
    assert max(significant(above), significant(below)) <= digits
    if exact in (Fraction(above), Fraction(below)):
        assert above == below
    elif exact:
        # No decimal number of so many digits lies between: one unit of the last digit separates the two.
        power = math.floor(math.log10(abs(value)))
        power += (abs(exact) >= Fraction(10) ** (power + 1)) - (abs(exact) < Fraction(10) ** power)
        assert Fraction(above) - Fraction(below) == Fraction(10) ** (power - digits + 1)


@given(FLOATS, DIGITS)
@settings(max_examples=300, deadline=None)
def test_the_text_is_short_and_reads_back(value, digits):
    text = show_upper(value, digits)
    assert text == text.strip() and not text.endswith((".", ".0"))
    assert "." not in text or not text.split("e")[0].endswith("0")
    assert len(text) <= digits + 8
    # Read again as a float it is on the right side too: reading rounds to nearest, and `value` is a float itself.
    assert float(text) >= value
    assert float(show_lower(value, digits)) <= value
    assert show_upper(-value, digits) == (show_lower(value, digits).removeprefix("-") if value < 0 else negative(value, digits))


def negative(value: float, digits: int) -> str:
    text = show_lower(value, digits)
    return text if text == "0" else f"-{text}"


@pytest.mark.parametrize(
    ("value", "digits", "below", "above"),
    [
        (1 / 3, 3, "0.333", "0.334"), (2.5, 6, "2.5", "2.5"), (1234567.0, 6, "1.23456e+06", "1.23457e+06"),
        (100.0, 3, "100", "100"), (1000.0, 3, "1e+03", "1e+03"), (0.0001, 6, "0.0001", "0.000100001"),
        (0.00001, 2, "1e-05", "1.1e-05"), (9.999, 2, "9.9", "10"), (-9.999, 2, "-10", "-9.9"), (0.0, 4, "0", "0"),
        (math.inf, 4, "inf", "inf"), (-math.inf, 4, "-inf", "-inf"), (math.nan, 4, "nan", "nan"), (7, 3, "7", "7"),
    ],
)  # fmt: skip
def test_texts(value, digits, below, above):
    assert (show_lower(value, digits), show_upper(value, digits)) == (below, above)
    assert (show(value, "lower", digits), show(value, "upper", digits)) == (below, above)
    assert show_interval(value, value, digits) == f"[{below}, {above}]"


def test_no_digits_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        show_upper(1.0, 0)


@given(st.floats(0, 1e12))
@settings(max_examples=300, deadline=None)
@example(0.00012)
@example(12.345)
@example(99999.0)
def test_both_progress_bars_show_the_number_outward(value):
    for text in ("{:.3g}", "{:.3f}"):
        assert Fraction(text.format(for_bar(value, "upper"))) >= Fraction(value)
        assert Fraction(text.format(for_bar(value, "lower"))) <= Fraction(value)
    assert for_bar(value, "upper") - for_bar(value, "lower") <= max(0.0011, 0.0101 * value)


def test_bars_show_what_is_no_number_as_it_is():
    assert for_bar(math.inf, "upper") == math.inf
    assert math.isnan(for_bar(math.nan, "lower"))


@given(st.floats(allow_nan=False))
@settings(max_examples=300, deadline=None)
def test_float32_keeps_the_bound(value):
    above, below = narrowed(value, "upper"), narrowed(value, "lower")
    assert float(below) <= value <= float(above)
    assert float(below.float()) <= value or below.float().isinf()
    assert above.dtype == torch.float64
    if abs(value) <= 3.4e38:
        assert float(above.float()) == float(above)
        assert float(below.float()) == float(below)
