"""The whole method, small: every stage from prompts to report through the command line, and the same after kills.

Needs the shipped tiny weights. The sizes are far too small to learn anything; what is tested is that the stages fit
together, that the report has what it promises, and that a killed run ends like one that was left alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spatialt2i.build import stages
from spatialt2i.build.parts import SHIPPED, WEIGHTS
from spatialt2i.core.config import load_config
from spatialt2i.core.run import RunDir
from spatialt2i.rl.policy import PromptError

SMALL = ["threads=1", "data.pairs=400", "data.shard=100", "data.workers=2", "data.validation=0.1", "data.test=0.1",
         "reward.steps=12", "reward.batch=8", "reward.micro_batch=8", "reward.eval_every=6", "reward.eval_pairs=16",
         "reward.save_every=3", "rl.steps=3", "rl.prompts_per_step=1", "rl.group=6", "rl.top_k=2", "rl.save_every=1",
         "rl.rollout_steps=3", "rl.train_steps=2", "rl.eval_steps=3", "rl.gallery_prompts=2",
         "bench.in_domain_prompts=6", "bench.hard_prompts=4", "bench.bootstrap=200"]
STAGES = ("data build", "reward train", "reward eval", "rl train", "bench indomain", "report")
RESULTS = ("data/data/*.parquet", "reward/model/*", "rl/adapter/*", "eval/*/*/*.png", "eval/*.jsonl")

pytestmark = pytest.mark.skipif(not all((WEIGHTS / name / "manifest.json").exists() for name in SHIPPED),
                                reason="the tiny weights are not installed: make tiny-weights")


def start(stage: str, run: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", "from spatialt2i.cli import main; main()", *stage.split(), "--run", str(run)]
    if not (run / "config.toml").exists():
        command += ["--preset", "quickstart", *SMALL]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
                            env=os.environ | {"HF_HUB_OFFLINE": "1"})


def finish(stage: str, run: Path) -> float:
    begun = time.monotonic()
    process = start(stage, run)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, f"{stage}: {output[-3000:]}"
    return time.monotonic() - begun


def content(path: Path) -> str:
    """Hash of a file; of a safetensors file without the order of its metadata, which the format leaves open."""
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        size = int.from_bytes(data[:8], "little")
        header = json.dumps(json.loads(data[8:8 + size]), sort_keys=True)
        data = header.encode() + data[8 + size:]
    return hashlib.sha256(data).hexdigest()


def results(run: Path) -> dict[str, str]:
    files = sorted(path for pattern in RESULTS for path in run.glob(pattern) if path.is_file())
    return {str(path.relative_to(run)): content(path) for path in files}


def figures(run: Path) -> dict[str, dict]:
    found = {path.parent.name: json.loads(path.read_text())["figures"] for path in run.glob("*/manifest.json")}
    found["rl"].pop("gate_log_ratio", None)  # of the last call alone
    return found


@pytest.fixture(scope="module")
def calm(tmp_path_factory) -> tuple[Path, dict[str, float]]:
    """A run that nobody disturbed, and how long its stages took in seconds."""
    run = tmp_path_factory.mktemp("pipeline") / "run"
    return run, {stage: finish(stage, run) for stage in STAGES}


def test_the_report_has_every_promised_figure(calm):
    run, _ = calm
    report = json.loads((run / "report.json").read_text())
    accuracy = report["reward"]["accuracy"]
    interval = {"value", "lo", "hi", "n"}
    assert set(accuracy) == {"one", "two_three", "overall"} and all(set(a) == interval for a in accuracy.values())
    assert accuracy["overall"]["n"] == accuracy["one"]["n"] + accuracy["two_three"]["n"] > 0
    for name, prompts in (("in_domain", 6), ("hard", 4)):
        for model in ("base", "tuned"):
            found = report["rl"][name][model]
            assert set(found) >= {"relations", "all", "presence", "clean"}
            assert all(0 <= share <= 1 for share in found.values())
            assert report["rl"][name]["intervals"][model]["all"]["n"] == prompts
        assert set(report["rl"][name]["gain_all"]) == interval
    scores = report["rl"]["spatialscore"]
    assert isinstance(scores["base"], float) and isinstance(scores["tuned"], float)
    for stage in ("data", "reward", "reward_eval", "rl", "bench"):
        assert report["cost"][stage]["seconds"] > 0 and report["cost"][stage]["peak_mb"] > 0
    assert report["seed"] == 0 and "torch" in report["versions"]


def test_the_page_names_the_evaluation_prompts_and_loads_nothing(calm):
    run, _ = calm
    page = (run / "report.html").read_text()
    first = json.loads((run / "eval" / "in_domain.jsonl").read_text().splitlines()[0])
    assert first["prompt"] in page and "data:image/png;base64," in page
    assert 'src="http' not in page and 'href="http' not in page


def test_evaluation_prompts_are_in_no_training_set(calm):
    run, _ = calm
    import datasets
    held_out = {json.loads(line)["prompt"] for name in ("in_domain", "hard")
                for line in (run / "eval" / f"{name}.jsonl").read_text().splitlines()}
    rows = datasets.load_dataset(str(run / "data"), cache_dir=str(run.parent / "cache"))
    seen = {text for split in rows.values() for column in ("prompt", "perturbed_prompt") for text in split[column]}
    assert len(seen) > 500 and not held_out & seen


@pytest.mark.parametrize(("settings", "name"), [
    ((), r"(in_domain|hard)-\d+"),
    (("bench.in_domain_relations=[1]", "bench.hard_relations=[1]"), r"rl-\d+-\d+")])
def test_a_prompt_that_the_encoders_cannot_take_stops_before_training(settings, name, tmp_path):
    config = load_config("quickstart", ["rl.max_text_tokens=16", *settings])
    run = RunDir.open(tmp_path, config)
    run.finish("reward", key="", counts={}, seconds=0, peak_mb=0)
    with pytest.raises(PromptError, match=f"prompt '{name}' has .* expected at most rl.max_text_tokens = 16"):
        stages.rl_train(config, run)


def test_finished_stages_are_not_done_again(calm):
    run, _ = calm
    before = {path: path.stat().st_mtime_ns for path in run.glob("*/manifest.json")}
    finish("all", run)
    assert before == {path: path.stat().st_mtime_ns for path in run.glob("*/manifest.json")}


def test_killed_at_random_moments_ends_the_same(calm, tmp_path):
    """Every stage is killed with SIGKILL in each third of its time before it may finish."""
    run, seconds = calm
    moments = random.Random()
    moments.seed(seed := int.from_bytes(os.urandom(4), "big"))
    other = tmp_path / "run"
    killed = dict.fromkeys(STAGES, 0)
    for stage in STAGES:
        for begin, end in ((0.05, 0.3), (0.3, 0.6), (0.6, 0.9)):
            process = start(stage, other)
            try:
                process.communicate(timeout=moments.uniform(begin, end) * seconds[stage])
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                killed[stage] += 1
        finish(stage, other)
    # a late moment may miss: the stage goes on from where it was killed, and the calm run also waited for cold files
    assert all(killed.values()) and sum(killed.values()) >= 10, f"moments of seed {seed} came too late: {killed}"
    assert results(other) == results(run), f"seed of the moments: {seed}"
    assert figures(other) == figures(run), f"seed of the moments: {seed}"
