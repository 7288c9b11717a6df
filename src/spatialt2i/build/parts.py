"""Turns settings into objects: the writer, the generators, the judge, the score, the policy, the prompts.

Rooms are imported inside the functions, so that each needs only its own extra.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from spatialt2i.core.config import Config
from spatialt2i.core.device import pick_device, set_threads
from spatialt2i.core.run import RunDir, file_hash, json_text, seed_of
from spatialt2i.core.types import Prompt

if TYPE_CHECKING:
    import torch

    from spatialt2i.core.protocols import Generator, Policy, Scorer, Verifier, Writer
    from spatialt2i.data.shard import Parts

WEIGHTS = Path(__file__).parent.parent / "tiny" / "weights"
SHIPPED = ("tiny-flux", "tiny-qwen2.5-vl")


def data_parts(config: Config, folder: Path) -> Parts:
    """What part 1 needs; each of its processes makes its own. What endpoints replied is kept in ``folder``."""
    from spatialt2i.data.shard import Parts
    return Parts(
        writer=functools.partial(make_writer, config, folder / "replies.sqlite"),
        generators={n: functools.partial(make_generator, config, n, folder) for n in config.data.generators},
        verifier=functools.partial(make_verifier, config, folder))


def make_writer(config: Config, replies: Path | None = None) -> Writer:
    """``data.writer``; the scene grammar stands in for a language model where its replies have no place to go."""
    if config.data.writer == "llm" and replies:
        from spatialt2i.data.endpoint import Endpoint
        from spatialt2i.data.llm import LLMWriter
        return LLMWriter(Endpoint(config.data.llm, replies), threads=config.data.llm.concurrency)
    if config.data.writer in ("grammar", "llm"):
        from spatialt2i.data.prompts import SceneWriter
        return SceneWriter()
    from spatialt2i.tiny.grammar import TinyWriter
    return TinyWriter()


def make_generator(config: Config, name: str, folder: Path) -> Generator:
    """One of ``data.generators``, who draw the pairs; the pictures of an endpoint are kept in ``folder``."""
    if name == "tiny-painter":
        from spatialt2i.tiny.painter import TinyPainter
        return TinyPainter(wrong_layout=config.data.wrong_layout)
    from spatialt2i.data.generators import open_generator
    return open_generator(name, folder=folder, format=config.data.image_format,
                          device=functools.partial(device_of, config))


def make_verifier(config: Config, folder: Path) -> Verifier:
    """``data.verifier``, who judges pairs, and pictures of the benchmark; what it replied is kept in ``folder``."""
    if config.data.verifier == "tiny-oracle":
        from spatialt2i.tiny.oracle import TinyOracle
        return TinyOracle()
    from spatialt2i.data.verifiers import open_verifier
    return open_verifier(config.data.verifier, folder=folder)


def make_scorer(config: Config, run: RunDir | None, model: str | None = None, backbone: str | None = None) -> Scorer:
    """The run's SpatialScore, or the one of that folder or hub id, on the body that it names or on ``backbone``."""
    from spatialt2i.reward.scorer import SpatialScore
    if model is None:
        model, backbone = str(run.path / "reward" / "model"), backbone or config.reward.backbone
    return SpatialScore.from_pretrained(model, device=device_of(config), batch=config.reward.score_batch,
                                        backbone=model_folder(backbone) if backbone else None)


def make_policy(config: Config, adapter: Path | None = None) -> Policy:
    """``rl.model`` with a trained adapter, or with a fresh one, which changes nothing."""
    from spatialt2i.rl.policy import FluxPolicy
    located = dataclasses.replace(config.rl, model=model_folder(config.rl.model))
    policy = FluxPolicy.from_pretrained(located, device=device_of(config), seed=seed_of(config.seed, "rl", "adapter"))
    policy.name = config.rl.model
    if adapter is not None:
        policy.load(adapter)
    return policy


def model_folder(name: str) -> str:
    """Where a model is: the shipped folder for a shipped name, else the name itself (a folder or hub id).

    Raises:
        FileNotFoundError: the name is a shipped one, but its weights are not installed.
    """
    if name not in SHIPPED:
        return name
    if not (WEIGHTS / name).is_dir():
        raise FileNotFoundError(f"the weights of {name} are not installed in {WEIGHTS / name}; make them with "
                                "`make tiny-weights`")
    return str(WEIGHTS / name)


def bench_prompts(config: Config) -> dict[str, list[Prompt]]:
    """The evaluation sets ``in_domain`` and ``hard``."""
    from spatialt2i.data.sets import evaluation_sets
    return evaluation_sets(make_writer(config), config=config.bench, seed=config.seed)


def training_prompts(config: Config, *, avoid: set[str]) -> Callable[[int], list[Prompt]]:
    """The prompts of an RL step, as a function of the step; none has a text in ``avoid``."""
    from spatialt2i.data.sets import training_stream
    return training_stream(make_writer(config), config=config.rl, seed=config.seed, avoid=avoid)


def settings_of(config: Config, name: str) -> str:
    """What pictures or verdicts depend on, where a file of settings says it."""
    if name in ("tiny-painter", "tiny-oracle"):
        return ""
    from spatialt2i.data import generators, verifiers
    if name == config.data.verifier:
        return json_text(verifiers.read_verifier(name).judged_by())
    return json_text(generators.read_generator(name).drawn_by())


def made(model: str) -> str:
    """What changes when a shipped model is made again; the name of any other model."""
    return file_hash(Path(model_folder(model), "manifest.json")) if model in SHIPPED else model


def device_of(config: Config) -> torch.device:
    """Where models compute, after torch was told how many threads to use."""
    set_threads(config.threads)
    return pick_device(config.device)
