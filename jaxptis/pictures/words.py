"""How numbers and lists of layers are written for a person."""

from collections.abc import Sequence

_TIME_UNITS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9))
_SIZE_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def duration(seconds: float) -> str:
    """Write seconds with four digits in the unit that suits them.

    >>> duration(0.01234567), duration(75.0), duration(4321.5), duration(0.0)
    ('12.35 ms', '75 s', '4322 s', '0 s')
    """
    for unit, each in _TIME_UNITS:
        # What rounds to 1000 of a unit is written as 1 of the next.
        if seconds >= each * 0.99995:
            return f"{_digits(seconds / each, 4)} {unit}"
    return f"{_digits(seconds / 1e-9, 4)} ns" if seconds else "0 s"


def size(num_bytes: int) -> str:
    """Write bytes with three digits in the unit that suits them.

    >>> size(41_000_000_000), size(1536), size(7)
    ('38.2 GiB', '1.5 KiB', '7 B')
    """
    for unit, each in _SIZE_UNITS:
        if num_bytes >= each:
            return f"{_digits(num_bytes / each, 3)} {unit}"
    return f"{num_bytes} B"


def _digits(number: float, digits: int) -> str:
    number *= 1 + 1e-12  # what is half-way goes up, as it does in the page
    return f"{number:.{digits}g}" if number < 10**digits - 0.5 else f"{number:.0f}"


def percent(share: float) -> str:
    """Write a share without decimals, but not so that a part looks like nothing or all.

    >>> percent(0.934), percent(0.001), percent(0.9999), percent(1.0)
    ('93 %', '<1 %', '>99 %', '100 %')
    """
    if 0 < share < 0.005:
        return "<1 %"
    if 0.995 <= share < 1 - 1e-9:
        return ">99 %"
    return f"{share:.0%}".replace("%", " %")


def and_list(words: Sequence[str]) -> str:
    """Join with commas, and `and` before the last.

    >>> and_list(["a", "b", "c"])
    'a, b and c'
    """
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def layer_names(names: Sequence[str]) -> str:
    """Name up to three layers, or of more the first, the last and how many there are.

    >>> layer_names(["norm", "head"])
    'norm and head'
    >>> layer_names([f"layer_{index}" for index in range(12)])
    '12 layers: layer_0 to layer_11'
    """
    if len(names) <= 3:
        return and_list(names)
    return f"{len(names)} layers: {names[0]} to {names[-1]}"
