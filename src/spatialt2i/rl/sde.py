"""Denoising as a Markov chain: schedule, transition kernels, log-probabilities. Pure functions.

Convention: sigma falls from 1 (noise) to 0 (picture), x_sigma = (1 - sigma) x0 + sigma eps, and the model predicts
v = eps - x0. So x0 is estimated by x - sigma v and eps by x + (1 - sigma) v. Every tensor here is float32.
Axes: B batch, T denoising steps, S latent tokens, C latent channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spatialt2i.core.config import RLConfig

KERNELS = ("sde", "cps", "dance", "ode")

# Settings of the stock scheduler that change the schedule in ways FLUX does not use, with the value that means "off".
_UNUSED_BY_FLUX = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False,
                   "invert_sigmas": False, "shift_terminal": None, "use_flow_sigmas": False,
                   "time_shift_type": "exponential", "stochastic_sampling": False}


def flux_sigmas(*, steps: int, image_tokens: int, scheduler: Mapping[str, Any]) -> Tensor:
    """The noise levels that the stock FluxPipeline visits.

    linspace(1, 1/T, T) is shifted by e^mu / (e^mu + 1/s - 1), with mu linear in the number of image tokens (or a fixed
    factor where the scheduler has no dynamic shifting), then 0 is appended.

    Args:
        steps: T.
        image_tokens: S, the number of packed latent tokens of one picture.
        scheduler: the config of the pipeline's FlowMatchEulerDiscreteScheduler.

    Returns:
        float32 [T+1], from 1 to 0.

    Raises:
        ValueError: the scheduler has a setting that FLUX's schedule does not know.
    """
    for key, off in _UNUSED_BY_FLUX.items():
        if (scheduler.get(key) or off) != off:
            raise ValueError(f"scheduler config: {key} = {scheduler[key]!r}, expected {off!r}; "
                             "only FLUX's shifted linear schedule is supported")
    sigmas = np.linspace(1.0, 1 / steps, steps).astype(np.float32)
    if scheduler.get("use_dynamic_shifting", False):
        low, high = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
        base, top = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
        slope = (top - base) / (high - low)
        factor = math.exp(image_tokens * slope + (base - slope * low))
        sigmas = factor / (factor + (1 / sigmas - 1))
    else:
        shift = scheduler.get("shift", 1.0)
        sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    return torch.from_numpy(np.append(sigmas, 0).astype(np.float32))


def trained_steps(config: RLConfig) -> range:
    """The denoising steps that are trained on and, unless the kernel is "ode", draw noise; all others are ODE steps.

    Raises:
        ValueError: the window does not fit into the rollout, or the kernel has no noise at one of its steps.
    """
    stop = config.train_from + config.train_steps
    if stop > config.rollout_steps:
        raise ValueError(f"rl.train_from + rl.train_steps = {stop}, expected at most rl.rollout_steps = "
                         f"{config.rollout_steps}; lower rl.train_steps or raise rl.rollout_steps")
    if config.kernel == "cps" and stop == config.rollout_steps:
        raise ValueError("kernel 'cps' draws no noise at the last step, so that step has no log-probability; "
                         f"got rl.train_steps = {config.train_steps}, expected at most "
                         f"{config.rollout_steps - 1 - config.train_from}")
    if config.kernel == "cps" and config.noise > 1:
        raise ValueError(f"rl.noise = {config.noise}, expected at most 1 with kernel 'cps' "
                         "(its std is sigma_next sin(noise pi / 2))")
    return range(config.train_from, stop)


def noise_level(kernel: str, *, sigma: Tensor, sigma_next: Tensor, noise: float, sigma_max: Tensor) -> Tensor:
    """The kernel's s: a diffusion coefficient (Flow-SDE, Dance-SDE) or a std (CPS). It scales the KL.

    Args:
        kernel: "sde" (s = a sqrt(sigma / (1 - sigma)); sigma = 1 in the denominator is replaced by ``sigma_max``),
            "dance" (s = a), "cps" (s = sigma_next sin(a pi / 2)) or "ode" (s = 0).
        sigma, sigma_next: noise level before and after the step, any shape.
        noise: a.
        sigma_max: the schedule's second value, 0-d.

    Returns:
        s, of ``sigma``'s shape.
    """
    if kernel == "sde":
        return noise * torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigma_max, sigma)))
    if kernel == "cps":
        return sigma_next * math.sin(noise * math.pi / 2)
    if kernel == "dance":
        return torch.full_like(sigma, noise)
    if kernel == "ode":
        return torch.zeros_like(sigma)
    raise ValueError(f"kernel {kernel!r}, expected one of {', '.join(KERNELS)}")


def step_mean_std(kernel: str, *, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, noise: float,
                  sigma_max: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std of the Gaussian transition from x_sigma to x_sigma_next.

    Flow-SDE (Flow-GRPO, arXiv 2505.05470) and Dance-SDE (DanceGRPO, arXiv 2505.07818) are Euler-Maruyama steps of
    dx = [v + s^2 eps_hat / (2 sigma)] dt + s dW, which has the marginals of the ODE dx = v dt for every s. CPS
    (arXiv 2509.05952) mixes predicted and fresh noise so that their total variance is exactly sigma_next^2.

    Args:
        kernel: see `noise_level`.
        x: [B, S, C], the state at ``sigma``.
        v: [B, S, C], the predicted velocity there.
        sigma, sigma_next: [B] or 0-d.
        noise, sigma_max: see `noise_level`.

    Returns:
        mean [B, S, C]; std of ``sigma``'s shape, 0 for "ode".
    """
    s = noise_level(kernel, sigma=sigma, sigma_next=sigma_next, noise=noise, sigma_max=sigma_max)
    dt = sigma_next - sigma  # negative
    if kernel == "cps":
        x0, eps = x - _over(sigma, x) * v, x + _over(1 - sigma, x) * v
        kept = torch.sqrt((sigma_next**2 - s**2).clamp(min=0))
        return _over(1 - sigma_next, x) * x0 + _over(kept, x) * eps, s
    if kernel == "ode":
        return x + v * _over(dt, x), s
    pull = s**2 / (2 * sigma) * dt
    return x + v * _over(dt, x) + _over(pull, x) * (x + _over(1 - sigma, x) * v), s * torch.sqrt(-dt)


def log_prob(x_next: Tensor, *, mean: Tensor, std: Tensor) -> Tensor:
    """Gaussian log-density of a transition, as the *mean* over its latent elements [Flow-GRPO].

    The mean (not the sum) keeps ratios of whole pictures near 1, which is why clip ranges are as small as 1e-4. All
    kernels keep their constants, CPS too (its authors drop the 1 / (2 std^2)): so a ratio is a ratio of densities.

    Args:
        x_next, mean: [B, S, C].
        std: [B] or 0-d, positive.

    Returns:
        [B].
    """
    z = (x_next - mean) / _over(std, mean)
    return -0.5 * (z**2).mean((1, 2)) - torch.log(std) - 0.5 * math.log(2 * math.pi)


def add_noise(x0: Tensor, *, noise: Tensor, sigma: Tensor) -> Tensor:
    """The forward process: what pictures x0 [B, S, C] look like at levels sigma [B] of the noise [B, S, C]."""
    return x0 + _over(sigma, x0) * (noise - x0)


def picture_log_prob(v: Tensor, *, x0: Tensor, noise: Tensor) -> Tensor:
    """How likely a picture is, as one noise level tells: minus the error of the velocity predicted at `add_noise`.

    Half of the squared error is what the level adds to the evidence bound of the log-likelihood, and what Advantage
    Weighted Matching (arXiv 2509.25050) takes. This is the root of the mean squared error: the same gradient, divided
    by the picture's own error as in DiffusionNFT (arXiv 2509.16117). So all pictures of a rollout pull equally, and a
    bad one that is already unlikely does not push ever harder.

    Args:
        v: [B, S, C], predicted at the noised pictures.
        x0, noise: [B, S, C].

    Returns:
        [B].
    """
    return -(v - (noise - x0)).square().mean((1, 2)).sqrt()


def _over(value: Tensor, x: Tensor) -> Tensor:
    """A [B] or 0-d value, shaped to broadcast over x [B, S, C]."""
    return value.reshape(-1, *(1,) * (x.dim() - 1))
