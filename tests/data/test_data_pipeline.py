"""The dataset: its rows, its splits, and that nothing depends on how the work was cut, killed or resumed."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from data_parts import CONFIG, SEED, Parts, TinyOracle, TinyPainter, TinyWriter, parquet_sums, parts
from PIL import Image

from spatialt2i.core.config import DataConfig
from spatialt2i.core.run import DiskFull
from spatialt2i.core.store import read_jsonl, read_preferences
from spatialt2i.core.types import Preference, Prompt, Relation, Verdict
from spatialt2i.data import dataset as dataset_module, pipeline
from spatialt2i.data.dataset import SPLITS, plan
from spatialt2i.data.endpoint import BudgetSpent
from spatialt2i.data.pipeline import build_dataset
from spatialt2i.data.stages import outcome, perturb_prompts, write_prompts
from spatialt2i.data.stats import describe

SRC = Path(__file__).resolve().parents[2] / "src"


def build(folder: Path, config: DataConfig = CONFIG, **options: Any) -> dict[str, Any]:
    return build_dataset(config=config, seed=SEED, folder=folder, parts=options.pop("parts", parts()), **options)


def watch(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What is worked on from now on."""
    made: list[tuple[str, int]] = []
    for phase in ("draw", "judge"):
        def work(shard: Any, parts: Any, phase: str = phase, real: Any = getattr(pipeline, f"{phase}_shard")) -> Any:
            made.append((phase, shard.number))
            return real(shard, parts)

        monkeypatch.setattr(pipeline, f"{phase}_shard", work)
    return made


def rows(folder: Path, split: str) -> list[Preference]:
    return list(read_preferences(sorted((folder / "data").glob(f"{split}-*.parquet"))))


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("dataset")
    return folder, build(folder)


@pytest.fixture(scope="module")
def pairs(built) -> dict[str, list[Preference]]:
    return {name: rows(built[0], name) for name in SPLITS}


# ---- what comes out

def test_the_counts_add_up(built, pairs: dict[str, list[Preference]]) -> None:
    counts = built[1]["counts"]
    assert counts["written"] == CONFIG.pairs and counts["kept"] == sum(len(p) for p in pairs.values())
    assert {name: counts[name] for name in SPLITS} == {name: len(found) for name, found in pairs.items()}
    others = [n for name, n in counts.items() if name not in (*SPLITS, "written", "perturbed", "kept")]
    assert counts["kept"] + sum(others) == CONFIG.pairs
    assert 0.5 < counts["kept"] / CONFIG.pairs < 1 and all(pairs.values())


def test_kept_pairs_satisfy_their_own_prompts_and_not_each_others(pairs: dict[str, list[Preference]]) -> None:
    oracle = parts().verifier()
    for pair in (p for found in pairs.values() for p in found):
        images = [Image.open(io.BytesIO(data)) for data in (pair.chosen, pair.rejected)]
        prompts = [pair.pair.perfect, pair.pair.perturbed]
        assert [v.overall for v in oracle.verify(images=images, prompts=prompts)] == [True, True]
        crossed = oracle.verify(images=images, prompts=prompts[::-1])
        edited = {e.index for e in pair.pair.edits}
        for verdict in crossed:
            assert {i for i, holds in enumerate(verdict.relations) if not holds} == edited
        assert [v.overall for v in pair.verdicts] == [True, True]
        assert [d.generator for d in pair.drawn] == ["tiny-painter"] * 2


def test_no_two_splits_share_a_text_a_scene_or_relations(pairs: dict[str, list[Preference]]) -> None:
    def keys(found: list[Preference]) -> set:
        sides = [prompt for p in found for prompt in (p.pair.perfect, p.pair.perturbed)]
        return ({p.text for p in sides} | {(p.scene, frozenset(p.objects)) for p in sides}
                | {(p.scene, frozenset(p.relations)) for p in sides})

    train, validation, test = (keys(pairs[name]) for name in SPLITS)
    assert not train & validation and not train & test and not validation & test


def test_pairs_of_one_scene_stay_together_and_of_equal_texts_the_first_stays() -> None:
    """Rows are (scene key, key of the prompt, key of the perturbed prompt); here 3 scenes and many repeated texts."""
    rng = np.random.default_rng(0)
    scenes = [int(share * 2**63) for share in (0.05, 0.15, 0.6)]  # of the test, the validation and the training split
    rows_of_shards = [[(scenes[rng.integers(3)], int(text), int(text) + 1000) for text in rng.integers(40, size=50)]
                      for _ in range(4)]
    config = DataConfig(validation=0.1, test=0.1)
    splits, dropped = plan(rows_of_shards, config=config, exclude=frozenset({3, 1005}))
    assert [len(part) for part in splits] == [50] * 4
    placed = [(row, split) for rows, part in zip(rows_of_shards, splits, strict=True)
              for row, split in zip(rows, part, strict=True)]
    named = dict(zip(scenes, ("test", "validation", "train"), strict=True))
    seen, lost = {3, 5}, Counter()
    for (scene, text, perturbed), split in placed:
        if text in seen:
            assert split is None
            lost["in an evaluation set" if text in (3, 5) else "text written before"] += 1
        else:
            assert split == named[scene]
        seen.add(text)
    assert dropped == lost and len(lost) == 2 and {split for _, split in placed} == {*SPLITS, None}


def test_texts_are_distinct_and_relations_follow_the_config(pairs: dict[str, list[Preference]]) -> None:
    found = [p for members in pairs.values() for p in members]
    assert len({p.prompt.text for p in found}) == len(found)
    assert {len(p.prompt.relations) for p in found} == {2, 3}
    assert {p.pair.n_perturbations for p in found} == {1, 2, 3}


def test_every_step_leaves_its_records(built, pairs: dict[str, list[Preference]]) -> None:
    folder = built[0]
    written, perturbed, judged = ([row for path in sorted((folder / name).glob("*.jsonl")) for row in read_jsonl(path)]
                                  for name in ("prompts", "pairs", "verdicts"))
    assert len(written) == CONFIG.pairs and len(perturbed) == len(judged) == built[1]["counts"]["perturbed"]
    kept = {row["id"] for row in judged if [v["overall"] for v in row["verdicts"]] == [True, True]}
    assert {p.prompt.id for found in pairs.values() for p in found} <= kept
    by_id = {row["id"]: row for row in written}
    assert all(by_id[p.prompt.id] == p.prompt.to_json() for p in pairs["train"])
    assert Prompt.from_json(written[0]).relations and {"id", "perturbed", "edits"} == set(perturbed[0])


def test_load_dataset_reads_three_splits(built, tmp_path: Path, monkeypatch) -> None:
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset(str(built[0]), cache_dir=str(tmp_path))
    assert {name: len(loaded[name]) for name in loaded} == {name: built[1]["counts"][name] for name in SPLITS}
    row = loaded["test"][0]
    assert row["chosen"].size == row["rejected"].size == (64, 64)
    assert {"predicate", "subject", "objects"} == set(json.loads(row["relations"])[0])


def test_a_split_without_pairs_is_left_out(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    build(tmp_path, dataclasses.replace(CONFIG, pairs=6, validation=0, test=0))
    assert set(datasets.load_dataset(str(tmp_path), cache_dir=str(tmp_path / "cache"))) == {"train"}


def test_statistics_of_any_set(built) -> None:
    figures = built[1]["statistics"]
    assert figures["pairs"] == sum(figures["scenes"].values()) == sum(figures["perturbations"].values())
    assert set(figures["relations_per_prompt"]["histogram"]) == {"2", "3"}
    assert figures["funnel"]["written"] == CONFIG.pairs and set(figures["edits"]) <= {"flip", "swap", "move", "depth"}
    assert json.loads((built[0] / "statistics.json").read_text()) == figures
    assert describe([])["pairs"] == 0 and describe([])["words_per_prompt"]["mean"] is None


def test_excluded_texts_do_not_appear(built, pairs: dict[str, list[Preference]], tmp_path: Path) -> None:
    unwanted = frozenset((pairs["train"][0].prompt.text, pairs["train"][3].pair.perturbed.text))
    counts = build(tmp_path, exclude=unwanted)["counts"]
    texts = {text for name in SPLITS for p in rows(tmp_path, name) for text in (p.prompt.text, p.pair.perturbed.text)}
    assert not unwanted & texts and counts["in an evaluation set"] == 2 == built[1]["counts"]["kept"] - counts["kept"]


# ---- what it must not depend on

def test_equal_bytes_whatever_was_killed_and_resumed(built, tmp_path: Path) -> None:
    rng = np.random.default_rng()
    environment = dict(os.environ, PYTHONPATH=f"{SRC}{os.pathsep}{Path(__file__).parent}", OMP_NUM_THREADS="1")
    deaths = []
    for kill, workers, shards in ((signal.SIGKILL, 1, 1), (signal.SIGKILL, 2, 2), (signal.SIGINT, 2, 4), (None, 1, 6)):
        script = Path(__file__).parent / "data_parts.py"
        process = subprocess.Popen([sys.executable, str(script), str(tmp_path), str(workers)], env=environment,
                                   stderr=subprocess.PIPE, text=True)
        if kill is None:
            assert process.wait(timeout=120) == 0
            break
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("shards/*.json"))) < shards and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(float(rng.random()) * 0.1)
        workers_alive = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(kill)
        deaths.append((process.wait(timeout=60), kill, "KeyboardInterrupt" in process.stderr.read()))
        assert not psutil.wait_procs(workers_alive, timeout=30)[1], "workers outlive their parent"
    assert all(code == -kill or code != 0 and shown for code, kill, shown in deaths), deaths
    assert parquet_sums(tmp_path) == parquet_sums(built[0])
    assert (tmp_path / "README.md").read_bytes() == (built[0] / "README.md").read_bytes()
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_finished_dataset_is_not_computed_again(built, monkeypatch) -> None:
    monkeypatch.setattr(pipeline, "draw_shard", None)
    monkeypatch.setattr(pipeline, "judge_shard", None)
    assert build(built[0]) == built[1]


@pytest.mark.parametrize("name", [
    "drawn/00002.jsonl", "verdicts/00001.jsonl", "shards/00003-drawn.json", "shards/00004-judged.json"])
def test_a_damaged_shard_is_noticed_and_made_again(name: str, built, caplog, monkeypatch) -> None:
    folder, before = built[0], parquet_sums(built[0])
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 0xFF
    (folder / name).write_bytes(data)
    made = watch(monkeypatch)
    build(folder)
    assert made == [("draw" if "drawn" in name else "judge", int(name.split("/")[1][:5]))]
    assert "damaged" in caplog.text
    assert parquet_sums(folder) == before


def test_a_missing_file_is_made_again(built) -> None:
    before = parquet_sums(built[0])
    (built[0] / "pairs" / "00000.jsonl").unlink()
    sorted((built[0] / "data").glob("train-*.parquet"))[0].unlink()
    build(built[0])
    assert parquet_sums(built[0]) == before and (built[0] / "pairs" / "00000.jsonl").exists()


def test_other_settings_make_other_pairs_and_leave_no_old_file(built, tmp_path: Path) -> None:
    small = dataclasses.replace(CONFIG, pairs=30, validation=0)
    first = build(tmp_path, small)
    more = build(tmp_path, dataclasses.replace(small, relations=(0, 0, 1)))
    assert first["sha256"] != more["sha256"] and set(parquet_sums(tmp_path)) == set(more["sha256"])
    assert {len(p.prompt.relations) for p in rows(tmp_path, "train")} == {3}


def test_more_pairs_use_the_shards_that_are_there(tmp_path: Path, monkeypatch) -> None:
    build(tmp_path, dataclasses.replace(CONFIG, pairs=30))
    made = watch(monkeypatch)
    build(tmp_path, dataclasses.replace(CONFIG, pairs=45))
    assert made == [("draw", 2), ("judge", 2)]


# ---- trouble

def test_a_full_disk_is_named_and_finished_work_kept(built, tmp_path: Path, monkeypatch) -> None:
    calls, sync = Counter(), os.fsync

    def full(fd: int) -> None:
        calls["n"] += 1
        if calls["n"] > 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(fd)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull, match="the disk is full; free some space and run the same command again"):
        build(tmp_path)
    assert len(list(tmp_path.glob("shards/*.json"))) == 3 and not list(tmp_path.rglob("*.tmp"))
    monkeypatch.setattr(os, "fsync", sync)
    build(tmp_path)
    assert parquet_sums(tmp_path) == parquet_sums(built[0])


class SilentJudge:
    """A verifier that judges nothing."""

    name = "silent"

    def verify(self, *, images: list, prompts: list) -> list[Verdict]:
        """Nothing judged."""
        return [Verdict(None, (None,) * len(p.relations), (None,) * len(p.objects), None, self.name) for p in prompts]


def test_what_is_not_judged_is_not_kept(tmp_path: Path) -> None:
    silent = Parts(writer=TinyWriter, generators={"tiny-painter": TinyPainter}, verifier=SilentJudge)
    counts = build(tmp_path, dataclasses.replace(CONFIG, pairs=8), parts=silent)["counts"]
    assert counts["kept"] == 0 and counts["not judged"] == counts["perturbed"]


@pytest.mark.parametrize(("overall", "crossed", "expected"), [
    ((True, True), (False, False), "kept"), ((False, True), (False, False), "chosen image wrong"),
    ((True, False), (False, False), "rejected image wrong"), ((False, False), (False, False), "both images wrong"),
    ((True, True), (True, False), "fits the other prompt"), ((True, True), (False, True), "fits the other prompt"),
    ((None, True), (False, False), "not judged"), ((True, True), (False, None), "not judged"),
])
def test_outcomes(overall: tuple, crossed: tuple, expected: str) -> None:
    assert outcome(overall, crossed) == expected


def test_the_shares_of_relations_and_edits_follow_the_config() -> None:
    class Writer:
        threads = 1

        def write(self, *, id: str, n_relations: int, seed: int) -> Prompt:
            return Prompt(id, "", "", (Relation("above", "a", ("b",)),) * n_relations)

        def perturb(self, *, prompt: Prompt, n_edits: int, seed: int) -> int:
            return n_edits

    config = DataConfig(relations=(0, 3, 0, 1), one_perturbation=0.4)
    prompts = write_prompts(Writer(), indices=range(2000), config=config, seed=0)[0]
    sizes = Counter(len(p.relations) for p in prompts)
    assert set(sizes) == {2, 4} and 0.70 < sizes[2] / 2000 < 0.80 and len({p.id for p in prompts}) == 2000
    edits = Counter(zip((len(p.relations) for p in prompts), perturb_prompts(Writer(), prompts, config=config, seed=0),
                        strict=True))
    assert 0.35 < (edits[4, 1] / sizes[4]) < 0.45 and edits[4, 2] > 100 and edits[4, 3] > 100
    assert edits[2, 3] == 0 and edits[2, 2] > 0.5 * sizes[2]


# ---- pictures and verdicts, each made once

class Counting:
    """The painter and the oracle, and how often they were asked."""

    def __init__(self) -> None:
        self.drawn, self.judged = [], []

    def parts(self, **others: Any) -> Parts:
        outer = self

        class Painter(TinyPainter):
            def generate(self, *, prompts: Any, seeds: Any) -> Any:
                outer.drawn += [p.id for p in prompts]
                return super().generate(prompts=prompts, seeds=seeds)

        class Oracle(TinyOracle):
            def verify(self, *, images: Any, prompts: Any) -> Any:
                outer.judged += [p.id for p in prompts]
                return super().verify(images=images, prompts=prompts)

        return Parts(**{"writer": TinyWriter, "generators": {"tiny-painter": Painter}, "verifier": Oracle} | others)


SMALL = dataclasses.replace(CONFIG, pairs=45)


def test_another_keep_rule_draws_and_judges_nothing(tmp_path: Path) -> None:
    counting = Counting()
    strict = build(tmp_path, SMALL, parts=counting.parts())
    before = len(counting.drawn), len(counting.judged)
    loose = build(tmp_path, dataclasses.replace(SMALL, keep=("chosen right",)), parts=counting.parts())
    assert (len(counting.drawn), len(counting.judged)) == before
    assert loose["counts"]["kept"] > strict["counts"]["kept"] and "rejected image wrong" not in loose["counts"]
    assert build(tmp_path, SMALL, parts=counting.parts()) == strict


def test_another_verifier_draws_nothing(tmp_path: Path) -> None:
    counting = Counting()
    build(tmp_path, SMALL, parts=counting.parts())
    drawn = len(counting.drawn)
    for path in tmp_path.glob("verdicts/*.jsonl"):
        path.write_text("")
    build(tmp_path, SMALL, parts=counting.parts(verifier=SilentJudge))
    assert len(counting.drawn) == drawn


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(path.read_bytes()[:-7]), lambda path: path.unlink()])
def test_a_damaged_or_missing_picture_is_named_and_alone_is_drawn_again(
        spoil: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    counting = Counting()
    found = build(tmp_path, SMALL, parts=counting.parts())
    kept = {p.prompt.id for p in rows(tmp_path, "train")}
    row = next(row for row in read_jsonl(tmp_path / "drawn" / "00001.jsonl") if row["id"] in kept)
    name = row["pictures"][0]["image"]
    spoil(next(tmp_path.glob(f"images/*/{name}.*")))
    counting.drawn.clear()
    sorted(tmp_path.glob("data/*.parquet"))[0].unlink()
    assert build(tmp_path, SMALL, parts=counting.parts()) == found
    assert counting.drawn == [row["id"], next(p for p in counting.drawn if p != row["id"])]
    assert name in caplog.text and "it is made again" in caplog.text


def test_a_picture_that_is_lost_before_it_is_judged_is_drawn_again(tmp_path: Path) -> None:
    counting = Counting()
    build(tmp_path, SMALL, parts=counting.parts(), until="drawn")
    assert not counting.judged and not list(tmp_path.glob("data/*"))
    lost = sorted(tmp_path.glob("images/*/*"))[::7]
    for path in lost:
        path.unlink()
    judged = build(tmp_path, SMALL, parts=counting.parts(), until="judged")["counts"]
    found = build(tmp_path, SMALL, parts=counting.parts())
    assert judged["kept"] == found["counts"]["kept"] and all(path.exists() for path in lost)
    assert found == build(tmp_path / "other", SMALL)


def test_large_pictures_make_more_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build(tmp_path, SMALL)
    before = rows(tmp_path, "train")
    monkeypatch.setattr(dataset_module, "_FILE_BYTES", 5 * (len(before[0].chosen) + len(before[0].rejected)))
    parts_ = build(tmp_path, SMALL)
    assert len(parts_["sha256"]) > len(whole["sha256"]) + 3 and rows(tmp_path, "train") == before
    assert not list(tmp_path.glob("data/*.tmp"))


def test_too_few_shards_or_generators_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="same_generator = false: expected at least two data.generators"):
        build(tmp_path, dataclasses.replace(SMALL, same_generator=False))
    two = dataclasses.replace(SMALL, pairs=5, generators=("tiny-painter", "x"), generator_shares=(1.0, 1.0))
    build(tmp_path, two)
    assert "2 generators and 1 shards" in caplog.text


def test_a_process_killed_in_a_shard_goes_on_after_its_last_pictures(tmp_path: Path) -> None:
    one = dataclasses.replace(CONFIG, pairs=90, shard=90)
    counting = Counting()
    found = build(tmp_path / "whole", one, parts=counting.parts())
    every, judged = len(counting.drawn), len(counting.judged)

    class Dying(TinyPainter):
        calls = 0

        def generate(self, *, prompts: Any, seeds: Any) -> Any:
            Dying.calls += 1
            if Dying.calls == 3:
                raise KeyboardInterrupt
            return super().generate(prompts=prompts, seeds=seeds)

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "killed", one, parts=counting.parts(generators={"tiny-painter": Dying}))
    file = tmp_path / "killed" / "drawn" / "00000.jsonl"
    file.write_bytes(file.read_bytes() + b'{"id": "cut o')
    counting.drawn.clear()
    counting.judged.clear()
    assert build(tmp_path / "killed", one, parts=counting.parts()) == found
    assert len(counting.drawn) == every - 2 * 64 and len(counting.judged) == judged


def test_generators_share_the_pairs_by_weight_and_pairs_are_of_one(tmp_path: Path) -> None:
    class Other(TinyPainter):
        name = "other"

    two = Parts(writer=TinyWriter, generators={"tiny-painter": TinyPainter, "other": Other}, verifier=TinyOracle)
    config = dataclasses.replace(CONFIG, shard=5, generators=("tiny-painter", "other"), generator_shares=(2.0, 1.0))
    build(tmp_path, config, parts=two)
    found = [p for name in SPLITS for p in rows(tmp_path, name)]
    assert all(len({d.generator for d in p.drawn}) == 1 == len({d.seed for d in p.drawn}) for p in found)
    drawn = [row for path in tmp_path.glob("drawn/*.jsonl") for row in read_jsonl(path)]
    by = Counter(row["pictures"][0]["by"]["generator"] for row in drawn)
    assert abs(by["other"] / by.total() - 1 / 3) < 0.06
    apart = dataclasses.replace(config, same_generator=False, same_seed=False)
    build(tmp_path, apart, parts=two)
    mixed = [p for name in SPLITS for p in rows(tmp_path, name)]
    assert mixed and all({d.generator for d in p.drawn} == {"tiny-painter", "other"} for p in mixed)
    assert all(len({d.seed for d in p.drawn}) == 2 for p in mixed)


class Broke(TinyPainter):
    """A generator that costs too much."""

    def generate(self, *, prompts: Any, seeds: Any) -> Any:
        """Nothing."""
        raise BudgetSpent("nothing left")


def test_ray_makes_the_same_dataset(built, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {
        "PYTHONPATH": f"{SRC}{os.pathsep}{Path(__file__).parent}", "OMP_NUM_THREADS": "1"}})
    try:
        found = build(tmp_path, dataclasses.replace(CONFIG, engine="ray"))
        broke = Parts(writer=TinyWriter, generators={"tiny-painter": Broke}, verifier=TinyOracle)
        with pytest.raises(BudgetSpent, match="^nothing left"):
            build(tmp_path / "broke", dataclasses.replace(CONFIG, engine="ray", pairs=15), parts=broke)
    finally:
        ray.shutdown()
    assert found == built[1] and parquet_sums(tmp_path) == parquet_sums(built[0])
