"""The machine: devices, threads, dtypes, what ``doctor`` reports, and what work costs. Only here `core` knows torch."""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from spatialt2i.core.run import read_json, write_json

if TYPE_CHECKING:
    import torch

# package -> what does not work without it; the extra of the same part brings it
NEEDED_FOR = {
    "torch": "every model: reward train, rl train, sampling",
    "transformers": "SpatialScore's backbone and the text encoders",
    "diffusers": "the generators of Spatial-RL",
    "peft": "the adapters of both trainings",
    "accelerate": "loading large models",
    "safetensors": "reading and writing weights",
    "datasets": "reading the pairs with load_dataset",
    "tensorboard": "live curves; metrics.jsonl is written without it",
    "openai": "language models that write prompts, and endpoints that draw",
    "ray": "building the dataset on a cluster (data.engine=ray)",
    "scipy": "the judge of the tabletop world, broken images for SpatialScore, statistics of the benchmarks",
    "matplotlib": "figures of the dataset and the report",
    "jinja2": "the page of the report",
}


def cpu_count() -> int:
    """Cores that this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" takes CUDA, then MPS, then the CPU.

    Raises:
        ValueError: torch knows no such device, or the machine has none.
    """
    import torch
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise ValueError(f"device = {name!r}: expected auto, cpu, cuda, cuda:1 or mps") from e
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    count = counts.get(device.type, 0)
    if (device.index or 0) >= count:
        raise ValueError(f"device = {name!r}: this machine has {count} {device.type} device(s); "
                         "use device=auto or device=cpu")
    return device


def set_threads(n: int) -> None:
    """Let torch use ``n`` CPU threads; 0 means one per core that the process may use."""
    import torch
    torch.set_num_threads(n or cpu_count())


def torch_dtype(name: str) -> torch.dtype:
    """``"float32"`` or ``"bfloat16"`` as a torch dtype."""
    import torch
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in dtypes:
        raise ValueError(f"dtype = {name!r}: expected one of {', '.join(dtypes)}")
    return dtypes[name]


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Mixed precision in ``dtype``; nothing at all for float32."""
    import torch
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def describe_machine() -> dict[str, Any]:
    """What is here and what is missing, without failing where a package is missing or broken.

    Returns:
        ``python``, ``cores``, ``memory_gb`` and ``memory_free_gb``, ``devices`` (name and memory of each),
        ``device`` (what "auto" picks, None without torch), ``versions`` (package -> version) and ``missing``
        (package -> what does not work without it).
    """
    found, missing = {}, {}
    for name, purpose in NEEDED_FOR.items():
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing[name] = purpose
    memory = psutil.virtual_memory()
    machine: dict[str, Any] = {
        "python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}",
        "cores": cpu_count(),
        "memory_gb": round(memory.total / 2**30, 1), "memory_free_gb": round(memory.available / 2**30, 1),
        "device": None, "devices": [], "versions": found, "missing": missing}
    try:
        import torch
    except (ImportError, OSError) as e:  # OSError: a shared library that torch needs cannot be loaded
        missing.setdefault("torch", f"{NEEDED_FOR['torch']} (installed, but importing it fails: {e})")
        return machine
    machine["device"] = str(pick_device("auto"))
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        machine["devices"].append({"name": properties.name, "memory_gb": round(properties.total_memory / 2**30, 1)})
    return machine


@dataclass
class Measurement:
    """Cost of a block of work: wall seconds, and peak resident memory in MB of this process and its children."""

    seconds: float = 0.0
    peak_mb: float = 0.0


@contextmanager
def measured(ledger: Path) -> Iterator[Measurement]:
    """Measure the time and memory of the block, and of the blocks before it that did not get to delete the ledger.

    Args:
        ledger: file that keeps the figures, at most ten seconds old, when the process is killed.

    Yields:
        The figures, current four times a second, and final after the block.
    """
    result = Measurement(**read_json(ledger)) if ledger.exists() else Measurement()
    before, start, stop = result.seconds, time.perf_counter(), threading.Event()

    def look() -> None:
        result.seconds = before + time.perf_counter() - start
        result.peak_mb = max(result.peak_mb, _tree_mb())

    def keep() -> None:
        with suppress(OSError):  # a full disk is for the block to report
            write_json(ledger, asdict(result))

    def watch() -> None:
        looks = 0
        while not stop.wait(0.25):
            look()
            looks += 1
            if looks % 40 == 0:
                keep()

    look()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield result
    finally:
        stop.set()
        watcher.join()
        look()
        keep()


def _tree_mb() -> float:
    me = psutil.Process()
    total = 0
    for process in (me, *me.children(recursive=True)):
        try:
            total += process.memory_info().rss
        except psutil.Error:  # it ended meanwhile
            continue
    return total / 2**20
