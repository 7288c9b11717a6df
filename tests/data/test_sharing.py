"""Datasets elsewhere: as WebDataset shards, and on a hub."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from data_parts import CONFIG, SEED, parts

from spatialt2i.core.store import read_preferences
from spatialt2i.data.pipeline import build_dataset
from spatialt2i.data.sharing import push, write_webdataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    build_dataset(config=dataclasses.replace(CONFIG, pairs=30), seed=SEED, folder=folder, parts=parts())
    return folder


def test_webdataset_gives_back_every_pair(dataset: Path, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    shards = sorted((dataset / "data").glob("*.parquet"))
    rows = list(read_preferences(shards))
    (tmp_path / "old.tar").write_bytes(b"")
    assert write_webdataset(shards, tmp_path) == {"pairs": len(rows), "files": len(shards)}
    first = {path.name: path.read_bytes() for path in tmp_path.glob("*.tar")}
    assert set(first) == {f"{path.stem}.tar" for path in shards}
    found = {sample["__key__"]: sample for name in sorted(first)
             for sample in webdataset.WebDataset(str(tmp_path / name), shardshuffle=False)}
    assert len(found) == len(rows)
    for row in rows:
        sample = found[row.prompt.id]
        assert (sample["chosen.webp"], sample["rejected.webp"]) == (row.chosen, row.rejected)
        told = json.loads(sample["json"])
        assert told["prompt"] == row.prompt.text and json.loads(told["edits"]) == [e.to_json() for e in row.pair.edits]
    write_webdataset(shards, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.tar")} == first


def test_push_sends_the_dataset_and_nothing_else(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    said: list[tuple[str, dict[str, Any]]] = []

    class Hub:
        def create_repo(self, repo: str, **options: Any) -> None:
            said.append((repo, options))

        def upload_folder(self, **options: Any) -> str:
            sent = {str(path.relative_to(dataset)) for pattern in options["allow_patterns"]
                    for path in dataset.glob(pattern)}
            said.append(("sent", {"files": sent, **options}))
            return "https://hub/commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert push(dataset, "me/pairs", private=True) == {"pushed": "https://hub/commit"}
    (repo, options), (_, sent) = said
    assert sent["delete_patterns"] == "data/*.parquet", "files of an earlier dataset"
    assert repo == "me/pairs" and options["private"] and options["repo_type"] == sent["repo_type"] == "dataset"
    assert {"README.md", "statistics.json"} < sent["files"] and sent["repo_id"] == repo
    assert all(name.endswith(".parquet") for name in sent["files"] - {"README.md", "statistics.json"})


def test_a_hub_that_is_not_there_is_told(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    class Transport(Exception):
        pass

    def refuse(self: Any, repo: str, **options: Any) -> None:
        raise Transport("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(OSError, match="me/pairs: the hub is not there, or refuses: no route; log in"):
        push(dataset, "me/pairs", private=False)


def test_a_folder_without_a_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no dataset to push; run `spatialt2i data build` first"):
        push(tmp_path, "me/pairs", private=False)
