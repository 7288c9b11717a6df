"""Pictures under their hashes: kept once, whole, and never believed unchecked."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spatialt2i.core.store import CorruptData
from spatialt2i.data.images import FORMATS, ImageStore


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8))


@pytest.mark.parametrize("format", FORMATS)
def test_a_picture_comes_back(format: str, tmp_path: Path) -> None:
    store = ImageStore(tmp_path, format=format)
    name = store.keep(picture())
    with Image.open(io.BytesIO(store.read(name))) as found:
        assert found.format.lower() == format
        if format != "jpeg":
            assert np.array_equal(np.asarray(found.convert("RGB")), np.asarray(picture()))


def test_the_same_picture_is_one_file(tmp_path: Path) -> None:
    store = ImageStore(tmp_path, format="webp")
    assert store.keep(picture()) == store.keep(picture()) != store.keep(picture(1))
    assert len([f for f in tmp_path.rglob("*") if f.is_file()]) == 2


@pytest.mark.parametrize("spoil", [
    lambda path: path.write_bytes(path.read_bytes()[:-1]), lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"), lambda path: path.unlink()])
def test_a_damaged_or_missing_picture_is_named_and_mended_by_drawing_it_again(spoil, tmp_path: Path) -> None:
    store = ImageStore(tmp_path, format="webp")
    name = store.keep(picture())
    path = tmp_path / name[:2] / f"{name}.webp"
    before = path.read_bytes()
    spoil(path)
    with pytest.raises(CorruptData, match=f"{name}.webp: .*data build"):
        store.read(name)
    assert store.keep(picture()) == name and store.read(name) == before
