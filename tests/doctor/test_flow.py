"""Gains of chains whose value is known, and why weight gradients cannot show them."""

import math

import pytest
import torch
from torch import nn

from thalweg.doctor import examine
from thalweg.doctor.anatomy import DEPTH, WIDTH, stack


def _report(model, width=WIDTH, batch=64, seed=0):
    x = torch.randn(batch, width, generator=torch.Generator().manual_seed(seed))
    return examine(model, lambda: model(x).square().mean(), checks=["flow"])


@pytest.mark.parametrize("seed", range(5))
def test_orthogonal_linear_layers_lose_nothing(seed):
    report = _report(stack(None, nn.init.orthogonal_, seed), seed=seed)
    assert report["A.gain"]["#"] == pytest.approx(1.0, abs=1e-6)
    assert report["A.activation_gain"]["#"] == pytest.approx(1.0, abs=1e-6)


def test_torch_default_init_loses_the_root_of_a_sixth_a_layer():
    gains = [_report(stack(nn.ReLU, None, seed), seed=seed)["A.gain"]["#"] for seed in range(5)]
    mean = sum(gains) / len(gains)
    error = math.sqrt(sum((g - mean) ** 2 for g in gains) / (len(gains) - 1) / len(gains))
    # weights uniform on ±1/sqrt(n) have variance 1/(3n), and a relu lets half of the gradient through; at
    # finite width the norm's mean lies within a per cent of that limit
    assert abs(mean - math.sqrt(1 / 6)) < 5 * error + 0.01
    assert error < 0.01


def test_weight_gradients_are_blind_to_it():
    for seed in range(5):
        report = _report(stack(nn.ReLU, None, seed), seed=seed)
        weights = [n for n in report["A.parameter_gradients"] if n.endswith("weight")][:DEPTH]
        norms = [report["A.parameter_gradients"][name] for name in weights]
        signal = report["A.blocks"]["#"]["gradients"]
        # the biases of the default init keep the forward from shrinking as fast as in the bias-free
        # case, where the ratio is 0.6 to 1.3; without biases it is read here
        assert signal[0] / signal[-1] < 1e-6
        assert norms[0] / norms[-1] < 1

    model = nn.Sequential(
        *[p for _ in range(DEPTH) for p in (nn.Linear(WIDTH, WIDTH, bias=False), nn.ReLU())]
    )
    report = _report(model)
    norms = list(report["A.parameter_gradients"].values())
    assert 0.1 < norms[0] / norms[-1] < 10
    signal = report["A.blocks"]["#"]["gradients"]
    assert signal[0] / signal[-1] < 1e-6
    assert report.codes == ("V1",)


def test_gain_of_a_scaled_chain_is_the_scale():
    model = nn.Sequential(*[nn.Linear(8, 8, bias=False) for _ in range(12)])
    for layer in model:
        nn.init.orthogonal_(layer.weight, gain=2.0)
    report = _report(model, width=8)
    assert report["A.gain"]["#"] == pytest.approx(2.0, rel=1e-5)
    blocks = report["A.blocks"]["#"]
    assert blocks["paths"] == [str(index) for index in range(12)]
    assert blocks["gradients"][0] / blocks["gradients"][-1] == pytest.approx(2.0**11, rel=1e-4)
    assert report.codes == ("V2",)


def test_activation_gradients_are_autograd_s_own():
    model = nn.Sequential(*[p for _ in range(5) for p in (nn.Linear(8, 8), nn.ReLU(inplace=True))])
    x = torch.randn(4, 8)
    report = examine(model, lambda: model(x).square().mean(), checks=["flow"])
    tensors, hidden = [], x
    for module in model:
        hidden = module(hidden) if isinstance(module, nn.Linear) else torch.relu(hidden)
        if isinstance(module, nn.Linear):
            tensors.append(hidden)
    expected = torch.autograd.grad(hidden.square().mean(), tensors)
    measured = report["A.blocks"]["#"]["gradients"]
    assert measured == pytest.approx([g.double().norm().item() for g in expected], rel=1e-6)


def test_a_cell_called_in_a_loop_is_a_chain():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.Linear(6, 6, bias=False)
            nn.init.orthogonal_(self.cell.weight, gain=0.5)

        def forward(self, x):
            for _ in range(15):
                x = self.cell(x)
            return x

    report = _report(Loop(), width=6)
    assert report["A.gain"]["cell"] == pytest.approx(0.5, rel=1e-5)
    assert [(f.code, f.where) for f in report.findings] == [("V1", "cell")]


def test_parallel_heads_are_no_chain():
    heads = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))
    with torch.no_grad():
        for index, head in enumerate(heads):
            head.weight.mul_(10.0 ** (2 * index))
    x = torch.randn(3, 4)
    report = examine(heads, lambda: sum(head(x).square().mean() for head in heads), checks=["flow"])
    assert report["A.gain"] == {}
    assert any(each.what == "gain through depth" for each in report.not_measured)


def test_a_gradient_too_small_for_single_precision_norms_is_still_read():
    model = nn.Sequential(*[nn.Linear(8, 8, bias=False) for _ in range(10)])
    for layer in model:
        nn.init.orthogonal_(layer.weight, gain=1e-3)
    x = torch.randn(4, 8)
    report = examine(model, lambda: (1e9 * model(x)).sum(), checks=["flow"])
    assert report["A.gain"]["#"] == pytest.approx(1e-3, rel=1e-3)


def test_fused_recurrence_is_said_not_to_be_measured():
    model = nn.LSTM(4, 4)
    x = torch.randn(5, 2, 4)
    report = examine(model, lambda: model(x)[0].square().mean())
    assert any("time steps" in each.what for each in report.not_measured)
    assert report.worst < 2
