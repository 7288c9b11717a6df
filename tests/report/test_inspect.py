"""A page of pairs to leaf through."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from report_parts import preferences

from spatialt2i import cli
from spatialt2i.core.store import CorruptData, write_preferences
from spatialt2i.report.inspect import write_inspection


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    rows = preferences(10)
    write_preferences(tmp_path / "data" / "train-00000-of-00002.parquet", rows[:6])
    write_preferences(tmp_path / "data" / "train-00001-of-00002.parquet", rows[6:])
    return tmp_path


def files(dataset: Path) -> list[Path]:
    return sorted(dataset.rglob("*.parquet"))


def test_pairs_are_drawn_at_random_and_shown_in_order(dataset: Path) -> None:
    options = {"predicate": None, "edit": None}
    figures = write_inspection(files(dataset), dataset / "a.html", count=4, seed=0, **options)
    assert figures == {"pairs": 4, "of": 10, "page": str(dataset / "a.html")}
    html = (dataset / "a.html").read_text()
    shown = [int(i) for i in re.findall(r" · p(\d+) · ", html)]
    assert len(shown) == 4 and shown == sorted(shown) and html.count("<mark>") >= 8
    assert html.count("data:image/png;base64,") == 8 and "https://" not in html and "<script" not in html
    assert html.count("previous</a>") == html.count("next</a>") == 3
    write_inspection(files(dataset), dataset / "b.html", count=4, seed=0, **options)
    assert (dataset / "b.html").read_text() == html
    write_inspection(files(dataset), dataset / "b.html", count=4, seed=1, **options)
    assert (dataset / "b.html").read_text() != html


def test_only_what_is_asked_for_is_shown(dataset: Path) -> None:
    for asked, n in (({"predicate": "in the centre", "edit": None}, 4), ({"predicate": None, "edit": "flip"}, 6),
                     ({"predicate": "left of", "edit": "flip"}, 6)):
        found = write_inspection(files(dataset), dataset / "a.html", count=60, seed=0, **asked)
        assert found["pairs"] == found["of"] == n
    with pytest.raises(ValueError, match="no pairs with predicate 'on Mars' and edit 'flip' in 2 files"):
        write_inspection(files(dataset), dataset / "a.html", count=60, seed=0, predicate="on Mars", edit="flip")


def test_a_damaged_picture_is_named(dataset: Path) -> None:
    broken = dataclasses.replace(preferences(1)[0], chosen=b"no picture")
    write_preferences(dataset / "data" / "train-00000-of-00002.parquet", [broken])
    with pytest.raises(CorruptData, match="00000-of-00002.parquet, row 0, chosen: the image cannot be decoded"):
        write_inspection(files(dataset), dataset / "a.html", count=60, seed=0, predicate=None, edit=None)


def test_the_command_takes_a_run_or_any_dataset(dataset: Path) -> None:
    result = CliRunner().invoke(cli.command_line(), ["data", "inspect", "--dataset", str(dataset), "--count", "3"])
    assert result.exit_code == 0, result.output
    assert (dataset / "pairs.html").exists() and re.search(r"pairs +3\b", result.output)
    result = CliRunner().invoke(cli.command_line(), ["data", "inspect"])
    assert result.exit_code == 1 and "Give --run a run, or --dataset a folder" in result.output
