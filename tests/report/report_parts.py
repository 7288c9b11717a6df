"""A run folder with a little of everything in it, made without any model."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from spatialt2i.core.config import load_config
from spatialt2i.core.run import RunDir, write_atomic, write_json
from spatialt2i.core.store import write_jsonl, write_preferences
from spatialt2i.core.types import Drawn, Edit, Pair, Preference, Prompt, Relation, Verdict

LEFT = Relation("left of", "red circle", ("blue square",))
RIGHT = Relation("right of", "red circle", ("blue square",))
CENTRE = Relation("in the centre", "blue square")
EVIL = "A red circle <script>alert('x')</script> is left of a \"blue\" square & that is in the centre."
STAGES = ("data", "reward", "reward_eval", "rl", "bench")


def png(seed: int, size: int = 8) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def share(value: float | None, n: int = 40) -> dict[str, Any]:
    around = (None, None) if value is None else (max(value - 0.1, 0.0), min(value + 0.1, 1.0))
    return {"value": value, "lo": around[0], "hi": around[1], "n": n if value is not None else 0}


def prompt(i: int, text: str = "A red circle is left of a blue square that is in the centre.") -> Prompt:
    return Prompt(f"p{i}", text, "table", (LEFT, CENTRE))


def make_run(path: Path, stages: tuple[str, ...] = STAGES, *, seed: int = 3) -> RunDir:
    """A run in which these stages are finished."""
    run = RunDir.open(path, load_config("quickstart", [f"seed={seed}"]))
    for stage in stages:
        make = {"data": _data, "reward": _reward, "reward_eval": _reward_eval, "rl": _rl, "bench": _bench}[stage]
        run.finish(stage, key="k", counts={}, seconds=12.5 * (1 + STAGES.index(stage)), peak_mb=500.0,
                   extra={"figures": make(run)})
    return run


def preferences(n: int) -> list[Preference]:
    """Pairs with a flip; from the fourth on some with a move."""
    verdict = Verdict(True, (True, True), (True, True), True, "judge", {})
    edge = Relation("at the left edge", CENTRE.subject)
    pairs = []
    for i in range(n):
        moved = i > 2 and i % 2
        text = prompt(i).text
        text = text.replace("in the centre", "at the left edge") if moved else text.replace("left of", "right of")
        perturbed = Prompt(f"p{i}*", text, "table", (LEFT, edge) if moved else (RIGHT, CENTRE))
        pair = Pair(prompt(i), perturbed, (Edit("move", 1, CENTRE, edge) if moved else Edit("flip", 0, LEFT, RIGHT),))
        pairs.append(Preference(pair, png(i), png(i + 50), (Drawn("painter", i),) * 2, (verdict, verdict)))
    return pairs


def _data(run: RunDir) -> dict[str, Any]:
    run.stage("data")
    write_preferences(run.path / "data" / "data" / "test-00000-of-00001.parquet", preferences(3))
    write_json(run.path / "data" / "statistics.json", {
        "pairs": 3, "scenes": {"table": 2, "<b>lawn</b>": 1}, "words": {"red": 3, "left": 3}, "dependent_edits": 0,
        "predicates": {"left of": 3}, "edits": {"flip": 3}, "perturbations": {"1": 3},
        "words_per_prompt": {"mean": 18.3, "histogram": {"12": 2, "31": 1}},
        "relations_per_prompt": {"mean": 2.3, "histogram": {"2": 2, "3": 1}},
        "objects_per_prompt": {"mean": None, "histogram": {}}, "funnel": {"written": 5, "kept": 3}})
    return {}


def _reward(run: RunDir) -> dict[str, Any]:
    for step in range(6):
        run.log("reward", step, {"loss": 0.7 - 0.05 * step, "accuracy": 0.5 + 0.05 * step, "grad_norm": 1.0})
    run.log("reward", 6, {"validation/overall": 0.8, "validation/one": 0.7, "validation/two_three": float("nan")})
    return {}


def _reward_eval(run: RunDir) -> dict[str, Any]:
    return {"one": share(0.9), "two_three": share(None), "overall": share(0.9), "ties": 0, "pairs": 40, "coverage": 1.0,
            "predicates": {"left of": share(0.9)}, "edits": {"flip": share(0.9), "swap": share(None)}}


def _rl(run: RunDir) -> dict[str, Any]:
    for step in range(4):
        run.log("rl", step, {
            "reward_mean": 0.1 * step, "reward_std": 0.3, "reward_max": 1.0, "dropped_groups": 0.25, "not_judged": 0.0,
            "kl": float("nan") if step == 1 else 0.01 * step, "clip_share": 0.1, "grad_norm": 0.5, "max_log_ratio": 0.0,
            "seconds_sample": 1.0, "seconds_decode": 0.1, "seconds_score": 0.2, "seconds_update": 2.0 + 0.1 * step})
    for step in (0, 2, 4):
        folder = run.path / "rl" / "gallery" / f"step_{step:04d}"
        write_atomic(folder / "00.png", png(step))
        write_json(folder / "prompts.json", [prompt(0).to_json()])
    return {}


def _bench(run: RunDir) -> dict[str, Any]:
    figures: dict[str, Any] = {"spatialscore": {"base": share(0.1), "tuned": share(0.6)}}
    for name in ("in_domain", "hard"):
        rows = [prompt(i, EVIL if i == 0 else prompt(i).text) for i in range(14)]
        write_jsonl(run.path / "eval" / f"{name}.jsonl", [
            {"index": i, "prompt": p.text, "relations": [r.to_json() for r in p.relations], "id": p.id, "seed": i}
            for i, p in enumerate(rows)])
        for model, wrong in (("base", 1), ("tuned", 13)):
            verdicts = [Verdict(i != wrong, (i != wrong, None), (True, True), True, "judge",
                                {"reasons": ["misplaced by 3.0 pixels" if i == wrong else "", "not judged"]})
                        for i in range(len(rows))]
            write_jsonl(run.path / "eval" / model / f"{name}_verdicts.jsonl", [v.to_json() for v in verdicts])
            for i in range(len(rows)):
                write_atomic(run.path / "eval" / model / name / f"{i}.png", png(i))
        measures = {"relations": share(0.5), "all": share(0.3), "presence": share(0.9), "clean": share(None)}
        measures["coverage"] = 0.5
        figures[name] = {"judge": "oracle-7", "version": "1", "gain_all": share(0.3),
                         "base": measures, "tuned": measures | {"all": share(0.6)},
                         "predicates": {"left of": {"base": share(0.5), "tuned": share(0.7)}}}
    return json.loads(json.dumps(figures))
