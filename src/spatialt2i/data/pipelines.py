"""Draws with any text-to-image pipeline of diffusers, from a hub or from a folder (a `Generator`)."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from spatialt2i.core.device import torch_dtype
from spatialt2i.core.run import json_text, seed_of
from spatialt2i.core.types import Prompt
from spatialt2i.data.generators import PipelineConfig


class PipelineGenerator:
    """A diffusers pipeline that draws prompts.

    Each picture has a noise of its own, drawn on the CPU from its seed; so it depends on its prompt and seed, and on
    its batch by rounding at most.

    Args:
        name: of the generator in the records. config: the model, and how it draws. device: where.

    Attributes:
        settings: what the pictures depend on, with the revision of the model that was found.

    Raises:
        ValueError: there is no such pipeline, or it lacks what the settings name.
    """

    def __init__(self, *, name: str, config: PipelineConfig, device: torch.device) -> None:
        self.name, self._config = name, config
        folder = _folder(config)
        self._pipeline = _load(folder, config)
        self._arguments = _arguments(self._pipeline, config)
        self._tokenizer = getattr(self._pipeline, config.tokenizer) if config.tokenizer else None
        self.settings = {**config.drawn_by(), "revision": _revision(folder), "pipeline": _class(self._pipeline)}
        self._pipeline.set_progress_bar_config(disable=True)
        {"none": self._pipeline.to, "model": self._pipeline.enable_model_cpu_offload,
         "sequential": self._pipeline.enable_sequential_cpu_offload}[config.offload](device)

    def generate(self, *, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Image.Image]:
        """One RGB picture per prompt.

        Raises:
            ValueError: a prompt is too long for the text encoder, or a picture is not what was asked for.
        """
        for prompt in prompts:
            self._check(prompt)
        images: list[Image.Image] = []
        for start in range(0, len(prompts), self._config.batch):
            part = slice(start, start + self._config.batch)
            images += self._draw([p.text for p in prompts[part]], seeds[part])
        return images

    @torch.no_grad()
    def _draw(self, texts: list[str], seeds: Sequence[int]) -> list[Image.Image]:
        config = self._config
        arguments = dict(self._arguments)
        if config.negative_prompt:
            arguments["negative_prompt"] = [config.negative_prompt] * len(texts)
        pixels = self._pipeline(
            prompt=texts, width=config.width, height=config.height, num_inference_steps=config.steps, output_type="np",
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds], **arguments).images  # [B, H, W, 3]
        if pixels.shape[1:] != (config.height, config.width, 3):
            raise ValueError(f"{config.model} draws {pixels.shape[2]} x {pixels.shape[1]} pixels where "
                             f"{config.width} x {config.height} were asked for; set a size that it can draw")
        if not np.isfinite(pixels).all():
            raise ValueError(f"{config.model} draws pixels that are no numbers; set dtype = \"float32\"")
        return [Image.fromarray(p) for p in (pixels * 255).round().astype(np.uint8)]

    def _check(self, prompt: Prompt) -> None:
        tokens = len(self._tokenizer(prompt.text).input_ids) if self._tokenizer else 0
        if tokens > self._config.max_text_tokens:
            raise ValueError(f"prompt {prompt.id!r} has {tokens} tokens, {self._config.model} reads at most "
                             f"max_text_tokens = {self._config.max_text_tokens}; shorten it, or raise that")


def _folder(config: PipelineConfig) -> Path:
    """Where the model is; fetched from the hub if need be."""
    if Path(config.model, "model_index.json").is_file():
        return Path(config.model)
    try:
        return Path(DiffusionPipeline.download(config.model, revision=config.revision or None, use_safetensors=True))
    except (OSError, ValueError) as error:
        raise ValueError(f"model = {config.model!r}: neither a folder of a diffusers pipeline nor one that the hub "
                         f"gives: {error}") from error


def _load(folder: Path, config: PipelineConfig) -> DiffusionPipeline:
    try:
        return DiffusionPipeline.from_pretrained(folder, dtype=torch_dtype(config.dtype), use_safetensors=True)
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder}: cannot be loaded as a diffusers pipeline: {error}") from error


def _arguments(pipeline: DiffusionPipeline, config: PipelineConfig) -> dict[str, Any]:
    """The settings that not every pipeline has, by its own names."""
    takes = inspect.signature(pipeline.__call__).parameters
    wanted = {"prompt": None, config.guidance: config.guidance_scale}
    wanted.pop("none", None)
    if config.negative_prompt:
        wanted["negative_prompt"] = None
    for argument in wanted:
        if argument not in takes:
            raise ValueError(f"{_class(pipeline)} takes no {argument}; it takes {', '.join(takes)}")
    if config.tokenizer and getattr(pipeline, config.tokenizer, None) is None:
        raise ValueError(f"tokenizer = {config.tokenizer!r}: {_class(pipeline)} has {', '.join(pipeline.components)}")
    if "max_sequence_length" in takes:
        wanted["max_sequence_length"] = config.max_text_tokens
    return {name: value for name, value in wanted.items() if value is not None}


def _class(pipeline: DiffusionPipeline) -> str:
    return type(pipeline).__name__


def _revision(folder: Path) -> str:
    """The commit of a model from the hub; of a folder, a hash of its files' names and sizes."""
    if folder.parent.name == "snapshots":  # the hub's cache has a folder per commit
        return folder.name
    sizes = {str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()}
    return f"{seed_of(json_text(sizes)):016x}"
