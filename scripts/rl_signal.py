"""How much a policy gradient can learn from one step's pictures, before anything is trained.

    python scripts/rl_signal.py --reward runs/quickstart/reward/model --batches 16 [rl.kernel=sde ...]

Draws the rollouts of some RL steps with the untrained adapter and says: how far the pictures of one prompt differ in
what the oracle sees and in reward; how well the reward ranks them (correlation within a prompt); and whether the
gradients of independent steps point the same way (mean cosine, and its standard error over steps left out one by one),
for this reward and for the oracle's share of true relations. The oracle is asked here by name; nothing is trained.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import torch

from spatialt2i.build.parts import make_policy, make_scorer, training_prompts
from spatialt2i.core.config import load_config
from spatialt2i.core.device import set_threads
from spatialt2i.core.run import json_text, progress, seed_of
from spatialt2i.rl.credit import normalize, select_extremes
from spatialt2i.rl.train import accumulate_gradients, group_scores
from spatialt2i.tiny.oracle import TinyOracle


def cosine(gradients: list[torch.Tensor]) -> dict[str, float]:
    """Mean cosine between the rows of some gradients, and its jackknife standard error."""
    unit = torch.nn.functional.normalize(torch.stack(gradients), dim=1)
    cosines, n = (unit @ unit.T).numpy(), len(gradients)
    off = ~np.eye(n, dtype=bool)
    others = [np.delete(np.arange(n), i) for i in range(n)]
    without = [cosines[np.ix_(rest, rest)][off[1:, 1:]].mean() for rest in others]
    return {"mean": float(cosines[off].mean()), "se": float(np.sqrt((n - 1) * np.var(without)))}


def centred(values: np.ndarray) -> np.ndarray:
    """[P, G] without the mean of each prompt, flat."""
    return (values - values.mean(1, keepdims=True)).ravel()


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="rl.SETTING=VALUE")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--reward", required=True, help="folder of a SpatialScore")
    parser.add_argument("--batches", type=int, default=16, help="RL steps to draw")
    args = parser.parse_args()
    config = load_config(args.preset, args.overrides)
    set_threads(config.threads)
    rl, oracle = config.rl, TinyOracle()
    policy, prompts = make_policy(config), training_prompts(config, avoid=set())
    scorer = make_scorer(config, None, args.reward, config.reward.backbone)
    gradients: dict[str, list[torch.Tensor]] = {"reward": [], "oracle": []}
    seen: dict[str, list[np.ndarray]] = {"reward": [], "relations": [], "presence": [], "clean": [], "all": []}
    for step in progress(range(args.batches), desc="batches"):
        batch = prompts(step)
        seeds = [[seed_of(config.seed, "signal", step, p.id, g) for g in range(rl.group)] for p in batch]
        rollout = policy.sample(prompts=batch, group=rl.group, seeds=seeds)
        rollout.images = policy.decode(rollout)
        verdicts = oracle.verify(images=[image for group in rollout.images for image in group],
                                 prompts=[prompt for prompt in batch for _ in range(rl.group)])
        shape = (len(batch), rl.group)
        facts = {"reward": group_scores(scorer, rollout).numpy(),
                 "relations": np.reshape([np.mean(v.relations) for v in verdicts], shape),
                 "presence": np.reshape([np.mean(v.present) for v in verdicts], shape),
                 "clean": np.reshape([float(v.clean) for v in verdicts], shape),
                 "all": np.reshape([float(v.overall) for v in verdicts], shape)}
        for name, values in facts.items():
            seen[name].append(values)
        for name, values in {"reward": facts["reward"], "oracle": facts["relations"]}.items():
            rewards = torch.as_tensor(values)
            kept = select_extremes(rewards, k=rl.top_k)
            advantages = normalize(rewards, kept, over=rl.stats_over, clip=rl.advantage_clip,
                                   global_std=rl.global_std)
            accumulate_gradients(policy, rollout.take(kept), advantages, rl)
            gradients[name].append(torch.cat([p.grad.flatten() for p in policy.parameters().values()]))
    whole = {name: np.concatenate(values) for name, values in seen.items()}
    reward = centred(whole["reward"])
    sys.stdout.write(json_text({
        "mean": {name: float(values.mean()) for name, values in whole.items()},
        "spread_within_prompt": {name: float(values.std(1).mean()) for name, values in whole.items()},
        "correlation_with_reward": {name: float(np.corrcoef(reward, centred(values))[0, 1])
                                    for name, values in whole.items() if name != "reward"},
        "cosine_of_gradients": {name: cosine(rows) for name, rows in gradients.items()},
        "batches": args.batches, "images": int(whole["reward"].size)}))


if __name__ == "__main__":
    main()
