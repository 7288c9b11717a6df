"""The composition root, as far as it needs no model: prompts of the sets, keys of the stages, where models are."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
from PIL import Image

from spatialt2i.build import parts, stages
from spatialt2i.core.config import BenchConfig, Config, DataConfig, RLConfig, load_config
from spatialt2i.core.run import RunDir, RunError

STAGES = ("data", "reward", "rl", "bench")


@pytest.fixture
def config() -> Config:
    return dataclasses.replace(
        Config(), rl=RLConfig(prompts_per_step=5, relations=(0, 1, 3)),
        bench=BenchConfig(in_domain_prompts=12, hard_prompts=6, in_domain_relations=(2, 3), hard_relations=(4, 5)))


def test_evaluation_sets_are_distinct_and_have_the_relations_asked_for(config: Config) -> None:
    sets = parts.bench_prompts(config)
    texts = [p.text for prompts in sets.values() for p in prompts]
    assert len(set(texts)) == len(texts) == 18
    assert [len(p.relations) for p in sets["in_domain"]] == [2, 3] * 6
    assert [len(p.relations) for p in sets["hard"]] == [4, 5] * 3
    assert sets == parts.bench_prompts(config)
    assert sets != parts.bench_prompts(dataclasses.replace(config, seed=1))


def test_training_prompts_are_a_function_of_the_step_and_avoid_the_evaluation_sets(config: Config) -> None:
    free = parts.training_prompts(config, avoid=set())
    assert free(3) == free(3) != free(4)
    assert len({p.text for p in free(3)}) == 5 and {len(p.relations) for s in range(5) for p in free(s)} == {2, 3}
    forbidden = {p.text for p in free(3)}
    assert not forbidden & {p.text for p in parts.training_prompts(config, avoid=forbidden)(3)}


def test_a_stage_is_done_once_and_again_when_its_inputs_change(config: Config, tmp_path: Path) -> None:
    run, done = RunDir.open(tmp_path, config), []

    def work() -> dict:
        done.append(1)
        return {"counts": {"pairs": 3}, "share": 0.5}

    for key in ("k1", "k1", "k2"):
        assert stages._stage(run, "data", key, work) == {"counts": {"pairs": 3}, "share": 0.5}
    assert len(done) == 2
    manifest = run.manifest("data")
    assert manifest["counts"] == {"pairs": 3} and manifest["peak_mb"] > 0
    assert not (run.path / "data" / "cost.json").exists()


def test_a_stage_that_is_done_again_is_not_finished_until_its_end(config: Config, tmp_path: Path) -> None:
    run = RunDir.open(tmp_path, config)
    stages._stage(run, "rl", "30 steps", dict)

    def stopped() -> dict:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages._stage(run, "rl", "60 steps", stopped)
    with pytest.raises(RunError, match="the stage 'rl' is not finished"):
        stages._needs(run, "rl", "rl train")


def test_a_run_without_results_has_no_report(config: Config, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no stage is finished, so there is nothing to report"):
        stages.report(config, RunDir.open(tmp_path, config))


def test_the_key_of_a_stage_sees_its_settings_alone(config: Config) -> None:
    more_workers = dataclasses.replace(config, data=DataConfig(workers=7), device="cuda", threads=3)
    other_rl = dataclasses.replace(config, rl=RLConfig(top_k=1))
    assert stages._key(config, "data") == stages._key(more_workers, "data")
    assert stages._key(config, "reward") == stages._key(other_rl, "reward")
    assert stages._key(config, "rl") != stages._key(other_rl, "rl")
    assert stages._key(config, "data") != stages._key(dataclasses.replace(config, seed=1), "data")


def test_the_key_of_a_stage_sees_which_shipped_model_it_used(tmp_path: Path, monkeypatch) -> None:
    config = load_config("quickstart")
    for name in parts.SHIPPED:
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    monkeypatch.setattr(parts, "WEIGHTS", tmp_path)
    before = {stage: stages._key(config, stage) for stage in STAGES}
    (tmp_path / "tiny-flux" / "manifest.json").write_text('{"seed": 1}')
    changed = [stage for stage in STAGES if stages._key(config, stage) != before[stage]]
    assert changed == ["rl"]


def test_models_are_found_by_shipped_name_or_taken_as_they_are(monkeypatch, tmp_path: Path) -> None:
    assert parts.model_folder("black-forest-labs/FLUX.1-dev") == "black-forest-labs/FLUX.1-dev"
    monkeypatch.setattr(parts, "WEIGHTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="weights of tiny-flux are not installed.*make tiny-weights"):
        parts.model_folder("tiny-flux")
    (tmp_path / "tiny-flux").mkdir()
    assert parts.model_folder("tiny-flux") == str(tmp_path / "tiny-flux")


def test_missing_shards_are_named(tmp_path: Path) -> None:
    run = RunDir.open(tmp_path, Config())
    with pytest.raises(RunError, match="no shards of the split 'test'; run `spatialt2i data build"):
        stages.shards(run, "test")
    run.finish("data", key="", counts={"train": 5, "test": 0}, seconds=0, peak_mb=0)
    with pytest.raises(RunError, match="split 'test' is empty; ask for more pairs"):
        stages.shards(run, "test")


@pytest.mark.parametrize("preset", ["tiny", "quickstart"])
def test_the_embedded_presets_name_the_embedded_parts(preset: str, tmp_path: Path) -> None:
    config = load_config(preset)
    assert (config.reward.backbone, config.rl.model) == parts.SHIPPED[::-1]
    found = parts.data_parts(config, tmp_path)
    made = found.writer(), *found.generators(config.data.generators), found.verifier()
    assert [type(part).__name__ for part in made] == ["TinyWriter", "TinyPainter", "TinyOracle"]


def test_a_damaged_file_of_the_dataset_is_made_again(tmp_path: Path) -> None:
    config = load_config("quickstart", ["data.pairs=12", "data.workers=1"])
    run = RunDir.open(tmp_path / "run", config)
    stages.data_build(config, run)
    file = stages.shards(run, "train")[0]
    whole = file.read_bytes()
    file.write_bytes(whole[:1000])
    stages.data_build(config, run)
    assert file.read_bytes() == whole


def test_pictures_are_drawn_and_judged_again_when_their_settings_change(tmp_path: Path, monkeypatch) -> None:
    seen = []

    def compare(*, identities, **_) -> dict:
        seen.append(identities)
        return {}

    monkeypatch.setattr("spatialt2i.bench.indomain.compare", compare)
    monkeypatch.setattr(parts, "make_scorer", lambda config, run: None)
    for settings in ([], [], ["rl.eval_steps=9"], ["rl.guidance_scale=5"]):
        config = load_config("quickstart", settings)
        run = RunDir.open(tmp_path, config, "delete" if settings else "resume", stages=["rl"])
        for stage in ("reward", "rl"):
            run.finish(stage, key="", counts={}, seconds=0, peak_mb=0)
        stages.bench_indomain(config, run)
    assert len(seen) == 3 and len({names["base"] for names in seen}) == len({names["tuned"] for names in seen}) == 3


def test_what_was_sampled_before_an_interruption_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped:
        drawn = 0

        def generate(self, *, prompts, seeds):
            if self.drawn == 4:
                raise KeyboardInterrupt
            self.drawn += len(prompts)
            return [Image.new("RGB", (8, 8), (seed, 0, 0)) for seed in seeds]

    monkeypatch.setattr(parts, "make_policy", lambda config, adapter=None: Stopped())
    config = load_config("tiny", ["rl.sample_batch=2"])
    settings = dict(prompts=["a", "b"], first_seed=5, base=True, out=tmp_path)
    assert [p["seed"] for p in stages.rl_sample(config, None, count=2, **settings)["pictures"]] == [5, 6, 5, 6]
    shutil.rmtree(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        stages.rl_sample(config, None, count=3, **settings)
    assert [Image.open(p).getpixel((0, 0))[0] for p in sorted(tmp_path.iterdir())] == [5, 6, 7, 5]
