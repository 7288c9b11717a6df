"""The settings of those who draw: a TOML file each, in ``presets/images`` or anywhere."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spatialt2i.core.config import DTYPES, PRESETS, EndpointConfig, preset_path, read_settings, setting

if TYPE_CHECKING:
    import torch

    from spatialt2i.core.protocols import Generator

IMAGES = PRESETS / "images"


@dataclass(frozen=True)
class PipelineConfig:
    """A model, and how it draws; the files in ``presets/images`` are such settings."""

    model: str = setting("", "hub id or folder")
    revision: str = setting("", "commit, tag or branch of the hub; empty takes the newest")
    license: str = setting("", "of the pictures; goes into the card of a dataset")
    dtype: str = setting("bfloat16", "of the weights", choices=DTYPES)
    offload: str = setting("none", "what waits in host memory: nothing, models, or every layer",
                           choices=("none", "model", "sequential"))
    batch: int = setting(4, "pictures per forward", ge=1)
    width: int = setting(1024, "in pixels", ge=16)
    height: int = setting(1024, "in pixels", ge=16)
    steps: int = setting(50, "denoising steps", ge=1)
    guidance: str = setting("guidance_scale", "the pipeline's argument for the scale; none leaves it to the pipeline",
                            choices=("guidance_scale", "true_cfg_scale", "distilled_guidance_scale", "none"))
    guidance_scale: float = setting(3.5, "strength of the guidance", ge=0)
    negative_prompt: str = setting("", "what to keep away from; empty sends none")
    tokenizer: str = setting("", "the pipeline's tokenizer that counts max_text_tokens; empty counts nothing")
    max_text_tokens: int = setting(512, "longest prompt; a longer one is an error", ge=8)

    def drawn_by(self) -> dict[str, Any]:
        """The settings that a picture depends on."""
        return {name: value for name, value in asdict(self).items() if name not in ("batch", "offload")}


@dataclass(frozen=True)
class ImageAPIConfig:
    """An image endpoint, and how it draws; the files in ``presets/images`` are such settings."""

    license: str = setting("", "of the pictures; goes into the card of a dataset")
    seeded: bool = setting(False, "send each picture's seed; not every endpoint takes one")
    fields: dict = field(default_factory=dict, metadata={
        "help": "further fields of a request, by the endpoint's names"})
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)

    def drawn_by(self) -> dict[str, Any]:
        """The settings that a picture depends on."""
        return {"model": self.endpoint.model, "base_url": self.endpoint.base_url, "license": self.license,
                "seeded": self.seeded, **self.fields}


def read_generator(name: str) -> PipelineConfig | ImageAPIConfig:
    """The settings of a generator: an image endpoint where they have an ``[endpoint]``, else a pipeline.

    Args:
        name: of a file of ``presets/images``, or of another TOML file.

    Raises:
        ConfigError: there is no such file, or it has settings that do not exist.
    """
    path = preset_path(name, IMAGES)
    return read_settings(ImageAPIConfig if _has_endpoint(path) else PipelineConfig, path)


def open_generator(name: str, *, folder: Path, format: str, device: Callable[[], torch.device]) -> Generator:
    """What draws with the settings of that name.

    Args:
        name: see `read_generator`. folder: keeps what endpoints drew, in this format, with what they replied.
        device: tells where a pipeline computes.

    Raises:
        ConfigError, ValueError, EndpointError: it cannot be made; the message says why.
    """
    config = read_generator(name)
    if isinstance(config, ImageAPIConfig):
        from spatialt2i.data.endpoint import Endpoint
        from spatialt2i.data.image_api import APIGenerator
        from spatialt2i.data.images import ImageStore
        from spatialt2i.data.replies import reply_file
        return APIGenerator(name=_short(name), config=config, images=ImageStore(folder / "images", format=format),
                            endpoint=Endpoint(config.endpoint, reply_file(folder, config.endpoint)))
    from spatialt2i.data.pipelines import PipelineGenerator
    return PipelineGenerator(name=_short(name), config=config, device=device())


def _has_endpoint(path: Path) -> bool:
    try:
        return "endpoint" in tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):  # the strict reader says what is wrong
        return False


def _short(name: str) -> str:
    return Path(name).name.removesuffix(".toml")
