"""Texts such as "borderline=0.1", by which a command line takes values by name."""

from collections.abc import Sequence


def values_by_name(
    texts: Sequence[str], option: str, example: str, *, may_be_empty: bool = False
) -> dict[str, str]:
    """The values of NAME=VALUE texts by name."""
    values: dict[str, str] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not name or not sign or not (value or may_be_empty):
            raise ValueError(f"{option}={text!r}; expected NAME=VALUE, such as {example!r}")
        if values.get(name, value) != value:
            raise ValueError(
                f"{option}={text!r}, and {values[name]!r} before; give {name!r} one value"
            )
        values[name] = value
    return values
