"""Records on disk: JSON lines, and the parquet shards of preferences that `datasets.load_dataset(FOLDER)` reads."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq

from spatialt2i.core.run import disk_errors, write_atomic
from spatialt2i.core.types import Drawn, Edit, Pair, Preference, Prompt, Relation, Verdict

# the order of the columns in a shard; JSON holds what has no fixed shape
COLUMNS: dict[str, str] = {
    "id": "string", "prompt": "string", "perturbed_prompt": "string", "chosen": "image", "rejected": "image",
    "relations": "string", "perturbed_relations": "string", "edits": "string", "n_perturbations": "int32",
    "generator": "string", "seed": "int64", "drawn": "string", "verdicts": "string", "scene": "string",
    "perturbed_id": "string",
}
REWRITE = "delete the file and run the stage that writes it again"
REBUILD = "delete the file and run `spatialt2i data build` on the same run again"


class CorruptData(ValueError):
    """A stored record that cannot be read; the message names the file, the place in it, and what to do."""


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object per line, atomically."""
    write_atomic(path, "".join(_json(row) + "\n" for row in rows))


def append_jsonl(path: str | Path, *rows: dict[str, Any]) -> None:
    """Add lines to a file, after cutting off an unfinished line that a killed process left there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(path), path.open("a+b") as f:
        end = f.seek(0, os.SEEK_END)
        f.seek(max(end - 1, 0))
        if end and f.read(1) != b"\n":
            f.seek(0)
            f.truncate(f.read().rfind(b"\n") + 1)
        f.write(b"".join(_json(row).encode() + b"\n" for row in rows))


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """The objects of a file, one per line; a last line without its end, left by a killed process, is not one.

    Raises:
        CorruptData: a line is not a JSON object.
    """
    with Path(path).open("rb") as f:
        for number, line in enumerate(f, 1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
            except ValueError as e:
                raise CorruptData(f"{path}, line {number}: not JSON ({e}); {REWRITE}") from e
            if not isinstance(row, dict):
                raise CorruptData(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}; {REWRITE}")
            yield row


def write_preferences(path: str | Path, rows: Sequence[Preference]) -> str:
    """Write preferences as one parquet shard, atomically; equal rows give equal bytes.

    Returns:
        The sha256 of the file, in hex.
    """
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    for row in rows:
        for name, value in _to_columns(row).items():
            columns[name].append(value)
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pydict(columns, schema=schema()), buffer, row_group_size=500, compression="zstd",
                   use_dictionary=["generator", "drawn", "scene"], write_page_checksum=True)
    data = buffer.getvalue()
    write_atomic(path, data)
    return hashlib.sha256(data).hexdigest()


def schema() -> pa.Schema:
    """The columns of a shard, with the note that lets `datasets` show its images."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    types = {"string": pa.string(), "int32": pa.int32(), "int64": pa.int64(), "image": image}
    features = {n: {"_type": "Image"} if k == "image" else {"dtype": k, "_type": "Value"} for n, k in COLUMNS.items()}
    return pa.schema([(n, types[k]) for n, k in COLUMNS.items()],
                     metadata={"huggingface": json.dumps({"info": {"features": features}})})


def read_preferences(paths: Iterable[str | Path]) -> Iterator[Preference]:
    """The preferences of some shards, in order, each with both images checked to be whole.

    Raises:
        CorruptData: a shard is missing, cut off or altered, or an image in it cannot be decoded.
    """
    for path in paths:
        number = 0
        for batch in _batches(Path(path)):
            for row in batch.to_pylist():
                yield preference_of(row, f"{path}, row {number}")
                number += 1


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            missing = [name for name in COLUMNS if name not in file.schema_arrow.names]
            if missing:
                raise CorruptData(f"{path}: not a shard of preferences, the columns {', '.join(missing)} are missing")
            yield from file.iter_batches(batch_size=256, columns=list(COLUMNS))
    except FileNotFoundError as e:
        raise CorruptData(f"{path}: no such shard; run `spatialt2i data build` on the same run again") from e
    except (pa.ArrowException, OSError) as e:
        raise CorruptData(f"{path}: the shard is cut off or altered ({e}); {REBUILD}") from e


def _to_columns(row: Preference) -> dict[str, Any]:
    perfect, perturbed = row.pair.perfect, row.pair.perturbed
    if perfect.scene != perturbed.scene:
        raise ValueError(f"pair {perfect.id}: the scenes {perfect.scene!r} and {perturbed.scene!r} differ; expected a "
                         "perturbation that changes relations only")
    return {
        "id": perfect.id, "perturbed_id": perturbed.id, "prompt": perfect.text, "perturbed_prompt": perturbed.text,
        "chosen": {"bytes": row.chosen, "path": None}, "rejected": {"bytes": row.rejected, "path": None},
        "relations": _json([r.to_json() for r in perfect.relations]),
        "perturbed_relations": _json([r.to_json() for r in perturbed.relations]),
        "edits": _json([e.to_json() for e in row.pair.edits]), "n_perturbations": row.pair.n_perturbations,
        "generator": row.drawn[0].generator, "seed": row.drawn[0].seed, "drawn": _json([asdict(d) for d in row.drawn]),
        "verdicts": _json([v.to_json() for v in row.verdicts]), "scene": perfect.scene,
    }


def preference_of(row: dict[str, Any], where: str) -> Preference:
    """A row of a shard. where: how an error names it.

    Raises:
        CorruptData: a column does not hold what it should, or an image cannot be decoded.
    """
    try:
        def prompt(id: str, text: str, relations: str) -> Prompt:
            return Prompt(id, text, row["scene"], tuple(Relation.from_json(r) for r in json.loads(relations)))

        pair = Pair(prompt(row["id"], row["prompt"], row["relations"]),
                    prompt(row["perturbed_id"], row["perturbed_prompt"], row["perturbed_relations"]),
                    tuple(Edit.from_json(e) for e in json.loads(row["edits"])))
        drawn = tuple(Drawn(**d) for d in json.loads(row["drawn"]))
        verdicts = tuple(Verdict.from_json(v) for v in json.loads(row["verdicts"]))
        if (len(drawn), len(verdicts)) != (2, 2):
            raise ValueError(f"{len(drawn)} pictures were drawn and {len(verdicts)} judged, expected 2 and 2")
    except (ValueError, KeyError, TypeError) as e:
        raise CorruptData(f"{where}: a column does not hold what it should ({type(e).__name__}: {e}); {REBUILD}") from e
    images = [_whole_image(row[side], f"{where}, {side}") for side in ("chosen", "rejected")]
    return Preference(pair, images[0], images[1], drawn, verdicts)


def decode(data: bytes) -> PIL.Image.Image:
    """An encoded picture, in RGB.

    Raises:
        ValueError: it cannot be decoded.
    """
    try:
        with PIL.Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as e:  # SyntaxError is what Pillow raises for a broken PNG chunk
        raise ValueError(f"not a picture that can be decoded: {e}") from e


def read_image(path: Path) -> PIL.Image.Image:
    """A picture in RGB.

    Raises:
        OSError: there is none, or it cannot be decoded.
    """
    try:
        return decode(path.read_bytes())
    except FileNotFoundError as e:
        raise FileNotFoundError(f"{path}: no such image file") from e
    except ValueError as e:
        raise OSError(f"{path}: {e}; expected PNG, JPEG or WebP") from e


def _whole_image(value: dict[str, Any] | None, where: str) -> bytes:
    data = (value or {}).get("bytes")
    if not data:
        raise CorruptData(f"{where}: the image is missing; {REBUILD}")
    try:
        decode(data)
    except ValueError as e:
        raise CorruptData(f"{where}: the image cannot be decoded ({e}); {REBUILD}") from e
    return data


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
