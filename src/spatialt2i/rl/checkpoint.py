"""What an RL run needs to go on exactly where it stopped: adapter, its average, optimiser, step. One file each.

There is no generator state: every random draw has a seed that is named after its step, prompt and picture.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Parameter

from spatialt2i.core.config import RLConfig
from spatialt2i.core.run import EXTENDS, atomic_path, interrupts_held, lasting

KEPT = 2  # checkpoints; the older one is there in case the disk damages the newer
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state per parameter


@dataclass
class TrainState:
    """Everything that training changes.

    Attributes:
        parameters: the adapter's, by name.
        ema: their running average, or None where it is off.
        optimizer: AdamW over ``parameters``.
        step: RL steps done.
    """

    parameters: dict[str, Parameter]
    ema: dict[str, Tensor] | None
    optimizer: torch.optim.AdamW
    step: int = 0


class CheckpointError(ValueError):
    """A checkpoint that cannot be continued from."""


def save_checkpoint(folder: Path, state: TrainState, *, config: RLConfig, seed: int, inputs: str) -> None:
    """Write ``step_000123.safetensors`` atomically and delete all but the newest `KEPT`.

    Raises:
        DiskFull: no space left; the checkpoint before is intact.
    """
    tensors = {f"adapter/{name}": p.detach() for name, p in state.parameters.items()}
    tensors |= {f"ema/{name}": value for name, value in (state.ema or {}).items()}
    for name, p in state.parameters.items():
        tensors |= {f"{key}/{name}": value for key, value in state.optimizer.state.get(p, {}).items()}
    with interrupts_held(), atomic_path(folder / f"step_{state.step:06d}.safetensors") as part:
        save_file({key: value.contiguous() for key, value in tensors.items()}, part,
                  metadata={"step": str(state.step), "settings": json.dumps(_settings(config, seed, inputs))})
    for old in _newest_first(folder)[KEPT:]:
        old.unlink()


def load_checkpoint(folder: Path, state: TrainState, *, config: RLConfig, seed: int, inputs: str) -> bool:
    """Put the newest checkpoint of ``folder`` into ``state``; False where there is none.

    Raises:
        CheckpointError: it is damaged, or belongs to another config or model.
    """
    paths = _newest_first(folder)
    if not paths:
        return False
    path = paths[0]
    try:
        with safe_open(path, "pt") as file:
            meta = file.metadata()
            _check_settings(path, json.loads(meta["settings"]), _settings(config, seed, inputs))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not a readable checkpoint ({error}); delete it to go on from the one before, "
                              "if there is one, or from the start") from error
    _check_shapes(path, tensors, state)
    with torch.no_grad():
        for name, p in state.parameters.items():
            p.copy_(tensors[f"adapter/{name}"])
            if state.ema is not None:
                state.ema[name].copy_(tensors[f"ema/{name}"])
            if f"step/{name}" in tensors:
                moments = {key: tensors[f"{key}/{name}"] for key in _MOMENTS}
                state.optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in moments.items()}
    state.step = int(meta["step"])
    return True


def _settings(config: RLConfig, seed: int, inputs: str) -> dict[str, Any]:
    """What must be equal for two runs to be the same run, JSON-able."""
    kept = {k: v for k, v in lasting("rl", config).items() if f"rl.{k}" not in EXTENDS}
    return kept | {"model": Path(config.model).name, "seed": seed, "inputs": inputs}  # the model's folder may move


def _check_settings(path: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    differing = [f"{key} = {saved.get(key)!r} there, {wanted.get(key)!r} here"
                 for key in sorted(saved | wanted) if saved.get(key) != wanted.get(key)]
    if differing:
        raise CheckpointError(f"{path} was made with another config: {'; '.join(differing)}. Use the same settings to "
                              "go on, another run folder to start anew, or --if-exists delete to start the stage anew")


def _check_shapes(path: Path, tensors: dict[str, Tensor], state: TrainState) -> None:
    saved = {k.removeprefix("adapter/"): tuple(v.shape) for k, v in tensors.items() if k.startswith("adapter/")}
    expected = {name: tuple(p.shape) for name, p in state.parameters.items()}
    if saved != expected:
        name = next(n for n in sorted(saved | expected) if saved.get(n) != expected.get(n))
        raise CheckpointError(f"{path} belongs to another model: adapter {name} is {saved.get(name, 'missing')}, "
                              f"expected {expected.get(name, 'no such tensor')}; check rl.model")


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*.safetensors"), reverse=True)
