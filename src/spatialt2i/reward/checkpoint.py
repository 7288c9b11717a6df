"""Checkpoints of the reward training: safetensors and JSON, from which a run continues bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from spatialt2i.core.config import RewardConfig
from spatialt2i.core.run import atomic_path, lasting, read_json, write_json
from spatialt2i.reward.model import SpatialScoreModel
from spatialt2i.reward.scorer import load_trained

KEPT = 2  # newest checkpoints that stay


class CheckpointMismatch(RuntimeError):
    """The checkpoint on disk belongs to another config, seed or data set."""


def identity(config: RewardConfig, seed: int, data: str, fingerprint: str) -> dict[str, Any]:
    """What must be the same for a checkpoint to be continued."""
    return {"seed": seed, "data": data, "backbone weights": fingerprint, **lasting("reward", config)}


def save(folder: Path, step: int, *, model: SpatialScoreModel, optimizer: torch.optim.Optimizer,
         identity: dict[str, Any], best: dict[str, Any]) -> None:
    """Write ``folder/checkpoints/step-N`` atomically, and drop all but the newest ones.

    Args:
        folder: of the stage.
        step: updates done.
        model, optimizer: what to keep. identity: from `identity`.
        best: when and how well the best model was evaluated, empty before the first evaluation.
    """
    names = {id(p): name for name, p in model.trainable().items()}
    moments = {f"{names[id(p)]}|{key}": value.detach().cpu().contiguous()
               for p, state in optimizer.state.items() for key, value in state.items()}
    with atomic_path(folder / "checkpoints" / f"step-{step:08d}") as temporary:
        temporary.mkdir()
        weights = {n: p.detach().cpu().contiguous() for n, p in model.trainable().items()}
        save_file(weights, temporary / "trained.safetensors")
        save_file(moments, temporary / "optimizer.safetensors")
        write_json(temporary / "state.json", {"step": step, "best": best, "identity": identity})
    for old in _all(folder)[:-KEPT]:
        shutil.rmtree(old)


def resume(folder: Path, *, model: SpatialScoreModel, optimizer: torch.optim.Optimizer,
           identity: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Load the newest checkpoint into the model and the optimizer.

    Returns:
        Updates done (0 where there is no checkpoint), and what `save` was told of the best model.

    Raises:
        CheckpointMismatch: it belongs to another config, seed or data; the message names what differs.
        OSError: it is damaged.
    """
    found = _all(folder)
    if not found:
        return 0, {}
    try:
        state = read_json(found[-1] / "state.json")
        moments = load_file(found[-1] / "optimizer.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise OSError(f"{found[-1]}: not a readable checkpoint ({error}); delete that folder to go on from the one "
                      "before, if there is one, or from the start") from error
    stored, wanted = state["identity"], json.loads(json.dumps(identity))
    changed = [f"{key} was {stored.get(key)!r} and is {wanted.get(key)!r}"
               for key in sorted(stored.keys() | wanted.keys()) if stored.get(key) != wanted.get(key)]
    if changed:
        raise CheckpointMismatch(f"{found[-1]}: belongs to another training: {'; '.join(changed)}. Use the same "
                                 f"settings, or another run, or delete {folder}")
    load_trained(model, found[-1] / "trained.safetensors")
    parameters = model.trainable()
    for key, value in moments.items():
        name, _, moment = key.rpartition("|")
        place = value.device if moment == "step" else parameters[name].device
        optimizer.state[parameters[name]][moment] = value.to(place)
    # a kill while the best model was being replaced leaves none; then the next evaluated one is the best
    return state["step"], state["best"] if (folder / "best").is_dir() else {}


def _all(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("step-*"))
