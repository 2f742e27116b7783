"""The exact answers of the made-up problems, checked against autograd and against sampling."""

import pytest
import torch

from thalweg.problems import BernoulliNet, Quadratic


def test_quadratic_has_its_spectrum_gradient_and_minimum():
    spectrum = torch.tensor([-1.0, 0.5, 3.0], dtype=torch.float64)
    problem = Quadratic.from_spectrum(spectrum, seed=4)
    torch.testing.assert_close(torch.linalg.eigvalsh(problem.hessian), spectrum)
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(problem.loss(x).sum(), x)
    torch.testing.assert_close(gradient, problem.gradient(x))
    torch.testing.assert_close(
        torch.autograd.functional.hessian(problem.loss, x[0].detach()), problem.hessian
    )
    assert problem.loss(problem.minimum) == 0
    assert torch.equal(problem.hessian, Quadratic.from_spectrum(spectrum, seed=4).hessian)


def test_expected_loss_of_a_bernoulli_net_is_the_mean_of_samples():
    net = BernoulliNet(gates=5, batch=3, seed=2)
    with torch.no_grad():
        samples = torch.stack([net() for _ in range(4000)]).mean(1)
        exact = net.expected_loss()
    error = samples.std() / len(samples) ** 0.5
    assert error < 0.05 * exact
    assert abs(samples.mean() - exact) < 5 * error


def test_probabilities_sum_to_one_and_gradients_agree():
    net = BernoulliNet(gates=6, batch=3)
    torch.testing.assert_close(net.probabilities().sum(0), torch.ones(3, dtype=torch.float64))
    by_logits = net.x.T @ net.exact_logit_gradient() / len(net.x)
    torch.testing.assert_close(net.exact_gradient()[0], by_logits)


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: Quadratic.from_spectrum([]), "spectrum"),
        (lambda: Quadratic.from_spectrum([1.0, float("nan")]), "spectrum"),
        (lambda: Quadratic.from_spectrum("abc"), "spectrum"),
        (lambda: Quadratic.from_spectrum(None), "spectrum"),
        (lambda: Quadratic.from_spectrum([1.0]).loss([1.0]), "x"),
        (lambda: Quadratic.from_spectrum([1.0]).gradient([1.0]), "x"),
        (lambda: Quadratic.from_spectrum([1.0]).loss(torch.ones(2)), "x"),
        (lambda: BernoulliNet(gates=0), "gates"),
        (lambda: BernoulliNet(gates=17), "gates"),
        (lambda: BernoulliNet(batch=1.0), "batch"),
        (lambda: BernoulliNet(gates=1).moments(None), "estimator"),
    ],
)
def test_bad_input_is_refused_by_name(call, argument):
    with pytest.raises((ValueError, TypeError), match=f"^{argument}: expected"):
        call()


def test_moments_are_the_mean_and_the_variance_of_a_bernoulli():
    net = BernoulliNet(gates=3, batch=2)
    mean, variance = net.moments(lambda outcomes, logits, losses: outcomes)
    p = torch.sigmoid(net.logits().detach())
    torch.testing.assert_close(mean, p)
    torch.testing.assert_close(variance, p * (1 - p))
