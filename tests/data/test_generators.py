"""Settings of those who draw."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from spatialt2i.core.config import ConfigError, preset_names
from spatialt2i.data.generators import IMAGES, ImageAPIConfig, PipelineConfig, read_generator

NAMES = preset_names(IMAGES)


def test_the_papers_and_the_usual_generators_are_there() -> None:
    assert {"qwen-image", "hunyuan-image-2.1", "seedream-4.0", "gpt-image-1", "flux.1-dev", "sd3.5-large"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_settings_load_and_list_only_differences(name: str) -> None:
    config = read_generator(name)
    assert config.license
    assert isinstance(config, ImageAPIConfig) or config.model
    plain = type(config)()
    for key, value in tomllib.loads((IMAGES / f"{name}.toml").read_text()).items():
        if isinstance(value, dict) and key != "fields":
            assert all(v != getattr(getattr(plain, key), k) or k == "base_url" for k, v in value.items())
        else:
            assert value != getattr(plain, key), key


@pytest.mark.parametrize(("text", "message"), [
    ("modle = 'x'", "no setting modle.*did you mean model"), ("steps = 0", "steps = 0: expected int >= 1"),
    ("[endpoint]\nmodle = 'x'", "no setting endpoint.modle"), ("guidance = 'cfg'", "expected one of guidance_scale"),
    ("steps", "not a TOML file")])
def test_a_wrong_setting_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_generator(str(tmp_path / "mine.toml"))


def test_fields_of_an_endpoint_are_its_own_business(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("fields = {size = '64x64', any = {thing = 1}}\n[endpoint]\nmodel = 'm'")
    config = read_generator(str(tmp_path / "mine.toml"))
    assert isinstance(config, ImageAPIConfig) and config.fields == {"size": "64x64", "any": {"thing": 1}}


def test_an_unknown_name_is_told_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="expected a TOML file or one of .*qwen-image.*did you mean qwen-image"):
        read_generator("qwen-imag")
    assert isinstance(read_generator("qwen-image"), PipelineConfig)
