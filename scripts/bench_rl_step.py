"""What an RL step costs, against the passes through the models that no implementation can avoid.

    python scripts/bench_rl_step.py --preset tiny [rl.top_k=0 ...] [--json FILE]

The floor is measured in the same run, in turns with the step: bare calls of the transformer in the same batches
(rollout forwards, forward and backward of the trained transitions, reference forwards where the KL has a weight) and
of the VAE's decoder. Everything else is overhead: text encoding, noise, kernels, log-probs, pictures, loss, optimiser.
Scoring is left out on both sides.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from pathlib import Path

import numpy as np
import torch

from spatialt2i.build.parts import model_folder
from spatialt2i.core.config import load_config, to_dict
from spatialt2i.core.device import pick_device, set_threads
from spatialt2i.core.run import json_text, seed_of
from spatialt2i.core.types import Prompt, Scores
from spatialt2i.rl.credit import normalize, select_extremes
from spatialt2i.rl.policy import FluxPolicy
from spatialt2i.rl.train import accumulate_gradients, apply_update, fresh_state, group_scores, timed

PHASES = ("sample", "decode", "score", "update")


class Lottery:
    """Scores without a cost."""

    name = "lottery"

    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)

    def score(self, *, images, prompts):
        """B standard normal numbers."""
        return Scores(mean=self.generator.standard_normal(len(images)))


def rl_step(policy, state, scorer, config, step):
    """One whole step, as in `spatialt2i.rl.train.train`; seconds by phase."""
    seconds: dict[str, float] = {}
    prompts = [Prompt(f"{step}-{i}", f"On a lawn, a red circle is {step + i} to the left of a blue square.", "", ())
               for i in range(config.prompts_per_step)]
    seeds = [[seed_of(0, step, prompt.id, g) for g in range(config.group)] for prompt in prompts]
    with timed(seconds, "sample"):
        rollout = policy.sample(prompts=prompts, group=config.group, seeds=seeds)
    with timed(seconds, "decode"):
        rollout.images = policy.decode(rollout)
    with timed(seconds, "score"):
        rewards = group_scores(scorer, rollout)
    kept = select_extremes(rewards, k=config.top_k)
    advantages = normalize(rewards, kept, over=config.stats_over, clip=config.advantage_clip,
                           global_std=config.global_std)
    with timed(seconds, "update"):
        accumulate_gradients(policy, rollout.take(kept), advantages, config)
        apply_update(state, config)
    return seconds


def floor(policy, config):
    """The unavoidable passes alone; seconds by phase."""
    pipeline = policy.pipeline
    transformer, vae = pipeline.transformer, pipeline.vae
    device, dtype = transformer.device, next(pipeline.text_encoder_2.parameters()).dtype
    side = config.resolution // (2 * pipeline.vae_scale_factor)
    channels, conf = transformer.config.in_channels, transformer.config

    def inputs(n):
        return {"hidden_states": torch.randn(n, side * side, channels, device=device, dtype=dtype),
                "timestep": torch.full((n,), 0.5, device=device, dtype=dtype),
                "guidance": torch.full((n,), 3.5, device=device) if conf.guidance_embeds else None,
                "pooled_projections": torch.randn(n, conf.pooled_projection_dim, device=device, dtype=dtype),
                "encoder_hidden_states": torch.randn(n, config.max_text_tokens, conf.joint_attention_dim, device=device,
                                                     dtype=dtype),
                "txt_ids": torch.zeros(config.max_text_tokens, 3, device=device),
                "img_ids": torch.zeros(side * side, 3, device=device), "return_dict": False}

    def sizes(total, size):
        return [min(size, total - i) for i in range(0, total, size)]

    images = config.prompts_per_step * config.group
    kept = config.prompts_per_step * (min(2 * config.top_k, config.group) if config.top_k else config.group)
    draws = config.draws if config.kernel == "ode" else 1  # noises per picture and trained level
    drawn = sizes(images, config.sample_batch)
    trained = [draws * n for n in sizes(kept * config.train_steps, config.micro_batch)]
    made = {n: inputs(n) for n in {*drawn, *trained, config.prompts_per_step}}
    seconds: dict[str, float] = {}
    with timed(seconds, "sample"), torch.no_grad():
        for n in drawn:
            for _ in range(config.rollout_steps - config.same_start):
                transformer(**made[n])
        if config.same_start:  # the images of a prompt share their first step
            transformer(**made[config.prompts_per_step])
    latents = {n: torch.randn(n, vae.config.latent_channels, 2 * side, 2 * side, device=device, dtype=vae.dtype)
               for n in set(drawn)}
    with timed(seconds, "decode"), torch.no_grad():
        for n in drawn:
            vae.decode(latents[n])
    with timed(seconds, "update"):
        for n in trained:
            transformer(**made[n])[0].float().square().mean().backward()
    if config.kl:
        transformer.disable_adapters()
        with timed(seconds, "update"), torch.no_grad():
            for n in trained:
                transformer(**made[n])
        transformer.enable_adapters()
    for parameter in policy.parameters().values():
        parameter.grad = None
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="rl.SETTING=VALUE")
    parser.add_argument("--preset", default="tiny", help="a preset or a TOML file; its [rl] section counts")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of one step and one floor; the median counts")
    parser.add_argument("--json", help="also write the result to this file; - for standard output")
    args = parser.parse_args()
    whole = load_config(args.preset, args.overrides)
    set_threads(whole.threads)
    config, repeats = dataclasses.replace(whole.rl, model=model_folder(whole.rl.model)), args.repeats
    policy = FluxPolicy.from_pretrained(config, device=pick_device(whole.device), seed=0)
    state, scorer = fresh_state(policy, config), Lottery()
    rl_step(policy, state, scorer, config, 0), floor(policy, config)  # warm-up
    pairs = [(rl_step(policy, state, scorer, config, 1 + i), floor(policy, config)) for i in range(repeats)]

    def median(values):
        return statistics.median(list(values))

    result = {name: {"step": median(s[name] for s, _ in pairs), "floor": median(f.get(name, 0.0) for _, f in pairs)}
              for name in PHASES}
    result["total"] = {"step": median(sum(s.values()) for s, _ in pairs),
                       "floor": median(sum(f.values()) for _, f in pairs)}
    ratio = median(sum(s.values()) / sum(f.values()) for s, f in pairs)
    lines = [f"{'':8}{'step s':>10}{'floor s':>10}{'ratio':>8}{'share':>8}"]
    for name, row in result.items():
        times = f"{row['step'] / row['floor']:8.3f}" if row["floor"] else f"{'':8}"
        share = row["step"] / result["total"]["step"]
        lines.append(f"{name:8}{row['step']:10.3f}{row['floor']:10.3f}{times}{share:8.1%}")
    lines.append(f"an RL step costs {ratio:.3f} times its unavoidable passes (median of {repeats} pairs)")
    sys.stderr.write("\n".join(lines) + "\n")
    if args.json:
        text = json_text({"ratio": ratio, "repeats": repeats, "seconds": result, "rl": to_dict(whole.rl)})
        sys.stdout.write(text) if args.json == "-" else Path(args.json).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
