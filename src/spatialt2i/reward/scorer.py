"""SpatialScore as the rest of the system sees it: a `Scorer` that is saved to and read from a folder."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from spatialt2i.core.config import RewardConfig
from spatialt2i.core.run import atomic_path, read_json, write_json
from spatialt2i.core.types import Prompt, Scores
from spatialt2i.reward.model import SpatialScoreModel
from spatialt2i.reward.pixels import ImageLike, decode

WEIGHTS, SETTINGS = "trained.safetensors", "spatialscore.json"


class SpatialScore:
    """How well images follow the layout of their prompts.

    Args:
        model: the weights.
        stats: mean and standard deviation of the scores of the training set's images, (0, 1) while unknown.
        batch: images per forward.
        name: how reports call it.
    """

    def __init__(self, model: SpatialScoreModel, *, stats: tuple[float, float] = (0.0, 1.0), batch: int = 64,
                 name: str = "SpatialScore") -> None:
        self.model, self.stats, self.batch, self.name = model, stats, batch, name

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: torch.device | str = "cpu", dtype: str | None = None,
                        batch: int | None = None, backbone: str | Path | None = None) -> SpatialScore:
        """Read what `save_pretrained` wrote.

        Args:
            folder: a folder, or the id of a hub repository with the same files.
            device: where to score.
            dtype: "float32" or "bfloat16" for the body; by default that of the training.
            batch: images per forward; by default ``score_batch`` of the training.
            backbone: folder or hub id of the pre-trained body; by default the one that the folder names.

        Raises:
            OSError: a file is missing or cannot be read.
            ValueError: the weights do not fit the body, or the settings are those of another version.
        """
        place = Path(folder)
        if not place.is_dir():
            place = _from_hub(str(folder))
        if not (place / SETTINGS).is_file():
            raise FileNotFoundError(f"{place}: has no {SETTINGS}, so it is not a SpatialScore; train one with "
                                    "`spatialt2i reward train`, or name the folder that save_pretrained wrote")
        settings = read_json(place / SETTINGS)
        try:
            config = RewardConfig(**settings["config"])
        except TypeError as error:
            raise ValueError(f"{place / SETTINGS}: settings of another version of spatialt2i ({error}); score with the "
                             "version that trained it, or train it again") from error
        config = config if dtype is None else dataclasses.replace(config, dtype=dtype)
        body = backbone or _find_backbone(place, settings)
        model = SpatialScoreModel.from_backbone(body, config=config, seed=0, device=device)
        if model.fingerprint != settings["fingerprint"]:
            raise ValueError(f"{place}: was trained on another body than {body} (fingerprint "
                             f"{settings['fingerprint']}, found {model.fingerprint}); name its own with "
                             "backbone= (--backbone)")
        load_trained(model, place / WEIGHTS)
        return cls(model, stats=(settings["mean"], settings["std"]), batch=batch or config.score_batch,
                   name=settings["name"])

    def save_pretrained(self, folder: str | Path) -> None:
        """Write everything that was trained, the settings, the statistics and the body's name; no pickle, no body.

        Args:
            folder: made, or replaced as a whole.
        """
        with atomic_path(Path(folder)) as temporary:
            temporary.mkdir()
            weights = {n: p.detach().cpu().contiguous() for n, p in self.model.trainable().items()}
            save_file(weights, temporary / WEIGHTS)
            body = self.model.backbone.config.name_or_path
            here = os.path.relpath(body, folder) if Path(body).is_dir() else None
            write_json(temporary / SETTINGS, {
                "name": self.name, "mean": self.stats[0], "std": self.stats[1], "fingerprint": self.model.fingerprint,
                "backbone_path": here, "config": dataclasses.asdict(self.model.config)})

    def score(self, *, images: Sequence[ImageLike], prompts: Sequence[Prompt] | Sequence[str],
              normalized: bool = False) -> Scores:
        """Score B images, each under its own prompt.

        Args:
            images: PIL images, uint8 arrays [H, W, 3], bytes of image files, or paths.
            prompts: one per image.
            normalized: subtract the mean and divide by the standard deviation of the training set's scores.

        Returns:
            Mean and standard deviation, float64 [B] each. They do not depend on the other images of the call,
            but for rounding where the body is in bfloat16.

        Raises:
            ValueError: an image cannot be read, or a prompt is empty, too long, or has a special token; the
                message names it.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images and {len(prompts)} prompts: expected one prompt per image")
        names = [f"prompt {i} ({p.id})" if isinstance(p, Prompt) else f"prompt {i}" for i, p in enumerate(prompts)]
        texts = self.model.tokenize([p.text if isinstance(p, Prompt) else p for p in prompts], names)
        mean, std = np.empty(len(images)), np.empty(len(images))
        by_length = sorted(range(len(images)), key=lambda i: len(texts[i]))  # batches of like lengths pad little
        training = self.model.training
        self.model.eval()
        for start in range(0, len(images), self.batch):
            index = by_length[start:start + self.batch]
            pictures = [decode(images[i], f"image {i}") for i in index]
            inputs = self.model.collate(pictures, [texts[i] for i in index]).to(self.model.device)
            with torch.inference_mode():
                mu, log_sigma = self.model(inputs)
            mean[index], std[index] = mu.double().cpu().numpy(), log_sigma.double().exp().cpu().numpy()
        self.model.train(training)
        if normalized:
            mean, std = (mean - self.stats[0]) / self.stats[1], std / self.stats[1]
        return Scores(mean, std)


def load_trained(model: SpatialScoreModel, path: Path) -> None:
    """Put the trained weights of a file into a model.

    Raises:
        OSError: the file is missing or damaged.
        ValueError: it holds other weights than the model trains; the message names some.
    """
    try:
        stored = load_file(path)
    except SafetensorError as e:
        raise OSError(f"{path}: damaged ({e}); copy or train it again") from e
    ours = model.trainable()
    wrong = sorted(set(stored) ^ set(ours)) or [n for n in ours if stored[n].shape != ours[n].shape]
    if wrong:
        raise ValueError(f"{path}: does not fit this model and these settings, {len(wrong)} weights differ: "
                         f"{wrong[:3]}; use the backbone and the [reward] settings of its training")
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(stored[name])


def _find_backbone(place: Path, settings: dict) -> str:
    """The body beside the folder, where it was, else the name in the settings."""
    if settings["backbone_path"] is not None:
        found = (place / settings["backbone_path"]).resolve()
        if found.is_dir():
            return str(found)
        if not Path(settings["config"]["backbone"]).is_dir():
            raise FileNotFoundError(f"{place}: its body is not at {found} any more; name its folder with "
                                    "backbone= (--backbone)")
    return settings["config"]["backbone"]


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError
    try:
        return Path(snapshot_download(name, allow_patterns=[WEIGHTS, SETTINGS]))
    except HFValidationError as e:
        raise FileNotFoundError(f"{name}: is neither a folder nor the id of a hub repository") from e
