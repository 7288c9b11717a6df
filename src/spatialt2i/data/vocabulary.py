"""The places and things that the scene grammar writes about, read from ``objects.toml`` and ``scenes.toml``."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_HERE = Path(__file__).resolve().parent
COLOURS = ("red", "blue", "green", "yellow", "orange", "purple", "pink", "white", "black", "grey", "brown", "teal",
           "navy", "beige", "turquoise", "cream")


@dataclass(frozen=True)
class Thing:
    """One kind of object.

    Attributes:
        name: what it is called, without any adjective.
        verb: how it is where it is: ``"stands"``, ``"hangs"`` ...
        finishes: what may be put before the name. tinted: likewise, after a colour.
        bears: other things can stand on it.
    """

    name: str
    verb: str
    finishes: tuple[str, ...]
    tinted: tuple[str, ...]
    bears: bool


@dataclass(frozen=True)
class Scene:
    """One kind of place.

    Attributes:
        name: the category. share: how often it is written about, relative to the others.
        places: how a prompt says where it is, ``"in a sunlit kitchen"``.
        floor_name: what the corners of the whole place are said to be of.
        surfaces: what small things stand on. top, floor, wall: names of the things that may be on one of those, on the
            floor, and on the wall.
    """

    name: str
    share: int
    places: tuple[str, ...]
    floor_name: str
    surfaces: tuple[str, ...]
    top: tuple[str, ...]
    floor: tuple[str, ...]
    wall: tuple[str, ...]


@cache
def things() -> dict[str, Thing]:
    """Every kind of object by its name."""
    groups = tomllib.loads((_HERE / "objects.toml").read_text())["group"]
    return {name: Thing(name, g["verb"], tuple(g["finishes"]), tuple(g["tinted"]), g.get("bears", False))
            for g in groups for name in g["names"]}


@cache
def scenes() -> dict[str, Scene]:
    """Every kind of place by its name."""
    found = tomllib.loads((_HERE / "scenes.toml").read_text())
    return {name: Scene(name, **{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
            for name, fields in found.items()}


@cache
def thing_of(name: str) -> Thing:
    """The kind of object that a full name, ``"blue enamel kettle"``, is about.

    Raises:
        ValueError: it is none of ours.
    """
    words = name.split()
    for start in range(len(words)):
        if (found := things().get(" ".join(words[start:]))) is not None:
            return found
    raise ValueError(f"{name}: no object of objects.toml")
