"""Random, tiny pipelines of every diffusers class that a preset names, loaded from folders in the hub's format."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tiny_pipelines
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from spatialt2i.core.types import Prompt
from spatialt2i.data.generators import PipelineConfig, read_generator
from spatialt2i.data.pipelines import PipelineGenerator

PROMPTS = [Prompt(str(i), f"A red mug stands left of a {'very ' * i}tall lamp.", "kitchen", ()) for i in range(3)]
SEEDS = [5, 6, 5]


@pytest.fixture(scope="module", params=tiny_pipelines.PIPELINES)
def named(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("pipelines") / request.param
    tiny_pipelines.write(request.param, folder)
    return request.param, folder


def small(name: str, folder: Path, **changes: object) -> PipelineConfig:
    """The preset of that name, for a tiny model."""
    return dataclasses.replace(read_generator(name), model=str(folder), dtype="float32", width=32, height=32, steps=2,
                               **changes)


def made(named: tuple[str, Path], **changes: object) -> PipelineGenerator:
    return PipelineGenerator(name=named[0], config=small(*named, **changes), device=torch.device("cpu"))


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=np.int64) for image in images])


def test_pictures_follow_from_prompt_and_seed_in_any_batch(named: tuple[str, Path]) -> None:
    generator = made(named, batch=2)
    images = generator.generate(prompts=PROMPTS, seeds=SEEDS)
    assert [image.size for image in images] == [(32, 32)] * 3 and {image.mode for image in images} == {"RGB"}
    alone = [generator.generate(prompts=[p], seeds=[s])[0] for p, s in zip(PROMPTS, SEEDS, strict=True)]
    assert np.abs(pixels(images) - pixels(alone)).max() <= 1  # the batch rounds differently
    other = generator.generate(prompts=PROMPTS, seeds=[7, 8, 9])
    assert (pixels(images) != pixels(other)).any(axis=(1, 2, 3)).all(), "seeds matter"
    assert (pixels(images)[0] != pixels(images)[2]).any(), "texts matter"


def test_it_draws_what_the_stock_pipeline_draws(named: tuple[str, Path]) -> None:
    name, folder = named
    generator = made(named)
    stock = type(generator._pipeline).from_pretrained(folder, dtype=torch.float32)
    config = small(name, folder)
    arguments = {} if config.guidance == "none" else {config.guidance: config.guidance_scale}
    if config.negative_prompt:
        arguments["negative_prompt"] = config.negative_prompt
    image = stock(PROMPTS[0].text, width=32, height=32, num_inference_steps=2,
                  generator=torch.Generator("cpu").manual_seed(5), **arguments).images[0]
    assert np.abs(pixels(generator.generate(prompts=PROMPTS[:1], seeds=[5])) - pixels([image])).max() <= 1


def test_guidance_reaches_the_model(named: tuple[str, Path]) -> None:
    if read_generator(named[0]).guidance == "none":
        pytest.skip("its guidance is a part of the folder")
    pictures = [made(named, guidance_scale=scale).generate(prompts=PROMPTS[:1], seeds=[5]) for scale in (2.0, 9.0)]
    assert (pixels(pictures[0]) != pixels(pictures[1])).any()


def test_the_settings_tell_what_a_picture_depends_on(named: tuple[str, Path]) -> None:
    settings = made(named).settings
    assert settings["revision"] and settings["steps"] == 2 and settings["license"] and "batch" not in settings
    assert made(named).settings == settings
    (named[1] / "more.txt").write_text("another model")
    assert made(named).settings["revision"] != settings["revision"]


def test_a_prompt_that_would_be_cut_off_is_an_error(named: tuple[str, Path]) -> None:
    generator = made(named, max_text_tokens=60)
    long = Prompt("p7", "a mug " * 30, "kitchen", ())
    with pytest.raises(ValueError, match="prompt 'p7' has 1.. tokens, .* reads at most max_text_tokens = 60"):
        generator.generate(prompts=[PROMPTS[0], long], seeds=[1, 2])


@pytest.mark.parametrize("name", ["flux.1-dev"])
def test_what_a_pipeline_does_not_have_is_told(name: str, tmp_path: Path) -> None:
    tiny_pipelines.write(name, tmp_path)
    with pytest.raises(ValueError, match="FluxPipeline takes no distilled_guidance_scale; it takes prompt, "):
        made((name, tmp_path), guidance="distilled_guidance_scale")
    with pytest.raises(ValueError, match="tokenizer = 'tokenizer_9': FluxPipeline has .*tokenizer_2"):
        made((name, tmp_path), tokenizer="tokenizer_9")
    with pytest.raises(ValueError, match="draws 32 x 36 pixels where 32 x 38 were asked for"):
        odd = dataclasses.replace(small(name, tmp_path), height=38)
        PipelineGenerator(name=name, config=odd, device=torch.device("cpu")).generate(prompts=PROMPTS[:1], seeds=[1])
    next(tmp_path.glob("transformer/*.safetensors")).write_bytes(b"cut off")
    with pytest.raises(ValueError, match="cannot be loaded as a diffusers pipeline"):
        made((name, tmp_path))


def test_pixels_that_are_no_numbers_are_an_error(tmp_path: Path) -> None:
    tiny_pipelines.write("flux.1-dev", tmp_path)
    generator = made(("flux.1-dev", tmp_path))
    next(generator._pipeline.vae.decoder.parameters()).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="pixels that are no numbers; set dtype"):
        generator.generate(prompts=PROMPTS[:1], seeds=[1])


def test_a_model_that_is_nowhere_is_named(tmp_path: Path) -> None:
    config = PipelineConfig(model=str(tmp_path / "none"))
    with pytest.raises(ValueError, match="none': neither a folder of a diffusers pipeline nor one that the hub gives"):
        PipelineGenerator(name="none", config=config, device=torch.device("cpu"))


def test_a_model_in_the_hubs_cache_is_known_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, commit = tmp_path / "hub", "0123456789abcdef0123456789abcdef01234567"
    model = cache / "models--me--tiny"
    tiny_pipelines.write("flux.1-dev", model / "snapshots" / commit)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    real = DiffusionPipeline.download
    monkeypatch.setattr(DiffusionPipeline, "download", lambda name, **options: real(
        name, cache_dir=cache, local_files_only=True, **options))
    generator = made(("flux.1-dev", Path("me/tiny")))
    assert generator.settings["revision"] == commit and generator.generate(prompts=PROMPTS[:1], seeds=[1])
