"""Numbers and counts as the report writes them: one way for each, everywhere on the page."""

from __future__ import annotations

import math
from collections.abc import Sequence

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
SMALL = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SHARES = (
    (0.25, "a quarter"),
    (1 / 3, "a third"),
    (0.5, "half"),
    (2 / 3, "two thirds"),
    (0.75, "three quarters"),
)


def number(value: float, digits: int = 3) -> str:
    """`value` with `digits` significant digits, thousands with commas, and a real minus.

    >>> number(1234567.0), number(0.000012), number(-0.25), number(6953.7), number(5.0, 2)
    ('1.23·10⁶', '1.20·10⁻⁵', '−0.250', '6,954', '5.0')
    >>> number(float("nan")), number(float("-inf")), number(0.0)
    ('NaN', '−∞', '0')
    """
    if math.isnan(value):
        return "NaN"
    sign = "−" if value < 0 else ""
    size = abs(value)
    if math.isinf(size):
        return f"{sign}∞"
    if size == 0:
        return "0"
    mantissa, power = f"{size:.{digits - 1}e}".split("e")
    exponent = int(power)
    if size >= 1e-3 and exponent < 5:
        decimals = 0 if size >= 1000 else max(0, digits - 1 - exponent)
        return f"{sign}{size:,.{decimals}f}"
    return f"{sign}{mantissa}·10{str(exponent).translate(SUPERSCRIPTS)}"


def plain(value: float, digits: int = 3) -> str:
    """`number` without trailing zeros, for values that somebody chose (a rate, a threshold).

    >>> plain(5.0), plain(0.1), plain(38.0), plain(3e-4), plain(1000.0)
    ('5', '0.1', '38', '3·10⁻⁴', '1,000')
    """
    text = number(value, digits)
    mantissa, ten, exponent = text.partition("·")
    if "." in mantissa:
        mantissa = mantissa.rstrip("0").rstrip(".")
    return mantissa + ten + exponent


def telling(values: Sequence[float], digits: int = 2) -> tuple[str, ...]:
    """The values with as many digits as tell them apart, at most six.

    >>> telling([2.5, 3.9]), telling([1.0085, 1.0088])
    (('2.5', '3.9'), ('1.008', '1.009'))
    """
    different = len({float(value) for value in values})
    while digits < 6 and len({number(value, digits) for value in values}) < different:
        digits += 1
    return tuple(number(value, digits) for value in values)


def steps(step: int) -> str:
    """A step or a count of steps.

    >>> steps(40000)
    '40,000'
    """
    return f"{int(step):,}".replace("-", "−")


def percent(share: float, decimals: int = 0) -> str:
    """A share of one in percent, with a space.

    >>> percent(0.9804, 1), percent(0.62), percent(float("nan"))
    ('98.0 %', '62 %', 'NaN')
    """
    if not math.isfinite(share):
        return number(share)
    return f"{100 * share:,.{decimals}f} %".replace("-", "−")


def points(difference: float, decimals: int = 0) -> str:
    """A difference of accuracies in percentage points, without the word.

    >>> points(0.264), points(0.0268, 1), points(-0.01)
    ('26', '2.7', '−1')
    """
    text = f"{100 * difference:.{decimals}f}"
    return text.replace("-", "−") if float(text) else text.lstrip("-")


def times(factor: float) -> str:
    """A factor for a label.

    >>> times(1.985), times(53.2), times(4.0)
    ('×2.0', '×53', '×4.0')
    """
    return f"×{number(factor, 2)}"


def count(n: int, noun: str, plural: str | None = None) -> str:
    """A small count in words, with its noun.

    >>> count(1, "event"), count(4, "event"), count(0, "task"), count(61, "sample")
    ('one event', 'four events', 'no tasks', '61 samples')
    """
    word = SMALL[n] if 0 <= n < len(SMALL) else steps(n)
    return f"{word} {noun if n == 1 else plural or noun + 's'}"


def often(n: int) -> str:
    """How many times, as an adverb.

    >>> often(1), often(2), often(10)
    ('once', 'twice', '10 times')
    """
    return {1: "once", 2: "twice"}.get(n) or count(n, "time")


def capital(text: str) -> str:
    """The text with its first letter large, the rest as it is.

    >>> capital("four events")
    'Four events'
    """
    return text[:1].upper() + text[1:]


def share_of(share: float) -> str:
    """A share as one would say it, fit for "… of its steps".

    >>> share_of(0.734), share_of(0.5), share_of(0.62), share_of(0.995), share_of(0.004)
    ('almost three quarters', 'half', '62 %', 'almost all', 'less than 1 %')
    """
    if share >= 0.97:
        return "almost all" if share < 1 else "all"
    if share < 0.01:
        return "less than 1 %"
    anchor, name = min(SHARES, key=lambda pair: abs(pair[0] - share))
    if abs(share - anchor) > 0.03:
        return percent(share)
    if abs(share - anchor) < 0.005:
        return name
    return f"{'almost' if share < anchor else 'just over'} {name}"


def fold(factor: float) -> str:
    """How many times, as an adverb.

    >>> fold(2.04), fold(3.1), fold(1.6), fold(53.0)
    ('doubled', 'rose threefold', 'rose 1.6-fold', 'rose 53-fold')
    """
    if abs(factor - 2) < 0.1:
        return "doubled"
    if abs(factor - 3) < 0.15:
        return "rose threefold"
    return f"rose {number(factor, 2)}-fold"


def duration(seconds: float) -> str:
    """A time span.

    >>> duration(0.74), duration(28.94), duration(312.0), duration(8000.0), duration(3e5)
    ('0.74 s', '28.9 s', '5 min 12 s', '2 h 13 min', '3 d 11 h')
    """
    if not math.isfinite(seconds):
        return number(seconds)
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for large, small, unit, part in ((86400, 3600, "d", "h"), (3600, 60, "h", "min")):
        if whole >= large:
            return f"{whole // large} {unit} {whole % large // small} {part}"
    return f"{whole // 60} min {whole % 60} s"


def listing(parts: Sequence[str]) -> str:
    """Parts in a sentence.

    >>> listing(["a"]), listing(["a", "b"]), listing(["a", "b", "c"])
    ('a', 'a and b', 'a, b and c')
    """
    if len(parts) < 2:
        return "".join(parts)
    return f"{', '.join(parts[:-1])} and {parts[-1]}"
