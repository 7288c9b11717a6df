"""Takes a finished dataset elsewhere: as WebDataset shards, and to a hub."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image

from spatialt2i.core.run import atomic_path, progress
from spatialt2i.core.store import COLUMNS

PUSHED = ["README.md", "statistics.json", "data/*.parquet"]
_IMAGES = [name for name, kind in COLUMNS.items() if kind == "image"]


def write_webdataset(shards: Sequence[Path], folder: Path) -> dict[str, Any]:
    """Each parquet file as a tar of the same name; equal files give equal bytes.

    A pair is ``ID.chosen.EXT``, ``ID.rejected.EXT`` and ``ID.json``, which has all other columns. In its name a pair's
    id has "_" for ".", because WebDataset ends a name at the first one.

    Args:
        shards: parquet files of a dataset. folder: where the tars go; others' are removed.

    Returns:
        ``pairs`` and ``files``.
    """
    names = {path: f"{path.stem}.tar" for path in shards}
    for old in folder.glob("*.tar"):
        if old.name not in names.values():
            old.unlink()
    pairs = 0
    for path in progress(list(shards), desc="WebDataset"):
        with atomic_path(folder / names[path]) as temporary, tarfile.open(temporary, "w") as tar:
            for batch in pq.ParquetFile(path).iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    pairs += 1
                    for name, data in _members(row):
                        member = tarfile.TarInfo(name)
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
    return {"pairs": pairs, "files": len(names)}


def _members(row: dict[str, Any]) -> list[tuple[str, bytes]]:
    key = row["id"].replace(".", "_")
    images = {side: row.pop(side)["bytes"] for side in _IMAGES}
    text = json.dumps(row, ensure_ascii=False).encode()
    return [*((f"{key}.{side}.{_extension(data)}", data) for side, data in images.items()), (f"{key}.json", text)]


def _extension(data: bytes) -> str:
    with Image.open(io.BytesIO(data)) as image:
        return {"JPEG": "jpg"}.get(image.format, image.format.lower())


def push(folder: Path, repo: str, *, private: bool) -> dict[str, Any]:
    """Upload a dataset's parquet files, card and statistics to a dataset repository of the Hugging Face hub.

    The library's own settings say who one is: ``hf auth login``, or its environment variables. What is there already is
    not sent again, and parquet files of an earlier dataset are removed there.

    Raises:
        ValueError: the folder holds no dataset.
        OSError: the hub refuses, or is not there.
    """
    from huggingface_hub import HfApi
    if not (folder / "README.md").exists() or not list((folder / "data").glob("*.parquet")):
        raise ValueError(f"{folder}: no dataset to push; run `spatialt2i data build` first")
    hub = HfApi()
    try:
        hub.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
        done = hub.upload_folder(repo_id=repo, folder_path=folder, repo_type="dataset", allow_patterns=PUSHED,
                                 delete_patterns="data/*.parquet", commit_message="Spatial preference pairs")
    except Exception as error:  # the library's transport has errors of its own
        raise OSError(f"{repo}: the hub is not there, or refuses: {error}; log in with `hf auth login` and try again"
                      ) from error
    return {"pushed": str(done)}
