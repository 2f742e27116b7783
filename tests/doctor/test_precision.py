"""16-bit health and the origin of non-finite values."""

import pytest
import torch
from torch import nn

from thalweg.doctor import examine
from thalweg.doctor.precision import FLUSHED, LARGEST, NORMAL, fractions


def test_the_limits_are_those_of_the_format():
    info = torch.finfo(torch.float16)
    assert (info.tiny, info.max) == (NORMAL, LARGEST)
    assert info.smallest_normal * info.eps == FLUSHED


def test_fractions_of_known_entries():
    gradient = torch.tensor([0.0, 1e-9, 1e-6, 1.0, 1e6])
    told = fractions([gradient, None])
    assert list(told.values()) == [0.5, 0.25, 0.25]


@pytest.mark.parametrize(("scale", "sick"), [(1.0, False), (1e-7, True)])
def test_float16_underflow_and_its_remedy(scale, sick):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)).half()
    x = torch.randn(16, 8).half()
    report = examine(model, lambda: scale * model(x).float().square().mean())
    assert ("V3" in report.codes) is sick


@pytest.mark.parametrize(("rate", "sick"), [(1.0, False), (1e-5, True)])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_bfloat16_updates_that_are_lost(rate, sick, kind):
    torch.manual_seed(0)
    model = nn.Linear(8, 8).bfloat16()
    x = torch.randn(16, 8).bfloat16()
    optimizer = kind(model.parameters(), lr=rate)
    before = model.weight.detach().clone()
    report = examine(model, lambda: 10 * model(x).float().square().mean(), optimizer=optimizer)
    assert ("V3" in report.codes) is sick
    assert torch.equal(before, model.weight)
    assert optimizer.state_dict()["state"] == {}
    gradient = torch.autograd.grad(10 * model(x).float().square().mean(), model.weight)[0]
    model.weight.grad = gradient
    optimizer.step()
    same = ((model.weight == before) & (gradient != 0)).sum() / (gradient != 0).sum()
    assert report["A.unfelt_updates"]["weight"] == pytest.approx(same.item())


def test_an_optimizer_that_wants_a_closure_is_not_measured():
    model = nn.Linear(4, 4).bfloat16()
    x = torch.ones(2, 4).bfloat16()
    optimizer = torch.optim.LBFGS(model.parameters())
    report = examine(model, lambda: model(x).float().sum(), optimizer=optimizer)
    assert any(each.what == "updates lost in 16 bits" for each in report.not_measured)


class _Named(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "word"),
    [
        (lambda x: x * (0 * x).log(), "log"),
        (lambda x: (x - x).sqrt(), "sqrt"),
        (lambda x: torch.where(x > 1e9, x / (x - x), x), "div"),
        (lambda x: (1e30 * x) * 1e30, "mul"),
    ],
)
def test_the_operation_and_the_module_are_named(function, word):
    model = nn.Sequential(nn.Linear(4, 4), _Named(function), nn.Linear(4, 1))
    x = torch.rand(3, 4)
    report = examine(model, lambda: model(x).mean())
    finding = report.findings[0]
    assert (finding.code, finding.where, finding.severity) == ("V4", "1", 3)
    assert word in finding.title.lower()


def test_a_masked_attention_is_healthy():
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8)
    mask = torch.full((5, 5), float("-inf")).triu(1)
    assert examine(layer, lambda: layer(x, x, x, attn_mask=mask)[0].square().mean()).worst < 2


def test_a_mask_of_minus_infinity_is_not_blamed_for_another_s_nan():
    def attend(x):
        scores = (x @ x.T).masked_fill(torch.ones(4, 4).triu(1).bool(), float("-inf"))
        return scores.softmax(-1) @ x

    model = nn.Sequential(nn.Linear(4, 4), _Named(attend), _Named(lambda x: x * (0 * x).log()))
    x = torch.rand(4, 4)
    finding = examine(model, lambda: model(x).mean()).findings[0]
    assert (finding.code, finding.where) == ("V4", "2")


def test_a_batch_that_is_already_bad():
    model = nn.Linear(2, 1)
    x = torch.tensor([[float("nan"), 1.0]])
    finding = examine(model, lambda: model(x).sum()).findings[0]
    assert finding.code == "V4"
    assert "already hold nan" in finding.title


def test_a_weight_without_gradient_is_not_counted_as_one_that_a_step_leaves_unchanged():
    model = nn.Linear(64, 1, bias=False).bfloat16()
    x = torch.zeros(8, 64).bfloat16()
    x[:, 0] = 1
    report = examine(
        model, lambda: model(x).float().sum(), optimizer=torch.optim.SGD(model.parameters(), 1.0)
    )
    assert report["A.unfelt_updates"] == {"weight": 0.0}
    assert "V3" not in report.codes
