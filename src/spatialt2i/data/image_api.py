"""Draws with an OpenAI-compatible image endpoint (a `Generator`)."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from spatialt2i.core.types import Prompt
from spatialt2i.data.endpoint import AskError, Endpoint
from spatialt2i.data.generators import ImageAPIConfig
from spatialt2i.data.images import ImageStore
from spatialt2i.data.stages import at_a_time

_SEEDS = 2**31  # what endpoints take


class APIGenerator:
    """An image endpoint that draws prompts.

    Whatever the endpoint sent is kept, so that a prompt and a seed give the same picture even where it takes no seeds.

    Args:
        name: of the generator in the records. config: how it draws. endpoint: where. images: keeps the pictures.

    Attributes:
        settings: what the pictures depend on.
    """

    def __init__(self, *, name: str, config: ImageAPIConfig, endpoint: Endpoint, images: ImageStore) -> None:
        self.name, self._config, self._endpoint, self._images = name, config, endpoint, images
        self.settings = config.drawn_by()

    def generate(self, *, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Image.Image | str]:
        """One RGB picture per prompt, or why there is none: ``"refusal"``, ``"content filter"``."""
        return at_a_time(self._config.endpoint.concurrency, self._draw, zip(prompts, seeds, strict=True))

    def _draw(self, asked: tuple[Prompt, int]) -> Image.Image | str:
        prompt, seed = asked
        settings = {**self._config.fields, **({"seed": seed % _SEEDS} if self._config.seeded else {})}
        try:
            return self._endpoint.draw(prompt=prompt.text, settings=settings, seed=seed, images=self._images)
        except AskError as error:
            return error.kind
