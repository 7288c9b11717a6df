"""The gate: before the first update, a rollout must replay through the training path to its own log-probs.

Online RL divides by the probability of what was drawn. When sampling and training disagree about it (another schedule,
another adapter, rounded latents, kernels that depend on the batch), the ratio is noise and rewards still may rise for a
while; so the run stops here instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from spatialt2i.core.config import RLConfig
from spatialt2i.core.protocols import Policy
from spatialt2i.core.types import Rollout
from spatialt2i.rl.sde import trained_steps

REPLAYED = 128  # transitions, spread over the rollout


class GateError(RuntimeError):
    """Rollout and training path disagree."""


def check_replay(*, policy: Policy, rollout: Rollout, config: RLConfig) -> float:
    """Replay transitions of a fresh rollout, in micro-batches of mixed steps as training does.

    Args:
        policy: what drew the rollout, not updated since.
        rollout: latents [P, G, T+1, S, C] and log-probs [P, G, T].
        config: trained steps, batch sizes, tolerance.

    Returns:
        The largest |log ratio|.

    Raises:
        GateError: it is above ``config.gate_tolerance`` or not finite, or the latents were rounded; names the likely
            cause.
    """
    rows = _spread(rollout, config)
    errors = _replay(policy, rollout, rows.split(config.micro_batch))  # [N]
    worst = errors.max().item()
    rounded = torch.equal(rollout.latents, rollout.latents.bfloat16().float())
    if worst <= config.gate_tolerance and not rounded:
        return worst
    if worst <= config.gate_tolerance:
        raise GateError("the stored latents hold only bfloat16 values; expected float32, whatever rl.dtype is. This "
                        f"rollout still replays to its log-probs (largest |log ratio| {worst:.3e}, rl.gate_tolerance = "
                        f"{config.gate_tolerance:.1e}), but others need not. Nothing was trained.")
    cause = ("the stored latents hold only bfloat16 values; keep them in float32" if rounded
             else _diagnose(policy, rollout, rows, config))
    by_step = ", ".join(f"step {t}: {errors[rows[:, 2] == t].max().item():.1e}" for t in rows[:, 2].unique().tolist())
    raise GateError(f"a rollout does not replay to the log-probs it was drawn with: largest |log ratio| {worst:.3e} "
                    f"({by_step}), expected at most rl.gate_tolerance = {config.gate_tolerance:.1e}. "
                    f"Likely cause: {cause}. Nothing was trained.")


def _diagnose(policy: Policy, rollout: Rollout, rows: Tensor, config: RLConfig) -> str:
    """Replay variants until one fits, and say what it stands for."""
    batches = rows.split(config.micro_batch)

    def fits(variant: Rollout, batches: tuple[Tensor, ...] | Iterator[Tensor], *, reference: bool = False) -> bool:
        return _replay(policy, variant, batches, reference=reference).max().item() <= config.gate_tolerance

    drawn = config.kernel == "ode" or rollout.log_probs[tuple(rows.T)].isfinite().all().item()
    if not (drawn and rollout.latents.isfinite().all().item()):
        return "latents or log-probs are not finite; the model overflows, or a trained step has no noise"
    if fits(dataclasses.replace(rollout, sigmas=policy.sigmas), batches):
        return "the rollout carries another schedule than the policy's; both must come from the same shift and steps"
    unshifted = torch.linspace(1, 0, len(rollout.sigmas)).to(rollout.sigmas)
    if fits(dataclasses.replace(rollout, sigmas=unshifted), batches):
        return "the rollout was drawn with an unshifted schedule; FLUX shifts it by the number of image tokens"
    if fits(rollout, batches, reference=True):
        return "the adapter was off (or not yet loaded) while sampling and is on while training"
    if fits(rollout, _as_sampled(rollout, config)):
        return ("the model's output depends on how it is batched; set rl.micro_batch = rl.sample_batch = "
                f"{config.sample_batch}, or use rl.dtype = float32")
    return ("unknown: the weights changed since sampling, or sampling and training differ in schedule, guidance, text "
            "or attention kernel")


def _replay(policy: Policy, rollout: Rollout, batches: tuple[Tensor, ...] | Iterator[Tensor], *,
            reference: bool = False) -> Tensor:
    """|log ratio| of every transition [N]; infinite where it is not a number."""
    errors = []
    with torch.no_grad():
        for rows in batches:
            errors.append(policy.replay(rollout=rollout, rows=rows, reference=reference).abs().cpu())
    return torch.cat(errors).nan_to_num(nan=torch.inf)


def _spread(rollout: Rollout, config: RLConfig) -> Tensor:
    """Up to `REPLAYED` transitions int64 [N, 3] at even distances over all prompts, images and steps that matter."""
    prompts, group = rollout.log_probs.shape[:2]
    rows = torch.cartesian_prod(torch.arange(prompts), torch.arange(group), torch.tensor(_steps(rollout, config)))
    return rows[torch.linspace(0, len(rows) - 1, min(REPLAYED, len(rows))).round().long()]


def _as_sampled(rollout: Rollout, config: RLConfig) -> Iterator[Tensor]:
    """The first transitions [B, 3] in the batches in which they were sampled: neighbours, all at the same step."""
    prompts, group = rollout.log_probs.shape[:2]
    flat = torch.cartesian_prod(torch.arange(prompts), torch.arange(group))  # [P G, 2]
    first = flat[:config.sample_batch]
    return (torch.cat([first, torch.full((len(first), 1), t)], dim=1) for t in _steps(rollout, config))


def _steps(rollout: Rollout, config: RLConfig) -> range:
    """The steps that must replay: the trained ones, or all that led to the picture, where that is trained on."""
    return range(rollout.log_probs.shape[2]) if config.kernel == "ode" else trained_steps(config)
