"""The command line: one table, help from the config, clear errors, exit codes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from spatialt2i import cli
from spatialt2i.core.config import Config, RLConfig, describe, load_config
from spatialt2i.core.run import RunDir

SRC = Path(__file__).resolve().parent.parent / "src"
NAMES = [stage.name for stage in cli.STAGES]


def spatialt2i(*args: str | Path) -> Result:
    return CliRunner().invoke(cli.command_line(), [str(a) for a in args], catch_exceptions=False)


@pytest.fixture
def stage(monkeypatch) -> SimpleNamespace:
    """Replaces every stage's work; ``calls`` are what it was given, ``work`` what it does instead."""
    seen = SimpleNamespace(calls=[], work=lambda config, run: {"done": True})

    def function(config: Config, run: RunDir | None, **options: Any) -> dict[str, Any]:
        seen.calls.append((config, run, options))
        return seen.work(config, run)

    monkeypatch.setattr(cli, "_function", lambda stage: function)
    monkeypatch.setattr(cli, "_card", lambda run: f"the card of {run.path}\n")
    return seen


def test_the_commands_are_there() -> None:
    assert NAMES == ["data build", "data generate", "data verify", "data publish", "data push", "data import",
                     "data inspect", "data prompts", "data perturb", "reward train", "reward eval", "reward score",
                     "rl train", "rl sample", "bench indomain", "report", "all", "quickstart", "doctor"]


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_its_function(name: str) -> None:
    from spatialt2i.build import stages
    assert callable(getattr(stages, next(s for s in cli.STAGES if s.name == name).target))


@pytest.mark.parametrize("stage", cli.STAGES, ids=lambda s: s.name)
def test_help_names_every_field_with_default_and_meaning(stage: cli.Stage) -> None:
    result = spatialt2i(*stage.name.split(), "--help")
    assert result.exit_code == 0 and stage.help.split()[0] in result.output
    assert all(option in result.output for option in ("--preset", "--run", "--json", "--debug"))
    starts_work = stage.name not in (
        "data push", "data inspect", "data prompts", "data perturb", "reward score", "rl sample", "doctor")
    assert ("--if-exists" in result.output) == starts_work
    for row in describe(Config(), stage.sections):
        assert f"  {row.key} = {row.value}\n" in result.output
        assert f"      {row.help} ({row.type})" in result.output


def test_help_shows_only_the_sections_of_the_command() -> None:
    output = spatialt2i("rl", "train", "--help").output
    assert "rl.top_k = 6" in output and "bench.bootstrap" not in output


def test_a_stage_gets_preset_overrides_and_run(stage: SimpleNamespace, tmp_path: Path) -> None:
    result = spatialt2i("rl", "train", "rl.top_k=5", "--preset", "paper", "--run", tmp_path / "r", "seed=3")
    assert result.exit_code == 0, result.output
    (config, run, options), = stage.calls
    assert (config.seed, config.rl.top_k, config.rl.lr) == (3, 5, RLConfig().lr)
    assert run.path == tmp_path / "r" and load_config(tmp_path / "r" / "config.toml") == config
    assert options == {}


def test_a_run_is_continued_with_its_own_config(stage: SimpleNamespace, tmp_path: Path) -> None:
    spatialt2i("data", "build", "--preset", "paper", "--run", tmp_path / "r", "seed=3")
    assert spatialt2i("rl", "train", "--run", tmp_path / "r").exit_code == 0
    assert stage.calls[0][0] == stage.calls[1][0] and stage.calls[1][0].seed == 3


def test_without_a_run_and_preset_there_are_defaults(stage: SimpleNamespace, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    spatialt2i("data", "build")
    spatialt2i("quickstart")
    assert [str(run.path) for _, run, _ in stage.calls] == ["runs/tiny", "runs/quickstart"]
    assert [config for config, _, _ in stage.calls] == [load_config("tiny"), load_config("quickstart")]


def test_if_exists_looks_at_the_stage_alone_or_at_the_whole_run(stage: SimpleNamespace, tmp_path: Path) -> None:
    spatialt2i("data", "build", "--run", tmp_path)
    (RunDir.open(tmp_path, load_config("tiny")).stage("data") / "x").write_text("x")
    assert spatialt2i("rl", "train", "--run", tmp_path, "--if-exists", "raise").exit_code == 0
    assert spatialt2i("data", "build", "--run", tmp_path, "--if-exists", "raise").exit_code == 1
    assert spatialt2i("all", "--run", tmp_path, "--if-exists", "raise").exit_code == 1
    assert spatialt2i("rl", "train", "--run", tmp_path, "--if-exists", "delete").exit_code == 0
    assert (tmp_path / "data" / "x").exists()
    assert spatialt2i("all", "--run", tmp_path, "--if-exists", "delete").exit_code == 0
    assert not (tmp_path / "data").exists()
    (tmp_path / "report.html").write_text("x")
    assert spatialt2i("report", "--run", tmp_path, "--if-exists", "raise").exit_code == 1
    assert spatialt2i("report", "--run", tmp_path, "--if-exists", "delete").exit_code == 0
    assert not (tmp_path / "report.html").exists()


def test_own_options_reach_the_stage(stage: SimpleNamespace) -> None:
    spatialt2i("reward", "score", "--image", "a.png", "--image", "b.png", "--prompt", "x", "--model", "m")
    (_, run, options), = stage.calls
    assert run is None
    assert options == {"images": (Path("a.png"), Path("b.png")), "prompts": ("x",), "model": "m", "backbone": None}


@pytest.mark.parametrize("command", ["doctor", "report"])
def test_commands_that_only_read_a_run_make_no_folder(command: str, stage: SimpleNamespace, tmp_path: Path) -> None:
    result = spatialt2i(command, "--run", tmp_path / "r")
    assert result.exit_code == 1 and "not a run folder" in result.output and not (tmp_path / "r").exists()


def test_only_runs_are_compared(stage: SimpleNamespace, tmp_path: Path) -> None:
    run, other = (RunDir.open(tmp_path / name, load_config("tiny")).path for name in "ab")
    result = spatialt2i("report", "--run", run, "--beside", other, "--beside", tmp_path / "nowhere")
    assert result.exit_code == 1 and f"{tmp_path / 'nowhere'}: not a run folder" in result.stderr
    assert spatialt2i("report", "--run", run, "--beside", other).exit_code == 0
    assert stage.calls[0][2] == {"beside": (other,)}


# ---- figures

FIGURES = {"accuracy": {"one": {"value": 0.951234, "lo": 0.94, "hi": 0.96, "n": 2000}}, "judge": "oracle", "bad": None,
           "rows": [{"mean": 1.5}], "none": []}


def test_figures_are_shown_and_written(stage: SimpleNamespace, tmp_path: Path) -> None:
    stage.work = lambda config, run: FIGURES
    result = spatialt2i("reward", "eval", "--run", tmp_path / "r", "--json", tmp_path / "out" / "x.json")
    assert "accuracy.one  0.9512 [0.94, 0.96] of 2000" in result.stdout
    assert "bad           not judged" in result.stdout and "rows.0.mean   1.5" in result.stdout
    assert json.loads((tmp_path / "out" / "x.json").read_text()) == FIGURES


def test_a_whole_run_ends_with_its_report_card(stage: SimpleNamespace, tmp_path: Path) -> None:
    RunDir.open(tmp_path / "report", load_config("tiny"))  # the only one that wants the run to be there
    for name in ("report", "all", "quickstart"):
        assert spatialt2i(name, "--run", tmp_path / name).stdout == f"the card of {tmp_path / name}\n"


def test_json_on_standard_output_is_json_alone(stage: SimpleNamespace, tmp_path: Path) -> None:
    stage.work = lambda config, run: FIGURES
    result = spatialt2i("reward", "eval", "--run", tmp_path / "r", "--json", "-")
    assert json.loads(result.stdout) == FIGURES and "accuracy.one" in result.stderr


def test_nan_becomes_null_on_standard_output(stage: SimpleNamespace, tmp_path: Path) -> None:
    stage.work = lambda config, run: {"x": float("nan")}
    result = spatialt2i("reward", "eval", "--run", tmp_path / "r", "--json", "-")
    assert json.loads(result.stdout, parse_constant=pytest.fail) == {"x": None}


def test_figures_that_cannot_be_written_are_an_error_and_still_shown(stage: SimpleNamespace, tmp_path: Path) -> None:
    stage.work = lambda config, run: FIGURES
    (tmp_path / "file").write_text("x")
    target = tmp_path / "file" / "x.json"
    result = spatialt2i("reward", "eval", "--run", tmp_path / "r", "--json", target)
    assert result.exit_code == 1 and f"Error: --json {target}: cannot be written" in result.stderr
    assert "accuracy.one" in result.stdout and "Traceback" not in result.output


# ---- errors

@pytest.mark.parametrize(("args", "code", "words"), [
    (["rl", "train", "rl.topk=3"], 2, "did you mean rl.top_k?"),
    (["rl", "train", "--preset", "tinny"], 2, "did you mean tiny?"),
    (["rl", "train", "--if-exists", "burn"], 2, "'burn' is not one of"),
    (["rl", "trian"], 2, "No such command"),
    (["reward", "score", "--prompt", "x"], 2, "Missing option '--image'"),
])
def test_bad_input_is_one_message_and_exit_code_2(args: list[str], code: int, words: str, tmp_path: Path,
                                                  monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = spatialt2i(*args)
    assert result.exit_code == code and words in result.stderr and "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [ValueError("a cause"), OSError("a cause"), RuntimeError("a cause")])
def test_a_known_error_is_one_message_and_exit_code_1(error: Exception, stage: SimpleNamespace, tmp_path: Path) -> None:
    def work(config: Config, run: RunDir) -> dict[str, Any]:
        raise error

    stage.work = work
    result = spatialt2i("rl", "train", "--run", tmp_path / "r")
    assert result.exit_code == 1 and result.stderr.startswith("Error: a cause\n") and result.stdout == ""
    with pytest.raises(type(error)):
        spatialt2i("rl", "train", "--run", tmp_path / "r", "--debug")


def test_a_missing_package_names_the_extra(stage: SimpleNamespace, tmp_path: Path) -> None:
    def work(config: Config, run: RunDir) -> dict[str, Any]:
        raise ModuleNotFoundError("No module named 'diffusers'", name="diffusers")

    stage.work = work
    result = spatialt2i("rl", "train", "--run", tmp_path / "r")
    assert result.exit_code == 1 and "package diffusers is not installed; pip install '.[all]'" in result.stderr


def test_a_fault_in_the_program_is_not_hidden(stage: SimpleNamespace, tmp_path: Path) -> None:
    def work(config: Config, run: RunDir) -> dict[str, Any]:
        raise KeyError("a bug")

    stage.work = work
    with pytest.raises(KeyError):
        spatialt2i("rl", "train", "--run", tmp_path / "r")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_say_how_to_go_on_and_exit_with_130(number: int, tmp_path: Path) -> None:
    code = ("import time; from spatialt2i import cli\n"
            "def work(config, run): print('ready', flush=True); time.sleep(60)\n"
            "cli._function = lambda stage: work\ncli.main()")
    process = subprocess.Popen([sys.executable, "-c", code, "rl", "train", "--run", str(tmp_path / "r")], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=SRC)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in stderr
    assert f"go on with: spatialt2i rl train --run {tmp_path / 'r'}" in stderr


# ---- the stages' own checks, as far as they need no model

def test_a_stage_names_the_stage_that_must_come_first(tmp_path: Path) -> None:
    for args, first in ((["reward", "train"], "data build"), (["reward", "eval"], "reward train"),
                        (["rl", "train"], "reward train"), (["bench", "indomain"], "rl train"),
                        (["rl", "sample", "--prompt", "x"], "rl train")):
        RunDir.open(tmp_path / "r", load_config("tiny"))
        result = spatialt2i(*args, "--run", tmp_path / "r")
        assert result.exit_code == 1 and f"run `spatialt2i {first} --run {tmp_path / 'r'}` first" in result.stderr


@pytest.mark.parametrize(("args", "words"), [
    (["--prompt", "x"], "which SpatialScore?"),
    (["--prompt", "x", "--prompt", "y", "--model", "m"], "2 prompts for 1 images"),
    (["--prompt", " ", "--model", "m"], "empty prompt"),
    (["--prompt", "x", "--model", "m"], "no such image file"),
])
def test_scoring_checks_its_input(args: list[str], words: str, tmp_path: Path) -> None:
    result = spatialt2i("reward", "score", "--image", tmp_path / "no.png", *args)
    assert result.exit_code == 1 and words in result.stderr


def test_a_corrupt_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n half")
    result = spatialt2i("reward", "score", "--image", tmp_path / "x.png", "--prompt", "x", "--model", "m")
    assert result.exit_code == 1 and "x.png: not a picture that can be decoded" in result.stderr


def test_doctor_reports_machine_weights_and_run(tmp_path: Path) -> None:
    run = RunDir.open(tmp_path, load_config("tiny"))
    run.finish("data", key="k", counts={}, seconds=12, peak_mb=345)
    result = spatialt2i("doctor", "--run", tmp_path, "--json", "-")
    found = json.loads(result.stdout)
    assert found["cores"] >= 1 and found["weights"].keys() == {"tiny-flux", "tiny-qwen2.5-vl"}
    assert found["stages"] == {"data": "finished in 12 s, peak 345 MB"}
    assert {"missing", "versions", "device", "memory_gb", "disk_free_gb"} <= found.keys()


def test_doctor_works_without_torch(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    result = spatialt2i("doctor")
    assert result.exit_code == 0 and "importing it fails" in result.stdout
