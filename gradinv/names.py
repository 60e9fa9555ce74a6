"""Names of parameters without what wraps the network that they are of."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

WRAPPERS = ("module", "_orig_mod", "_module", "model", "network", "net")
"""What DataParallel, torch.compile, Opacus and people's own classes call the network that they wrap."""

_NUMBERED = re.compile(r"\.\d+\.(weight|bias)$")
_PLACE = re.compile(r"(\d+)\.of\.(\d+)")


def place_of(index: int, count: int) -> str:
    """The name of what has no name but its place in a list of so many; also where some in the list are left out, the
    names tell how many there are."""
    return f"{index}.of.{count}"


def listed_of(names: Collection[str]) -> int | None:
    """How long the list is whose places these are; None where they are names."""
    found = [_PLACE.fullmatch(name) for name in names]
    counts = {int(place[2]) for place in found if place is not None}
    return counts.pop() if len(counts) == 1 and all(found) else None


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
    layer with parameters (fc.1.weight → fc.weight), by its place where all are places in a list as long as the expected
    ones or plain numbers, or with their prefix. None where some name has no counterpart."""
    ordered = list(expected)
    if listed_of(names) == len(ordered):
        return {name: ordered[int(name.partition(".")[0])] for name in names}
    if names and all(name.isdecimal() and int(name) < len(ordered) for name in names):
        return {name: ordered[int(name)] for name in names}
    known = set(expected)

    def counterpart(name: str) -> str:
        return name if name in known else _NUMBERED.sub(r".\1", name)

    tried = [{name: counterpart(name.removeprefix(prefix)) for name in names} for prefix in prefixes(names)]
    tried += [{name: prefix + name for name in names} for prefix in prefixes(expected)]
    right = (found for found in tried if set(found.values()) <= known and len(set(found.values())) == len(names))
    return next(right, None)
