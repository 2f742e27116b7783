from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from thalweg.borrowed import borrowed
from thalweg.errors import ArgumentError, ArgumentTypeError
from thalweg.ledger import Cost, cost, fidelity, saved_bytes
from thalweg.ledger.storages import StorageCounter
from thalweg.losses import mean_loss
from thalweg.noise import Key, rademacher
from thalweg.step import Backprop, Estimate, Step, as_step

FLOAT = 4


@dataclass(frozen=True)
class TwoPoint:
    """A zeroth-order rule as small as can be: two forwards, no graph."""

    smoothing: float = 1e-3

    def estimate(self, closure: Callable[[], Tensor], parameters: Sequence[Tensor], key: Key) -> Estimate:
        directions = [rademacher(p, key.at(call=i)) for i, p in enumerate(parameters)]
        losses = []
        with torch.no_grad():
            for sign in (1, -1):

                def move(i: int, value: Tensor, sign: int = sign) -> Tensor:
                    return value + sign * self.smoothing * directions[i]

                with borrowed(parameters, move):
                    losses.append(mean_loss(closure()))
        slope = (losses[0] - losses[1]) / (2 * self.smoothing)
        return Estimate((losses[0] + losses[1]) / 2, tuple(slope * d for d in directions), 2)


def kept_by_graph(result: Tensor, before: set[int]) -> int:
    """The truth by another way: storages of the tensors in the nodes of the graph, less what was there."""
    found: dict[int, int] = {}
    queue, seen = [result.grad_fn], set()
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for name in dir(node):
            if name.startswith("_saved_"):
                saved = getattr(node, name)
                for tensor in saved if isinstance(saved, tuple | list) else [saved]:
                    if isinstance(tensor, Tensor):
                        storage = tensor.untyped_storage()
                        found[storage._cdata] = storage.nbytes()
        queue += [next_node for next_node, _ in node.next_functions]
    return sum(size for address, size in found.items() if address not in before)


def storages_now() -> set[int]:
    gc.collect()
    return {t.untyped_storage()._cdata for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter)}


def block(kind: str) -> tuple[nn.Module, Tensor]:
    x = torch.randn(8, 3, 16, 16)
    if kind == "conv":
        return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 3)), x
    if kind == "in-place":
        return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten()), x
    if kind == "attention":
        return nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True), x.view(8, 48, 16)
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 32), nn.GELU(), nn.LayerNorm(32), nn.Dropout()), x


@pytest.mark.parametrize("kind", ["conv", "in-place", "attention", "dense"])
def test_saved_bytes_are_what_the_graph_holds(kind: str) -> None:
    torch.manual_seed(0)
    model, x = block(kind)
    before = storages_now()
    loss = model(x).square().mean()
    truth = kept_by_graph(loss, before)
    del loss
    torch.manual_seed(0)
    assert saved_bytes(lambda: model(x).square().mean(), model) == truth
    assert truth > 0


def test_convolution_by_hand() -> None:
    conv, x = nn.Conv2d(3, 5, 3), torch.randn(8, 3, 16, 16)
    assert x.numel() * FLOAT == 24_576
    # the batch was there before and the sum needs only shapes; made in the forward, the input is kept
    assert saved_bytes(lambda: conv(x).sum(), conv) == 0
    assert saved_bytes(lambda: conv(x.clone()).sum(), conv) == 24_576
    # the square keeps its argument, the convolution's output
    assert saved_bytes(lambda: conv(x.clone()).square().sum(), conv) == 24_576 + 8 * 5 * 14 * 14 * FLOAT


def test_layers_by_hand() -> None:
    x = torch.randn(32, 10)
    layer = nn.Linear(10, 20)
    out = 32 * 20 * FLOAT
    assert saved_bytes(lambda: layer(x).sum(), layer) == 0  # its input is the batch, its weight a parameter
    assert saved_bytes(lambda: torch.relu(layer(x)).sum(), layer) == out  # ReLU keeps its result
    assert saved_bytes(lambda: functional.gelu(layer(x)).sum(), layer) == out  # GELU keeps its argument
    # tanh keeps its result, which is the layer's input too; the factor is not kept: the batch has no gradient
    assert saved_bytes(lambda: layer(torch.tanh(layer.bias.sum() * x)).sum(), layer) == 32 * 10 * FLOAT
    norm = nn.BatchNorm1d(20)
    both = nn.Sequential(layer, norm)
    assert saved_bytes(lambda: both(x).sum(), both) == out + 2 * 20 * FLOAT  # argument, mean, 1/deviation
    assert int(norm.num_batches_tracked) == 0
    w = torch.randn(1000, requires_grad=True)
    assert saved_bytes(lambda: w.sum()) == 0
    assert saved_bytes(lambda: (w * w.detach()).sum()) == 0
    with torch.no_grad():
        assert saved_bytes(lambda: w.exp().sum()) == 1000 * FLOAT  # gradients are enabled inside
    kept = []
    assert saved_bytes(lambda: kept.append(w.detach().exp())) == 0  # no graph, nothing for backward
    assert saved_bytes(lambda: [kept.append(w.detach() + 1), w.sum()][1]) == 1000 * FLOAT  # kept elsewhere


def tanh_stack() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(8)]), torch.randn(
        16, 32
    )


def segmented(model: nn.Sequential, x: Tensor, length: int) -> Tensor:
    for start in range(0, 8, length):
        x = checkpoint(model[start : start + length], x, use_reentrant=False)
    return x.sum()


def test_checkpointing_keeps_the_inputs_of_segments() -> None:
    model, x = tanh_stack()
    activation = 16 * 32 * FLOAT
    parameters = list(model.parameters())
    plain = cost((model, lambda: model(x).sum(), parameters), repeats=0)
    assert plain.saved_bytes == 8 * activation
    assert plain.by_module == {f"{i}.1": activation for i in range(8)}
    for length in (1, 2, 4):
        found = cost((model, lambda n=length: segmented(model, x, n), parameters), repeats=0)
        # the first input is the batch; the output of each other segment but the last is an input
        assert found.saved_bytes == (8 // length - 1) * activation
        assert found.operations - plain.operations == 8 * 2 * 16 * 32 * 32


def test_checkpointing_lowers_the_peak_where_activations_outweigh_gradients() -> None:
    model, _ = tanh_stack()
    x = torch.randn(512, 32)
    parameters = list(model.parameters())
    plain = cost((model, lambda: model(x).sum(), parameters), repeats=0)
    found = cost((model, lambda: segmented(model, x, 2), parameters), repeats=0)
    activation = 512 * 32 * FLOAT
    # three segment inputs, the two results of one segment made again, and what the tanh backward makes
    assert found.peak_bytes <= 6 * activation + sum(p.numel() for p in parameters) * FLOAT
    assert plain.peak_bytes >= 9 * activation


def test_offloaded_and_stashed_tensors_are_counted() -> None:
    model, x = tanh_stack()
    activation = 16 * 32 * FLOAT
    stash: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> int:
        stash[len(stash)] = tensor.clone()
        return len(stash) - 1

    def closure() -> Tensor:
        stash.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, stash.__getitem__):
            return model(x).sum()

    found = cost((model, closure, model.parameters()), repeats=0)
    # copies of 8 results, the batch, 8 inputs that are results again, and of the weights
    weights = 7 * 32 * 32 * FLOAT
    assert found.saved_bytes == (8 + 8) * activation + weights
    assert closure().item() == pytest.approx(model(x).sum().item())


def test_operations_are_those_of_flop_counter_mode() -> None:
    torch.manual_seed(0)
    model, x = block("conv")
    with FlopCounterMode(display=False) as counter:
        model(x).square().mean().backward()
    model.zero_grad()
    found = cost((model, lambda: model(x).square().mean(), model.parameters()), repeats=0)
    assert found.operations == counter.get_total_flops() > 0


def test_attention_on_the_cpu_counts_its_products() -> None:
    q = torch.randn(2, 3, 8, 4, requires_grad=True)
    model = nn.ParameterList([q])
    step = (
        model,
        lambda: functional.scaled_dot_product_attention(model[0], model[0], model[0]).sum(),
        [model[0]],
    )
    product = 2 * 2 * 3 * 8 * 8 * 4
    # forward: scores and values; backward: the scores again and four products
    assert cost(step, repeats=0).operations == (2 + 5) * product


@pytest.mark.parametrize("kind", ["layer", "attention"])
def test_kernels_that_run_only_without_gradients_count_the_same_products(kind: str) -> None:
    x = torch.randn(3, 7, 16)
    if kind == "layer":
        model: nn.Module = nn.TransformerEncoderLayer(16, 2, 40, batch_first=True).eval()
        forward = lambda: model(x).sum()  # noqa: E731
    else:
        model = nn.MultiheadAttention(16, 2, batch_first=True).eval()
        forward = lambda: model(x, x, x, need_weights=False)[0].sum()  # noqa: E731
    counted = []
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        counter = StorageCounter()
        with context(), counter.counting():
            forward()
        counted.append(counter.operations)
    assert counted[0] == counted[1] == counted[2] > 0


def test_a_rule_without_a_graph_keeps_nothing() -> None:
    model, x = tanh_stack()
    step = (model, lambda: model(x).square().mean(dim=1), list(model.parameters()))
    exact, blind = cost(step, repeats=1), cost(step, gradient=TwoPoint(), repeats=1)
    assert blind.saved_bytes == 0
    assert blind.by_module == {}
    assert blind.evaluations == 2
    assert exact.evaluations == 1
    forward = 8 * 2 * 16 * 32 * 32
    assert blind.operations == 2 * forward
    assert exact.operations == 3 * forward - 2 * 16 * 32 * 32  # the batch needs no gradient
    parameters = sum(p.numel() for p in model.parameters()) * FLOAT
    assert blind.peak_bytes >= parameters
    assert exact.peak_bytes >= parameters


def test_peak_of_a_backward_by_hand() -> None:
    w = torch.randn(1000, requires_grad=True)
    model = nn.ParameterList([w])
    found = cost((model, lambda: model[0].exp().exp().sum(), model.parameters()), repeats=0)
    a = 1000 * FLOAT
    # two kept results; the gradient through the outer exp makes a third, as the seed is expanded, not copied
    assert found.saved_bytes == 2 * a
    assert 3 * a <= found.peak_bytes <= 3 * a + 4 * FLOAT


@dataclass
class LayerPhase:
    name: str
    parameters: Sequence[Tensor]
    loss: Callable[[], Tensor]

    def backward(self) -> Tensor:
        loss = self.loss()
        loss.backward()
        return loss.detach()


def local_step(depth: int) -> Step:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(depth)])
    x = torch.randn(16, 32)

    def phases() -> Iterator[LayerPhase]:
        h = x
        for index, layer in enumerate(model):
            yield LayerPhase(
                str(index), list(layer.parameters()), lambda h=h, layer=layer: layer(h).square().mean()
            )
            with torch.no_grad():
                h = layer(h)

    return Step(model, phases, list(model.parameters()))


def test_a_learner_costs_its_largest_phase_and_the_sum_of_operations() -> None:
    shallow, deep = cost(local_step(2), repeats=1), cost(local_step(6), repeats=1)
    assert (shallow.evaluations, deep.evaluations) == (2, 6)
    forward = 2 * 16 * 32 * 32
    # per phase a forward, the gradient of the weight, and the forward that feeds the next
    assert deep.operations - shallow.operations == 4 * 3 * forward
    assert shallow.saved_bytes == deep.saved_bytes > 16 * 32 * FLOAT
    with pytest.raises(ArgumentTypeError, match=r"gradient: .*learner"):
        cost(local_step(2), gradient=TwoPoint())


def test_closures_that_use_function_transforms_are_counted() -> None:
    model = nn.Linear(4, 1)
    x = torch.randn(8, 4)

    def penalty() -> Tensor:
        slope = torch.func.vmap(torch.func.grad(lambda row: model(row).tanh().sum()))(x)
        return slope.square().sum()

    def tangent() -> Tensor:
        return torch.func.jvp(lambda rows: model(rows).tanh(), (x,), (torch.ones_like(x),))[1].square().sum()

    for closure in (penalty, tangent):
        found = cost((model, closure, list(model.parameters())), repeats=0)
        assert found.saved_bytes > 0
        assert sum(found.by_module.values()) == found.saved_bytes


def test_a_compiled_model_is_counted_as_the_code_it_was_made_from(recwarn: pytest.WarningsRecorder) -> None:
    model, x = tanh_stack()
    compiled = torch.compile(model, backend="aot_eager")
    parameters = list(model.parameters())
    plain = cost((model, lambda: model(x).exp().sum(), parameters), repeats=0)
    found = cost((compiled, lambda: compiled(x).exp().sum(), parameters), repeats=1)
    assert (found.saved_bytes, found.peak_bytes) == (plain.saved_bytes, plain.peak_bytes)
    assert (found.operations, found.by_module) == (plain.operations, plain.by_module)
    assert not [w for w in recwarn if "global hooks" in str(w.message)]


def test_sparse_gradients_and_half_precision() -> None:
    table = nn.Embedding(1000, 4, sparse=True)
    index = torch.arange(3)
    found = cost((table, lambda: table(index).square().sum(), table.parameters()), repeats=0)
    assert found.peak_bytes < 1000 * 4 * FLOAT
    half = nn.Linear(4, 4).bfloat16()
    x = torch.ones(2, 4, dtype=torch.bfloat16)
    assert saved_bytes(lambda: half(x).exp().sum(), half) == 2 * 4 * 2


def fingerprint(model: nn.Module) -> list[Any]:
    tensors = [*model.parameters(), *model.buffers()]
    gradients = [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()]
    hooks = [len(m._forward_hooks) for m in model.modules()]
    values = [t.detach().clone() for t in tensors]
    return [values, [id(t) for t in tensors], gradients, model.training, hooks, torch.get_rng_state()]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return bool(a == b)


@pytest.mark.parametrize("rule", [None, Backprop(), TwoPoint()])
def test_nothing_changes(rule: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 1))
    x = torch.randn(8, 4)
    model(x).sum().backward()
    before = fingerprint(model)
    cost((model, lambda: model(x).square().mean(), model.parameters()), gradient=rule, repeats=2)
    saved_bytes(lambda: model(x).sum(), model)
    assert same(before, fingerprint(model))
    assert not nn.modules.module._global_forward_hooks
    assert not nn.modules.module._global_forward_pre_hooks


def test_nothing_changes_after_an_exception() -> None:
    model = nn.Linear(2, 2)

    def closure() -> Tensor:
        model(torch.rand(1, 2)).sum().backward()
        raise KeyError("mine")

    before = fingerprint(model)
    with pytest.raises(KeyError, match="mine"):
        cost((model, closure, model.parameters()))
    assert same(before, fingerprint(model))
    assert not nn.modules.module._global_forward_hooks


def test_a_cost_prints_itself_with_the_largest_modules() -> None:
    model, x = tanh_stack()
    found = cost((model, lambda: model(x).exp().sum(), model.parameters()), repeats=2)
    assert isinstance(found, Cost)
    assert found.milliseconds > 0
    assert found.allocator_peak_bytes is None
    text = str(found)
    for line in ("kept for backward", "18.4 kB", "kept by 0.1", "kept by 1 others"):
        assert line in text


@pytest.mark.gpu
def test_on_cuda_the_allocator_is_read_too() -> None:
    model = tanh_stack()[0].cuda()
    x = torch.randn(512, 32, device="cuda")
    found = cost((model, lambda: model(x).square().mean(), model.parameters()), repeats=1)
    assert found.allocator_peak_bytes is not None
    # the allocator rounds each block up to 512 bytes and sees the workspaces of kernels
    assert found.allocator_peak_bytes >= found.peak_bytes


def test_as_step_takes_the_three_forms_and_refuses_the_rest() -> None:
    model = nn.Linear(2, 1)

    def closure() -> Tensor:
        return model(torch.ones(1, 2)).sum()

    forms: list[Any] = [
        Step(model, closure, list(model.parameters())),
        (model, closure, model.parameters()),
        lambda: (model, closure, model.parameters()),
    ]
    for form in forms:
        assert as_step(form) == Step(model, closure, tuple(model.parameters()))
    wrong: list[tuple[Any, str]] = [
        (3, "step: "),
        (model, "step: "),
        ((model, closure), "step: "),
        (lambda: None, "step: .*function that returns"),
        ((closure, model, model.parameters()), r"step\[0\]"),
        ((model, closure(), model.parameters()), r"step\[1\]"),
        ((model, closure, model), r"step\[2\]"),
    ]
    for form, name in wrong:
        with pytest.raises(ArgumentTypeError, match=name):
            as_step(form)
    with pytest.raises(ArgumentError, match=r"step\[2\]"):
        as_step((model, closure, []))


def test_refusals() -> None:
    model = nn.Linear(2, 1)
    parameters = list(model.parameters())

    def closure() -> Tensor:
        return model(torch.ones(1, 2)).sum()

    with pytest.raises(ArgumentTypeError, match=r"gradient: .*Make one: Backprop\(\)"):
        cost((model, closure, parameters), gradient=Backprop)  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match="gradient: "):
        cost((model, closure, parameters), gradient="spsa")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="repeats: "):
        cost((model, closure, parameters), repeats=-1)
    with pytest.raises(ArgumentTypeError, match="key: "):
        cost((model, closure, parameters), key=3)  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match="closure: "):
        saved_bytes(3)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"closure: .*no phases"):
        cost((model, lambda: iter(()), parameters))
    with pytest.raises(ArgumentTypeError, match=r"closure: .*backward\(\)"):
        cost((model, lambda: [1, 2], parameters))
    with pytest.raises(ArgumentTypeError, match="closure: "):
        cost((model, lambda: None, parameters))
    with pytest.raises(ArgumentError, match="depends on the parameters"):
        cost((model, lambda: torch.ones(()), parameters))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="the fused LSTM is oneDNN's")
@pytest.mark.parametrize("bidirectional", [False, True])
def test_operations_of_the_fused_lstm_are_its_products(bidirectional):
    model = nn.LSTM(4, 8, 2, bidirectional=bidirectional)
    x = torch.randn(5, 3, 4)
    weights = sum(w.numel() for name, w in model.named_parameters() if name.startswith("weight"))
    found = cost((model, lambda: model(x)[0].square().mean(), model.parameters()), repeats=0)
    assert found.operations == 3 * 2 * 5 * 3 * weights


def test_sparse_gradients_are_counted_and_compared():
    model = nn.Sequential(nn.Embedding(50, 4, sparse=True), nn.Flatten(), nn.Linear(16, 3))
    x = torch.arange(32).view(8, 4)
    step = (model, lambda: model(x).square().mean(), list(model.parameters()))
    # kept: the input of the linear layer, which flatten only views, and the input of the square
    assert cost(step, repeats=0).saved_bytes == 4 * (8 * 16 + 8 * 3)
    assert fidelity(step).cosine == 1.0


def test_the_first_call_warms_up_and_is_not_timed():
    model = nn.Linear(4, 1)
    calls = 0

    def slow_at_first():
        nonlocal calls
        calls += 1
        if calls == 1:
            time.sleep(0.4)
        return model(torch.ones(2, 4)).sum()

    # with the first call in it the median of two would be at least 200 ms
    assert cost((model, slow_at_first, model.parameters()), repeats=1).milliseconds < 200


def test_a_buffer_that_the_forward_replaces_is_not_kept_for_backward():
    class Averaged(nn.Module):
        def __init__(self, replaces: bool) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 8)
            self.register_buffer("mean", torch.zeros(8))
            self.replaces = replaces

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.layer(x)
            if self.replaces:
                self.mean = 0.9 * self.mean + 0.1 * hidden.detach().mean(0)
            return hidden.square().mean()

    x = torch.randn(16, 4)
    plain, averaged = Averaged(False), Averaged(True)
    found = [
        cost((model, lambda model=model: model(x), model.parameters()), repeats=0).saved_bytes
        for model in (plain, averaged)
    ]
    assert found[0] == found[1] == 16 * 8 * 4
    assert averaged.mean.eq(0).all()


@pytest.mark.parametrize("first", [0, 10])
def test_a_tensor_that_grows_in_place_counts_with_its_new_size(first):
    weight = nn.Parameter(torch.ones(1))

    def grows():
        scratch = torch.empty(first)
        scratch.resize_(1000)
        return weight.sum()

    found = cost((nn.ParameterList([weight]), grows, [weight]), repeats=0)
    # 0 kept: the graph of a sum holds only shapes
    assert found.saved_bytes == 0
    assert 4000 <= found.peak_bytes < 4100
