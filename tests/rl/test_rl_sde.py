import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

from spatialt2i.core.config import RLConfig
from spatialt2i.rl import sde

SHIFTED = {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15}


def transition(kernel, sigma, sigma_next, noise, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, v = torch.randn(2, 3, 5, 7, generator=g)
    law = dict(sigma=torch.tensor(sigma), sigma_next=torch.tensor(sigma_next), noise=noise, sigma_max=torch.tensor(0.9))
    return x, v, *sde.step_mean_std(kernel, x=x, v=v, **law)


@pytest.mark.parametrize("scheduler", [SHIFTED, {"shift": 3.0}, {"shift": 1.0},
                                       SHIFTED | {"base_image_seq_len": 64, "max_image_seq_len": 1024}])
@pytest.mark.parametrize(("steps", "tokens"), [(1, 16), (6, 1024), (28, 4096), (50, 64)])
def test_schedule_is_the_stock_pipelines(scheduler, steps, tokens):
    stock = FlowMatchEulerDiscreteScheduler(**scheduler)
    c = stock.config
    mu = calculate_shift(tokens, c.get("base_image_seq_len", 256), c.get("max_image_seq_len", 4096),
                         c.get("base_shift", 0.5), c.get("max_shift", 1.15))
    retrieve_timesteps(stock, steps, "cpu", sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    ours = sde.flux_sigmas(steps=steps, image_tokens=tokens, scheduler=c)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, stock.sigmas, rtol=0, atol=1e-7)


def test_schedule_has_the_known_values():
    ours = sde.flux_sigmas(steps=6, image_tokens=1024, scheduler=SHIFTED)
    torch.testing.assert_close(ours, torch.tensor([1, .9037, .7897, .6525, .4842, .2730, 0]), rtol=0, atol=1e-4)
    level = sde.noise_level("sde", sigma=ours[:-1], sigma_next=ours[1:], noise=0.9, sigma_max=ours[1])
    std = level * (ours[:-1] - ours[1:]).sqrt()
    torch.testing.assert_close(std, torch.tensor([.90, .93, .65, .51, .40, .29]), rtol=0, atol=2e-2)
    cps = sde.noise_level("cps", sigma=ours[:-1], sigma_next=ours[1:], noise=0.8, sigma_max=ours[1])
    torch.testing.assert_close(cps, torch.tensor([.86, .75, .62, .46, .26, 0]), rtol=0, atol=1e-2)


def test_a_scheduler_that_flux_does_not_use_is_refused():
    with pytest.raises(ValueError, match="use_karras_sigmas = True, expected False"):
        sde.flux_sigmas(steps=4, image_tokens=16, scheduler=SHIFTED | {"use_karras_sigmas": True})


@pytest.mark.parametrize("kernel", ["sde", "cps", "dance"])
@pytest.mark.parametrize(("sigma", "sigma_next"), [(1.0, 0.9), (0.7, 0.4), (0.3, 0.0)])
def test_noise_0_is_the_ode(kernel, sigma, sigma_next):
    x, v, mean, std = transition(kernel, sigma, sigma_next, 0.0)
    assert std == 0
    torch.testing.assert_close(mean, x + v * (sigma_next - sigma))
    torch.testing.assert_close(transition("ode", sigma, sigma_next, 0.9)[2], x + v * (sigma_next - sigma))


@pytest.mark.parametrize("kernel", ["sde", "cps", "dance"])
def test_log_prob_is_the_normal_distributions(kernel):
    x, _, mean, std = transition(kernel, 0.7, 0.4, 0.8)
    expected = torch.distributions.Normal(mean, std).log_prob(x).mean((1, 2))
    torch.testing.assert_close(sde.log_prob(x, mean=mean, std=std), expected)


def test_flow_sde_has_the_published_form():
    sigma, sigma_next, a = 0.7, 0.4, 0.8
    x, v, mean, std = transition("sde", sigma, sigma_next, a)
    s, dt = a * math.sqrt(sigma / (1 - sigma)), sigma_next - sigma
    expected = x * (1 + s**2 * dt / (2 * sigma)) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
    torch.testing.assert_close(mean, expected)
    assert std.item() == pytest.approx(s * math.sqrt(-dt))


def test_dance_sde_has_the_published_form():
    sigma, sigma_next, a = 0.7, 0.4, 0.3
    x, v, mean, std = transition("dance", sigma, sigma_next, a)
    dt, x0 = sigma_next - sigma, x - sigma * v
    torch.testing.assert_close(mean, x + (v + a**2 / 2 * (x - (1 - sigma) * x0) / sigma**2) * dt)
    assert std.item() == pytest.approx(a * math.sqrt(-dt))


@pytest.mark.parametrize("noise", [0.1, 0.5, 1.0])
def test_cps_keeps_the_total_variance(noise):
    sigma, sigma_next = 0.7, 0.4
    x0, eps = torch.randn(2, 1, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    law = dict(sigma=torch.tensor(sigma), sigma_next=torch.tensor(sigma_next), noise=noise, sigma_max=torch.tensor(0.9))
    mean, std = sde.step_mean_std("cps", x=(1 - sigma) * x0 + sigma * eps, v=eps - x0, **law)
    weight = (mean - (1 - sigma_next) * x0) / eps  # of the predicted noise that is kept
    torch.testing.assert_close(weight**2 + std**2, torch.full_like(weight, sigma_next**2), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("kernel", "noise"), [("ode", 0.0), ("sde", 0.7), ("dance", 0.4)])
def test_marginals_are_the_odes_on_a_gaussian(kernel, noise):
    """Data N(m, tau^2): x_sigma is Gaussian, the true velocity linear in x, and no kernel may change the marginal."""
    m, tau, n, steps = 1.5, 0.6, 40_000, 300
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, 1, generator=g)
    sigmas = torch.linspace(1, 0, steps + 1)
    for now, then in zip(sigmas, sigmas[1:], strict=False):
        var = (1 - now) ** 2 * tau**2 + now**2
        v = -m + (now - (1 - now) * tau**2) / var * (x - (1 - now) * m)  # E[eps - x0 | x]
        mean, std = sde.step_mean_std(kernel, x=x, v=v, sigma=now, sigma_next=then, noise=noise, sigma_max=sigmas[1])
        x = mean + std * torch.randn(x.shape, generator=g) if then > 0 else mean
        if abs(then - 0.5) < 1e-6:
            assert x.mean().item() == pytest.approx(0.5 * m, abs=0.03)
            assert x.std().item() == pytest.approx(math.sqrt(0.25 * tau**2 + 0.25), abs=0.03)
    assert x.mean().item() == pytest.approx(m, abs=0.03)
    assert x.std().item() == pytest.approx(tau, abs=0.03)


def test_a_step_per_row_equals_steps_one_by_one():
    g = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 3, 5, 7, generator=g)
    sigma, sigma_next = torch.tensor([1.0, 0.7, 0.4]), torch.tensor([0.7, 0.4, 0.1])
    law = dict(noise=0.7, sigma_max=torch.tensor(0.7))
    mean, std = sde.step_mean_std("sde", x=x, v=v, sigma=sigma, sigma_next=sigma_next, **law)
    for i in range(3):
        one, s = sde.step_mean_std("sde", x=x[i:i + 1], v=v[i:i + 1], sigma=sigma[i], sigma_next=sigma_next[i], **law)
        assert torch.equal(mean[i:i + 1], one)
        assert torch.equal(std[i], s)


def test_the_window_of_trained_steps_is_checked():
    config = RLConfig()
    assert list(sde.trained_steps(config)) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="train_steps = 7, expected at most"):
        sde.trained_steps(replace(config, train_steps=5, train_from=2))
    with pytest.raises(ValueError, match="no noise at the last step"):
        sde.trained_steps(replace(config, kernel="cps", noise=0.8, train_steps=6))
    with pytest.raises(ValueError, match="at most 1 with kernel 'cps'"):
        sde.trained_steps(replace(config, kernel="cps", noise=1.2))
    with pytest.raises(ValueError, match="expected one of sde, cps, dance, ode"):
        sde.noise_level("ddim", sigma=torch.ones(1), sigma_next=torch.ones(1), noise=1.0, sigma_max=torch.ones(()))


def test_the_forward_process_ends_at_picture_and_noise_and_its_error_is_measured_in_velocity():
    g = torch.Generator().manual_seed(0)
    x0, noise, v = torch.randn(3, 2, 16, 12, generator=g)
    x = sde.add_noise(x0, noise=noise, sigma=torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(x, torch.stack([x0[0], noise[1]]))
    halfway = sde.add_noise(x0, noise=noise, sigma=torch.tensor([0.5, 0.5]))
    back, _ = sde.step_mean_std("ode", x=halfway, v=noise - x0, sigma=torch.tensor([0.5, 0.5]),
                                sigma_next=torch.zeros(2), noise=0.0, sigma_max=torch.tensor(0.9))
    torch.testing.assert_close(back, x0)  # the target is the velocity of the straight path
    for far in (0.5, 3.0):  # the pull on each picture is of one size, however far off it is
        off = (noise - x0 + far * v).requires_grad_()
        log_prob = sde.picture_log_prob(off, x0=x0, noise=noise)
        torch.testing.assert_close(log_prob.detach(), -far * v.square().mean((1, 2)).sqrt())
        log_prob.sum().backward()
        torch.testing.assert_close(off.grad.square().sum((1, 2)), torch.full((2,), 1 / (16 * 12)))
