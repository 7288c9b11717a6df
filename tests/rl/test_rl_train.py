import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rl_parts import Redness, prompts_of, shake
from safetensors.torch import load_file

from spatialt2i.core.config import Config
from spatialt2i.core.run import DiskFull, RunDir, interrupts_held
from spatialt2i.core.types import Scores
from spatialt2i.rl import checkpoint, train
from spatialt2i.rl.credit import RewardError, normalize, select_extremes
from spatialt2i.rl.gate import GateError
from spatialt2i.rl.policy import FluxPolicy


class Scripted(Redness):
    """Redness, with something done at the n-th call."""

    def __init__(self, at, what):
        self.calls, self.at, self.what = 0, at, what

    def score(self, *, images, prompts):
        scores = super().score(images=images, prompts=prompts)
        self.calls += 1
        return self.what(scores) if self.calls == self.at else scores


def open_run(path):
    return RunDir.open(path, Config())


def go(path, make_policy, config, *, scorer=None, gallery=(), seed=3, inputs="w"):
    """A run, or its continuation, with everything made anew as in a new process."""
    policy = make_policy(**{f: getattr(config, f) for f in ("micro_batch", "sample_batch", "kernel")})
    result = train.train(policy=policy, scorer=scorer or Redness(), prompts=prompts_of, config=config, seed=seed,
                         run=open_run(path), gallery=gallery, inputs=inputs)
    return policy, result


def outcome(path):
    """What must be equal bit for bit: adapter, checkpoint, and metrics without the seconds."""
    rl = Path(path, "rl")
    newest = sorted((rl / "checkpoints").iterdir())[-1]
    lines = [json.loads(line) for line in (rl / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in lines]
    return load_file(rl / "adapter" / "pytorch_lora_weights.safetensors"), load_file(newest), metrics


def assert_same(one, other):
    for a, b in zip(outcome(one)[:2], outcome(other)[:2], strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert outcome(one)[2] == outcome(other)[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, config, flux_folder):
    """An uninterrupted run of 4 steps."""
    path = tmp_path_factory.mktemp("whole")
    policy = FluxPolicy.from_pretrained(config, device=torch.device("cpu"), seed=0)
    result = train.train(policy=policy, scorer=Redness(), prompts=prompts_of, config=config, seed=3,
                         run=open_run(path), gallery=prompts_of(0, 1), inputs="w")
    return path, policy, result


def rollout_of(policy, config):
    rollout = policy.sample(prompts=prompts_of(0), group=6, seeds=[[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]])
    rollout.images = policy.decode(rollout)
    rewards = train.group_scores(Redness(), rollout)
    kept = select_extremes(rewards, k=config.top_k)
    return rollout.take(kept), normalize(rewards, kept, over="kept", clip=5.0)


def gradients(policy):
    return {name: p.grad.clone() for name, p in policy.parameters().items()}


# ---- one update ------------------------------------------------------------------------------------------------------

def test_every_adapter_weight_moves_and_no_frozen_one_does(policy, config):
    pipeline = policy.pipeline
    parts = [pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2]
    before = [{n: p.detach().clone() for n, p in part.named_parameters()} for part in parts]
    state = train.fresh_state(policy, config)
    train.accumulate_gradients(policy, *rollout_of(policy, config), config)
    train.apply_update(state, config)
    for part, old in zip(parts, before, strict=True):
        for name, parameter in part.named_parameters():
            assert torch.equal(parameter, old[name]) != (part is parts[0] and name in policy.parameters()), name


def test_the_gradient_does_not_depend_on_the_micro_batch(policy, config):
    rollout, advantages = rollout_of(policy, config)
    metrics, found = {}, {}
    for size in (1, 7, 8, 24):
        resized = replace(config, micro_batch=size, kl=0.1)
        metrics[size] = train.accumulate_gradients(policy, rollout, advantages, resized)
        found[size] = gradients(policy)
    for size in (1, 7, 8):
        assert metrics[size] == pytest.approx(metrics[24], rel=1e-3, abs=1e-5)
        for name, grad in found[24].items():
            torch.testing.assert_close(found[size][name], grad, rtol=1e-3, atol=2e-6)


def test_the_first_update_is_on_policy(make_policy, config):
    policy = make_policy(top_k=0, kl=0.0, sample_batch=12, train_steps=1)
    shake(policy)
    config = replace(config, top_k=0, kl=0.0, micro_batch=12, train_steps=1)
    rollout = policy.sample(prompts=prompts_of(0), group=6, seeds=[[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]])
    metrics = train.accumulate_gradients(policy, rollout, torch.ones(2, 6), config)
    assert np.isnan(metrics.pop("kl"))
    assert metrics == {"ratio_mean": 1.0, "max_log_ratio": 0.0, "clip_share": 0.0, "loss": -1.0}


@pytest.mark.parametrize("kernel", ["sde", "ode"])
def test_an_update_raises_the_likelihood_of_the_good(make_policy, config, kernel):
    config = replace(config, kl=0.0, lr=1e-3, kernel=kernel)
    policy = make_policy(kernel=kernel)
    shake(policy)
    rollout, advantages = rollout_of(policy, config)
    state = train.fresh_state(policy, config)
    rows = train.transitions(advantages.isfinite(), range(3))
    old = policy.log_prob(rollout=rollout, rows=rows)[0].detach()
    metrics = train.accumulate_gradients(policy, rollout, advantages, config)
    assert np.isnan(metrics["max_log_ratio"]) if kernel == "ode" else metrics["max_log_ratio"] < 1e-5
    train.apply_update(state, config)
    new = policy.log_prob(rollout=rollout, rows=rows)[0].detach()
    gain = (new - old) * advantages[tuple(rows[:, :2].T)]
    assert gain.sum() > 0


def test_kl_is_0_at_the_base_and_pulls_back_to_it(make_policy, config):
    policy = make_policy()
    rollout, advantages = rollout_of(policy, config)
    assert train.accumulate_gradients(policy, rollout, advantages, config)["kl"] < 1e-10
    shake(policy)
    before = train.accumulate_gradients(policy, rollout, advantages * 0, replace(config, kl=1.0))["kl"]
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter -= 1e-2 * parameter.grad / parameter.grad.norm()
    after = train.accumulate_gradients(policy, rollout, advantages * 0, replace(config, kl=1.0))["kl"]
    assert 0 < after < before


def test_ragged_and_dropped_groups_are_left_out(policy, config):
    rollout, advantages = rollout_of(policy, config)
    advantages[0, 2:] = torch.nan
    train.accumulate_gradients(policy, rollout, advantages, replace(config, kl=0.0))
    ragged = gradients(policy)
    state = train.fresh_state(policy, config)
    metrics = train.accumulate_gradients(policy, rollout, advantages * torch.nan, config)
    before = {n: p.detach().clone() for n, p in policy.parameters().items()}
    assert train.apply_update(state, config) == {"grad_norm": 0.0}
    assert np.isnan(list(metrics.values())).all()
    assert all(torch.equal(before[n], p) for n, p in policy.parameters().items())
    assert state.step == 1
    # The padding's content must not matter.
    rollout.latents[0, 2:] = 99.0
    train.accumulate_gradients(policy, rollout, advantages, replace(config, kl=0.0))
    assert all(torch.equal(g, ragged[n]) for n, g in gradients(policy).items())


def test_a_gradient_that_is_not_finite_changes_nothing(policy, config):
    rollout, advantages = rollout_of(policy, config)
    state = train.fresh_state(policy, config)
    train.accumulate_gradients(policy, rollout, advantages, config)
    before = {n: p.detach().clone() for n, p in policy.parameters().items()}
    next(iter(policy.parameters().values())).grad[0] = torch.nan
    with pytest.raises(train.TrainingError, match="norm nan.*weights are unchanged"):
        train.apply_update(state, config)
    assert all(torch.equal(before[n], p) for n, p in policy.parameters().items())
    assert state.step == 0


def test_the_gradient_is_clipped_and_the_average_follows(policy, config):
    config = replace(config, max_grad_norm=1e-3, ema=0.9)
    state = train.fresh_state(policy, config)
    start = {n: v.clone() for n, v in state.ema.items()}
    train.accumulate_gradients(policy, *rollout_of(policy, config), config)
    norm = train.apply_update(state, config)["grad_norm"]
    assert norm > 1e-3
    clipped = torch.stack([p.grad.norm() for p in policy.parameters().values()]).norm().item()
    assert clipped == pytest.approx(1e-3, rel=1e-3)
    for name, p in policy.parameters().items():  # decay of the first averaging: (1 + 1) / (10 + 1)
        torch.testing.assert_close(state.ema[name], start[name] * 2 / 11 + p.detach() * 9 / 11)
    live = {n: p.detach().clone() for n, p in policy.parameters().items()}
    average = {n: v.clone() for n, v in state.ema.items()}
    with train.averaged(state):
        assert all(torch.equal(policy.parameters()[n], average[n]) for n in live)
    assert all(torch.equal(policy.parameters()[n], live[n]) for n in live)


# ---- a run -----------------------------------------------------------------------------------------------------------

def test_a_run_leaves_metrics_gallery_adapter_and_two_checkpoints(whole, make_policy):
    path, policy, result = whole
    rl = path / "rl"
    lines = [json.loads(line) for line in (rl / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    wanted = {"reward_mean", "reward_std", "reward_max", "dropped_groups", "not_judged", "trained_images", "ratio_mean",
              "max_log_ratio", "clip_share", "loss", "kl", "grad_norm", "seconds_sample", "seconds_decode",
              "seconds_score", "seconds_update"}
    assert wanted <= lines[-1].keys()
    assert lines[0]["max_log_ratio"] < 1e-5
    assert lines[0]["trained_images"] == 8
    checkpoints = sorted(p.name for p in (rl / "checkpoints").iterdir())
    assert checkpoints == ["step_000002.safetensors", "step_000004.safetensors"]
    assert sorted(p.name for p in (rl / "gallery").iterdir()) == ["step_0000", "step_0004"]
    assert Image.open(rl / "gallery" / "step_0004" / "00.png").size == (16, 16)
    assert json.loads((rl / "gallery" / "step_0000" / "prompts.json").read_text())[0]["id"] == "p0-0"
    assert result["steps"] == 4
    assert result["gate_log_ratio"] < 1e-5
    fresh = make_policy(seed=5)
    fresh.load(path / result["adapter"])
    newest = load_file(rl / "checkpoints" / "step_000004.safetensors")
    for name, parameter in fresh.parameters().items():
        assert torch.equal(parameter, newest[f"ema/{name}"])
        assert torch.equal(parameter, policy.parameters()[name])


@pytest.mark.parametrize("kernel", ["sde", "ode"])
def test_the_reward_rises(tmp_path, make_policy, config, kernel):
    config = replace(config, steps=12, lr=3e-3, save_every=100, kernel=kernel)
    go(tmp_path, make_policy, config)
    rewards = [json.loads(line)["reward_mean"] for line in (tmp_path / "rl/metrics.jsonl").read_text().splitlines()]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.5


def test_a_run_that_stopped_and_went_on_equals_one_that_did_not(whole, tmp_path, make_policy, config):
    def fail(scores):
        raise ConnectionError("the scorer is gone")

    with pytest.raises(ConnectionError):
        go(tmp_path, make_policy, config, scorer=Scripted(2, fail))
    assert (tmp_path / "rl/checkpoints/step_000001.safetensors").exists()
    go(tmp_path, make_policy, replace(config, steps=3))
    go(tmp_path, make_policy, config)
    assert_same(whole[0], tmp_path)
    _, result = go(tmp_path, make_policy, config)  # nothing left to do
    assert result["steps"] == 4
    assert_same(whole[0], tmp_path)


@pytest.fixture
def listening():
    """Ctrl-C raises KeyboardInterrupt, also where the tests run in a shell that ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("listening")
def test_ctrl_c_leaves_a_checkpoint_and_the_run_goes_on(whole, tmp_path, make_policy, config):
    def interrupt(scores):
        os.kill(os.getpid(), signal.SIGINT)
        return scores

    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, make_policy, config, scorer=Scripted(4, interrupt))
    assert sorted(p.name for p in (tmp_path / "rl/checkpoints").iterdir())[-1] == "step_000003.safetensors"
    go(tmp_path, make_policy, config)
    assert_same(whole[0], tmp_path)


@pytest.mark.usefixtures("listening")
def test_ctrl_c_waits_for_what_belongs_together():
    done = []
    with pytest.raises(KeyboardInterrupt):
        with interrupts_held():
            os.kill(os.getpid(), signal.SIGINT)
            done.append(1)
        done.append(2)
    assert done == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import torch
torch.set_num_threads(1)
from rl_parts import Redness, prompts_of
from spatialt2i.core.config import Config, RLConfig
from spatialt2i.core.run import RunDir
from spatialt2i.rl import checkpoint, train
from spatialt2i.rl.policy import FluxPolicy
config = RLConfig(**{config!r})
calls = 0
def die(*args, **kwargs):
    global calls
    calls += 1
    if calls == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
real = {where}
{where} = die
policy = FluxPolicy.from_pretrained(config, device=torch.device("cpu"), seed=0)
train.train(policy=policy, scorer=Redness(), prompts=prompts_of, config=config, seed=3,
            run=RunDir.open({path!r}, Config()), gallery=[], inputs="w")
"""


@pytest.mark.parametrize(("where", "call"),
                         [("train.policy_loss", 10), ("checkpoint.save_file", 2), ("FluxPolicy.save", 1)])
def test_a_killed_run_goes_on_to_the_same_end(whole, tmp_path, make_policy, config, where, call):
    """kill -9 while updating, just before a checkpoint is written, and at the very end."""
    script = KILLED.format(tests=str(Path(__file__).parent), config=vars(config), where=where, call=call,
                           path=str(tmp_path))
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120,
                           env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    go(tmp_path, make_policy, config)
    assert_same(whole[0], tmp_path)


# ---- bad input -------------------------------------------------------------------------------------------------------

def test_unjudged_pictures_are_counted(tmp_path, make_policy, config):
    def lose(scores):
        scores.mean[:4] = np.nan  # of the first prompt's six
        return scores

    go(tmp_path, make_policy, replace(config, steps=1), scorer=Scripted(1, lose))
    line, = (json.loads(line) for line in (tmp_path / "rl/metrics.jsonl").read_text().splitlines())
    assert line["not_judged"] == pytest.approx(4 / 12)
    assert line["trained_images"] == 2 + 4
    assert line["reward_mean"] is not None


@pytest.mark.parametrize(("value", "message"), [(np.nan, "judged none of 12 pictures"), (np.inf, "is inf, expected")])
def test_rewards_that_cannot_be_trained_on_stop_the_run_with_its_progress_saved(tmp_path, make_policy, config, value,
                                                                               message):
    with pytest.raises(RewardError, match=message):
        go(tmp_path, make_policy, config, scorer=Scripted(2, lambda scores: Scores(np.full_like(scores.mean, value))))
    assert (tmp_path / "rl/checkpoints/step_000001.safetensors").exists()


def test_equal_rewards_train_nothing(tmp_path, make_policy, config):
    _, result = go(tmp_path, make_policy, replace(config, steps=1),
                   scorer=Scripted(1, lambda scores: Scores(np.ones_like(scores.mean))))
    line, = (json.loads(line) for line in (tmp_path / "rl/metrics.jsonl").read_text().splitlines())
    assert line["dropped_groups"] == 1
    assert line["ratio_mean"] is None
    assert line["grad_norm"] == 0
    adapter = load_file(tmp_path / result["adapter"] / "pytorch_lora_weights.safetensors")
    assert all(value.abs().sum() == 0 for key, value in adapter.items() if "lora_B" in key)


def test_a_wrong_number_of_scores_is_an_error(tmp_path, make_policy, config):
    with pytest.raises(RewardError, match=r"shape \(3,\), expected \(12,\)"):
        go(tmp_path, make_policy, config, scorer=Scripted(1, lambda scores: Scores(scores.mean[:3])))


def test_the_gate_stops_a_faulty_run_before_it_trains(tmp_path, make_policy, config, monkeypatch):
    policy = make_policy()
    sample = policy.sample

    def rounded(*, prompts, group, seeds):
        rollout = sample(prompts=prompts, group=group, seeds=seeds)
        rollout.latents = rollout.latents.bfloat16().float()
        return rollout

    monkeypatch.setattr(policy, "sample", rounded)
    with pytest.raises(GateError, match="bfloat16"):
        train.train(policy=policy, scorer=Redness(), prompts=prompts_of, config=config, seed=3, run=open_run(tmp_path),
                    gallery=[], inputs="w")
    assert not (tmp_path / "rl/checkpoints").exists()


def test_fewer_steps_than_are_trained_already_are_refused(whole, make_policy, config, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    with pytest.raises(checkpoint.CheckpointError, match="4 steps are trained already and rl.steps = 2"):
        go(tmp_path / "run", make_policy, replace(config, steps=2))


def test_a_checkpoint_of_another_config_is_refused(tmp_path, make_policy, config):
    go(tmp_path, make_policy, replace(config, steps=1))
    with pytest.raises(checkpoint.CheckpointError, match="clip = 0.001 there, 0.01 here.*--if-exists delete"):
        go(tmp_path, make_policy, replace(config, clip=0.01))
    with pytest.raises(checkpoint.CheckpointError, match="inputs = 'w' there, 'other weights' here"):
        go(tmp_path, make_policy, config, inputs="other weights")
    with pytest.raises(checkpoint.CheckpointError, match="seed = 3 there, 4 here"):
        go(tmp_path, make_policy, config, seed=4)
    (tmp_path / "rl/checkpoints/step_000001.safetensors").write_bytes(b"rubbish")
    with pytest.raises(checkpoint.CheckpointError, match="not a readable checkpoint.*delete it"):
        go(tmp_path, make_policy, config)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, make_policy, config, monkeypatch):
    go(tmp_path, make_policy, replace(config, steps=1))

    def full(tensors, path, metadata):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(DiskFull, match="the disk is full"):
        go(tmp_path, make_policy, config)
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "rl/checkpoints").iterdir()] == ["step_000001.safetensors"]
    assert go(tmp_path, make_policy, config)[1]["steps"] == 4
