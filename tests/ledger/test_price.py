from __future__ import annotations

import resource
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from thalweg.borrowed import borrowed
from thalweg.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from thalweg.ledger import cost, price
from thalweg.losses import mean_loss
from thalweg.noise import Key, rademacher
from thalweg.step import Backprop, Estimate, as_step

Parts = tuple[nn.Module, Callable[[], Any], list[Tensor]]


@dataclass(frozen=True)
class TwoPoint:
    """A zeroth-order rule as small as can be, in either way of borrowing weights."""

    restore: str = "copy"

    def estimate(self, closure: Callable[[], Tensor], parameters: Sequence[Tensor], key: Key) -> Estimate:
        directions = [rademacher(p, key.at(call=i)) for i, p in enumerate(parameters)]
        losses = []
        with torch.no_grad():
            for sign in (1e-3, -1e-3):

                def move(i: int, value: Tensor, sign: float = sign) -> Tensor:
                    return value + sign * directions[i]

                with borrowed(parameters, move, self.restore):
                    losses.append(mean_loss(closure()))
        slope = (losses[0] - losses[1]) / 2e-3
        return Estimate((losses[0] + losses[1]) / 2, tuple(slope * d for d in directions), 2)


def dense() -> Parts:
    model = nn.Sequential(nn.Linear(10, 64), nn.GELU(), nn.Dropout(0.1), nn.LayerNorm(64), nn.Linear(64, 1))
    x = torch.randn(32, 10)
    return model, lambda: model(x).square().mean(), list(model.parameters())


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width))
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(functional.relu(self.first(x), inplace=True))
        h += x
        return functional.relu_(h)


def residual() -> Parts:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        Residual(16),
        nn.MaxPool2d(2),
        Residual(16),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )
    x, y = torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,))
    return model, lambda: functional.cross_entropy(model(x), y), list(model.parameters())


def attention(masked: bool) -> Parts:
    model = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1 if masked else 0.0, batch_first=True)
    x = torch.randn(4, 24, 32)
    mask = nn.Transformer.generate_square_subsequent_mask(24) if masked else None
    return model, lambda: model(x, src_mask=mask).square().mean(), list(model.parameters())


def copied_layers() -> Parts:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    x = torch.randn(4, 24, 32)
    return model, lambda: model(x).square().mean(), list(model.parameters())


def language_model() -> Parts:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        hidden_size=32,
        intermediate_size=64,
        vocab_size=100,
    )
    model = transformers.LlamaForCausalLM(config)
    tokens = torch.randint(0, 100, (2, 48))
    return model, lambda: model(input_ids=tokens, labels=tokens).loss, list(model.parameters())


def image_transformer() -> Parts:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
    )
    model = transformers.ViTForImageClassification(config)
    x = torch.randn(2, 3, 32, 32)
    return model, lambda: model(x).logits.square().mean(), list(model.parameters())


SMALL_UNET = {
    "sample_size": 16,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
# the shape of Stable Diffusion 1's denoiser: the defaults of the class, and the width of its text encoder
STABLE_DIFFUSION = {"sample_size": 64, "cross_attention_dim": 768}


def denoiser(**config: Any) -> Parts:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DConditionModel(**config)
    size = model.config.sample_size
    x = torch.randn(2, 4, size, size)
    text = torch.randn(2, 77, model.config.cross_attention_dim)
    time = torch.randint(0, 1000, (2,))
    return model, lambda: functional.mse_loss(model(x, time, text).sample, x), list(model.parameters())


def checkpointed() -> Parts:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(8)])
    x = torch.randn(16, 32)

    def closure() -> Tensor:
        h = x
        for start in range(0, 8, 2):
            h = checkpoint(model[start : start + 2], h, use_reentrant=False)
        return h.square().mean(dim=1)

    return model, closure, list(model.parameters())


@dataclass
class Phase:
    name: str
    parameters: Sequence[Tensor]
    loss: Callable[[], Tensor]

    def backward(self) -> Tensor:
        loss = self.loss()
        loss.backward()
        return loss.detach()


def learner() -> Parts:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(3)])
    x = torch.randn(16, 32)

    def phases() -> Iterator[Phase]:
        h = x
        for index, layer in enumerate(model):
            yield Phase(
                str(index), list(layer.parameters()), lambda h=h, layer=layer: layer(h).square().mean()
            )
            with torch.no_grad():
                h = layer(h)

    return model, phases, list(model.parameters())


STEPS = {
    "dense": dense,
    "residual": residual,
    "attention": lambda: attention(False),
    "masked attention": lambda: attention(True),
    "copied layers": copied_layers,
    "language model": language_model,
    "image transformer": image_transformer,
    "denoiser": lambda: denoiser(**SMALL_UNET),
    "checkpointed": checkpointed,
    "learner": learner,
}


@pytest.mark.parametrize("built", [False, True], ids=["by a function", "already built"])
@pytest.mark.parametrize("name", STEPS)
def test_price_is_the_cost(name: str, built: bool) -> None:
    make = STEPS[name]
    step = as_step(make())
    real = cost(step, repeats=1)
    before = [t.detach().clone() for t in (*step.model.parameters(), *step.model.buffers())]
    told = price(step if built else make)[0]
    assert told.estimated == ()
    assert told.saved_bytes == real.saved_bytes > 0
    assert told.operations == real.operations > 0
    assert told.evaluations == real.evaluations
    assert dict(told.by_module) == dict(real.by_module)
    # what a kernel hands to the next in backward may differ in layout, hence by a copy
    assert told.peak_bytes == pytest.approx(real.peak_bytes, rel=0.01)
    assert told.parameter_bytes == sum(p.numel() * p.element_size() for p in step.parameters)
    after = (*step.model.parameters(), *step.model.buffers())
    assert all(torch.equal(a, b) and type(b) in (Tensor, nn.Parameter) for a, b in zip(before, after))


@pytest.mark.parametrize(("restore", "built"), [("copy", False), ("copy", True), ("swap", False)])
def test_rules_that_borrow_weights_can_be_priced(restore: str, built: bool) -> None:
    step = as_step(residual())
    rule = TwoPoint(restore)
    real = cost(step, gradient=rule, repeats=1)
    before = [t.detach().clone() for t in (*step.model.parameters(), *step.model.buffers())]
    told = price(step if built else residual, routes={"two-point": rule})[0]
    assert (told.saved_bytes, told.evaluations, told.operations) == (0, 2, real.operations)
    assert real.saved_bytes == 0
    assert told.peak_bytes == pytest.approx(real.peak_bytes, rel=0.01)
    after = (*step.model.parameters(), *step.model.buffers())
    assert all(torch.equal(a, b) for a, b in zip(before, after))


def test_swapping_the_weights_of_a_model_that_exists_is_refused_and_undone() -> None:
    step = as_step(residual())
    state = {name: t.clone() for name, t in step.model.state_dict().items()}
    with pytest.raises(UnsupportedError, match="function that builds the model"):
        price(step, routes=[TwoPoint("swap")])
    assert all(torch.equal(t, state[name]) for name, t in step.model.state_dict().items())
    step.closure().backward()
    assert all(p.grad is not None for p in step.parameters)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_may_be_converted_while_it_is_built(dtype: torch.dtype) -> None:
    def converted() -> Parts:
        model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.BatchNorm1d(8), "c": nn.Linear(8, 8)})
        model["c"].weight = model["a"].weight
        model = model.to("cpu").to(dtype)
        x = torch.randn(4, 8, dtype=dtype)
        return model, lambda: model["c"](model["b"](model["a"](x))).exp().sum(), list(model.parameters())

    real, told = cost(converted, repeats=1), price(converted)[0]
    assert (told.saved_bytes, told.operations) == (real.saved_bytes, real.operations)
    size = torch.finfo(dtype).bits // 8
    assert told.parameter_bytes == (8 * 8 + 8 + 2 * 8 + 8) * size  # the tied weight once


def test_an_existing_model_stays_real_when_the_function_converts_it() -> None:
    model, closure, parameters = residual()
    before = [p.detach().clone() for p in parameters]

    def step() -> Parts:
        model.to(torch.device("cpu"))
        return model, closure, list(model.parameters())

    price(step)
    assert all(
        a is b and torch.equal(a, value) for a, b, value in zip(model.parameters(), parameters, before)
    )


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="the fused LSTM is oneDNN's")
def test_the_known_gap_is_named() -> None:
    def recurrent() -> Parts:
        model = nn.LSTM(8, 16, 2)
        x = torch.randn(12, 4, 8)
        return model, lambda: model(x)[0].sum(), list(model.parameters())

    found = price(recurrent)
    assert found[0].estimated == ("mkldnn_rnn_layer",)
    assert "~" in str(found)
    assert found[0].saved_bytes < cost(recurrent, repeats=0).saved_bytes


def resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_a_stable_diffusion_sized_step_without_its_weights() -> None:
    price(lambda: denoiser(**SMALL_UNET))  # imports and first-time work, so that they are not in the reading
    before = resident_bytes()
    found = price(lambda: denoiser(**STABLE_DIFFUSION), routes={"backprop": Backprop()})[0]
    grown = resident_bytes() - before
    # 859 520 964 parameters, as the model card of Stable Diffusion 1 has it ("860M UNet")
    assert found.parameter_bytes == 859_520_964 * 4
    assert grown < found.parameter_bytes / 10
    assert found.saved_bytes > found.parameter_bytes
    assert found.peak_bytes > found.saved_bytes


def test_random_state_and_gradients_come_back() -> None:
    model, closure, parameters = residual()
    closure().backward()
    gradients = [(p.grad, p.grad.clone()) for p in parameters if p.grad is not None]
    state = torch.get_rng_state()

    def seeded() -> Parts:
        torch.manual_seed(7)
        torch.rand(3)
        return residual()

    price(seeded, routes=[Backprop(), TwoPoint()])
    price((model, closure, parameters), routes=[Backprop(), TwoPoint()])
    assert torch.equal(state, torch.get_rng_state())
    for parameter, (gradient, value) in zip(parameters, gradients):
        assert parameter.grad is gradient
        assert torch.equal(gradient, value)


def test_routes_have_names_and_print_as_a_table() -> None:
    listed = price(dense, routes=[Backprop(), TwoPoint(), TwoPoint("swap")])
    assert [each.route for each in listed] == [
        "Backprop()",
        "TwoPoint(restore='copy')",
        "TwoPoint(restore='swap')",
    ]
    named = price(dense, routes={"exact": None, "blind": TwoPoint()})
    assert [each.route for each in named] == ["exact", "blind"]
    header, _, exact, blind = str(named).splitlines()
    assert header.split() == ["route", "kept", "for", "backward", "peak", "operations", "evaluations"]
    assert exact.split()[:3] == ["exact", "33.2", "kB"]
    assert blind.split()[:3] == ["blind", "0", "B"]


def test_refusals() -> None:
    with pytest.raises(ArgumentTypeError, match=r"routes: .*list of rules"):
        price(dense, routes="spsa")  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match=r"routes\[1\]: "):
        price(dense, routes=[Backprop(), 3])  # type: ignore[list-item]
    with pytest.raises(ArgumentTypeError, match=r"routes\['a'\]: .*Make one"):
        price(dense, routes={"a": Backprop})  # type: ignore[dict-item]
    with pytest.raises(ArgumentError, match=r"routes: .*at least one"):
        price(dense, routes=[])
    with pytest.raises(ArgumentError, match=r"routes: .*different"):
        price(dense, routes=[Backprop(), Backprop()])
    with pytest.raises(ArgumentTypeError, match="step: "):
        price(lambda: 3)
    with pytest.raises(ArgumentTypeError, match="key: "):
        price(dense, key=1)  # type: ignore[arg-type]


def test_a_step_that_reads_values_is_refused_with_the_way_out() -> None:
    def reading() -> Parts:
        model, closure, parameters = dense()

        def closure_with_print() -> Tensor:
            loss = closure()
            assert isinstance(loss.item(), float)
            return loss

        return model, closure_with_print, parameters

    with pytest.raises(UnsupportedError, match=r"reads the value.*ledger\.cost"):
        price(reading)
    assert cost(reading, repeats=0).saved_bytes == price(dense)[0].saved_bytes


def test_pricing_under_autocast_leaves_no_fake_weights_behind() -> None:
    net, x = nn.Linear(4, 4), torch.randn(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        before = net(x)
        price((net, lambda: net(x).sum(), net.parameters()))
        assert torch.equal(net(x), before)
