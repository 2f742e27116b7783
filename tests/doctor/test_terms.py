"""Shares, cosines and alignment of loss terms whose gradients are known."""

import math

import pytest
import torch
from torch import nn

from thalweg.doctor import examine


def _linear():
    return nn.Linear(4, 1), torch.randn(16, 4)


def test_a_loss_and_its_negative_have_cosine_minus_one():
    model, x = _linear()

    def losses():
        loss = model(x).square().mean()
        return {"up": loss, "down": -loss}

    report = examine(model, losses)
    assert report["C.cosine"]["up | down"] == pytest.approx(-1.0, abs=1e-12)
    assert report["C.alignment"] == pytest.approx(0.0, abs=1e-12)
    assert report["C.share"] == pytest.approx({"up": 0.5, "down": 0.5})
    (finding,) = (f for f in report.findings if f.code == "T2")
    assert finding.severity == 2
    assert "100% of their length cancels" in finding.title


@pytest.mark.parametrize("ratio", [10.0, 99.0, 101.0, 1e5])
def test_imbalance_is_the_ratio_of_the_norms(ratio):
    model, x = _linear()
    losses = {"small": lambda: model(x).square().mean(), "large": lambda: ratio * model(x).square().mean()}
    report = examine(model, losses)
    norms = report["C.norm"]
    assert norms["large"] / norms["small"] == pytest.approx(ratio, rel=1e-5)
    assert report["C.share"]["large"] == pytest.approx(ratio / (1 + ratio), rel=1e-5)
    assert report["C.cosine"]["small | large"] == pytest.approx(1.0)
    assert report["C.alignment"] == pytest.approx(1.0)
    found = [(f.code, f.severity) for f in report.findings]
    assert found == ([] if ratio < 100 else [("T1", 3 if ratio > 1e4 else 2)])


def test_only_shared_parameters_count():
    trunk, left, right = nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(4, 1)
    model = nn.ModuleDict({"trunk": trunk, "left": left, "right": right})
    x = torch.randn(8, 4)
    terms = {
        "left": lambda: left(trunk(x)).square().mean(),
        "right": lambda: right(trunk(x)).square().mean(),
    }
    report = examine(model, terms)
    for name, term in terms.items():
        g = torch.autograd.grad(term(), list(trunk.parameters()))
        assert report["C.norm"][name] == pytest.approx(math.hypot(*[t.norm().item() for t in g]), rel=1e-5)


def test_conflict_names_the_shared_module():
    model = nn.ModuleDict({"trunk": nn.Linear(4, 4), "head": nn.Linear(4, 1)})
    x = torch.randn(8, 4)

    def losses():
        features = model["trunk"](x)
        return {"a": model["head"](features).mean(), "b": -features.sum(1).mean() - features.square().mean()}

    with torch.no_grad():
        model["head"].weight.fill_(1.0)
    report = examine(model, losses, checks=["terms"])
    assert [(f.code, f.where) for f in report.findings] == [("T2", "trunk")]


def test_the_annealed_weight_is_max_over_mean():
    model, x = _linear()
    losses = {"residual": lambda: model(x).square().mean(), "boundary": lambda: model(x[:3]).abs().mean()}
    report = examine(model, losses)
    first = torch.cat([g.flatten() for g in torch.autograd.grad(losses["residual"](), [*model.parameters()])])
    other = torch.cat([g.flatten() for g in torch.autograd.grad(losses["boundary"](), [*model.parameters()])])
    expected = (first.abs().max() / other.abs().mean()).item()
    assert report["C.annealed_weight"] == pytest.approx({"boundary": expected}, rel=1e-5)


def test_a_term_without_graph_or_gradient_is_named():
    model, x = _linear()
    losses = {
        "real": lambda: model(x).square().mean(),
        "constant": lambda: torch.tensor(1.0),
        "silent": lambda: 0 * model(x).mean(),
    }
    report = examine(model, losses, checks=["terms"])
    titles = [f.title for f in report.findings if f.code == "T1"]
    assert len(titles) == 2
    assert any("'constant'" in title for title in titles)
    assert any("'silent'" in title for title in titles)


def test_terms_that_share_nothing_are_said_so():
    model = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)])
    x = torch.ones(2, 2)
    report = examine(model, {"a": lambda: model[0](x).sum(), "b": lambda: model[1](x).sum()})
    assert "C.norm" not in report.measurements
    assert any("share no parameter" in each.why for each in report.not_measured)


@pytest.mark.parametrize(("small", "severity"), [(1.0, 2), (0.85, 2), (0.75, 1), (0.1, 1)])
def test_opposed_terms_are_serious_only_where_most_of_their_length_cancels(small, severity):
    # g and -s g: the sum keeps (1 - s) / (1 + s) of the length, 0.081 at s = 0.85 and 0.143 at s = 0.75
    model, x = _linear()
    losses = {"up": lambda: model(x).mean(), "down": lambda: -small * model(x).mean()}
    report = examine(model, losses, checks=["terms"])
    assert [(f.code, f.severity) for f in report.findings] == [("T2", severity)]
    kept = (1 - small) / (1 + small)
    assert f"{1 - kept:.0%} of their length cancels" in report.findings[0].title


def test_a_term_with_parameters_of_its_own_is_not_silent():
    actor, critic = nn.Linear(4, 2), nn.Linear(4, 1)
    x = torch.randn(16, 4)

    def losses():
        chances = actor(x).log_softmax(1)
        return {
            "policy": -chances[:, 0].mean(),
            "entropy": (chances.exp() * chances).sum(1).mean(),
            "value": critic(x).square().mean(),
        }

    report = examine(nn.ModuleDict({"actor": actor, "critic": critic}), losses, checks=["terms"])
    assert list(report["C.norm"]) == ["policy", "entropy"]
    assert not [f for f in report.findings if "'value'" in f.title]
