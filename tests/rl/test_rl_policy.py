import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from rl_parts import make_flux, prompts_of, shake

from spatialt2i.core.run import tree_hash
from spatialt2i.core.types import Prompt
from spatialt2i.rl import sde
from spatialt2i.rl.policy import FluxPolicy, PromptError

SEEDS = [[11, 12, 13], [21, 22, 23]]


def pixels(images):
    return np.stack([np.asarray(image, dtype=np.int64) for image in images])


def all_rows(rollout, steps):
    p, g = rollout.log_probs.shape[:2]
    return torch.cartesian_prod(torch.arange(p), torch.arange(g), torch.tensor(steps))


def test_a_rollout_has_the_promised_shapes(policy):
    rollout = policy.sample(prompts=prompts_of(0), group=3, seeds=SEEDS)
    assert rollout.latents.shape == (2, 3, 5, 16, 16)
    assert rollout.latents.dtype == rollout.log_probs.dtype == torch.float32
    assert rollout.log_probs[..., :3].isfinite().all()
    assert rollout.log_probs[..., 3].isnan().all()
    torch.testing.assert_close(rollout.sigmas, sde.flux_sigmas(steps=4, image_tokens=16,
                                                               scheduler=policy.pipeline.scheduler.config))
    images = policy.decode(rollout)
    assert [[image.size for image in group] for group in images] == [[(16, 16)] * 3] * 2
    assert images[0][0].mode == "RGB"


@pytest.mark.parametrize("guidance", [True, False])
def test_generate_is_the_stock_pipelines_picture_from_the_same_noise(config, tmp_path, guidance):
    folder = make_flux(tmp_path / "flux", guidance=guidance)
    policy = FluxPolicy.from_pretrained(replace(config, model=str(folder)), device=torch.device("cpu"), seed=0)
    prompts = prompts_of(0)
    ours = policy.generate(prompts=prompts, seeds=[5, 6])
    stock = FluxPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    theirs = stock([p.text for p in prompts], height=16, width=16, num_inference_steps=3, guidance_scale=3.5,
                   max_sequence_length=16, generator=[torch.Generator("cpu").manual_seed(s) for s in (5, 6)]).images
    assert np.abs(pixels(ours) - pixels(theirs)).max() <= 1  # a rounding step of 8 bits
    assert pixels(ours).std() > 5


def test_the_stock_pipeline_loads_the_saved_adapter_and_draws_the_same(policy, config, tmp_path):
    prompts = prompts_of(0)
    ours = policy.generate(prompts=prompts, seeds=[5, 6])
    policy.save(tmp_path / "adapter")
    assert [p.name for p in (tmp_path / "adapter").iterdir()] == ["pytorch_lora_weights.safetensors"]
    stock = FluxPipeline.from_pretrained(config.model)
    stock.set_progress_bar_config(disable=True)

    def draw():
        return pixels(stock([p.text for p in prompts], height=16, width=16, num_inference_steps=3, guidance_scale=3.5,
                            max_sequence_length=16,
                            generator=[torch.Generator("cpu").manual_seed(s) for s in (5, 6)]).images)

    base = draw()
    stock.load_lora_weights(tmp_path / "adapter")
    assert np.abs(pixels(ours) - draw()).max() <= 1
    assert np.abs(pixels(ours) - base).max() > 5


def test_what_a_killed_save_left_is_gone_after_the_next_one(policy, tmp_path, monkeypatch):
    """The folder's hash names the adapter, so nothing else may stay in it."""
    policy.save(tmp_path)
    before = tree_hash(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("spatialt2i.core.run.os.replace", lambda *_: pytest.fail("killed"))
        patch.setattr("spatialt2i.core.run._discard", lambda path: None)  # a kill leaves the unfinished file
        with pytest.raises(pytest.fail.Exception, match="killed"):
            policy.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    policy.save(tmp_path)
    assert tree_hash(tmp_path) == before


def test_load_reads_what_save_wrote(policy, make_policy, tmp_path):
    policy.save(tmp_path)
    policy.save(tmp_path)
    other = make_policy(seed=9)
    other.load(tmp_path)
    for name, parameter in policy.parameters().items():
        assert torch.equal(parameter, other.parameters()[name])
    with pytest.raises(ValueError, match="another model or rank.*check rl.model and rl.lora_rank"):
        make_policy(lora_rank=2).load(tmp_path)
    with pytest.raises(OSError, match="cannot read the adapter"):
        other.load(tmp_path / "nothing")
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"rubbish")
    with pytest.raises(OSError, match="cannot read the adapter"):
        other.load(tmp_path)


def test_the_adapter_is_where_the_recipe_has_it_and_nothing_else_trains(make_policy):
    policy = make_policy()
    trained = {name for name, p in policy.pipeline.transformer.named_parameters() if p.requires_grad}
    assert trained == set(policy.parameters())
    layers = {name.split(".lora_")[0] for name in trained}
    double = {f"transformer_blocks.0.{n}" for n in (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
        "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")}
    assert layers == double | {f"single_transformer_blocks.0.attn.to_{n}" for n in "qkv"}
    assert not any(p.requires_grad for part in (policy.pipeline.vae, policy.pipeline.text_encoder_2)
                   for p in part.parameters())


def test_a_fresh_adapter_changes_nothing_and_its_seed_is_its_own(make_policy):
    one, two, other = make_policy(seed=7), make_policy(seed=7), make_policy(seed=8)
    first = next(n for n in one.parameters() if "lora_A" in n)
    assert torch.equal(one.parameters()[first], two.parameters()[first])
    assert not torch.equal(one.parameters()[first], other.parameters()[first])
    assert all(p.abs().sum() == 0 for n, p in one.parameters().items() if "lora_B" in n)
    rollout = one.sample(prompts=prompts_of(0), group=3, seeds=SEEDS)
    rows = all_rows(rollout, [0, 1, 2])
    now, base = one.log_prob(rollout=rollout, rows=rows), one.log_prob(rollout=rollout, rows=rows, reference=True)
    torch.testing.assert_close(now[1], base[1])
    assert now[0].requires_grad
    assert not base[1].requires_grad


def test_replay_in_the_sampled_batch_is_exact(policy):
    rollout = policy.sample(prompts=prompts_of(0), group=3, seeds=SEEDS)
    for t in range(3):
        log_prob, mean, level = policy.log_prob(rollout=rollout, rows=all_rows(rollout, [t]))
        assert torch.equal(log_prob.detach(), rollout.log_probs[..., t].flatten())
        assert mean.shape == (6, 16, 16)
        assert level.shape == (6,)


def test_replay_in_any_batch_is_close(policy):
    rollout = policy.sample(prompts=prompts_of(0), group=3, seeds=SEEDS)
    rows = all_rows(rollout, [0, 1, 2])[torch.randperm(18, generator=torch.Generator().manual_seed(0))]
    for size in (1, 5, 18):
        for batch in rows.split(size):
            log_prob = policy.log_prob(rollout=rollout, rows=batch)[0].detach()
            torch.testing.assert_close(log_prob, rollout.log_probs[tuple(batch.T)], atol=2e-6, rtol=0)


def test_pictures_depend_on_prompt_and_seed_not_on_the_batch(make_policy):
    whole = make_policy(sample_batch=6).sample(prompts=prompts_of(0), group=3, seeds=SEEDS)
    alone = make_policy(sample_batch=1).sample(prompts=prompts_of(0)[1:], group=1, seeds=[[22]])
    torch.testing.assert_close(whole.latents[1, 1], alone.latents[0, 0], atol=1e-4, rtol=0)
    assert not torch.allclose(whole.latents[0, 0, 0], whole.latents[0, 1, 0])
    policy = make_policy(sample_batch=4)
    one, = policy.generate(prompts=prompts_of(0)[:1], seeds=[5])
    both = policy.generate(prompts=prompts_of(0) * 3, seeds=[5, 6, 7, 8, 9, 10])
    assert np.abs(pixels([one]) - pixels(both[:1])).max() <= 1


def test_images_of_a_prompt_may_start_from_the_same_noise(make_policy):
    same = make_policy(same_start=True)
    rollout, usual = (p.sample(prompts=prompts_of(0), group=3, seeds=SEEDS) for p in (same, make_policy()))
    starts = rollout.latents[:, :, 0]
    assert torch.equal(starts, starts[:, :1].expand_as(starts)) and torch.equal(starts[:, 0], usual.latents[:, 0, 0])
    assert not torch.equal(starts[0], starts[1])
    ends = rollout.latents[0, :, -1]
    assert not torch.equal(ends[0], ends[1]) and torch.equal(rollout.latents[:, 0], usual.latents[:, 0])
    rows = all_rows(rollout, range(3))
    torch.testing.assert_close(same.log_prob(rollout=rollout, rows=rows)[0], rollout.log_probs[tuple(rows.T)])
    images = [p.generate(prompts=prompts_of(0), seeds=[1, 2]) for p in (same, make_policy())]
    assert np.array_equal(pixels(images[0]), pixels(images[1]))


def test_the_base_model_is_the_policy_with_its_adapter_off(policy, make_policy):
    rollout = policy.sample(prompts=prompts_of(0), group=3, seeds=SEEDS)
    rows = all_rows(rollout, [0, 2])
    tuned = policy.log_prob(rollout=rollout, rows=rows)[1]
    base = policy.log_prob(rollout=rollout, rows=rows, reference=True)[1]
    torch.testing.assert_close(base, make_policy().log_prob(rollout=rollout, rows=rows)[1].detach())
    assert not torch.allclose(tuned, base, atol=1e-2)
    assert all(p.requires_grad for p in policy.parameters().values())
    torch.testing.assert_close(tuned, policy.log_prob(rollout=rollout, rows=rows)[1])


def test_each_text_is_encoded_once(make_policy, monkeypatch):
    policy, texts = make_policy(), []
    encode = policy.pipeline.encode_prompt

    def counted(text, device, max_sequence_length):
        texts.append(text)
        return encode(text, device=device, max_sequence_length=max_sequence_length)

    monkeypatch.setattr(policy.pipeline, "encode_prompt", counted)
    for _ in range(2):
        policy.generate(prompts=prompts_of(0) * 2, seeds=[1, 2, 3, 4])
    assert texts == [p.text for p in prompts_of(0)]


def test_a_prompt_that_the_encoders_cannot_take_is_named(make_policy):
    policy = make_policy()
    long = Prompt("p77", "red " * 16, "table", ())
    with pytest.raises(PromptError, match="'p77' has 17 T5 tokens, expected at most rl.max_text_tokens = 16"):
        policy.generate(prompts=[long], seeds=[0])
    with pytest.raises(PromptError, match="'p78' is empty"):
        policy.sample(prompts=[Prompt("p78", "  ", "table", ())], group=1, seeds=[[0]])
    policy.generate(prompts=[Prompt("p79", "red " * 15, "table", ())], seeds=[0])


def test_nothing_keeps_a_policy_in_memory(make_policy):
    """The benchmark makes two, one after the other, and has room for one."""
    policy = make_policy()
    policy.generate(prompts=prompts_of(0)[:1], seeds=[5])
    weights = weakref.ref(policy.pipeline.transformer)
    del policy
    assert weights() is None


def test_bad_settings_and_seeds_are_clear_errors(make_policy, tmp_path):
    with pytest.raises(ValueError, match="rl.resolution = 18, expected a multiple of 4"):
        make_policy(resolution=18)
    with pytest.raises(ValueError, match=r"seeds must be \[2\]\[3\]"):
        make_policy().sample(prompts=prompts_of(0), group=3, seeds=[[1, 2], [3, 4]])
    with pytest.raises(ValueError, match="one seed per prompt"):
        make_policy().generate(prompts=prompts_of(0), seeds=[1])
    with pytest.raises(OSError, match="expected the hub id or folder of a FLUX pipeline"):
        make_policy(model=str(tmp_path))


@pytest.mark.parametrize(("kernel", "noise"), [("cps", 0.8), ("dance", 0.3)])
def test_other_kernels_replay_too(make_policy, kernel, noise):
    policy = make_policy(kernel=kernel, noise=noise, train_from=1, train_steps=2)
    shake(policy)
    rollout = policy.sample(prompts=prompts_of(0), group=3, seeds=SEEDS)
    assert rollout.log_probs.isfinite().all(0).all(0).tolist() == [False, True, True, False]
    rows = all_rows(rollout, [1, 2])
    log_prob = policy.log_prob(rollout=rollout, rows=rows)[0].detach()
    torch.testing.assert_close(log_prob, rollout.log_probs[tuple(rows.T)], atol=2e-6, rtol=0)


def test_without_noise_a_rollout_is_the_stock_pipelines_and_its_log_probs_are_of_pictures(make_policy):
    policy = make_policy(kernel="ode", eval_steps=4, train_from=1, train_steps=2)
    shake(policy)
    rollout = policy.sample(prompts=prompts_of(0), group=3, seeds=SEEDS)
    assert rollout.log_probs.isnan().all()
    stock = policy.generate(prompts=[p for p in prompts_of(0) for _ in range(3)],
                            seeds=[s for row in SEEDS for s in row])
    assert np.abs(pixels(sum(policy.decode(rollout), [])) - pixels(stock)).max() <= 1
    rows = all_rows(rollout, [1, 2])
    log_prob, v, level = policy.log_prob(rollout=rollout, rows=rows)
    assert log_prob.requires_grad and level.tolist() == [1.0] * 12
    again = policy.log_prob(rollout=rollout, rows=rows[5:7])  # whatever else is in the batch
    torch.testing.assert_close(again[0], log_prob[5:7])
    # The noise of the pictures is the same for all images of a prompt, and another for each prompt and step.
    noise = policy._forward_noise(rollout, rows).unflatten(0, (2, 3, 2))
    assert torch.equal(noise, noise[:, :1].expand_as(noise))
    assert len({tuple(row) for row in noise[:, 0].flatten(0, 1)[:, 0].tolist()}) == 4
    x0 = rollout.latents[:, :, -1].flatten(0, 1).repeat_interleave(2, 0)
    torch.testing.assert_close(log_prob, sde.picture_log_prob(v, x0=x0, noise=noise.flatten(0, 2)))
    base = policy.log_prob(rollout=rollout, rows=rows, reference=True)
    assert not base[1].requires_grad and not torch.allclose(base[1], v, atol=1e-2)


def test_several_draws_average_the_log_prob_of_a_picture_and_a_seed_draws_its_own(make_policy):
    settings = {"kernel": "ode", "train_steps": 2}
    policy, once, other = (make_policy(draws=draws, seed=seed, **settings) for draws, seed in ((3, 0), (1, 0), (3, 1)))
    rollout = policy.sample(prompts=prompts_of(0), group=3, seeds=SEEDS)
    rows = all_rows(rollout, [0, 1])
    log_prob, v, level = policy.log_prob(rollout=rollout, rows=rows)
    noise = policy._forward_noise(rollout, rows).unflatten(0, (12, 3))
    assert torch.equal(noise[:, 0], once._forward_noise(rollout, rows))
    assert v.shape == (12, 3 * 16, rollout.latents.shape[-1]) and level.shape == (12,)
    x0 = rollout.latents[:, :, -1].flatten(0, 1).repeat_interleave(2, 0)
    each = [sde.picture_log_prob(v.unflatten(1, (3, -1))[:, i], x0=x0, noise=noise[:, i]) for i in range(3)]
    torch.testing.assert_close(log_prob, torch.stack(each).mean(0))
    torch.testing.assert_close(each[0], once.log_prob(rollout=rollout, rows=rows)[0])
    assert not torch.allclose(log_prob, other.log_prob(rollout=rollout, rows=rows)[0], atol=1e-4)


def test_bfloat16_keeps_latents_log_probs_and_adapter_in_float32(make_policy):
    policy = make_policy(dtype="bfloat16")
    shake(policy)
    rollout = policy.sample(prompts=prompts_of(0), group=3, seeds=SEEDS)
    assert rollout.latents.dtype == rollout.log_probs.dtype == torch.float32
    assert {p.dtype for p in policy.parameters().values()} == {torch.float32}
    log_prob = policy.log_prob(rollout=rollout, rows=all_rows(rollout, [0]))[0]
    assert (log_prob - rollout.log_probs[..., 0].flatten()).abs().max() < 1e-3
    assert math.isfinite(log_prob.sum().item())
    assert len(policy.decode(rollout)) == 2
