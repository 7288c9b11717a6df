import pytest
import torch
from spatialt2i.reward.losses import bradley_terry, gaussian_bradley_terry, sampled_bradley_terry


@pytest.fixture
def scores():
    g = torch.Generator().manual_seed(0)
    mu_w, mu_l = 3 * torch.randn(2, 64, generator=g, dtype=torch.float64)
    s_w, s_l = torch.rand(2, 64, generator=g, dtype=torch.float64) * 3
    return {"mu_w": mu_w.requires_grad_(), "s_w": s_w.requires_grad_(), "mu_l": mu_l, "s_l": s_l}


def test_quadrature_equals_sampling(scores):
    exact, _ = gaussian_bradley_terry(**scores, nodes=32)
    sampled, _ = sampled_bradley_terry(**scores, draws=100_000, generator=torch.Generator().manual_seed(1))
    assert exact.item() == pytest.approx(sampled.item(), rel=1e-2)
    for name in ("mu_w", "s_w"):
        a, b = (torch.autograd.grad(loss, scores[name], retain_graph=True)[0] for loss in (exact, sampled))
        torch.testing.assert_close(a, b, atol=5e-4, rtol=0)


def test_quadrature_converges(scores):
    few, many = (gaussian_bradley_terry(**scores, nodes=n)[0].item() for n in (32, 128))
    assert few == pytest.approx(many, rel=1e-4)


@pytest.mark.parametrize("spread", [0.0, 1e-9])
def test_without_doubt_it_is_plain_bradley_terry(scores, spread):
    sure = torch.full_like(scores["mu_l"], spread).requires_grad_()
    plain, _ = bradley_terry(mu_w=scores["mu_w"], mu_l=scores["mu_l"])
    loss, _ = gaussian_bradley_terry(mu_w=scores["mu_w"], s_w=sure, mu_l=scores["mu_l"], s_l=sure, nodes=32)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    assert torch.isfinite(torch.autograd.grad(loss, sure)[0]).all()


def test_plain_is_the_log_likelihood():
    mu_w, mu_l = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 0.0])
    loss, metrics = bradley_terry(mu_w=mu_w, mu_l=mu_l)
    assert loss.item() == pytest.approx(-(torch.sigmoid(mu_w - mu_l).log().mean()).item())
    assert metrics["accuracy"].item() == 0.75  # the tie counts half
    assert metrics["margin"].item() == 1.0


def test_large_margins_stay_finite():
    mu = torch.tensor([1e4])
    loss, _ = gaussian_bradley_terry(mu_w=-mu, s_w=mu, mu_l=mu, s_l=mu, nodes=16)
    assert torch.isfinite(loss)
