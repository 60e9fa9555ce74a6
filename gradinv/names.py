"""Names of parameters without what wraps the network that they are of."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

WRAPPERS = ("module", "_orig_mod", "_module", "model", "network", "net")
"""What DataParallel, torch.compile, Opacus and people's own classes call the network that they wrap."""

_NUMBERED = re.compile(r"\.\d+\.(weight|bias)$")


def prefixes(names: Collection[str], left: int = 2) -> Iterator[str]:
    """What all names begin with, the shortest first, as long as so many parts are left of each: with two, a module and
    its parameter."""
    yield ""
    parts = next(iter(names), "").split(".")
    for count in range(1, len(parts)):
        prefix = ".".join(parts[:count]) + "."
        if not all(name.startswith(prefix) and name.count(".") >= count + left - 1 for name in names):
            return
        yield prefix


def wrapper(names: Collection[str]) -> str:
    """The longest of these prefixes that is made of `WRAPPERS` only."""
    return max((prefix for prefix in prefixes(names) if set(prefix.split(".")[:-1]) <= set(WRAPPERS)), key=len)


def matched(names: Collection[str], expected: Collection[str]) -> Mapping[str, str] | None:
    """Each name as the expected ones have it: without a prefix, without the place in a Sequential of a head's only
    layer with parameters (fc.1.weight → fc.weight), by its number where all are numbers in the order of the expected
    ones, or with their prefix. None where some name has no counterpart."""
    if names and all(name.isdecimal() and int(name) < len(expected) for name in names):
        ordered = list(expected)
        return {name: ordered[int(name)] for name in names}
    known = set(expected)

    def counterpart(name: str) -> str:
        return name if name in known else _NUMBERED.sub(r".\1", name)

    tried = [{name: counterpart(name.removeprefix(prefix)) for name in names} for prefix in prefixes(names)]
    tried += [{name: prefix + name for name in names} for prefix in prefixes(expected)]
    right = (found for found in tried if set(found.values()) <= known and len(set(found.values())) == len(names))
    return next(right, None)
