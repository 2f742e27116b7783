"""Decorrelation: the law of its update, and how it lives with the rules that evaluate more than once."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from thalweg.blackbox import SPSA, NodePerturbation
from thalweg.blackbox.decorrelation import Decorrelation, off_diagonal
from thalweg.errors import ArgumentError, ArgumentTypeError, NonFiniteError
from thalweg.noise import Key
from thalweg.step import backward


def ratio(rows):
    """Norm of what lies off the diagonal of the correlations over that of the diagonal."""
    correlation = rows.T @ rows / len(rows)
    return off_diagonal(correlation).norm() / correlation.diagonal().norm()


def test_correlations_fall_as_published():
    """From 0.87 to at most 0.10 in 1000 steps of batch 64, on mixtures with about that ratio at the start."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(20, 20, generator=generator) / 20**0.5

    def draw(count):
        return torch.randn(count, 20, generator=generator) @ mix.T

    unit, held_out = Decorrelation(20, rate=0.05), draw(20000)
    start = ratio(held_out)
    for _ in range(1000):
        unit(draw(64))
    assert 0.87 < start < 1.0
    assert ratio(unit.eval()(held_out)) < 0.10


def test_one_update_is_the_rule():
    unit = Decorrelation(3, rate=0.1, automatic=False).double()
    x = torch.randn(5, 7, 3, dtype=torch.float64)
    start = torch.randn(3, 3, dtype=torch.float64)
    unit.matrix = start.clone()
    y = unit(x)
    torch.testing.assert_close(y, torch.einsum("ij,abj->abi", start, x))
    assert torch.equal(unit.matrix, start)
    unit.update_(y)
    c = torch.einsum("abi,abj->ij", y, y) / 35
    torch.testing.assert_close(unit.matrix, start - 0.1 * (c - torch.diag(c.diag())) @ start)


def test_evaluation_mode_and_rate_zero_keep_the_matrix():
    x = torch.randn(6, 3)
    for unit in (Decorrelation(3).eval(), Decorrelation(3, rate=0)):
        assert torch.equal(unit(x), x)
        assert torch.equal(unit.matrix, torch.eye(3))


def test_gradients_pass_and_a_graph_made_before_the_update_stays_valid():
    unit, x = Decorrelation(3, rate=0.5).double(), torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    unit.matrix = torch.randn(3, 3, dtype=torch.float64)
    before = unit.matrix.clone()
    y = unit(unit(x))
    y.sum().backward()
    second = before - 0.5 * off_diagonal((x @ before.T).T @ (x @ before.T) / 6) @ before
    torch.testing.assert_close(x.grad, torch.ones(6, 3, dtype=torch.float64) @ (second @ before).detach())
    assert not unit.matrix.requires_grad


@pytest.mark.parametrize("rule", [NodePerturbation(samples=2), SPSA(samples=2)], ids=repr)
def test_it_moves_once_per_estimate(rule):
    net, x = nn.Sequential(Decorrelation(4, rate=0.1), nn.Linear(4, 2)), torch.randn(8, 4)
    twin = Decorrelation(4, rate=0.1)
    twin(x)
    backward(lambda: net(x).square().sum(1), net.parameters(), gradient=rule, key=Key(0))
    torch.testing.assert_close(net[0].matrix, twin.matrix)
    assert [name for name, _ in net.named_parameters()] == ["1.weight", "1.bias"]
    assert "0.matrix" in net.state_dict()


def test_node_perturbation_learns_from_decorrelated_features():
    unit = Decorrelation(4)
    unit.matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    net, x = nn.Sequential(unit.eval(), nn.Linear(4, 2)), torch.randn(5, 4)
    found = NodePerturbation().estimate(lambda: net(x).square().sum(1), list(net.parameters()), Key(0))
    layer = nn.Sequential(net[1])
    inputs = unit(x)
    want = NodePerturbation().estimate(lambda: layer(inputs).square().sum(1), list(net.parameters()), Key(0))
    torch.testing.assert_close(found.gradients, want.gradients)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_input_decides_the_dtype_and_the_buffer_keeps_its_own(dtype):
    unit = Decorrelation(3, rate=0.1)
    assert unit(torch.randn(4, 3).to(dtype)).dtype == dtype
    assert unit.matrix.dtype == torch.float32


def test_fake_tensors_and_compilation():
    with FakeTensorMode():
        assert Decorrelation(3)(torch.randn(4, 3)).shape == (4, 3)
    unit, twin, x = Decorrelation(3, rate=0.1), Decorrelation(3, rate=0.1), torch.randn(4, 3)
    compiled = torch.compile(unit, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), twin(x))
    torch.testing.assert_close(unit.matrix, twin.matrix)


def test_a_rate_that_is_too_large_is_named():
    unit, x = Decorrelation(3, rate=1e3), torch.randn(8, 3)

    def train():
        for _ in range(20):
            unit(x)

    with pytest.raises(NonFiniteError, match=r"rate=1000.0, which is too large"):
        train()
    assert torch.isfinite(unit.matrix).all()


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ((0,), ArgumentError, "size"),
        ((2.0,), ArgumentTypeError, "size"),
        ((2, -0.1), ArgumentError, "rate"),
        ((2, float("nan")), ArgumentError, "rate"),
        ((2, "fast"), ArgumentTypeError, "rate"),
    ],
    ids=str,
)
def test_arguments_out_of_range(arguments, error, name):
    with pytest.raises(error, match=f"^{name}: "):
        Decorrelation(*arguments)


@pytest.mark.parametrize("x", [torch.zeros(2, 4), torch.zeros(())], ids=["size", "scalar"])
def test_inputs_of_another_size_are_refused(x):
    with pytest.raises(ArgumentError, match=r"a shape \(..., 3\)"):
        Decorrelation(3)(x)
    with pytest.raises(ArgumentTypeError, match=r"^x: "):
        Decorrelation(3)(torch.zeros(2, 3, dtype=torch.int64))
