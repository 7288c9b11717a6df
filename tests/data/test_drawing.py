"""Building a dataset with generators of every kind, judged by the oracle of the tabletop world."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_llm import Answer, FakeLLM, fake_llm

from spatialt2i.build import parts, stages
from spatialt2i.core.config import Config, ConfigError, load_config
from spatialt2i.core.run import RunDir
from spatialt2i.core.store import read_jsonl, read_preferences
from spatialt2i.core.types import Prompt
from spatialt2i.tiny.painter import TinyPainter


def config(generator: Path | str, pairs: int) -> Config:
    return load_config("tiny", [
        f'data.generators=["{generator}"]', f"data.pairs={pairs}", "data.shard=4", "data.workers=1", "threads=1",
        "data.relations=[1, 1]", "bench.in_domain_prompts=2", "bench.hard_prompts=2"])


def built(settings: Config, folder: Path) -> dict[str, Any]:
    return stages.data_build(settings, RunDir.open(folder, settings))


def kept(folder: Path) -> list[Any]:
    return list(read_preferences(sorted((folder / "data" / "data").glob("*.parquet"))))


def test_a_pipeline_draws_a_dataset(tmp_path: Path) -> None:
    settings = tmp_path / "small.flux.toml"
    settings.write_text(f'model = "{parts.WEIGHTS / "tiny-flux"}"\ndtype = "float32"\nwidth = 64\nheight = 64\n'
                        'steps = 8\ntokenizer = "tokenizer_2"\nmax_text_tokens = 40\n')
    found = built(config(settings, 12), tmp_path / "run")
    rows = kept(tmp_path / "run")
    assert found["counts"]["kept"] == len(rows) > 0
    for by in (by for row in rows for by in row.drawn):
        assert by.generator == "small.flux" and by.settings["pipeline"] == "FluxPipeline"
        assert by.settings["revision"] and by.settings["steps"] == 8
    # other settings are another dataset, and the log says so
    settings.write_text(settings.read_text().replace("steps = 8", "steps = 1"))
    again = built(config(settings, 12), tmp_path / "run")
    drawn = [row for path in (tmp_path / "run" / "data" / "drawn").glob("*") for row in read_jsonl(path)]
    assert again["sha256"] != found["sha256"]
    assert {picture["by"]["settings"]["steps"] for row in drawn for picture in row["pictures"]} == {1}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeLLM]:
    """Paints the prompts that the run has written."""
    painter = TinyPainter(wrong_layout=0)
    prompts: dict[str, Prompt] = {}

    def behave(request: dict[str, Any], times: int) -> Answer:
        if "blue" in request["prompt"]:
            return Answer(status=400, code="moderation_blocked")
        out = io.BytesIO()
        painter.generate(prompts=[prompts[request["prompt"]]], seeds=[request["seed"]])[0].save(out, "PNG")
        return Answer(image=out.getvalue())

    settings = config("tiny-painter", 16)
    built(settings, tmp_path / "painted")
    for path in (tmp_path / "painted" / "data" / "pairs").glob("*.jsonl"):
        for row in read_jsonl(path):
            prompts[row["perturbed"]["text"]] = Prompt.from_json(row["perturbed"])
    for path in (tmp_path / "painted" / "data" / "prompts").glob("*.jsonl"):
        for row in read_jsonl(path):
            prompts[row["text"]] = Prompt.from_json(row)
    with fake_llm(behave) as found:
        yield found


def test_an_endpoint_draws_a_dataset_and_what_it_refuses_is_counted(server: FakeLLM, tmp_path: Path) -> None:
    settings = tmp_path / "painter.toml"
    settings.write_text(f'seeded = true\n[endpoint]\nbase_url = "{server.url}"\nkey_env = ""\nmodel = "painter"\n')
    found = built(config(settings, 16), tmp_path / "run")
    paid = len(server.requests)
    refused = found["counts"]["not drawn: content filter"]
    verdicts = [row for path in (tmp_path / "run" / "data" / "verdicts").glob("*") for row in read_jsonl(path)]
    assert 0 < refused == found["counts"]["perturbed"] - len(verdicts)
    blue = [row for row in kept(tmp_path / "run") if "blue" in row.prompt.text]
    assert found["counts"]["kept"] > 0 and not blue
    assert found["counts"]["kept"] + refused <= 16
    # made again from what was paid for
    for path in (tmp_path / "run" / "data").glob("shards/*.json"):
        path.write_text("{}")
    (tmp_path / "run" / "data" / "manifest.json").unlink()
    assert built(config(settings, 16), tmp_path / "run")["sha256"] == found["sha256"]
    assert len(server.requests) == paid
    assert json.loads((tmp_path / "run" / "data" / "statistics.json").read_text())["funnel"][
        "not drawn: content filter"] == refused


def test_a_model_judges_a_dataset_and_another_one_draws_nothing_anew(tmp_path: Path) -> None:
    answer = {"word": "yes"}
    with fake_llm(lambda request, times: Answer(answer["word"])) as server:
        def judged_by(model: str) -> dict[str, Any]:
            judge = tmp_path / f"{model}.toml"
            judge.write_text(f'[endpoint]\nbase_url = "{server.url}"\nkey_env = ""\nmodel = "{model}"\n')
            settings = config("tiny-painter", 8)
            keep = replace(settings.data, verifier=str(judge), keep=("chosen right", "rejected right"))
            return built(replace(settings, data=keep), tmp_path / model)["counts"]

        assert judged_by("agreeable")["kept"] == judged_by("agreeable")["perturbed"] > 0
        answer["word"] = "no"
        assert judged_by("agreeable")["kept"] > 0, "its replies are kept"
        assert judged_by("strict")["both images wrong"] == judged_by("agreeable")["perturbed"]
        verdicts = [row for path in (tmp_path / "strict" / "data" / "verdicts").glob("*") for row in read_jsonl(path)]
        assert {v["judge"] for row in verdicts for v in row["verdicts"]} == {"strict (sure 0.5)"}


def test_a_generator_that_does_not_exist_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="preset 'qwen-imag': .*did you mean qwen-image"):
        built(config("qwen-imag", 4), tmp_path / "run")
    assert not (tmp_path / "run" / "data" / "prompts").exists()
