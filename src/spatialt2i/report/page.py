"""One page and one file of figures from what a run folder holds; what is not there yet is named with its command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from spatialt2i.core.config import to_toml
from spatialt2i.core.run import RunDir, read_json, write_atomic, write_json
from spatialt2i.report import curves, figures as f, plots
from spatialt2i.report.dataset import dataset_plots
from spatialt2i.report.gallery import before_after, over_steps, preference_pairs

CONTENTS = {
    "figures": "Headline figures", "before-after": "Before and after", "over-steps": "During Spatial-RL",
    "curves": "Curves", "predicates": "By predicate and edit", "dataset": "Dataset", "pairs": "Preference pairs",
    "cost": "Time and memory", "again": "Do it again"}


def write_report(*, run: RunDir) -> dict[str, Any]:
    """Write ``report.html``, which asks nothing of the network, and ``report.json`` into the run's folder.

    Reads only the run's folder: the same folder gives the same bytes. A part that is not finished is absent from the
    figures and named on the page, with the command that runs it.

    Returns:
        What ``report.json`` holds, see `figures.collect`.

    Raises:
        CorruptData, BrokenPicture, ValueError: a file of the run cannot be read; the message names it.
    """
    path = run.path / "report.json"
    write_json(path, f.collect(run))
    figures = read_json(path)
    write_atomic(run.path / "report.html", render(run, figures))
    return figures


def render(run: RunDir, figures: dict[str, Any]) -> str:
    """The page of a run. figures: of `figures.collect`."""
    context = {
        "name": run.path.resolve().name, "figures": figures, "config": run.config, "contents": CONTENTS.items(),
        "commands": {stage: None if run.manifest(stage) else f"spatialt2i {command} --run {run.path}"
                     for stage, command in f.COMMANDS.items()} | {"report": f"spatialt2i report --run {run.path}"},
        "all_commands": f.COMMANDS, "sets": f.SETS, "measures": f.MEASURES, "change": _change,
        "total": f.total_cost(figures) if figures["cost"] else None,
        "galleries": before_after(run), "stories": over_steps(run), "pairs": preference_pairs(run),
        "rl_plots": curves.draw("rl", run.metrics("rl"), curves.RL_PLOTS),
        "reward_plots": curves.draw("reward", run.metrics("reward"), curves.REWARD_PLOTS),
        "rl_tables": _rl_tables(figures), "reward_tables": _reward_tables(figures), "dataset": dataset_plots(run),
        "config_text": to_toml(run.config),
        "reproduce": [f"spatialt2i {command} --run again" + (" --preset config.toml" if i == 0 else "")
                      for i, command in enumerate([*f.COMMANDS.values(), "report"])],
    }
    return environment().get_template("report.html").render(context)


def environment() -> Environment:
    """The templates, with everything escaped that is not marked as safe, and the filters that write numbers."""
    made = Environment(loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True,
                       undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters |= {"percent": f.percent, "points": f.points, "between": f.between, "number": f.number,
                     "duration": f.duration, "gain_between": lambda figure: f.between(figure, signed=True)}
    return made


def _change(base: float | None, tuned: float | None) -> float | None:
    """Tuned minus base, or None where one of them is not known."""
    return None if None in (base, tuned) else tuned - base


def _rl_tables(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Per set its title, the rows (predicate, base and tuned), most frequent first, and a plot of those judged."""
    tables = []
    for name, title in f.SETS.items() if "rl" in figures else ():
        rows = sorted(figures["tables"]["rl"][name].items(), key=lambda row: (-row[1]["base"]["n"], row[0]))
        judged = [(predicate, [plots.Interval(row[m]["value"], row[m]["lo"], row[m]["hi"]) for m in f.MODELS])
                  for predicate, row in rows if None not in [row[m]["value"] for m in f.MODELS]]
        alt = f"{title} prompts: share of true relations by predicate, base and tuned; the table has the figures."
        svg = plots.forest(f"predicates-{name}", judged, series=f.MODELS, alt=alt) if judged else None
        tables.append({"title": title, "rows": rows, "svg": svg})
    return tables


def _reward_tables(figures: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    if "reward" not in figures:
        return []
    tables = figures["tables"]["reward"]
    return [("SpatialScore by predicate of the edited relation", tables["predicates"]),
            ("SpatialScore by kind of edit", tables["edits"])]
