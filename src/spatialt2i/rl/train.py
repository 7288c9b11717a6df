"""Spatial-RL: online GRPO with top-k filtering.

Axes: P prompts, G images per prompt, K kept images, T denoising steps, S latent tokens, C latent channels, B batch.
"""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from spatialt2i.core.config import RLConfig
from spatialt2i.core.protocols import Policy, Scorer
from spatialt2i.core.run import RunDir, interrupts_held, progress, seed_of, write_atomic, write_json
from spatialt2i.core.types import Prompt, Rollout
from spatialt2i.rl.checkpoint import CheckpointError, TrainState, load_checkpoint, save_checkpoint
from spatialt2i.rl.credit import RewardError, normalize, select_extremes
from spatialt2i.rl.gate import check_replay
from spatialt2i.rl.losses import kl_loss, policy_loss
from spatialt2i.rl.sde import trained_steps

logger = logging.getLogger(__name__)

STAGE = "rl"


class TrainingError(RuntimeError):
    """Training went out of hand."""


def train(*, policy: Policy, scorer: Scorer, prompts: Callable[[int], list[Prompt]], config: RLConfig, seed: int,
          run: RunDir, gallery: Sequence[Prompt], inputs: str) -> dict[str, float | int | str | None]:
    """Train the policy's adapter on the scorer's rewards; goes on from the run's newest checkpoint.

    Ctrl-C, an error or the end leave a checkpoint; after kill -9 the steps since the last one are done again. Either
    way the result is the same, bit for bit on a CPU.

    Args:
        policy: with a fresh adapter; in the end it has the averaged one (the last one where ``config.ema`` is 0).
        scorer: the reward.
        prompts: the P prompts of a step; a function of the step alone.
        config: the settings.
        seed: the run's.
        run: under ``rl/`` it gets metrics.jsonl, checkpoints/, gallery/step_0000/*.png and adapter/.
        gallery: prompts of the pictures drawn every ``config.gallery_every`` steps.
        inputs: names the weights of the model and of the scorer; a checkpoint of other ones is refused.

    Returns:
        ``steps``; ``adapter``, its folder in the run; the last step's ``reward_mean``; and ``gate_log_ratio``, where
        this call did any steps.

    Raises:
        GateError: the first rollout does not replay.
        RewardError: rewards are infinite, or nothing could be judged.
        CheckpointError: the run's checkpoint is damaged or of another config.
        TrainingError: the gradient is not finite.
        DiskFull: no space left; the last checkpoint is intact.
    """
    folder = run.stage(STAGE)
    state = fresh_state(policy, config)
    load_checkpoint(folder / "checkpoints", state, config=config, seed=seed, inputs=inputs)
    start = saved = state.step
    if start > config.steps:
        raise CheckpointError(f"{folder}: {start} steps are trained already and rl.steps = {config.steps}; ask for at "
                              f"least {start}, or make the stage afresh with --if-exists delete")
    run.truncate_metrics(STAGE, start)
    gate: dict[str, float] = {}
    bar = progress(config.steps, desc="Spatial-RL", initial=start)
    try:
        for step in range(start, config.steps):
            if step % config.gallery_every == 0:
                draw_gallery(policy, state, gallery, seed=seed, folder=folder / "gallery" / f"step_{step:04d}")
            seconds: dict[str, float] = {}
            batch = prompts(step)  # P
            seeds = [[seed_of(seed, STAGE, step, prompt.id, g) for g in range(config.group)] for prompt in batch]
            with timed(seconds, "sample"):
                rollout = policy.sample(prompts=batch, group=config.group, seeds=seeds)  # latents [P, G, T+1, S, C]
            with timed(seconds, "decode"):
                rollout.images = policy.decode(rollout)  # [P][G]
            with timed(seconds, "score"):
                rewards = group_scores(scorer, rollout)  # [P, G]
            kept = select_extremes(rewards, k=config.top_k)  # [P, K], K = 2 top_k
            advantages = normalize(rewards, kept, over=config.stats_over, clip=config.advantage_clip,
                                   global_std=config.global_std)  # [P, K]
            if step == start:
                gate["gate_log_ratio"] = check_replay(policy=policy, rollout=rollout, config=config)
                logger.info("gate passed: largest |log ratio| of a replayed rollout %.3e", gate["gate_log_ratio"])
            with timed(seconds, "update"):
                metrics = accumulate_gradients(policy, rollout.take(kept), advantages, config)
            with interrupts_held():  # weights, average, step counter and metrics belong together
                with timed(seconds, "update"):
                    metrics |= apply_update(state, config)
                metrics = describe(rewards, advantages) | metrics
                run.log(STAGE, step, metrics | {f"seconds_{k}": v for k, v in seconds.items()})
            bar.set_postfix(reward=f"{metrics['reward_mean']:.3f}", refresh=False)
            bar.update()
            if state.step % config.save_every == 0:
                save_checkpoint(folder / "checkpoints", state, config=config, seed=seed, inputs=inputs)
                saved = state.step
    finally:
        bar.close()
        if state.step > saved:
            save_checkpoint(folder / "checkpoints", state, config=config, seed=seed, inputs=inputs)
    use_average(state)
    draw_gallery(policy, state, gallery, seed=seed, folder=folder / "gallery" / f"step_{state.step:04d}")
    policy.save(folder / "adapter")
    return gate | {"steps": state.step, "adapter": str((folder / "adapter").relative_to(run.path)),
                   "reward_mean": run.metrics(STAGE)[-1]["reward_mean"]}


def group_scores(scorer: Scorer, rollout: Rollout) -> Tensor:
    """Rewards float64 [P, G] of a decoded rollout, each picture under its own prompt; NaN where not judged.

    Raises:
        RewardError: the scorer returned another number of scores, or judged nothing at all.
    """
    images = [image for group in rollout.images for image in group]
    owners = [prompt for prompt, group in zip(rollout.prompts, rollout.images, strict=True) for _ in group]
    mean = scorer.score(images=images, prompts=owners).mean
    if mean.shape != (len(images),):
        raise RewardError(f"scorer {scorer.name} returned scores of shape {mean.shape}, expected ({len(images)},)")
    rewards = torch.as_tensor(mean, dtype=torch.float64)
    if rewards.isnan().all():
        raise RewardError(f"scorer {scorer.name} judged none of {len(images)} pictures (all scores are NaN); look into "
                          "the scorer. Progress is saved: run the same command again to go on")
    return rewards.view(len(rollout.prompts), -1)


def accumulate_gradients(policy: Policy, rollout: Rollout, advantages: Tensor, config: RLConfig) -> dict[str, float]:
    """Gradient of the RL loss, the mean over all trained transitions; the same for every micro-batch size.

    Args:
        policy: its parameters' ``grad`` is replaced.
        rollout: the kept images, latents [P, K, T+1, S, C].
        advantages: [P, K], NaN where not trained on.
        config: trained steps, clip range, KL weight, micro-batch.

    Returns:
        ratio_mean, max_log_ratio and clip_share (NaN with kernel "ode", which draws without log-probs), kl (NaN where
        it has no weight) and loss; all NaN where nothing was trained on.
    """
    for parameter in policy.parameters().values():
        parameter.grad = None
    rows = transitions(advantages.isfinite(), trained_steps(config))  # [N, 3]
    advantages = advantages.to(rollout.latents)
    parts: dict[str, list[Tensor]] = {"ratio": [], "log_ratio": [], "clipped": [], "kl": [], "loss": []}  # each of [B]
    for batch in rows.split(config.micro_batch) if len(rows) else ():
        p, k, t = batch.unbind(1)
        if config.kl:
            reference = policy.log_prob(rollout=rollout, rows=batch, reference=True)[1]  # [B, S, C]
        log_prob, mean, level = policy.log_prob(rollout=rollout, rows=batch)  # [B], [B, S, C], [B]
        loss, values = policy_loss(log_prob=log_prob, old_log_prob=rollout.log_probs[p, k, t],
                                   advantage=advantages[p, k], clip=config.clip)  # [B]
        if config.kl:
            kl = kl_loss(mean=mean, reference=reference, level=level)  # [B]
            loss = loss + config.kl * kl
            values["kl"] = kl.detach()
        (loss.sum() / len(rows)).backward()
        values["loss"] = loss.detach()
        for name, value in values.items():
            parts[name].append(value)
    # Read only now: reading a number earlier would make the accelerator wait.
    whole = {k: torch.cat(v).double() if v else torch.tensor([torch.nan]) for k, v in parts.items()}
    return {"ratio_mean": whole["ratio"].mean().item(), "max_log_ratio": whole["log_ratio"].abs().max().item(),
            "clip_share": whole["clipped"].mean().item(), "kl": whole["kl"].mean().item(),
            "loss": whole["loss"].mean().item()}


def apply_update(state: TrainState, config: RLConfig) -> dict[str, float]:
    """Clip the gradient, step the optimiser, the average and the step counter; returns grad_norm before clipping.

    Without a gradient (every group was dropped) only the counter moves.

    Raises:
        TrainingError: the gradient is not finite; nothing was changed.
    """
    norm = torch.nn.utils.clip_grad_norm_(list(state.parameters.values()), config.max_grad_norm).item()
    if not norm < float("inf"):
        raise TrainingError(f"the gradient of RL step {state.step} has norm {norm}, expected a finite number; weights "
                            "are unchanged. Lower rl.lr, or train fewer low-noise steps (rl.train_steps), and start "
                            "the stage afresh with --if-exists delete")
    state.optimizer.step()
    state.step += 1
    if state.ema is not None and state.step % config.ema_every == 0:
        decay = min(config.ema, (1 + state.step) / (10 + state.step))  # so that a short run is averaged too [Flow-GRPO]
        for name, parameter in state.parameters.items():
            state.ema[name].lerp_(parameter.detach(), 1 - decay)
    return {"grad_norm": norm}


def transitions(trained: Tensor, steps: range) -> Tensor:
    """Rows (prompt, image, step) int64 [N, 3] of all trained steps of the trained images, bool [P, K]."""
    where = trained.nonzero().cpu()  # [M, 2]
    return torch.cat([where.repeat_interleave(len(steps), 0), torch.tensor(steps).repeat(len(where))[:, None]], dim=1)


def describe(rewards: Tensor, advantages: Tensor) -> dict[str, float]:
    """What the rewards [P, G] of a step looked like, and how much of it was trained on (advantages [P, K])."""
    judged = rewards[~rewards.isnan()]
    return {"reward_mean": judged.mean().item(), "reward_std": judged.std(correction=0).item(),
            "reward_max": judged.max().item(), "not_judged": rewards.isnan().double().mean().item(),
            "dropped_groups": (~advantages.isfinite()).all(1).double().mean().item(),
            "trained_images": float(advantages.isfinite().sum())}


def fresh_state(policy: Policy, config: RLConfig) -> TrainState:
    """The state before the first step: the recipe's AdamW, and an average that starts at the adapter."""
    parameters = policy.parameters()
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=config.lr, betas=(0.9, 0.999), eps=1e-8,
                                  weight_decay=config.weight_decay, foreach=True)  # [Flow-GRPO]
    ema = {name: p.detach().clone() for name, p in parameters.items()} if config.ema else None
    return TrainState(parameters, ema, optimizer)


@contextmanager
def averaged(state: TrainState) -> Iterator[None]:
    """Inside the block the adapter is its average, where there is one."""
    def swap() -> None:
        for name, value in (state.ema or {}).items():
            state.parameters[name].data, state.ema[name] = value, state.parameters[name].data

    swapped = False
    try:
        with interrupts_held():  # half-swapped weights must never reach a checkpoint
            swap()
            swapped = True
        yield
    finally:
        if swapped:
            with interrupts_held():
                swap()


def use_average(state: TrainState) -> None:
    """Replace the adapter by its average, where there is one."""
    with torch.no_grad():
        for name, value in (state.ema or {}).items():
            state.parameters[name].copy_(value)


def draw_gallery(policy: Policy, state: TrainState, prompts: Sequence[Prompt], *, seed: int, folder: Path) -> None:
    """Write ``00.png``, ``01.png`` ... and their prompts.json: what the averaged adapter draws, from fixed seeds."""
    if not prompts:
        return
    with averaged(state):
        images = policy.generate(prompts=prompts, seeds=[seed_of(seed, "gallery", prompt.id) for prompt in prompts])
    for i, image in enumerate(images):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        write_atomic(folder / f"{i:02d}.png", buffer.getvalue())
    write_json(folder / "prompts.json", [prompt.to_json() for prompt in prompts])


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the block's wall time to ``seconds[name]``, with the accelerator's queue drained at both ends."""
    _drain()
    start = time.perf_counter()
    yield
    _drain()
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def _drain() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
