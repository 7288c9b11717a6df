import math

import pytest
import torch

from spatialt2i.rl.credit import RewardError, normalize, select_extremes
from spatialt2i.rl.losses import kl_loss, policy_loss

NAN = math.nan


def rewards(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_the_k_worst_and_k_best_are_kept():
    index = select_extremes(rewards([5, 1, 4, 2, 3, 0], [0, 1, 2, 3, 4, 5]), k=2)
    assert index.tolist() == [[5, 1, 2, 0], [0, 1, 4, 5]]


def test_k_0_and_a_large_k_keep_all_judged():
    r = rewards([5, 1, 4, NAN, 3])
    for k in (0, 3, 24):
        assert select_extremes(r, k=k).tolist() == [[1, 4, 2, 0, -1]]


def test_not_judged_images_leave_their_group():
    groups = rewards([NAN, 1, 5, NAN, 3, 2], [NAN] * 6, [NAN] * 5 + [1], [NAN, 1, NAN, 2, NAN, NAN])
    index = select_extremes(groups, k=1)
    assert index.tolist() == [[1, 2], [-1, -1], [-1, -1], [1, 3]]
    assert select_extremes(rewards([NAN, 1, 5, NAN, 3, 2]), k=2).tolist() == [[1, 5, 4, 2]]
    assert select_extremes(rewards([NAN, 1, 5, NAN, 3, NAN]), k=2).tolist() == [[1, 4, 2, -1]]


def test_ties_are_deterministic():
    assert select_extremes(rewards([1, 1, 1, 1, 1, 1]), k=2).tolist() == [[0, 1, 4, 5]]


def test_an_infinite_reward_is_an_error():
    with pytest.raises(RewardError, match="prompt 1, image 2 is -inf"):
        select_extremes(rewards([1, 2, 3], [1, 2, -math.inf]), k=1)


def test_statistics_over_the_kept_or_over_the_group():
    r = rewards([0, 0, 1, 3, 4, 10])
    kept = select_extremes(r, k=1)
    assert kept.tolist() == [[0, 5]]
    torch.testing.assert_close(normalize(r, kept, over="kept", clip=5), rewards([-1, 1]), atol=1e-4, rtol=0)
    expected = (rewards([0, 10]) - r.mean()) / r.std(correction=0)
    torch.testing.assert_close(normalize(r, kept, over="group", clip=5), expected, atol=1e-4, rtol=0)


def test_advantages_have_unit_rms_over_the_kept_and_are_clipped():
    r = torch.randn(500, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kept = select_extremes(r, k=6)
    assert normalize(r, kept, over="kept", clip=5).square().mean().sqrt().item() == pytest.approx(1.0, abs=1e-3)
    assert normalize(r, kept, over="group", clip=5).square().mean().sqrt().item() == pytest.approx(1.36, abs=0.02)
    assert normalize(r, kept, over="group", clip=1.1).abs().max() == 1.1


def test_a_global_std_lets_a_group_weigh_by_its_spread():
    r = rewards([0, 1], [10, 13], [5, 5], [NAN, NAN])
    kept = select_extremes(r, k=1)
    std = math.sqrt((0.25 + 2.25 + 0) / 3)  # of groups around their own means; [NAN, NAN] has none
    expected = rewards([-0.5 / std, 0.5 / std], [-1.5 / std, 1.5 / std], [NAN, NAN], [NAN, NAN])
    torch.testing.assert_close(normalize(r, kept, over="kept", clip=5, global_std=True), expected, atol=1e-3, rtol=0,
                               equal_nan=True)
    own = normalize(r, kept, over="kept", clip=5)[:2]
    torch.testing.assert_close(own, rewards([-1, 1], [-1, 1]), atol=1e-3, rtol=0)


def test_groups_without_spread_and_padding_are_not_trained_on():
    r = rewards([2, 2, 2, 2], [NAN, 1, NAN, 3], [NAN] * 4, [0.1 + 0.2] * 4)
    for over in ("kept", "group"):
        advantages = normalize(r, select_extremes(r, k=2), over=over, clip=5)
        assert advantages.isnan().tolist() == [[True] * 4, [False, False, True, True], [True] * 4, [True] * 4]


def test_on_policy_the_loss_is_minus_the_advantage_and_its_gradient_is_reinforce():
    log_prob = torch.tensor([-1.0, -2.0, 0.5], requires_grad=True)
    advantage = torch.tensor([1.0, -2.0, 0.0])
    loss, metrics = policy_loss(log_prob=log_prob, old_log_prob=log_prob.detach(), advantage=advantage, clip=1e-4)
    loss.sum().backward()
    assert torch.equal(metrics["ratio"], torch.ones(3))
    assert metrics["clipped"].sum() == 0
    torch.testing.assert_close(loss.detach(), -advantage)
    torch.testing.assert_close(log_prob.grad, -advantage)


def test_without_old_log_probs_the_gradient_is_the_same_and_the_ratio_is_not_known():
    log_prob = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss, metrics = policy_loss(log_prob=log_prob, old_log_prob=torch.tensor([NAN, -2.0]),
                                advantage=torch.tensor([1.0, -2.0]), clip=1e-4)
    loss.sum().backward()
    torch.testing.assert_close(log_prob.grad, torch.tensor([-1.0, 2.0]))
    for name, known in {"ratio": 1.0, "log_ratio": 0.0, "clipped": 0.0}.items():
        assert metrics[name].isnan().tolist() == [True, False] and metrics[name][1] == known


@pytest.mark.parametrize(("ratio", "advantage", "clipped"), [(1.5, 1.0, True), (0.5, 1.0, False), (1.5, -1.0, False),
                                                             (0.5, -1.0, True), (1.05, 1.0, False)])
def test_the_clip_stops_the_gradient_only_where_it_would_go_further(ratio, advantage, clipped):
    log_prob = torch.tensor([math.log(ratio)], requires_grad=True)
    loss, metrics = policy_loss(log_prob=log_prob, old_log_prob=torch.zeros(1), advantage=torch.tensor([advantage]),
                                clip=0.1)
    loss.sum().backward()
    assert bool(metrics["clipped"]) == clipped
    assert (log_prob.grad == 0).item() == clipped


def test_kl_is_the_gaussian_kl_when_the_level_is_the_std():
    mean, reference = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    level = torch.tensor([0.3, 0.7, 1.0])
    std = level[:, None, None]
    normal = torch.distributions.Normal
    exact = torch.distributions.kl_divergence(normal(mean, std), normal(reference, std)).mean((1, 2))
    torch.testing.assert_close(kl_loss(mean=mean, reference=reference, level=level), exact)
    assert kl_loss(mean=mean, reference=mean, level=level).sum() == 0
