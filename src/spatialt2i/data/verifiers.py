"""The settings of models that judge: a TOML file each, in ``presets/judges`` or anywhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spatialt2i.core.config import PRESETS, EndpointConfig, preset_path, read_settings, setting
from spatialt2i.core.protocols import Verifier

JUDGES = PRESETS / "judges"


@dataclass(frozen=True)
class VLMConfig:
    """A vision-language model at an endpoint, and how it is asked."""

    sure: float = setting(0.5, "probability from which on an answer counts; else nothing is judged", ge=0.5, le=1)
    probable: bool = setting(False, "ask for the probabilities of answers; not every endpoint gives them")
    max_side: int = setting(1024, "longer pictures are made smaller, in pixels", ge=16)
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)

    def judged_by(self) -> dict[str, Any]:
        """The settings that a verdict depends on."""
        return {"sure": self.sure, "probable": self.probable, "max_side": self.max_side, "model": self.endpoint.model,
                "base_url": self.endpoint.base_url, "temperature": self.endpoint.temperature,
                "max_tokens": self.endpoint.max_tokens}


def read_verifier(name: str) -> VLMConfig:
    """The settings of a judge: the name of a file of ``presets/judges``, or of another TOML file.

    Raises:
        ConfigError: there is no such file, or it has settings that do not exist.
    """
    return read_settings(VLMConfig, preset_path(name, JUDGES))


def open_verifier(name: str, *, folder: Path) -> Verifier:
    """What judges with the settings of that name.

    Args:
        name: see `read_verifier`. folder: keeps what it replied.

    Raises:
        ConfigError, EndpointError: it cannot be made; the message says why.
    """
    from spatialt2i.data.endpoint import Endpoint
    from spatialt2i.data.replies import reply_file
    from spatialt2i.data.vlm import VLMVerifier
    config = read_verifier(name)
    return VLMVerifier(config=config, endpoint=Endpoint(config.endpoint, reply_file(folder, config.endpoint)))
