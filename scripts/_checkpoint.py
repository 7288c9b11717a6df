"""What the training scripts share: the device, optimizers, a resumable state of weights, averages and moments."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from spatialt2i.core.device import pick_device


def use_machine(*, device: str, threads: int) -> torch.device:
    """Make tensors on this device from now on ("auto": a GPU where there is one), with that many CPU threads."""
    torch.set_num_threads(threads)
    torch.set_default_device(pick_device(device))
    return torch.get_default_device()


def tensor(array: np.ndarray) -> torch.Tensor:
    """A numpy array as a tensor on the device of `use_machine`."""
    return torch.from_numpy(array).to(torch.get_default_device())


def save_state(path: Path, *, step: int, module: torch.nn.Module, average: dict[str, torch.Tensor],
               optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Write everything that `load_state` needs, atomically."""
    tensors = {f"model.{k}": v for k, v in module.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in average.items()}
    for n, optimizer in enumerate(optimizers):
        for i, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{n}.{i}.{k}": v for k, v in moments.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, partial, {"step": json.dumps(step)})
    os.replace(partial, path)


def load_state(path: Path, *, module: torch.nn.Module, average: dict[str, torch.Tensor],
               optimizers: Sequence[torch.optim.Optimizer]) -> int:
    """Read what `save_state` wrote into the given objects; returns the step, 0 where there is no file."""
    if not path.exists():
        return 0
    with safe_open(path, "pt") as f:
        module.load_state_dict({k: f.get_tensor(f"model.{k}") for k in module.state_dict()})
        average.update({k: f.get_tensor(f"average.{k}").to(v) for k, v in average.items()})
        states = [optimizer.state_dict() for optimizer in optimizers]
        for name in f.keys():  # noqa: SIM118 - a safetensors handle is no dict
            if name.startswith("optimizer."):
                _, n, i, key = name.split(".")
                states[int(n)]["state"].setdefault(int(i), {})[key] = f.get_tensor(name)
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.load_state_dict(state)
        return json.loads(f.metadata()["step"])


def load_average(path: Path, *, module: torch.nn.Module) -> None:
    """Read the averaged weights of what `save_state` wrote, and nothing else."""
    with safe_open(path, "pt") as f:
        module.load_state_dict({k: f.get_tensor(f"average.{k}") for k in module.state_dict()})


def make_optimizers(module: torch.nn.Module, *, lr: float, lr_matrices: float,
                    without: Sequence[torch.nn.Parameter] = ()) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon (as torch has it) for the matrices of the module's blocks; neither for those ``without``."""
    matrices = [p for n, p in module.named_parameters()
                if p.ndim == 2 and ("block" in n or "language_model.layers" in n) and "relative" not in n]
    rest = [p for p in module.parameters() if not any(p is m for m in (*matrices, *without))]
    return [torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=1e-3),
            torch.optim.Muon(matrices, lr=lr_matrices, weight_decay=1e-3, adjust_lr_fn="match_rms_adamw")]
