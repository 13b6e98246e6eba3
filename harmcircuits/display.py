"""How a value shows itself: texts of one line. Knows no model."""

from collections.abc import Iterable
from typing import Any


def listed(names: Iterable[Any], most: int = 8) -> str:
    """Names with commas between them; of more than `most` only the first, and how many follow.

    >>> listed(["a", "b"])
    'a, b'
    >>> listed(range(12), most=3)
    '0, 1, 2 and 9 more'
    """
    texts = [str(name) for name in names]
    if len(texts) <= most + 1:  # "and 1 more" is no shorter than the name
        return ", ".join(texts)
    return f"{', '.join(texts[:most])} and {len(texts) - most} more"


def share(part: float) -> str:
    """A share in per cent: two places below ten per cent, two digits below a hundredth of one.

    >>> share(0.0060001), share(0.34), share(0.0000123)
    ('0.60%', '34%', '0.0012%')
    """
    percent = 100 * part
    if percent == 0 or percent >= 10:
        return f"{percent:.0f}%"
    if percent >= 0.01:
        return f"{percent:.2f}%"
    return f"{percent:.2g}%"  # a few dozen of a billion weights are not 0.00%


def duration(seconds: float) -> str:
    """A time in the unit that a reader would choose, to two digits.

    >>> duration(0.42), duration(47), duration(2300), duration(9000), duration(300_000)
    ('0.4 s', '47 s', '38 min', '2.5 h', '3.5 days')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    for unit, size, limit in (("s", 1, 100), ("min", 60, 100), ("h", 3600, 48)):
        number = seconds / size
        if number < limit:
            digits = 1 if number < 10 and unit != "s" else 0
            return f"{number:.{digits}f} {unit}"
    return f"{seconds / 86_400:.1f} days"


def plural(number: int, noun: str) -> str:
    """A count with its noun.

    >>> plural(1, "mask"), plural(1200, "weight")
    ('1 mask', '1,200 weights')
    """
    ending = "" if number == 1 else "s"
    return f"{number:,} {noun}{ending}"


def nearest(name: str, known: Iterable[str]) -> str:
    """What to write in place of an unknown name: the nearest known one, and all of them.

    >>> nearest("harm", ["harmful", "benign"])
    "did you mean 'harmful'? There are harmful, benign"
    """
    from difflib import get_close_matches

    names = list(known)
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    start = "There are" if hint else "there are"
    return f"{hint}{start} {listed(names, most=12)}"
