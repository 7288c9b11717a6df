"""A run is a folder: the resolved config, one sub-folder and manifest per stage, metrics, and what resuming needs."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from numbers import Integral
from pathlib import Path
from typing import Any

from tqdm import tqdm

from spatialt2i.core.config import Config, describe, load_config, to_dict, to_toml

HEADER = "# spatialt2i run folder: the resolved config\n"  # marks a folder as ours; only such a folder is ever deleted
# How the work is done, not what comes out of it (rounding aside): may change between two calls on the same run.
FREE = frozenset({
    "device", "threads", "data.workers", "data.engine", "data.llm.key_env", "data.llm.concurrency", "data.llm.timeout",
    "data.llm.retries", "data.llm.price_in", "data.llm.price_out", "data.llm.price_image", "data.llm.budget",
    "reward.micro_batch", "reward.score_batch", "reward.save_every", "rl.micro_batch", "rl.sample_batch",
    "rl.save_every", "rl.gallery_every", "rl.gallery_prompts", "rl.gate_tolerance"})
ONLY_FOR = {"data.llm": ("data.writer", "llm")}  # sections that have a say for one value of a setting alone
# A finished stage goes on from where it is when one of these changes.
EXTENDS = frozenset({"rl.steps", "data.keep", "data.verifier", "data.generators", "data.generator_shares",
                     "data.same_generator", "data.same_seed"})
# They name the evaluation prompts, which pairs and training prompts were kept apart from.
HELD_OUT = frozenset({
    "bench.in_domain_prompts", "bench.hard_prompts", "bench.in_domain_relations", "bench.hard_relations"})
PACKAGES = ("spatialt2i", "torch", "transformers", "diffusers", "peft", "accelerate", "datasets", "safetensors",
            "tensorboard", "scipy", "matplotlib", "numpy", "pillow", "pyarrow")


class RunError(RuntimeError):
    """A run folder that cannot be used as asked; the message says why and what to do."""


class DiskFull(OSError):
    """No space left while writing; nothing half-written stays behind."""


def seed_of(*parts: int | str) -> int:
    """A seed named by its parts: run seed, stage, step, prompt id, sample index.

    Returns:
        An integer in [0, 2**63), the same on every machine; any other part, order or type gives another one.
    """
    named = json.dumps([int(p) if isinstance(p, Integral) else p for p in parts])
    return int.from_bytes(hashlib.sha256(named.encode()).digest()[:8], "big") >> 1


class RunDir:
    """The folder of one run. Made by `RunDir.open`; owns the event files of TensorBoard while a stage logs."""

    def __init__(self, path: Path, config: Config) -> None:
        self.path = path
        self.config = config
        self._boards: dict[str, Any] = {}

    @classmethod
    def open(cls, path: str | Path, config: Config, if_exists: str = "resume", *, stages: Iterable[str] = ()) -> RunDir:
        """Open or make a run folder and store the resolved config in it.

        Args:
            path: the folder.
            config: what the run does; it replaces the stored one, from which it may differ in `FREE` settings, and in
                the sections of stages without results.
            if_exists: "resume" continues, "raise" refuses a folder that has results, "delete" starts afresh.
            stages: "raise" and "delete" look at these folders and files of the run only; none means the whole run.

        Raises:
            RunError: the folder is not a run folder, holds a run of another config, or exists and must not.
        """
        path, stages = Path(path), tuple(stages)
        if if_exists not in ("resume", "raise", "delete"):
            raise ValueError(f"if_exists is {if_exists!r}: expected resume, raise or delete")
        if path.exists() and not path.is_dir():
            raise RunError(f"{path}: is a file; expected a run folder or a new path")
        if is_run(path):
            wanted = [path / s for s in stages] if stages else [path]
            found = [f for f in wanted if _has_results(f)]
            if found and if_exists == "raise":
                raise RunError(f"{found[0]}: exists already; name another --run, or continue it with --if-exists "
                               "resume, or start afresh with --if-exists delete")
            doomed = found if if_exists == "delete" else []
            if path not in doomed:
                _check_config(path, config, doomed)
            for folder in doomed:
                _remove(folder)
        elif path.is_dir() and any(not p.name.endswith(".tmp") for p in path.iterdir()):
            raise RunError(f"{path}: not empty and not a run folder (no config.toml of a run in it), so it is left "
                           "as it is; name another --run")
        path.mkdir(parents=True, exist_ok=True)
        if not is_run(path) or load_config(path / "config.toml") != config:
            write_atomic(path / "config.toml", HEADER + to_toml(config))
        return cls(path, config)

    def stage(self, name: str) -> Path:
        """The folder of a stage, made if needed."""
        folder = self.path / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def manifest(self, stage: str) -> dict[str, Any] | None:
        """What `finish` wrote, or None where the stage is not finished, or its inputs are other ones by now."""
        path = self.path / stage / "manifest.json"
        found = read_json(path) if path.exists() else None
        fresh = found and all(self.digest(name) == seen for name, seen in found["inputs"].items())
        return found if fresh else None

    def digest(self, stage: str) -> str | None:
        """A hash of the outputs of a finished stage; None where it is not finished."""
        manifest = self.manifest(stage)
        return manifest and hashlib.sha256(json_text(manifest["outputs"]).encode()).hexdigest()

    def done(self, stage: str, key: str) -> bool:
        """Whether the stage is finished, its manifest has this ``key``, and its outputs are whole."""
        manifest = self.manifest(stage)
        return manifest is not None and manifest["key"] == key and all(
            tree_hash(self.path / name) == seen for name, seen in manifest["outputs"].items())

    def finish(self, stage: str, *, key: str, counts: dict[str, int], seconds: float, peak_mb: float,
               inputs: Iterable[str] = (), outputs: Iterable[str] = (), extra: dict[str, Any] | None = None) -> None:
        """Write the stage's manifest, the last thing a stage does.

        Args:
            stage: its name.
            key: hash of what it was told: its settings.
            counts: what was made and what was dropped, by kind.
            seconds: wall time. peak_mb: peak memory of the process tree in MB.
            inputs: the stages whose outputs it read.
            outputs: files and folders of the run that later stages and people read.
            extra: anything else worth keeping, JSON-able.
        """
        if stage in self._boards:
            self._boards.pop(stage).close()
        write_json(self.stage(stage) / "manifest.json", {
            "stage": stage, "key": key, "inputs": {name: self.digest(name) for name in inputs},
            "outputs": {name: tree_hash(self.path / name) for name in outputs}, "counts": counts,
            "seconds": round(seconds, 3), "peak_mb": round(peak_mb, 1), **(extra or {}),
            "versions": versions(), "config": to_dict(self.config)})

    def log(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        """Append one line to the stage's metrics.jsonl, and to TensorBoard where it is installed.

        A value that is not finite becomes null in the file: it was not measured, which is not 0.
        """
        path = self.stage(stage) / "metrics.jsonl"
        row = _finite({"step": step} | {k: float(v) for k, v in metrics.items()})
        with disk_errors(path):
            with path.open("a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")
            if stage not in self._boards:
                self._boards[stage] = _board(path.parent / "tb")
            _draw(self._boards[stage], [row])

    def metrics(self, stage: str) -> list[dict[str, float | None]]:
        """The logged lines of a stage, each with its ``step``; a line cut off by a kill is left out."""
        path = self.path / stage / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as e:
                if number < len(lines):
                    raise RunError(f"{path}, line {number}: not JSON ({e}); delete the line to go on") from e
        return rows

    def truncate_metrics(self, stage: str, step: int) -> None:
        """Forget what was logged at ``step`` and later, before these steps are done again after a resume."""
        rows = [r for r in self.metrics(stage) if r["step"] < step]
        folder = self.stage(stage)
        if stage in self._boards:
            self._boards.pop(stage).close()
        write_atomic(folder / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
        shutil.rmtree(folder / "tb", ignore_errors=True)
        with disk_errors(folder / "tb"):
            self._boards[stage] = _board(folder / "tb")
            _draw(self._boards[stage], rows)


def is_run(path: Path) -> bool:
    """Whether the folder was made by `RunDir.open`."""
    config = Path(path) / "config.toml"
    return config.is_file() and config.read_text(encoding="utf-8", errors="replace").startswith(HEADER)


def lasting(name: str, section: Any) -> dict[str, Any]:
    """The settings of a section that have a say in its results: all but the `FREE` ones."""
    kept = {}
    for key, value in to_dict(section).items():
        full, (switch, on) = f"{name}.{key}", ONLY_FOR.get(f"{name}.{key}", (None, None))
        if full in FREE or switch and getattr(section, switch.rpartition(".")[2]) != on:
            continue
        kept[key] = lasting(full, getattr(section, key)) if isinstance(value, dict) else value
    return kept


def _check_config(path: Path, config: Config, doomed: Sequence[Path]) -> None:
    """Refuse settings that differ from those of results that stay."""
    stored = load_config(path / "config.toml")
    for old, new in zip(describe(stored), describe(config), strict=True):
        section = old.key.partition(".")[0] if "." in old.key else ""  # none has the seed, on which everything depends
        results = [path / section] if section else [f for f in path.iterdir() if f.is_dir()]
        results += [path / "data", path / "rl"] if old.key in HELD_OUT else []
        kept = [f for f in results if f not in doomed and _has_results(f)]
        if old.value != new.value and old.key not in FREE | EXTENDS and kept:
            advice = ("Use the same settings or name another --run" if old.key in HELD_OUT else
                      "Use the same settings, name another --run, or make the stage afresh with --if-exists delete")
            raise RunError(f"{path}: was made with another config: {old.key} is {old.value} there and {new.value} now, "
                           f"and {kept[0].name}/ has results. {advice}")


def _has_results(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists()


def _remove(path: Path) -> None:
    # renamed first, so that a kill in the middle never leaves half a run under its name
    path = path.resolve()
    trash = path.with_name(f".{path.name}.deleted.tmp")
    _discard(trash)
    os.replace(path, trash)
    _discard(trash)


def _board(folder: Path) -> Any:
    try:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError:  # curves are a convenience; metrics.jsonl has everything
        return None
    return EventFileWriter(str(folder))


def _draw(board: Any, rows: list[dict[str, Any]]) -> None:
    if board is None or not rows:
        return
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    for row in rows:
        values = [Summary.Value(tag=k, simple_value=v) for k, v in row.items() if k != "step" and v is not None]
        board.add_event(Event(step=row["step"], wall_time=time.time(), summary=Summary(value=values)))
    board.flush()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn "no space left" of any library into one clear `DiskFull`."""
    try:
        yield
    except Exception as e:  # libraries wrap the system's error in types of their own
        full = isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and not re.search("no space left|disk is full", str(e), re.IGNORECASE):
            raise
        raise DiskFull(f"{path}: the disk is full; free some space and run the same command again, finished work "
                       "is kept") from e


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Write a file or a folder under a temporary name; it gets its own name only when it is complete.

    Yields:
        The temporary path, in the same folder, for the caller to write to.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    _discard(temporary)
    try:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            if path.is_dir():
                _remove(path)
            os.replace(temporary, path)
    finally:
        _discard(temporary)


def _discard(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write a file so that a reader, or a run after a kill, sees the old content or the new one and nothing between."""
    with atomic_path(path) as temporary, temporary.open("wb") as f:
        f.write(data.encode() if isinstance(data, str) else data)
        f.flush()
        os.fsync(f.fileno())


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as `json_text`, atomically."""
    write_atomic(path, json_text(value))


def json_text(value: Any) -> str:
    """Indented JSON; a number that is not finite becomes null, "not known"."""
    return json.dumps(_finite(value), indent=1, ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def file_hash(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def tree_hash(path: Path) -> str | None:
    """The sha256 of a file, or of the names and contents of all files of a folder; None where there is nothing."""
    if not path.is_dir():
        return file_hash(path) if path.exists() else None
    files = {str(f.relative_to(path)): file_hash(f) for f in sorted(path.rglob("*")) if f.is_file()}
    return hashlib.sha256(json_text(files).encode()).hexdigest()


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: the file is not JSON; the message names it.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path}: not JSON: {e}; delete it and run the stage that writes it again") from e


def progress(work: Iterable[Any] | int, *, desc: str, total: int | None = None, initial: int = 0) -> tqdm:
    """A progress bar with ETA on standard error: around an iterable, or for a number of steps to ``update``."""
    steps, items = (work, None) if isinstance(work, int) else (total, work)
    interval = 0.2 if sys.stderr.isatty() else 30.0  # seconds; a log file gets a line now and then
    return tqdm(items, desc=desc, total=steps, initial=initial, mininterval=interval, maxinterval=2 * interval,
                dynamic_ncols=True)


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the block is over, so that things that belong together change together."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}  # the others end it
    if threading.current_thread() is not threading.main_thread() or not handlers:
        yield  # only the main thread gets signals
        return
    caught: list[int] = []
    for number in handlers:
        signal.signal(number, lambda number, frame: caught.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if caught:
        handlers[caught[0]](caught[0], None)


def versions() -> dict[str, str]:
    """Version of Python and of the installed packages that can change a result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
