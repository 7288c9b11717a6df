"""Preference sets of others, in files as they publish them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from spatialt2i.build import stages
from spatialt2i.core.config import DataConfig, load_config
from spatialt2i.core.run import RunDir
from spatialt2i.core.store import CorruptData, read_preferences
from spatialt2i.data.imports import import_preferences

CONFIG = DataConfig(validation=0.2, test=0.2, shard=7)


def jpeg(seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 24, 3), dtype=np.uint8)).save(out, "JPEG")
    return out.getvalue()


def picked(n: int = 40, **changes: list[Any]) -> pa.Table:
    """Every fourth row is a tie; where the number is odd the second picture was chosen."""
    labels = [0.5 if i % 4 == 3 else float(i % 2 == 0) for i in range(n)]
    return pa.table({
        "caption": [f"a cat left of dog {i // 2}" for i in range(n)], "jpg_0": [jpeg(2 * i) for i in range(n)],
        "jpg_1": [jpeg(2 * i + 1) for i in range(n)], "label_0": labels, "label_1": [1 - x for x in labels],
        "has_label": [i != 8 for i in range(n)], "model_0": ["a"] * n, "model_1": ["b"] * n} | changes)


def found(folder: Path) -> dict[str, list[Any]]:
    return {name: list(read_preferences(sorted((folder / "data").glob(f"{name}-*.parquet"))))
            for name in ("train", "validation", "test")}


def test_pick_a_pic(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    table = picked()
    pq.write_table(table.slice(0, 25), tmp_path / "source" / "train-00000.parquet")
    pq.write_table(table.slice(25), tmp_path / "source" / "train-00001.parquet")
    counts = import_preferences(tmp_path / "source", format="pick-a-pic", config=CONFIG, folder=tmp_path)["counts"]
    assert (counts["written"], counts["no choice"], counts["kept"]) == (40, 11, 29)
    splits = found(tmp_path)
    assert {name: len(rows) for name, rows in splits.items()} == {name: counts[name] for name in splits}
    texts = {name: {row.prompt.text for row in rows} for name, rows in splits.items()}
    assert not texts["train"] & texts["test"] and not texts["train"] & texts["validation"] and texts["test"]
    everything = {row.chosen: row for rows in splits.values() for row in rows}
    for i, row in enumerate(table.to_pylist()):
        if i % 4 != 3 and i != 8:
            pair = everything[row[f"jpg_{i % 2}"]]
            assert (pair.rejected, pair.prompt.text) == (row[f"jpg_{1 - i % 2}"], row["caption"])
            assert [d.generator for d in pair.drawn] == ["ab"[i % 2], "ab"[1 - i % 2]]
            assert pair.verdicts[0].overall is None and pair.pair.n_perturbations == 0
    with pytest.raises(ValueError, match="has no edits"):
        splits["train"][0].swap()
    datasets = pytest.importorskip("datasets")
    assert len(datasets.load_dataset(str(tmp_path), cache_dir=str(tmp_path / "cache"))["train"]) == counts["train"]


def test_an_import_stands_in_for_pairs_of_ours(tmp_path: Path) -> None:
    pq.write_table(picked(40), tmp_path / "source.parquet")
    config = load_config("tiny", ["reward.steps=2", "reward.batch=4", "reward.micro_batch=4", "reward.eval_pairs=4",
                                  "threads=1", "data.validation=0.3", "data.test=0.3"])
    run = RunDir.open(tmp_path / "run", config)
    figures = stages.data_import(config, run, source=tmp_path / "source.parquet", format="pick-a-pic")
    assert stages.data_build(config, run) == figures
    # SpatialScore learns from them: no prompt has another view, and no object another name
    assert stages.reward_train(config, run) and stages.reward_eval(config, run)["overall"]["n"] > 0


def test_hpsv3(tmp_path: Path) -> None:
    (tmp_path / "source" / "images").mkdir(parents=True)
    rows = []
    for i in range(12):
        for side in (1, 2):
            (tmp_path / "source" / "images" / f"{i}-{side}.jpg").write_bytes(jpeg(10 * i + side))
        rows.append({"prompt": f"a cup {i}", "path1": f"images/{i}-1.jpg", "path2": f"images/{i}-2.jpg",
                     "confidence": 0.9, "choice_dist": [9, 1], "model1": "x"})
    source = tmp_path / "source" / "train.json"
    source.write_text(json.dumps(rows))
    assert import_preferences(source, format="hpsv3", config=CONFIG, folder=tmp_path)["counts"]["kept"] == 12
    pair = next(row for rows in found(tmp_path).values() for row in rows if row.prompt.text == "a cup 3")
    assert (pair.chosen, pair.rejected) == (jpeg(31), jpeg(32))
    assert pair.verdicts[0].evidence == {"confidence": 0.9, "choice_dist": [9, 1]}
    assert [d.generator for d in pair.drawn] == ["x", "unknown"]
    (tmp_path / "source" / "images" / "5-2.jpg").unlink()
    with pytest.raises(CorruptData, match="row 5: there is no picture .*5-2.jpg"):
        import_preferences(source, format="hpsv3", config=CONFIG, folder=tmp_path)


def test_what_is_of_another_format_or_damaged_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["x"]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="not of Pick-a-Pic, the columns caption, jpg_0"):
        import_preferences(tmp_path / "other.parquet", format="pick-a-pic", config=CONFIG, folder=tmp_path / "out")
    pq.write_table(picked(2, jpg_1=[jpeg(1)[:50], jpeg(3)]), tmp_path / "cut.parquet")
    with pytest.raises(CorruptData, match="cut.parquet, row 0, jpg_1: not a picture"):
        import_preferences(tmp_path / "cut.parquet", format="pick-a-pic", config=CONFIG, folder=tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no preferences in it"):
        import_preferences(tmp_path / "empty", format="pick-a-pic", config=CONFIG, folder=tmp_path / "out")
    (tmp_path / "a.json").write_text('{"prompt": 1}')
    with pytest.raises(ValueError, match="not of HPSv3"):
        import_preferences(tmp_path / "a.json", format="hpsv3", config=CONFIG, folder=tmp_path / "out")
