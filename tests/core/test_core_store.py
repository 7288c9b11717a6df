"""JSON lines and parquet shards: there and back, and every kind of damage."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from core_parts import picture, preference
from spatialt2i.core.store import (
    COLUMNS, CorruptData, append_jsonl, read_jsonl, read_preferences, write_jsonl, write_preferences,
)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    write_preferences(tmp_path / "train-00000.parquet", [preference(i) for i in range(600)])
    return tmp_path / "train-00000.parquet"


# ---- JSON lines

def test_json_lines_there_and_back(tmp_path: Path) -> None:
    rows = [{"a": 1, "b": "é\n"}, {}, {"c": [None, 1.5]}]
    write_jsonl(tmp_path / "x.jsonl", iter(rows))
    append_jsonl(tmp_path / "x.jsonl", {"d": 4})
    assert list(read_jsonl(tmp_path / "x.jsonl")) == [*rows, {"d": 4}]


def test_append_makes_the_file_and_mends_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.jsonl"
    append_jsonl(path, {"a": 1})
    with path.open("a") as f:
        f.write('{"b": 2')
    assert list(read_jsonl(path)) == [{"a": 1}]
    append_jsonl(path, {"c": 3})
    assert list(read_jsonl(path)) == [{"a": 1}, {"c": 3}]


@pytest.mark.parametrize(("line", "word"), [('{"b": ', "not JSON"), ("[1, 2]", "expected a JSON object, got list")])
def test_a_damaged_line_is_named(line: str, word: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(f'{{"a": 1}}\n{line}\n')
    with pytest.raises(CorruptData, match=rf"x.jsonl, line 2: {word}.*run the stage"):
        list(read_jsonl(tmp_path / "x.jsonl"))


# ---- shards

def test_preferences_there_and_back(shard: Path) -> None:
    assert list(read_preferences([shard])) == [preference(i) for i in range(600)]


def test_equal_rows_give_equal_bytes(tmp_path: Path) -> None:
    rows = [preference(i) for i in range(3)]
    assert write_preferences(tmp_path / "a", rows) == write_preferences(tmp_path / "b", rows)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert write_preferences(tmp_path / "c", rows[:2]) != write_preferences(tmp_path / "a", rows)


def test_an_empty_shard_is_fine(tmp_path: Path) -> None:
    write_preferences(tmp_path / "x.parquet", [])
    assert list(read_preferences([tmp_path / "x.parquet"])) == []


def test_load_dataset_reads_the_folder_and_sees_images(shard: Path, monkeypatch, tmp_path_factory) -> None:
    datasets = pytest.importorskip("datasets")
    cache = tmp_path_factory.mktemp("cache")
    loaded = datasets.load_dataset(str(shard.parent), cache_dir=str(cache))
    assert set(loaded) == {"train"} and loaded["train"].column_names == list(COLUMNS)
    row = loaded["train"][3]
    assert row["chosen"].size == (16, 16) and row["chosen"].mode == "RGB"
    assert [row[name] for name in ("prompt", "n_perturbations", "generator", "seed")] == [
        preference(3).prompt.text, 1, "painter", preference(3).drawn[0].seed]


def test_two_scenes_in_a_pair_are_refused(tmp_path: Path) -> None:
    row = preference()
    pair = dataclasses.replace(row.pair, perturbed=dataclasses.replace(row.pair.perturbed, scene="on Mars"))
    with pytest.raises(ValueError, match="scenes 'on a lawn' and 'on Mars' differ"):
        write_preferences(tmp_path / "x", [dataclasses.replace(row, pair=pair)])


# ---- damage

@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_shard_is_named(share: float, shard: Path) -> None:
    data = shard.read_bytes()
    shard.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CorruptData, match=r"train-00000.parquet: the shard is cut off or altered.*data build"):
        list(read_preferences([shard]))


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_an_altered_byte_is_noticed(share: float, shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[int(len(data) * share)] ^= 0xFF
    shard.write_bytes(data)
    with pytest.raises(CorruptData, match=r"train-00000.parquet.*spatialt2i data build"):
        list(read_preferences([shard]))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorruptData, match="nowhere.parquet: no such shard"):
        list(read_preferences([tmp_path / "nowhere.parquet"]))


def test_another_parquet_file_is_no_shard(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["x"], "prompt": ["y"]}), tmp_path / "x.parquet")
    with pytest.raises(CorruptData, match="not a shard of preferences, the columns perturbed_prompt, chosen"):
        list(read_preferences([tmp_path / "x.parquet"]))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_truncated_image_is_named_with_its_row(side: str, kind: str, tmp_path: Path) -> None:
    data = picture(1, 32, kind)
    rows = [preference(0), dataclasses.replace(preference(1), **{side: data[: len(data) // 2]})]
    write_preferences(tmp_path / "x.parquet", rows)
    reader = read_preferences([tmp_path / "x.parquet"])
    assert next(reader) == rows[0]
    with pytest.raises(CorruptData, match=rf"x.parquet, row 1, {side}: the image cannot be decoded.*data build"):
        next(reader)


@pytest.mark.parametrize("data", [b"", b"not an image"])
def test_what_is_no_image_is_named(data: bytes, tmp_path: Path) -> None:
    write_preferences(tmp_path / "x.parquet", [dataclasses.replace(preference(), chosen=data)])
    with pytest.raises(CorruptData, match="row 0, chosen: the image"):
        list(read_preferences([tmp_path / "x.parquet"]))
