"""Run folders, seeds, atomic writes, measuring."""

from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from spatialt2i.core import run as run_module
from spatialt2i.core.config import (
    BenchConfig, Config, DataConfig, EndpointConfig, RewardConfig, RLConfig, load_config,
)
from spatialt2i.core.device import measured
from spatialt2i.core.run import (
    DiskFull, RunDir, RunError, atomic_path, disk_errors, is_run, lasting, progress, read_json, seed_of, tree_hash,
    versions, write_atomic, write_json,
)

SRC = Path(__file__).resolve().parents[2] / "src"


def other_config() -> Config:
    return dataclasses.replace(Config(), seed=7, rl=dataclasses.replace(RLConfig(), top_k=4))


# ---- seeds

def test_a_seed_depends_on_every_part_and_on_nothing_else() -> None:
    parts = (0, "rl", 3, "p-1", 5)
    assert seed_of(*parts) == 325324856354803148 == seed_of(*parts)
    others = [(1, "rl", 3, "p-1", 5), (0, "data", 3, "p-1", 5), (0, "rl", 4, "p-1", 5), (0, "rl", 3, "p-15"), parts[:-1],
              (0, "rl", "3", "p-1", 5), (0, "rl", 5, "p-1", 3)]
    seeds = {seed_of(*p) for p in [parts, *others]}
    assert len(seeds) == len(others) + 1
    assert all(0 <= s < 2**63 for s in seeds)
    assert seed_of(np.int64(3), "x") == seed_of(3, "x")


# ---- opening

def test_a_new_run_stores_its_resolved_config(tmp_path: Path) -> None:
    run = RunDir.open(tmp_path / "a" / "run", other_config())
    assert load_config(run.path / "config.toml") == other_config()
    assert is_run(run.path) and not is_run(tmp_path)


def with_results(path: Path, config: Config, *stages: str) -> RunDir:
    run = RunDir.open(path, config)
    for name in stages:
        (run.stage(name) / "x").write_text("x")
    return run


def test_settings_of_a_stage_with_results_may_not_change(tmp_path: Path) -> None:
    with_results(tmp_path, Config(), "rl")
    with pytest.raises(RunError, match=r"rl.top_k is 6 there and 4 now, and rl/ has results.*--if-exists delete"):
        RunDir.open(tmp_path, dataclasses.replace(Config(), rl=RLConfig(top_k=4)))
    with pytest.raises(RunError, match="seed is 0 there and 7 now, and rl/ has results"):
        RunDir.open(tmp_path, dataclasses.replace(Config(), seed=7))


def test_settings_of_a_stage_without_results_may_change_and_are_stored(tmp_path: Path) -> None:
    with_results(tmp_path, Config(), "data", "reward")
    changed = dataclasses.replace(Config(), rl=RLConfig(top_k=4))
    RunDir.open(tmp_path, changed)
    assert load_config(tmp_path / "config.toml") == changed


def test_a_stage_made_afresh_may_have_other_settings(tmp_path: Path) -> None:
    with_results(tmp_path, Config(), "data", "rl")
    RunDir.open(tmp_path, dataclasses.replace(Config(), rl=RLConfig(top_k=4)), "delete", stages=["rl"])
    assert (tmp_path / "data" / "x").exists() and not (tmp_path / "rl").exists()


def test_a_refused_delete_deletes_nothing(tmp_path: Path) -> None:
    with_results(tmp_path, Config(), "reward", "rl")
    with pytest.raises(RunError, match="reward/ has results"):
        RunDir.open(tmp_path, dataclasses.replace(Config(), reward=RewardConfig(steps=1)), "delete", stages=["rl"])
    assert (tmp_path / "rl" / "x").exists()


def test_more_rl_steps_and_other_batch_sizes_are_no_other_run(tmp_path: Path) -> None:
    with_results(tmp_path, Config(), "reward", "rl")
    RunDir.open(tmp_path, dataclasses.replace(Config(), rl=RLConfig(steps=400, sample_batch=1, gate_tolerance=1e-3),
                                              reward=RewardConfig(micro_batch=1)))


@pytest.mark.parametrize("stage", ["data", "rl", "bench"])
def test_evaluation_prompts_may_not_change_under_what_kept_apart_from_them(stage: str, tmp_path: Path) -> None:
    with_results(tmp_path, Config(), stage)
    more = dataclasses.replace(Config(), bench=BenchConfig(hard_prompts=400))
    with pytest.raises(RunError, match=f"bench.hard_prompts is 200 there and 400 now, and {stage}/ has results. Use "
                                       "the same settings or name another --run$"):
        RunDir.open(tmp_path, more)
    RunDir.open(tmp_path, more, "delete", stages=[stage])


def test_resume_allows_another_machine(tmp_path: Path) -> None:
    RunDir.open(tmp_path, Config())
    RunDir.open(tmp_path, dataclasses.replace(Config(), device="cpu", threads=1))


def test_raise_refuses_a_run(tmp_path: Path) -> None:
    RunDir.open(tmp_path, Config(), "raise")
    with pytest.raises(RunError, match="--if-exists resume"):
        RunDir.open(tmp_path, Config(), "raise")


def test_delete_starts_afresh_even_with_another_config(tmp_path: Path) -> None:
    run = RunDir.open(tmp_path / "run", Config())
    (run.stage("data") / "x").write_text("x")
    run = RunDir.open(tmp_path / "run", other_config(), "delete")
    assert [p.name for p in run.path.iterdir()] == ["config.toml"]
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_raise_and_delete_of_one_stage_leave_the_others(tmp_path: Path) -> None:
    run = RunDir.open(tmp_path, Config())
    for name in ("data", "rl"):
        (run.stage(name) / "x").write_text("x")
    RunDir.open(tmp_path, Config(), "raise", stages=["reward"])
    with pytest.raises(RunError, match="exists already"):
        RunDir.open(tmp_path, Config(), "raise", stages=["reward", "rl"])
    RunDir.open(tmp_path, Config(), "delete", stages=["rl"])
    assert (tmp_path / "data" / "x").exists() and not (tmp_path / "rl").exists()


@pytest.mark.parametrize("if_exists", ["resume", "raise", "delete"])
def test_a_folder_that_is_not_a_run_is_left_alone(if_exists: str, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / "config.toml").write_text("title = 'of another program'\n")
    with pytest.raises(RunError, match="not a run folder"):
        RunDir.open(tmp_path, Config(), if_exists)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_file_is_not_a_run(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    with pytest.raises(RunError, match="is a file"):
        RunDir.open(tmp_path / "x", Config())


def test_an_unknown_choice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected resume, raise or delete"):
        RunDir.open(tmp_path, Config(), "overwrite")


def test_a_run_killed_while_it_was_made_can_be_opened(tmp_path: Path) -> None:
    (tmp_path / ".config.toml.tmp").write_text("half")
    assert is_run(RunDir.open(tmp_path, Config()).path)


# ---- manifests and metrics

def test_a_stage_is_done_when_its_manifest_has_the_key(tmp_path: Path) -> None:
    run = RunDir.open(tmp_path, Config())
    assert not run.done("data", "k1") and run.manifest("data") is None
    run.finish("data", key="k1", counts={"pairs": 3}, seconds=1.5, peak_mb=20.0, extra={"note": float("nan")})
    assert run.done("data", "k1") and not run.done("data", "k2")
    manifest = run.manifest("data")
    assert manifest["counts"] == {"pairs": 3} and manifest["note"] is None and manifest["seconds"] == 1.5
    assert manifest["config"]["rl"]["top_k"] == 6 and manifest["versions"].keys() >= {"python", "numpy"}


def test_a_stage_whose_outputs_or_inputs_changed_is_not_done(tmp_path: Path) -> None:
    run = with_results(tmp_path, Config(), "reward", "rl")
    run.finish("reward", key="k", counts={}, seconds=0, peak_mb=0, outputs=["reward/x"])
    run.finish("rl", key="k", counts={}, seconds=0, peak_mb=0, inputs=["reward"], outputs=["rl/x"])
    assert run.done("reward", "k") and run.done("rl", "k")
    (tmp_path / "rl" / "x").write_text("damaged")
    assert not run.done("rl", "k") and run.manifest("rl")
    (tmp_path / "reward" / "x").write_text("another model")
    assert not run.done("reward", "k")
    run.finish("reward", key="k", counts={}, seconds=0, peak_mb=0, outputs=["reward/x"])
    assert run.manifest("rl") is None


def test_a_folder_has_the_hash_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x").write_text("x")
    before = tree_hash(tmp_path / "a")
    assert tree_hash(tmp_path / "nothing") is None and before == tree_hash(tmp_path / "a")
    (tmp_path / "a" / "b" / "x").rename(tmp_path / "a" / "x")
    assert tree_hash(tmp_path / "a") != before


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    run = RunDir.open(tmp_path, Config())
    (run.stage("data") / "manifest.json").write_text('{"key": ')
    with pytest.raises(ValueError, match="manifest.json: not JSON"):
        run.done("data", "k")


def test_metrics_are_logged_truncated_and_drawn_again(tmp_path: Path) -> None:
    run = RunDir.open(tmp_path, Config())
    for step in range(5):
        run.log("rl", step, {"reward": np.float32(step / 2), "kl": float("nan")})
    assert run.metrics("rl")[4] == {"step": 4, "reward": 2.0, "kl": None}
    with (tmp_path / "rl" / "metrics.jsonl").open("a") as f:
        f.write('{"step": 5, "rew')  # kill -9 in the middle of a line
    run.truncate_metrics("rl", 3)
    run.log("rl", 3, {"reward": 9.0})
    assert [(r["step"], r["reward"]) for r in run.metrics("rl")] == [(0, 0.0), (1, 0.5), (2, 1.0), (3, 9.0)]
    run.finish("rl", key="k", counts={}, seconds=0, peak_mb=0)
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(tmp_path / "rl" / "tb"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [(0, 0.0), (1, 0.5), (2, 1.0), (3, 9.0)]


def test_a_damaged_line_in_the_middle_of_the_metrics_is_named(tmp_path: Path) -> None:
    run = RunDir.open(tmp_path, Config())
    (run.stage("rl") / "metrics.jsonl").write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(RunError, match="metrics.jsonl, line 2"):
        run.metrics("rl")


# ---- files

def test_writing_replaces_the_whole_file_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.bin"
    write_atomic(path, b"old")
    with pytest.raises(ZeroDivisionError), atomic_path(path) as temporary:
        temporary.write_bytes(b"half")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old" and [p.name for p in path.parent.iterdir()] == ["x.bin"]
    write_atomic(path, "new")
    assert path.read_text() == "new"


def test_a_folder_can_be_written_atomically(tmp_path: Path) -> None:
    for text in ("one", "two"):
        with atomic_path(tmp_path / "model") as temporary:
            temporary.mkdir()
            (temporary / "weights").write_text(text)
    assert (tmp_path / "model" / "weights").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_is_one_clear_error_and_leaves_nothing_behind(tmp_path: Path, monkeypatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_atomic(tmp_path / "x", b"old")
    monkeypatch.setattr(run_module.os, "fsync", full)
    with pytest.raises(DiskFull, match="x: the disk is full; free some space and run the same command again"):
        write_atomic(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_really_full_device_is_recognised() -> None:
    with pytest.raises(DiskFull), disk_errors(Path("/dev/full")), open("/dev/full", "wb") as f:
        f.write(b"x" * 10_000)
        f.flush()


def test_other_errors_keep_their_type(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), disk_errors(tmp_path):
        raise PermissionError(errno.EACCES, "no")
    with pytest.raises(DiskFull), disk_errors(tmp_path):
        raise RuntimeError("I/O error: No space left on device (os error 28)")


def test_kill_9_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_atomic(path, "old")
    code = ("import sys, time; from spatialt2i.core.run import atomic_path\n"
            "with atomic_path(sys.argv[1]) as t:\n    t.write_text('half'); print('ready', flush=True); time.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, cwd=SRC)
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert path.read_text() == "old"
    write_atomic(path, "new")
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_json_has_no_nan_in_it(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": float("nan"), "b": [1.5, float("inf")], "c": {"d": "é"}})
    assert read_json(tmp_path / "x.json") == {"a": None, "b": [1.5, None], "c": {"d": "é"}}
    json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail)


# ---- progress, cost, versions

def test_progress_counts_items_and_steps(capsys) -> None:
    assert list(progress([1, 2, 3], desc="items")) == [1, 2, 3]
    bar = progress(10, desc="steps", initial=4)
    bar.update(6)
    bar.close()
    captured = capsys.readouterr()
    assert captured.out == "" and "items" in captured.err and "10/10" in captured.err


def hold_memory(megabytes: int, seconds: float) -> None:
    block = np.ones(megabytes * 2**20, dtype=np.uint8)
    time.sleep(seconds)
    assert block[-1] == 1


def test_measured_sees_memory_of_children_and_time(tmp_path: Path) -> None:
    with measured(tmp_path / "quiet.json") as quiet:
        pass
    with measured(tmp_path / "cost.json") as cost:
        child = multiprocessing.get_context("spawn").Process(target=hold_memory, args=(200, 1.0))
        child.start()
        child.join()
    assert child.exitcode == 0
    assert cost.peak_mb > quiet.peak_mb + 190
    assert cost.seconds >= 1.0 > quiet.seconds


def test_measured_goes_on_from_an_interrupted_block(tmp_path: Path) -> None:
    ledger = tmp_path / "cost.json"
    with pytest.raises(KeyboardInterrupt), measured(ledger):
        raise KeyboardInterrupt
    write_json(ledger, read_json(ledger) | {"seconds": 100.0, "peak_mb": 1e6})
    with measured(ledger) as cost:
        pass
    assert cost.peak_mb == 1e6 and 100 < cost.seconds < 110


def test_versions_name_what_can_change_a_result() -> None:
    assert versions().keys() >= {"python", "numpy", "pyarrow"}


def test_what_lasts_is_what_has_a_say_in_the_results() -> None:
    assert lasting("rl", RLConfig()) == lasting("rl", RLConfig(lr=3e-4, noise=0.9, save_every=3))
    assert lasting("data", DataConfig(relations=(0, 1))) == lasting("data", DataConfig(relations=(0.0, 1.0)))
    assert len({str(lasting("rl", RLConfig(top_k=k))) for k in range(6)}) == 6
    for writer, says in (("grammar", False), ("llm", True)):
        one, other, dearer = (DataConfig(writer=writer, llm=EndpointConfig(**settings))
                              for settings in ({}, {"model": "other"}, {"budget": 5.0}))
        assert (lasting("data", one) != lasting("data", other)) == says
        assert lasting("data", one) == lasting("data", dearer)
