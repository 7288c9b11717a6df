import dataclasses
from contextlib import nullcontext

import pytest
import torch
from rl_parts import prompts_of, shake

from spatialt2i.rl.gate import GateError, check_replay

SEEDS = [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]]


def draw(policy):
    return policy.sample(prompts=prompts_of(0), group=6, seeds=SEEDS)


@pytest.mark.parametrize(("micro_batch", "sample_batch"), [(8, 6), (1, 12), (36, 1)])
def test_a_healthy_policy_passes(make_policy, config, micro_batch, sample_batch):
    policy = make_policy(sample_batch=sample_batch)
    shake(policy)
    config = dataclasses.replace(config, micro_batch=micro_batch, sample_batch=sample_batch)
    assert check_replay(policy=policy, rollout=draw(policy), config=config) < 1e-5


def test_pictures_drawn_without_noise_pass_and_faults_are_named(make_policy, config):
    policy = make_policy(kernel="ode")
    shake(policy)
    config = dataclasses.replace(config, kernel="ode")
    rollout = draw(policy)
    assert check_replay(policy=policy, rollout=rollout, config=config) < 1e-8
    healthy = dict(latents=rollout.latents, sigmas=rollout.sigmas)
    partly, last = rollout.latents.clone(), rollout.latents.clone()
    partly[:, 1:, 1:] = partly[:, 1:, 1:].bfloat16().float()
    last[:, :, -1] += 0.01  # the picture that is trained on is not the one that the steps led to
    for fault, cause in ((dict(latents=rollout.latents.bfloat16().float()), "hold only bfloat16 values"),
                         (dict(sigmas=torch.linspace(1, 0, 5)), "carries another schedule"),
                         (dict(latents=partly), "unknown"), (dict(latents=last), "step 3: .*unknown"),
                         (dict(latents=rollout.latents * torch.nan), "not finite")):
        with pytest.raises(GateError, match=cause):
            check_replay(policy=policy, rollout=dataclasses.replace(rollout, **healthy | fault), config=config)
    with policy._adapter_off():
        base = draw(policy)
    with pytest.raises(GateError, match="the adapter was off"):
        check_replay(policy=policy, rollout=base, config=config)
    shifted, policy.sigmas = policy.sigmas, torch.linspace(1, 0, 5)
    unshifted = dataclasses.replace(draw(policy), sigmas=shifted)
    policy.sigmas = shifted
    with pytest.raises(GateError, match="drawn with an unshifted schedule"):
        check_replay(policy=policy, rollout=unshifted, config=config)


def test_latents_rounded_to_bfloat16_are_stopped(policy, config):
    rollout = draw(policy)
    rollout.latents = rollout.latents.bfloat16().float()
    with pytest.raises(GateError, match="does not replay .*Likely cause: the stored latents hold only bfloat16 values"):
        check_replay(policy=policy, rollout=rollout, config=config)
    tolerant = dataclasses.replace(config, gate_tolerance=10.0)
    with pytest.raises(GateError, match="hold only bfloat16 values.* still replays .*rl.gate_tolerance = 1.0e\\+01"):
        check_replay(policy=policy, rollout=rollout, config=tolerant)


def test_a_rollout_with_another_schedule_is_stopped(policy, config):
    rollout = draw(policy)
    rollout.sigmas = torch.linspace(1, 0, 5)
    with pytest.raises(GateError, match=r"largest \|log ratio\| \d\.\d+e[-+]\d+ .*carries another schedule"):
        check_replay(policy=policy, rollout=rollout, config=config)


def test_a_rollout_drawn_with_an_unshifted_schedule_is_stopped(policy, config):
    shifted, policy.sigmas = policy.sigmas, torch.linspace(1, 0, 5)
    rollout = draw(policy)
    policy.sigmas = rollout.sigmas = shifted
    with pytest.raises(GateError, match="drawn with an unshifted schedule"):
        check_replay(policy=policy, rollout=rollout, config=config)


def test_a_batch_dependent_model_is_stopped(policy, config, monkeypatch):
    velocity = policy._velocity
    monkeypatch.setattr(policy, "_velocity", lambda x, sigma, embeds: velocity(x, sigma, embeds) * (1 + 0.01 * len(x)))
    with pytest.raises(GateError, match="depends on how it is batched; set rl.micro_batch = rl.sample_batch = 6"):
        check_replay(policy=policy, rollout=draw(policy), config=config)


def test_an_adapter_that_was_off_while_sampling_is_named(policy, config):
    with policy._adapter_off():
        rollout = draw(policy)
    with pytest.raises(GateError, match="the adapter was off"):
        check_replay(policy=policy, rollout=rollout, config=config)


def test_weights_that_moved_are_stopped(policy, config):
    rollout = draw(policy)
    shake(policy, seed=5)
    with pytest.raises(GateError, match="unknown: the weights changed since sampling"):
        check_replay(policy=policy, rollout=rollout, config=config)


def test_values_that_are_not_finite_are_stopped(policy, config):
    rollout = draw(policy)
    rollout.latents[0, 0, 2] = torch.nan
    with pytest.raises(GateError, match="not finite"):
        check_replay(policy=policy, rollout=rollout, config=config)


def test_the_tolerance_is_the_configs(policy, config):
    rollout = draw(policy)
    rollout.log_probs = rollout.log_probs + 5e-4
    for tolerance, outcome in ((1e-3, nullcontext()), (1e-4, pytest.raises(GateError))):
        with outcome:
            check_replay(policy=policy, rollout=rollout, config=dataclasses.replace(config, gate_tolerance=tolerance))
