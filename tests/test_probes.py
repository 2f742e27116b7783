from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from thalweg.errors import ArgumentError, ArgumentTypeError
from thalweg.probes import probe


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.shared = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.shared(torch.relu_(self.first(x)))
        h += x
        return self.shared(h)


def by_hand(model: Residual, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    first = model.first(x)
    again = model.shared(torch.relu(first))
    out = model.shared(again + x)
    gradients = torch.autograd.grad((out**2).sum(), [first, again, out])
    return dict(zip(("first", "again", "out"), zip((first, again, out), gradients)))


def test_values_before_in_place_operations_and_gradients_at_them() -> None:
    torch.manual_seed(0)
    model, x = Residual(), torch.randn(3, 4)
    expected = by_hand(model, x)
    with probe(model, ["first", "shared"]) as found:
        found.differentiate((model(x) ** 2).sum())
    assert len(found.calls("shared")) == 2
    for name, reading in [
        ("first", found["first"]),
        ("again", found.reading("shared", call=0)),
        ("out", found.reading("shared", call=-1)),
    ]:
        torch.testing.assert_close(reading.activation, expected[name][0], rtol=0, atol=0)
        torch.testing.assert_close(reading.gradient, expected[name][1], rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ArgumentError, match="ran 2 times"):
        found["shared"]


def test_the_users_own_backward_is_read_and_not_changed() -> None:
    torch.manual_seed(0)
    model, x = Residual(), torch.randn(3, 4)
    model(x).sum().backward()
    plain = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    with probe(model, [""], transform=torch.linalg.vector_norm) as found:
        model(x).sum().backward()
    assert found[""].gradient is not None
    assert found[""].gradient.item() == pytest.approx(12**0.5)
    for parameter, gradient in zip(model.parameters(), plain):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)


def test_input_side_and_tuple_outputs() -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(3, 5)
    model = nn.ModuleDict({"lstm": lstm})
    x = torch.randn(2, 1, 3, requires_grad=True)
    with probe(model, ["lstm"]) as found, probe(model, ["lstm"], side="input") as before:
        _, (h, _c) = lstm(x)
        h.sum().backward()
    parts = found.calls("lstm")[0]
    assert [tuple(p.activation.shape) for p in parts] == [(2, 1, 5), (1, 1, 5), (1, 1, 5)]
    assert torch.equal(parts[1].gradient, torch.ones(1, 1, 5))  # type: ignore[arg-type]
    assert parts[2].gradient is None
    assert before["lstm"].gradient is not None
    assert torch.equal(before["lstm"].gradient, x.grad)  # type: ignore[arg-type]


def test_two_scalars_over_one_graph() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with probe(model, ["0"]) as found:
        out = model(torch.ones(1, 2))
        found.differentiate(out[0, 0], retain_graph=True)
        first = found["0"].gradient
        found.differentiate(out[0, 1])
    assert first is not None
    assert first.tolist() == [[1.0, 0.0]]
    assert found["0"].gradient is not None
    assert found["0"].gradient.tolist() == [[0.0, 1.0]]


def test_clear_starts_the_count_of_calls_again() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with probe(model, ["0"]) as found:
        for value in (1.0, 2.0):
            found.clear()
            x = torch.full((1, 2), value)
            found.differentiate(model(x).sum())
    assert [reading.call for reading in found] == [0]
    assert torch.equal(found["0"].activation, model[0](x))


def test_recomputation_under_checkpoint_is_one_call() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    x = torch.ones(1, 2)
    with probe(model, ["0"]) as plain:
        plain.differentiate(model(x).sum())
    with probe(model, ["0"]) as found:
        found.differentiate(checkpoint(model, x, use_reentrant=False).sum())
    assert len(found.calls("0")) == 1
    assert torch.equal(found["0"].gradient, plain["0"].gradient)  # type: ignore[arg-type]


def test_a_frozen_module_has_an_activation_and_no_gradient() -> None:
    model = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 1))
    with probe(model, ["0", "1"]) as found:
        found.differentiate(model(torch.ones(1, 2)).sum())
    assert not found["0"].differentiable
    assert found["0"].gradient is None
    assert found["1"].gradient is not None


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("side", ["input", "output"])
def test_hooks_are_gone_after_an_exception(side: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    x = torch.ones(1, 2, requires_grad=True)

    def interrupted() -> None:
        with probe(model, ["0"], side=side):
            model(x)
            assert hooks(model) == 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert hooks(model) == 0
    assert not x._backward_hooks


def test_refusals_name_the_argument_and_the_nearest_module() -> None:
    model = nn.Sequential()
    model.add_module("encoder", nn.Linear(2, 2))
    with (
        pytest.raises(ArgumentError, match=r"names: .*'encodr'.*Nearest: 'encoder'"),
        probe(model, ["encodr"]),
    ):
        pass
    with pytest.raises(ArgumentTypeError, match=r"names: .*iterable"), probe(model, "encoder"):
        pass
    with pytest.raises(ArgumentTypeError, match=r"names: .*strings"), probe(model, [3]):  # type: ignore[list-item]
        pass
    with pytest.raises(ArgumentError, match=r"names: .*at least one"), probe(model, []):
        pass
    with pytest.raises(ArgumentTypeError, match=r"model: "), probe(lambda: 0, [""]):  # type: ignore[arg-type]
        pass
    with pytest.raises(ArgumentError, match=r"side: .*'output', 'input'"), probe(model, [""], side="up"):
        pass
    with probe(model, ["encoder"]) as found:
        with pytest.raises(ArgumentError, match="a module that ran"):
            found["encoder"]
        with pytest.raises(ArgumentError, match="captured a differentiable tensor"):
            found.differentiate(torch.ones((), requires_grad=True))
        out = model(torch.ones(1, 2))
        with pytest.raises(ArgumentError, match=r"output: .*scalar"):
            found.differentiate(out)
        with pytest.raises(ArgumentError, match=r"call: .*1 calls"):
            found.reading("encoder", call=1)
        with pytest.raises(ArgumentError, match="part: "):
            found.reading("encoder", part=1)
    assert hooks(model) == 0
