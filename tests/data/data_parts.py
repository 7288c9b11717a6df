"""Parts and settings of a small dataset, and a script that builds it in a process of its own."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from spatialt2i.core.config import DataConfig
from spatialt2i.data.pipeline import build_dataset
from spatialt2i.data.shard import Parts
from spatialt2i.tiny.grammar import TinyWriter
from spatialt2i.tiny.oracle import TinyOracle
from spatialt2i.tiny.painter import TinyPainter

SEED = 11
CONFIG = DataConfig(pairs=90, relations=(0, 1, 1), shard=15, workers=1, validation=0.15, test=0.15)


def parts() -> Parts:
    """The tabletop world's."""
    return Parts(writer=TinyWriter, generators={"tiny-painter": TinyPainter}, verifier=TinyOracle)


def parquet_sums(folder: Path) -> dict[str, str]:
    """sha256 of every file of the finished dataset."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((folder / "data").glob("*.parquet"))}


if __name__ == "__main__":
    import dataclasses
    config = dataclasses.replace(CONFIG, workers=int(sys.argv[2]))
    build_dataset(config=config, seed=SEED, folder=Path(sys.argv[1]), parts=parts())
