"""The strict loader: what it accepts comes back unchanged, what it refuses is named in full."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import pytest

from spatialt2i.core.config import (
    Config, ConfigError, describe, load_config, preset_names, to_dict, to_toml,
)


@pytest.mark.parametrize("name", preset_names())
def test_every_shipped_preset_loads_and_comes_back_from_toml(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    (tmp_path / "config.toml").write_text(to_toml(config), encoding="utf-8")
    assert load_config(tmp_path / "config.toml") == config
    assert load_config(str(tmp_path / "config.toml")) == config


def test_the_shipped_presets_are_there() -> None:
    assert {"tiny", "quickstart", "paper"} <= set(preset_names())


def test_the_paper_is_the_default() -> None:
    assert load_config("paper") == Config()


@pytest.mark.parametrize("name", preset_names())
def test_presets_list_only_differences(name: str) -> None:
    def walk(table: dict, default: dict, prefix: str) -> list[str]:
        return [k for key, value in table.items() for k in (
            walk(value, default[key], f"{prefix}{key}.") if isinstance(value, dict)
            else [prefix + key] if value == default[key] else [])]

    path = Path(__file__).resolve().parents[2] / "src" / "spatialt2i" / "presets" / f"{name}.toml"
    assert walk(tomllib.loads(path.read_text(encoding="utf-8")), to_dict(Config()), "") == []


def test_overrides_win_over_the_preset_and_later_over_earlier() -> None:
    config = load_config("tiny", ["rl.top_k=5", "rl.top_k = 4", "device=cuda:1", "reward.instruction=", "rl.lr=1",
                                  'data.writer="tiny-grammar"', "bench.hard_relations=[4, 5]",
                                  "reward.train_vision=false"])
    assert (config.rl.top_k, config.device, config.reward.instruction) == (4, "cuda:1", "")
    assert config.rl.lr == 1.0 and type(config.rl.lr) is float
    assert config.bench.hard_relations == (4, 5)
    assert config.reward.train_vision is False


def test_awkward_strings_survive() -> None:
    text = 'quote " backslash \\ newline \n tab \t delete \x7f é 😀 # not a comment'
    config = dataclasses.replace(Config(), device=text)
    assert tomllib.loads(to_toml(config))["device"] == text


@pytest.mark.parametrize(("override", "words"), [
    ("rl.topk=3", ["rl.topk = 3", "no setting", "did you mean rl.top_k?"]),
    ("top_k=3", ["did you mean rl.top_k?"]),
    ("rewrd.lr=1", ["did you mean reward.lr?"]),
    ("rl=3", ["rl is a section", "rl.model"]),
    ("rl.top_k=true", ["rl.top_k = true", "expected int >= 0"]),
    ("rl.top_k=6.0", ["expected int"]),
    ("rl.top_k=six", ['rl.top_k = "six"', "expected int"]),
    ("rl.lr=nan", ["rl.lr = nan", "expected float > 0"]),
    ("rl.lr=inf", ["expected float > 0"]),
    ("rl.lr=0", ["expected float > 0"]),
    ("rl.ema=1.5", ["expected float >= 0 and <= 0.9999"]),
    ("rl.group=1", ["expected int >= 2"]),
    ("rl.kernel=sed", ["expected one of sde, cps, dance", "did you mean sde?"]),
    ("reward.train_vision=1", ["expected bool"]),
    ("device=3", ["device = 3", "expected str"]),
    ("data.relations=[]", ["expected list of float"]),
    ("data.relations=3", ["expected list of float"]),
    ("data.relations=[1, -1]", ["expected list of float >= 0"]),
    ("data.relations=[0, 0]", ["at least one number above 0"]),
    ("bench.hard_relations=[4, 5.5]", ["expected list of int"]),
    ("rl.top_k=13", ["rl.top_k = 13", "at most half of rl.group = 24"]),
    ("rl.train_steps=9", ["rl.rollout_steps"]),
    ("rl.train_from=2", ["rl.train_from = 2 with rl.train_steps = 5", "at most rl.rollout_steps = 6"]),
    ("bench.hard_relations=[4, 13]", ["bench.hard_relations = [4, 13]", "expected list of int >= 1 and <= 12"]),
    ("bench.in_domain_relations=[0]", ["expected list of int >= 1 and <= 12"]),
    (f"data.relations={[1] * 13}", ["data.relations = [1", "expected at most 12 numbers"]),
    (f"rl.relations={[1] * 13}", ["rl.relations = [1", "expected at most 12 numbers"]),
    ("bogus", ["expected KEY=VALUE"]),
    ("=3", ["expected KEY=VALUE"]),
    ("rl.top_k=1\nseed=2", ["expected int"]),
])
def test_a_bad_override_is_explained(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_config("paper", [override])
    message = str(error.value)
    assert all(word in message for word in words), message
    assert override.splitlines()[0].split("=")[0].strip() in message


def test_what_cps_cannot_do_is_refused() -> None:
    load_config("paper", ["rl.kernel=cps"])
    load_config("paper", ["rl.train_steps=6"])
    with pytest.raises(ConfigError, match='rl.train_steps = 6 .*rl.kernel = "cps".*below rl.rollout_steps = 6'):
        load_config("paper", ["rl.kernel=cps", "rl.train_steps=6"])
    with pytest.raises(ConfigError, match='rl.noise = 1.1 with rl.kernel = "cps": expected at most 1'):
        load_config("paper", ["rl.kernel=cps", "rl.noise=1.1"])


def test_pictures_without_noise_need_starts_of_their_own() -> None:
    load_config("paper", ["rl.kernel=ode"])
    with pytest.raises(ConfigError, match="rl.same_start = true with rl.kernel = ode: images would be equal"):
        load_config("paper", ["rl.kernel=ode", "rl.same_start=true"])
    with pytest.raises(ConfigError, match='rl.draws = 2: expected 1, or rl.kernel = "ode"'):
        load_config("paper", ["rl.draws=2"])


@pytest.mark.parametrize(("text", "words"), [
    ("[rl]\ntopk = 3", ["rl.topk = 3", "did you mean rl.top_k?"]),
    ("[rll]\ntop_k = 3", ["rll.top_k = 3", "did you mean rl.top_k?"]),
    ("[rll]", ["rll", "no setting"]),
    ("rl = 3", ["rl is a section"]),
    ("seed = -1", ["seed = -1", "expected int >= 0"]),
    ("[data]\npairs = 'many'", ['data.pairs = "many"', "expected int >= 1"]),
    ("[rl.top_k]\nx = 1", ["rl.top_k.x"]),
    ("seed = ", ["not a TOML file"]),
])
def test_a_bad_file_is_named(text: str, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert all(word in str(error.value) for word in [str(path), *words]), str(error.value)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="mine.toml: not a TOML file"):
        load_config(tmp_path / "mine.toml")


@pytest.mark.parametrize("preset", ["tinny", "nowhere/tiny.toml", Path("tinny")])
def test_an_unknown_preset_names_the_shipped_ones(preset: str | Path) -> None:
    with pytest.raises(ConfigError, match="expected a TOML file or one of .*paper.*tiny"):
        load_config(preset)


def test_an_empty_section_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[rl]\n[data]\n", encoding="utf-8")
    assert load_config(tmp_path / "mine.toml") == Config()


def test_every_setting_has_a_meaning_and_a_legal_default() -> None:
    rows = describe(Config())
    assert all(row.help for row in rows)
    assert load_config("paper", [f"{row.key}={row.value}" for row in rows]) == Config()


def test_describe_shows_the_sections_asked_for() -> None:
    keys = [row.key for row in describe(Config(), ["rl"])]
    assert "rl.top_k" in keys and "seed" in keys and "data.pairs" not in keys
