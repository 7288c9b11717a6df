"""The command line: one table of stages. Importing it imports no torch; a command imports what it needs."""

from __future__ import annotations

import importlib
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from spatialt2i import __version__
from spatialt2i.core.config import Config, ConfigError, describe, load_config, preset_names
from spatialt2i.core.run import RunDir, RunError, is_run, json_text, write_json


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        name: what is typed, ``"data build"``.
        target: the function of `spatialt2i.build.stages` behind it, from config, run and ``options`` to figures.
        help: one sentence.
        sections: of the config, shown by ``--help``.
        folders: (or files) in the run; what ``--if-exists`` looks at. Empty: the whole run.
        preset: used where neither ``--preset`` nor the run's own config says otherwise.
        makes_run: False where the command works without a run, and never makes its folder.
        reads: True where the run must be there already.
        options: the command's own.
        card: show the report card instead of every figure.
    """

    name: str
    target: str
    help: str
    sections: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    preset: str = "tiny"
    makes_run: bool = True
    reads: bool = False
    options: tuple[click.Option, ...] = ()
    card: bool = False


GROUPS = {
    "data": "Part 1: prompts, perturbations, images, verdicts, pairs.",
    "reward": "Part 2: SpatialScore, the reward model.",
    "rl": "Part 3: Spatial-RL, GRPO on an image generator.",
    "bench": "Part 4: benchmarks of generators.",
}

LONG = ("statistics", "sha256", "examples")  # figures that are for --json and the report, not for a terminal
EVERYTHING = ("data", "reward", "rl", "bench")
SCORE_OPTIONS = (
    click.Option(["--image", "images"], type=click.Path(path_type=Path), multiple=True, required=True,
                 help="An image file; may be given many times."),
    click.Option(["--prompt", "prompts"], multiple=True, required=True,
                 help="The prompt of all images, or one per image in the same order."),
    click.Option(["--model"], help="Folder or hub id of a SpatialScore; default: the run's own."),
    click.Option(["--backbone"], help="Folder or hub id of its pre-trained body; default: the one that it names."),
)
SAMPLE_OPTIONS = (
    click.Option(["--prompt", "prompts"], multiple=True, required=True, help="What to draw; may be given many times."),
    click.Option(["--first-seed"], type=int, default=0, show_default=True, help="Seed of a prompt's first picture."),
    click.Option(["--count"], type=click.IntRange(1), default=1, show_default=True, help="Pictures per prompt."),
    click.Option(["--base"], is_flag=True, help="Draw with the model as it was before Spatial-RL."),
    click.Option(["--out"], type=click.Path(path_type=Path), help="Folder of the pictures; default: RUN/samples."),
)
STANDS_FOR = {"data_writer": "data.writer", "data_pairs": "data.pairs", "data_budget": "data.llm.budget",
              "any_seed": "seed"}  # options for settings
WRITER = click.Option(["--writer", "data_writer"], help="Who writes; the same as data.writer=...")
SEED = click.Option(["--seed", "any_seed"], help="The same as seed=...")
BUDGET = click.Option(["--budget", "data_budget"],
                      help="Stop before a language model costs more; the same as data.llm.budget=...")
OUT = click.Option(["--out"], type=click.Path(path_type=Path), required=True,
                   help="File of JSON lines; continued where it ends.")
PROMPT_OPTIONS = (
    WRITER, click.Option(["--count", "data_pairs"], help="How many; the same as data.pairs=..."), SEED, BUDGET, OUT)
PERTURB_OPTIONS = (
    click.Option(["--prompts"], type=click.Path(path_type=Path, exists=True), required=True,
                 help="A file that `data prompts` wrote."), WRITER, SEED, BUDGET, OUT)
PUBLISH_OPTIONS = (click.Option(["--webdataset"], is_flag=True, help="Also as tar files for WebDataset."),)
PUSH_OPTIONS = (
    click.Option(["--repo"], required=True, help="NAME/DATASET; made where there is none."),
    click.Option(["--private"], is_flag=True, help="Make it private."))
IMPORT_OPTIONS = (
    click.Option(["--from", "format"], type=click.Choice(["pick-a-pic", "hpsv3"]), required=True, help="The format."),
    click.Option(["--source"], type=click.Path(path_type=Path, exists=True), required=True,
                 help="A parquet file or a folder of them (pick-a-pic), a JSON file beside its pictures (hpsv3)."))
INSPECT_OPTIONS = (
    click.Option(["--dataset"], type=click.Path(path_type=Path, exists=True), help="A dataset's folder, for --run."),
    click.Option(["--split"], type=click.Choice(["train", "validation", "test"]), default="train", show_default=True),
    click.Option(["--count"], type=click.IntRange(1), default=60, show_default=True, help="At most so many pairs."),
    click.Option(["--predicate"], help='Only pairs with an edit of it, such as "left of".'),
    click.Option(["--edit"], help="Only pairs with such an edit: flip, swap, move or depth."),
    click.Option(["--out"], type=click.Path(path_type=Path), help="The HTML file; default: pairs.html in the folder."),
    click.Option(["--open", "show"], is_flag=True, help="Open it in a browser."),
    click.Option(["--seed", "draw"], type=int, default=0, show_default=True, help="Another one draws other pairs."))
REPORT_OPTIONS = (
    click.Option(["--beside"], type=click.Path(path_type=Path), multiple=True, metavar="DIR",
                 help="Another run: its reward curve and update times beside this run's, in RUN/compare.html."),
)
STAGES = (
    Stage("data build", "data_build", "Write prompts and perturbed prompts, draw both, keep what is verified.",
          ("data",), ("data",)),
    Stage("data generate", "data_generate", "data build, up to the pictures.", ("data",), ("data",)),
    Stage("data verify", "data_verify", "data build, up to the verdicts.", ("data",), ("data",)),
    Stage("data publish", "data_publish", "data build; of what is judged it only makes the dataset, by data.keep.",
          ("data",), ("data",), options=PUBLISH_OPTIONS),
    Stage("data push", "data_push", "Upload the dataset of a run to the Hugging Face hub.", (), makes_run=False,
          options=PUSH_OPTIONS),
    Stage("data import", "data_import", "Preferences of others instead of data build.", ("data",), ("data",),
          options=IMPORT_OPTIONS),
    Stage("data inspect", "data_inspect", "A page of pairs to leaf through, with the edited words marked.", (),
          makes_run=False, options=INSPECT_OPTIONS),
    Stage("data prompts", "data_prompts", "Write prompts alone, to a file of JSON lines.", ("data",), preset="paper",
          makes_run=False, options=PROMPT_OPTIONS),
    Stage("data perturb", "data_perturb", "Change relations of each prompt of a file.", ("data",), preset="paper",
          makes_run=False, options=PERTURB_OPTIONS),
    Stage("reward train", "reward_train", "Train SpatialScore on the run's pairs.", ("reward",), ("reward",)),
    Stage("reward eval", "reward_eval", "Pairwise accuracy on the held-out pairs, by perturbation, predicate and edit.",
          ("reward",), ("reward_eval",)),
    Stage("reward score", "reward_score", "Score image files under prompts.", ("reward",), makes_run=False,
          options=SCORE_OPTIONS),
    Stage("rl train", "rl_train", "Train the generator's adapter with SpatialScore as the reward.", ("rl",), ("rl",)),
    Stage("rl sample", "rl_sample", "Draw pictures with the trained adapter, or without it.", ("rl",), makes_run=False,
          options=SAMPLE_OPTIONS),
    Stage("bench indomain", "bench_indomain", "Base against tuned generator on held-out prompts, judged by the oracle.",
          ("bench",), ("bench", "eval")),
    Stage("report", "report", "Write report.html and report.json of the run.", (),
          ("report.html", "report.json", "compare.html"), reads=True, options=REPORT_OPTIONS, card=True),
    Stage("all", "all_stages", "Every stage from prompts to report; finished ones are kept.", EVERYTHING, card=True),
    Stage("quickstart", "all_stages", "Every stage, small: the whole loop in minutes on two cores.", EVERYTHING,
          preset="quickstart", card=True),
    Stage("doctor", "doctor", "What is installed, which device, how much memory, what is missing and for what.",
          makes_run=False),
)


def main() -> None:
    """Entry point of the ``spatialt2i`` command."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a job that is preempted keeps its work like Ctrl-C
    command_line().main(prog_name="spatialt2i")


def command_line() -> click.Group:
    """The whole command line, built from `STAGES`."""
    root = click.Group("spatialt2i", help="Teach image generators where things go.")
    root = click.version_option(__version__)(root)
    groups = {name: click.Group(name, help=text) for name, text in GROUPS.items()}
    for stage in STAGES:
        group, _, name = stage.name.rpartition(" ")
        if group and group not in root.commands:
            root.add_command(groups[group])
        (groups[group] if group else root).add_command(_command(stage, name))
    return root


def _command(stage: Stage, name: str) -> click.Command:
    params: list[click.Parameter] = [
        *stage.options,
        click.Option(["--preset"], metavar="NAME_OR_FILE", help=(
            f"One of {', '.join(preset_names())}, or a TOML file; default: the run's own config, or {stage.preset}.")),
        click.Option(["--run"], type=click.Path(path_type=Path), metavar="DIR", help=(
            "The run's folder; default: runs/PRESET." if stage.makes_run else "A run's folder; default: none.")),
        click.Option(["--json", "json_file"], metavar="FILE",
                     help='Also write the figures as JSON; "-" is standard output.'),
        click.Option(["--debug"], is_flag=True, help="Show the traceback of an error."),
        click.Argument(["overrides"], nargs=-1, metavar="[SECTION.SETTING=VALUE]..."),
    ]
    if stage.makes_run:
        params.insert(-3, click.Option(
            ["--if-exists"], type=click.Choice(["resume", "raise", "delete"]), default="resume", show_default=True,
            help=f"What to do where {'the run' if not stage.folders else 'this stage of the run'} exists."))
    return click.Command(name, params=params, help=stage.help, epilog=_settings_help(stage),
                         callback=lambda **given: _run_command(stage, given))


def _settings_help(stage: Stage) -> str:
    rows = describe(Config(), stage.sections)
    text = "\n\n".join(f"\b\n{row.key} = {row.value}\n    {row.help} ({row.type})" for row in rows)
    return "\b\nSettings, with their defaults; change one with KEY=VALUE:\n\n" + text


def _run_command(stage: Stage, given: dict[str, Any]) -> None:
    """Do a stage, show its figures, and turn an error that a user can mend into one message."""
    preset, run = given["preset"], given["run"]
    if run is None and stage.makes_run:
        run = Path("runs") / Path(preset or stage.preset).stem
    _show_log()
    try:
        own = run / "config.toml" if run and is_run(run) else None
        named = [f"{setting}={given[name]}" for name, setting in STANDS_FOR.items() if given.get(name) is not None]
        config = load_config(preset or own or stage.preset, [*given["overrides"], *named])
        read = [*given.get("beside", ()), *([run] if run and (stage.reads or not stage.makes_run) else [])]
        for path in read:
            if not is_run(path):
                raise RunError(f"{path}: not a run folder; expected one that a stage of spatialt2i made")
        if_exists = given.get("if_exists", "resume")
        opened = RunDir.open(run, config, if_exists, stages=stage.folders) if run else None
        figures = _function(stage)(config, opened, **{
            o.name: given[o.name] for o in stage.options if o.name not in STANDS_FOR})
        _show(figures, given["json_file"], _card(opened) if stage.card else None)
    except KeyboardInterrupt:
        again = f"; go on with: spatialt2i {stage.name} --run {run}" if stage.makes_run else ""
        click.echo(f"\nInterrupted. Finished work is kept{again}", err=True)
        sys.exit(130)
    except (ValueError, OSError, RuntimeError, ImportError) as e:
        ours = isinstance(e, ImportError) and (e.name or "").startswith("spatialt2i")  # a fault, not a missing package
        if given["debug"] or ours or isinstance(e, BrokenPipeError):  # click ends quietly where its reader did
            raise
        click.echo(f"Error: {_message(e)}\n(--debug shows where)", err=True)
        sys.exit(2 if isinstance(e, ConfigError) else 1)


def _card(run: RunDir) -> str:
    return importlib.import_module("spatialt2i.build.stages").report_card(run)


def _function(stage: Stage) -> Callable[..., dict[str, Any]]:
    return getattr(importlib.import_module("spatialt2i.build.stages"), stage.target)


def _message(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return (f"the package {error.name} is not installed; pip install '.[all]' in a checkout of spatialt2i brings "
                "everything")
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which this module does not import
        return (f"{error}\nLower rl.micro_batch and rl.sample_batch, or reward.micro_batch and reward.score_batch, and "
                "run the same command again: they change no result, and finished work is kept")
    return str(error) or type(error).__name__


def _show_log() -> None:
    """Let the package's log messages appear on standard error, as they are."""
    log = logging.getLogger("spatialt2i")
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)


def _show(figures: dict[str, Any], json_file: str | None, card: str | None) -> None:
    lines = list(figure_lines({k: v for k, v in figures.items() if k not in LONG}))
    width = max((len(key) for key, _ in lines), default=0)
    listing = "".join(f"{key:<{width}}  {text}\n" for key, text in lines)
    click.echo(card or listing, nl=False, err=json_file == "-")
    if json_file == "-":
        click.echo(json_text(figures), nl=False)
    elif json_file:
        try:
            write_json(json_file, figures)
        except OSError as e:
            raise OSError(f"--json {json_file}: cannot be written ({e}); name another file") from e


def figure_lines(figures: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Figures as (dotted key, text); a value with an interval is one line: ``0.952 [0.940, 0.963] of 2000``."""
    for name, value in figures.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and {"value", "lo", "hi", "n"} <= value.keys():
            yield key, f"{_number(value['value'])} [{_number(value['lo'])}, {_number(value['hi'])}] of {value['n']}"
        elif isinstance(value, dict):
            yield from figure_lines(value, f"{key}.")
        elif isinstance(value, list) and any(isinstance(v, dict) for v in value):
            yield from figure_lines({str(i): v for i, v in enumerate(value)}, f"{key}.")
        else:
            yield key, ", ".join(map(_number, value)) or "none" if isinstance(value, list) else _number(value)


def _number(value: Any) -> str:
    if value is None:
        return "not judged"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
