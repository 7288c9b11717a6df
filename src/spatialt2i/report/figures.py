"""The figures of a run as JSON-able values: ``report.json``, and the same on one card of text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from spatialt2i.core.run import RunDir

COMMANDS = {  # stage -> the command that runs it
    "data": "data build", "reward": "reward train", "reward_eval": "reward eval", "rl": "rl train",
    "bench": "bench indomain"}
SETS = {"in_domain": "In-domain", "hard": "Hard"}
MODELS = ("base", "tuned")
MEASURES = {"all": "all right", "relations": "relations true", "presence": "objects present", "clean": "clean"}
ACCURACY = {"overall": "overall", "one": "one change", "two_three": "two or three"}


def collect(run: RunDir) -> dict[str, Any]:
    """The figures of the finished stages; what belongs to a stage that is not finished is absent.

    Returns:
        ``reward.accuracy.{one,two_three,overall}``;
        ``rl.{in_domain,hard}.{base,tuned}.{relations,all,presence,clean,coverage}``, where ``coverage`` is the share of
        pictures that could be judged; ``rl.{in_domain,hard}.{gain_all,judge,version}``;
        ``rl.spatialscore.{base,tuned}``; ``cost.{stage}.{seconds,peak_mb}``; ``versions``; ``seed``; and ``tables``:
        ``reward.{predicates,edits}`` and ``rl.{in_domain,hard}`` (predicate -> base and tuned).

        Accuracies, ``gain_all`` and the tables' figures are ``{value, lo, hi, n}``, all but ``n`` None where nothing
        was judged. Those of a model are numbers, and the same ``{value, lo, hi, n}`` is at
        ``rl.{in_domain,hard}.intervals.{base,tuned}.{relations,all,presence,clean}`` and
        ``rl.spatialscore.intervals.{base,tuned}``.
    """
    found: dict[str, Any] = {"seed": run.config.seed, "cost": {}, "tables": {}}
    manifests = {stage: run.manifest(stage) for stage in COMMANDS}
    for stage, manifest in manifests.items():
        if manifest is not None:
            found["cost"][stage] = {name: manifest[name] for name in ("seconds", "peak_mb")}
    if manifests["reward_eval"] is not None:
        accuracy = manifests["reward_eval"]["figures"]
        found["reward"] = {"accuracy": {name: accuracy[name] for name in ACCURACY}}
        found["tables"]["reward"] = {name: accuracy[name] for name in ("predicates", "edits")}
    if manifests["bench"] is not None:
        bench = manifests["bench"]["figures"]
        found["rl"] = {name: _compared(bench[name]) for name in SETS}
        scores = bench["spatialscore"]
        found["rl"]["spatialscore"] = {model: scores[model]["value"] for model in MODELS} | {"intervals": scores}
        found["tables"]["rl"] = {name: bench[name]["predicates"] for name in SETS}
    found["versions"] = _versions([m for m in manifests.values() if m is not None])
    return found


def _compared(found: dict[str, Any]) -> dict[str, Any]:
    """What the benchmark found on one set, as `collect` has it."""
    whole = {model: {name: found[model][name] for name in MEASURES} for model in MODELS}
    values = {model: {name: figure["value"] for name, figure in figures.items()}
              | {"coverage": found[model]["coverage"]} for model, figures in whole.items()}
    return values | {"intervals": whole} | {name: found[name] for name in ("gain_all", "judge", "version")}


def _versions(manifests: list[dict[str, Any]]) -> dict[str, str]:
    """Package -> version; all versions, in the order of the stages, where stages ran with different ones."""
    seen: dict[str, list[str]] = {}
    for manifest in manifests:
        for name, version in manifest["versions"].items():
            if version not in seen.setdefault(name, []):
                seen[name].append(version)
    return {name: ", ".join(found) for name, found in seen.items()}


# ---- as text ---------------------------------------------------------------------------------------------------------

def percent(value: float | None) -> str:
    """A share in per cent, ``95.2%``; a dash where it is not known."""
    return "–" if value is None else f"{100 * value:.1f}%"


def points(value: float | None) -> str:
    """A difference of shares in percentage points, with its sign."""
    return "–" if value is None else f"{100 * value:+.1f}".replace("-", "−")


def between(figure: dict[str, Any], *, signed: bool = False) -> str:
    """The interval of a figure in per cent: ``94.0 to 96.3``."""
    if figure["lo"] is None or figure["hi"] is None:
        return "not judged"
    write = points if signed else percent
    return f"{write(figure['lo']).rstrip('%')} to {write(figure['hi']).rstrip('%')}"


def number(value: float | None) -> str:
    """A number with four digits; a dash where it is not known."""
    return "–" if value is None else f"{value:.4g}".replace("-", "−")


def duration(seconds: float) -> str:
    """Seconds as ``42 s``, ``6 min 10 s`` or ``2 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if whole < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{round(whole / 60) // 60} h {round(whole / 60) % 60:02d} min"


def report_card(figures: dict[str, Any], run: str) -> str:
    """What a run reached, on a few lines for a terminal.

    Args:
        figures: of `collect`. run: the run's folder, as its user names it.
    """
    rows = list(_card_rows(figures))
    width = max(len(label) for label, _ in rows)
    body = [f"  {label:<{width}}  {text}".rstrip() if label or text else "" for label, text in rows]
    return "\n".join([f"Report card of {run}, seed {figures['seed']}", *body, f"  {run}/report.html", ""])


def _card_rows(figures: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if "reward" in figures:
        for name, label in ACCURACY.items():
            figure = figures["reward"]["accuracy"][name]
            yield f"SpatialScore, {label}", f"{percent(figure['value'])} of {figure['n']} pairs ({between(figure)})"
    else:
        yield "SpatialScore", "not measured: spatialt2i reward eval"
    if "rl" in figures:
        for name, label in SETS.items():
            found = figures["rl"][name]
            for measure, text in MEASURES.items():
                base, tuned = (found[model][measure] for model in MODELS)
                gain = found["gain_all"]
                extra = (f", gain {points(gain['value'])} points ({between(gain, signed=True)}), {gain['n']} prompts"
                         if measure == "all" else "")
                yield f"{label}, {text}", f"{percent(base)} -> {percent(tuned)}{extra}"
        base, tuned = (number(figures["rl"]["spatialscore"][model]) for model in MODELS)
        yield "Reward of the pictures", f"{base} -> {tuned}"
    else:
        yield "Base against tuned", "not measured: spatialt2i bench indomain"
    if figures["cost"]:
        seconds, peak = total_cost(figures)
        yield "Time, peak memory", f"{duration(seconds)}, {peak:,.0f} MB"


def total_cost(figures: dict[str, Any]) -> tuple[float, float]:
    """Seconds of all finished stages together, and the largest of their peaks in MB."""
    cost = figures["cost"].values()
    return sum(c["seconds"] for c in cost), max(c["peak_mb"] for c in cost)
