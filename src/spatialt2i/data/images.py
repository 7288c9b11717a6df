"""Pictures as files that are named after what is in them, so that none can be damaged or exchanged unnoticed."""

from __future__ import annotations

import hashlib
import io
import uuid
from pathlib import Path

from PIL import Image

from spatialt2i.core.run import disk_errors
from spatialt2i.core.store import CorruptData

FORMATS = {"png": {"compress_level": 3},  # the fastest for flat pictures; 6 saves only 7 % more
           "webp": {"lossless": True, "exact": True, "quality": 50},  # quality: how hard it tries; nothing is lost
           "jpeg": {"quality": 95, "subsampling": 0}}


def encode(image: Image.Image, format: str) -> bytes:
    """A picture as a file: ``"png"``, ``"webp"`` (both without loss) or ``"jpeg"``."""
    out = io.BytesIO()
    image.save(out, format, **FORMATS[format])
    return out.getvalue()


class ImageStore:
    """A folder of pictures, each under the sha256 of its file: ``ab/abcdef....webp``.

    Args:
        folder: made where there is none. format: one of `FORMATS`, of the pictures that it gets.
    """

    def __init__(self, folder: Path, *, format: str) -> None:
        self._folder, self._format = folder, format

    def keep(self, image: Image.Image) -> str:
        """Store a picture, once, and return its sha256.

        Raises:
            DiskFull: no space left.
        """
        data = encode(image, self._format)
        name = hashlib.sha256(data).hexdigest()
        path = self._path(name)
        if not path.exists() or path.read_bytes() != data:  # a damaged one is mended
            with disk_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                # a name of its own, because others may be about to store the same picture
                temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
                try:
                    temporary.write_bytes(data)
                    temporary.replace(path)
                finally:
                    temporary.unlink(missing_ok=True)
        return name

    def read(self, name: str) -> bytes:
        """The file with that sha256.

        Raises:
            CorruptData: it is missing, or is not what it was.
        """
        path = self._path(name)
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise CorruptData(f"{path}: no such image; `data build` on the same run makes it again") from error
        if hashlib.sha256(data).hexdigest() != name:
            raise CorruptData(f"{path}: the image is not what it was ({len(data)} bytes); `data build` on the "
                              "same run makes it again")
        return data

    def has(self, name: str) -> bool:
        """Whether the file with that sha256 is there, and is what it was."""
        try:
            self.read(name)
        except CorruptData:
            return False
        return True

    def tidy(self) -> None:
        """Remove what processes left that were killed while they stored a picture."""
        for path in self._folder.glob("*/.*.tmp"):
            path.unlink()

    def _path(self, name: str) -> Path:
        return self._folder / name[:2] / f"{name}.{self._format}"
