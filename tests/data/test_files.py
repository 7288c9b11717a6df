"""Files of prompts and of their perturbations."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from spatialt2i.cli import command_line
from spatialt2i.core.config import DataConfig
from spatialt2i.core.protocols import Writer
from spatialt2i.core.run import RunError
from spatialt2i.core.store import read_jsonl
from spatialt2i.core.types import Pair, Prompt
from spatialt2i.data import files
from spatialt2i.data.files import write_pair_file, write_prompt_file
from spatialt2i.data.prompts import SceneWriter
from spatialt2i.data.stages import write_prompts
from spatialt2i.tiny.grammar import TinyWriter

CONFIG = DataConfig(pairs=300)


def make(folder: Path, config: DataConfig = CONFIG, seed: int = 0) -> tuple[Path, Path]:
    prompts, pairs = folder / "prompts.jsonl", folder / "pairs.jsonl"
    write_prompt_file(SceneWriter(), config=config, seed=seed, path=prompts)
    write_pair_file(SceneWriter(), prompts, config=config, seed=seed, path=pairs)
    return prompts, pairs


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make(tmp_path_factory.mktemp("whole"))


def test_a_line_is_a_prompt_and_no_two_are_alike(whole: tuple[Path, Path]) -> None:
    rows = list(read_jsonl(whole[0]))
    assert len(rows) == 300 and {tuple(row) for row in rows} == {("id", "text", "scene", "relations")}
    assert len({row["text"] for row in rows}) == len({row["id"] for row in rows}) == 300
    assert all(Prompt.from_json(row).to_json() == row for row in rows)


def test_every_prompt_has_its_line_of_edits(whole: tuple[Path, Path]) -> None:
    prompts, rows = (list(read_jsonl(path)) for path in whole)
    assert [row["perfect"] for row in rows] == prompts
    assert all(Pair.from_json(row).to_json() == row for row in rows if row["perturbed"])
    assert all(row["edits"] is None for row in rows if not row["perturbed"])


@pytest.mark.parametrize("left", [0, 1, 17, 299])
def test_files_that_were_cut_off_are_continued_to_the_same_end(left: int, whole: tuple[Path, Path],
                                                               tmp_path: Path) -> None:
    for path in whole:
        lines = path.read_bytes().splitlines(keepends=True)
        (tmp_path / path.name).write_bytes(b"".join(lines[:left]) + lines[left][:20])  # killed within a line
    again = make(tmp_path)
    assert [p.read_bytes() for p in again] == [p.read_bytes() for p in whole]


def test_equal_texts_are_written_anew(tmp_path: Path) -> None:
    """The tabletop has few prompts of one relation, so that 400 draws meet."""
    config = dataclasses.replace(CONFIG, pairs=400, relations=(1,))
    write_prompt_file(TinyWriter(), config=config, seed=0, path=tmp_path / "p.jsonl")
    assert len({row["text"] for row in read_jsonl(tmp_path / "p.jsonl")}) == 400


def test_a_file_of_other_settings_is_refused(whole: tuple[Path, Path], tmp_path: Path) -> None:
    for path in whole:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(RunError, match="was written with other settings; name another file"):
        write_prompt_file(SceneWriter(), config=CONFIG, seed=1, path=tmp_path / "prompts.jsonl")
    with pytest.raises(RunError, match="was written with other settings; name another file"):
        write_pair_file(SceneWriter(), whole[0], config=CONFIG, seed=1, path=tmp_path / "pairs.jsonl")
    assert [(tmp_path / path.name).read_bytes() for path in whole] == [path.read_bytes() for path in whole]


def test_figures_tell_how_far_it_is_from_the_papers_histogram(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, pairs=2000)
    figures = write_prompt_file(SceneWriter(), config=config, seed=0, path=tmp_path / "p.jsonl")
    assert figures["prompts"] == 2000 and 0 < figures["relations_distance"] < 0.05
    assert 35 <= figures["words"]["min"] <= figures["words"]["mode"] <= figures["words"]["max"] <= 125
    assert figures["near_duplicates"] < 0.005
    assert len(figures["examples"]) == files._EXAMPLES and json.dumps(figures)


def test_settings_that_only_show_later_in_the_file_are_noticed(tmp_path: Path) -> None:
    """Both begin with prompts of three relations."""
    path, three = tmp_path / "p.jsonl", dataclasses.replace(CONFIG, relations=(0, 0, 1))
    write_prompt_file(SceneWriter(), config=three, seed=0, path=path)
    rare = dataclasses.replace(CONFIG, relations=(0, 0, 1, 0.05))
    written = write_prompts(SceneWriter(), indices=range(300), config=rare, seed=0)[0]
    assert written[0].to_json() == next(iter(read_jsonl(path)))
    with pytest.raises(RunError, match="was written with other settings"):
        write_prompt_file(SceneWriter(), config=rare, seed=0, path=path)


def test_a_file_that_is_longer_is_refused(whole: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(whole[0].read_bytes())
    with pytest.raises(RunError, match="has 300 lines already, 100 are asked for; name another file with --out"):
        write_prompt_file(SceneWriter(), config=dataclasses.replace(CONFIG, pairs=100), seed=0, path=path)
    assert path.read_bytes() == whole[0].read_bytes()


def test_a_writer_that_knows_no_more_texts_says_so(tmp_path: Path) -> None:
    class Parrot(SceneWriter):
        def write(self, *, id: str, n_relations: int, seed: int) -> Prompt:
            return super().write(id="always", n_relations=3, seed=seed % 5)

    with pytest.raises(ValueError, match=r"finds no new prompt with \d+ relations; ask for fewer"):
        write_prompt_file(Parrot(), config=CONFIG, seed=0, path=tmp_path / "p.jsonl")


@pytest.mark.parametrize(("theirs", "ours"), [(TinyWriter(), SceneWriter()), (SceneWriter(), TinyWriter())])
def test_prompts_of_another_writer_are_refused(theirs: Writer, ours: Writer, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    write_prompt_file(theirs, config=dataclasses.replace(CONFIG, pairs=3), seed=0, path=path)
    with pytest.raises(ValueError, match="prompt '0-0' is about '.+', which is no place of .+; name the writer"):
        write_pair_file(ours, path, config=CONFIG, seed=0, path=tmp_path / "q.jsonl")


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").touch()
    with pytest.raises(ValueError, match="no prompts in it, expected a file that `data prompts` wrote"):
        write_pair_file(SceneWriter(), tmp_path / "p.jsonl", config=CONFIG, seed=0, path=tmp_path / "q.jsonl")


def test_the_options_choose_writer_count_and_seed(tmp_path: Path) -> None:
    out, pairs = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    run = functools.partial(CliRunner().invoke, command_line(), catch_exceptions=False)
    chosen = ["--writer", "grammar", "--seed", "5"]
    assert run(["data", "prompts", *chosen, "--count", "12", "--out", str(out)]).exit_code == 0
    done = run(["data", "perturb", *chosen, "--prompts", str(out), "--out", str(pairs), "--json", "-"])
    figures = json.loads(done.stdout)
    assert figures["pairs"] + figures.get("no satisfiable edit", 0) == 12
    assert [row["id"] for row in read_jsonl(out)] == [f"5-{i}" for i in range(12)]
    assert all(len(row["relations"]) >= 3 for row in read_jsonl(out)), "the paper's numbers of relations, not tiny's"
    wrong = run(["data", "prompts", "--writer", "novelist", "--out", str(tmp_path / "c.jsonl")])
    assert wrong.exit_code == 2 and "data.writer" in wrong.stderr and "grammar" in wrong.stderr
