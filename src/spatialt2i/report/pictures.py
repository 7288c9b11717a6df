"""Pictures as data URIs, and texts with what changed in them marked."""

from __future__ import annotations

import base64
import difflib
import io
import itertools
import re
from dataclasses import dataclass
from pathlib import Path

import PIL.Image

SMALL = 128  # pixels; up to here they are shown as sharp squares
SIDE = 320  # pixels; longer pictures are made smaller, so that a page of large ones can still be sent around


class BrokenPicture(OSError):
    """A picture in the run folder that cannot be decoded."""


@dataclass(frozen=True)
class Picture:
    """A picture to put inside a page: its data URI, and whether it is so small that its pixels should show."""

    uri: str
    small: bool


def read_picture(path: Path) -> Picture | None:
    """The picture of a file, or None where there is no such file.

    Raises:
        BrokenPicture: the file is there and cannot be decoded.
    """
    return embed(path.read_bytes(), where=str(path)) if path.is_file() else None


def embed(data: bytes, *, where: str) -> Picture:
    """Encoded image bytes as a picture of a page: a small one as it is, a large one as a smaller JPEG.

    Args:
        data: PNG, JPEG or WebP. where: how an error names it.

    Raises:
        BrokenPicture: the bytes cannot be decoded.
    """
    try:
        with PIL.Image.open(io.BytesIO(data)) as image:
            image.load()
            if max(image.size) > SIDE:
                image, out = image.convert("RGB"), io.BytesIO()
                image.thumbnail((SIDE, SIDE))
                image.save(out, "JPEG", quality=85)
                return Picture(_uri("jpeg", out.getvalue()), False)
            return Picture(_uri(image.format.lower(), data), max(image.size) <= SMALL)
    except (OSError, SyntaxError, ValueError) as e:  # SyntaxError is what Pillow raises for a broken PNG chunk
        raise BrokenPicture(f"{where}: the picture cannot be decoded ({e}); delete it and run the stage that draws it "
                            "again") from e


def changed_words(before: str, after: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Two texts as (piece, whether it differs from the other text); the pieces join to the texts."""
    a, b = (re.findall(r"\s+|\w+|[^\w\s]", text) for text in (before, after))
    left, right = [False] * len(a), [False] * len(b)
    for tag, a0, a1, b0, b1 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if tag != "equal":
            left[a0:a1], right[b0:b1] = [True] * (a1 - a0), [True] * (b1 - b0)
    return _pieces(a, left), _pieces(b, right)


def _pieces(words: list[str], changed: list[bool]) -> list[tuple[str, bool]]:
    """Neighbours of one kind joined; a space between two changed words counts as changed."""
    flags = [flag or (0 < i < len(words) - 1 and word.isspace() and changed[i - 1] and changed[i + 1])
             for i, (word, flag) in enumerate(zip(words, changed, strict=True))]
    runs = itertools.groupby(zip(words, flags, strict=True), key=lambda pair: pair[1])
    return [("".join(word for word, _ in run), flag) for flag, run in runs]


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
