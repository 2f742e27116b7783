"""Node perturbation: the exact checks, every kind of layer, and what it must refuse."""

import math
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from thalweg.blackbox import SPSA
from thalweg.blackbox.nodes import NODES, NodePerturbation
from thalweg.errors import ArgumentError, ArgumentTypeError, NonFiniteError, UnsupportedError
from thalweg.noise import Key
from thalweg.step import backward

SIGMAS = 5
F = nn.functional


def flat(gradients):
    return torch.cat([gradient.reshape(-1) for gradient in gradients])


def exact(closure, parameters):
    return torch.autograd.grad(closure().mean(), parameters)


def orthonormal(monkeypatch, shapes, unit_of):
    """Let sample s put its noise on unit s of every example: an orthonormal basis of each example's units."""

    def of_the_basis(like, key):
        noise = torch.zeros(like.shape, dtype=like.dtype)
        sample, call = unit_of(key)
        start = sum(math.prod(shape) for shape in shapes[:call])
        size = math.prod(shapes[call])
        if start <= sample < start + size:
            noise.flatten(1)[:, sample - start] = 1
        return noise

    monkeypatch.setattr("thalweg.blackbox.calls.noise.normal", of_the_basis)
    return sum(math.prod(shape) for shape in shapes)


def conv_net():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 3, 2, dilation=2, padding_mode="circular", padding=1, bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(27, 2),
    )


class Tied(nn.Module):
    """One layer called twice, with a residual written in place over its input."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.last = nn.Linear(3, 2, bias=False)

    def forward(self, x):
        x = x.clone()
        for _ in range(2):
            change = torch.tanh(self.layer(x))
            # in place wherever autograd does not need the value that was there
            x = x + change if torch.is_grad_enabled() else x.add_(change)
        return self.last(x)


class Tokens(nn.Module):
    """What a language model is made of: an embedding, norms, a parametrized layer, tokens."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))

    def forward(self, ids):
        return self.head(self.norm(self.embedding(ids))).sum(1)


CASES = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
        lambda: torch.randn(6, 4, dtype=torch.float64),
        [(5,), (3,)],
        NODES,
    ),
    "convolutions": (
        conv_net,
        lambda: torch.randn(3, 2, 5, 5, dtype=torch.float64),
        [(4, 3, 3), (3, 3, 3), (2,)],
        NODES,
    ),
    "tied": (Tied, lambda: torch.randn(4, 3, dtype=torch.float64), [(3,), (3,), (2,)], NODES),
    "tokens": (
        Tokens,
        lambda: torch.randint(5, (3, 2)),
        [(2, 4), (2, 4), (2, 2)],
        (*NODES, nn.Embedding, nn.LayerNorm),
    ),
}


@pytest.mark.parametrize("layers", ["all", "one"])
@pytest.mark.parametrize("name", CASES)
def test_average_over_an_orthonormal_basis_is_autograd(monkeypatch, name, layers):
    make, batch, shapes, nodes = CASES[name]
    torch.manual_seed(0)
    net, x = make().double(), batch()
    parameters = list(net.parameters())

    def closure():
        return net(x).square().sum(1)

    found_of = {}
    for sample in range(400):
        for call in range(len(shapes)):
            found_of[Key(Key(3).bits(), step=sample, call=call)] = (sample, call)
    units = orthonormal(monkeypatch, shapes, found_of.__getitem__)
    rule = NodePerturbation(samples=units, scale=1e-6, layers=layers, nodes=nodes)
    estimate = rule.estimate(closure, parameters, Key(3))
    assert estimate.evaluations == 1 + units * (1 if layers == "all" else len(shapes))
    torch.testing.assert_close(estimate.loss, closure().mean().detach())
    for found, want in zip(estimate.gradients, exact(closure, parameters), strict=True):
        torch.testing.assert_close(units * found, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layers", ["all", "one"])
@pytest.mark.parametrize("scale", [1e-3, 2.0])
def test_linear_network_is_unbiased_at_any_scale(scale, layers):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    x = torch.randn(1000, 3, dtype=torch.float64)
    parameters = list(net.parameters())

    def closure():
        return net(x).square().sum(1)

    rule = NodePerturbation(scale=scale, layers=layers)
    found = torch.stack([flat(rule.estimate(closure, parameters, Key(s)).gradients) for s in range(300)])
    want = flat(exact(closure, parameters))
    error = found.std(0) / math.sqrt(len(found))
    assert error.max() < 0.1 * want.abs().max()
    assert ((found.mean(0) - want) / error).abs().max() < SIGMAS


def test_second_moment_law_of_one_layer():
    torch.manual_seed(0)
    layer = nn.Linear(4, 5, bias=False).double()
    x = torch.randn(1, 4, dtype=torch.float64)

    def closure():
        return layer(x).square().sum(1)

    want = flat(exact(closure, [layer.weight]))
    rule = NodePerturbation(scale=1e-5)
    found = torch.stack([flat(rule.estimate(closure, [layer.weight], Key(s)).gradients) for s in range(4000)])
    ratios = found.square().sum(1) / want.square().sum()
    error = ratios.std() / math.sqrt(len(ratios))
    assert error < 0.04 * 7
    assert abs(ratios.mean() - 7) < SIGMAS * error


def three_layers(seed):
    torch.manual_seed(seed)
    sizes = ((20, 30), (30, 30), (30, 10))
    layers = [nn.Linear(*size, bias=False) for size in sizes]
    net = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2]).double()
    x, y = torch.randn(1, 20, dtype=torch.float64), torch.randint(10, (1,))
    return list(net.parameters()), lambda: F.cross_entropy(net(x), y, reduction="none")


def test_cosines_of_weights_nodes_and_activities():
    """Single examples, tanh networks 20-30-30-10 as torch makes them: .0187, .079, .105."""
    rules = {
        "weights": (SPSA(scale=1e-4, directions="gaussian"), 0.0187),
        "nodes": (NodePerturbation(scale=1e-4), 0.079),
        "activities": (NodePerturbation(scale=1e-4, mode="activity"), 0.105),
    }
    cosines = {name: [] for name in rules}
    for seed in range(100):
        parameters, closure = three_layers(seed)
        want = flat(exact(closure, parameters))
        for name, (rule, _) in rules.items():
            found = [flat(rule.estimate(closure, parameters, Key(seed, k)).gradients) for k in range(3)]
            cosines[name].append(F.cosine_similarity(torch.stack(found), want[None]).abs().mean())
    for name, (_, published) in rules.items():
        values = torch.stack(cosines[name])
        error = values.std() / math.sqrt(len(values))
        assert error < 0.06 * published
        assert abs(values.mean() - published) < SIGMAS * error, name


def test_mean_direction_is_unbiased_for_noise_and_biased_for_activity():
    parameters, closure = three_layers(0)
    for parameter in parameters:
        # so that what arrives from the layer before weighs as much as what is injected
        parameter.data.mul_(3)
    want = flat(exact(closure, parameters))
    cosine = {}
    for mode in ("noise", "activity"):
        rule = NodePerturbation(samples=3000, scale=1e-4, mode=mode)
        # two independent means: their product has no share of the variance, as the square of one would
        one, other = (flat(rule.estimate(closure, parameters, Key(s)).gradients) for s in (1, 2))
        cosine[mode] = ((one + other) @ want / 2) / (want.norm() * (one @ other).sqrt())
    assert abs(cosine["noise"] - 1) < 0.03
    assert 0.6 < cosine["activity"] < 0.94


def test_activity_of_a_single_layer_is_noise_normalised_by_what_was_drawn():
    layer, x = nn.Linear(3, 4, bias=False).double(), torch.randn(2, 3, dtype=torch.float64)

    def closure():
        return layer(x).square().sum(1)

    noise = NodePerturbation(scale=0.1).estimate(closure, [layer.weight], Key(5)).gradients[0]
    rule = NodePerturbation(scale=0.1, mode="activity")
    activity = rule.estimate(closure, [layer.weight], Key(5)).gradients[0]
    like = torch.empty(2, 4, dtype=torch.float64)
    from thalweg.noise import normal

    drawn = normal(like, Key(Key(5).bits(), step=0, call=0))
    clean = closure()
    change = (layer(x) + 0.1 * drawn).square().sum(1) - clean
    want = (change / 0.1)[:, None] * drawn / 2
    torch.testing.assert_close(noise, (want.T @ x).detach())
    want = (4 * change / (0.1 * drawn).square().sum(1))[:, None] * 0.1 * drawn / 2
    torch.testing.assert_close(activity, (want.T @ x).detach())


@pytest.mark.parametrize("mode", ["noise", "activity"])
def test_the_same_key_gives_the_same_bits_and_another_gives_others(mode):
    net, x = nn.Linear(3, 2), torch.randn(5, 3)
    rule = NodePerturbation(mode=mode)

    def once(key):
        return flat(rule.estimate(lambda: net(x).square().sum(1), list(net.parameters()), key).gradients)

    assert torch.equal(once(Key(1)), once(Key(1)))
    assert not torch.equal(once(Key(1)), once(Key(2)))


def test_a_step_descends_and_leaves_no_hooks():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
    x = torch.randn(64, 4)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        losses.append(
            backward(
                lambda: (net(x)[:, 0] - x[:, 0] * x[:, 1]).square(),
                net.parameters(),
                gradient=NodePerturbation(),
            )
        )
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    assert not nn.modules.module._has_any_global_hook()


def test_dropout_is_the_same_in_both_passes_and_moves_on_like_one_forward():
    net, x = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2)), torch.ones(6, 4)
    masks = []
    net[0].register_forward_hook(lambda m, i, out: masks.append(out != 0))
    torch.manual_seed(5)
    net(x)
    after_one = torch.rand(3)
    torch.manual_seed(5)
    NodePerturbation().estimate(lambda: net(x).sum(1), list(net.parameters()), Key(0))
    assert torch.equal(torch.rand(3), after_one)
    assert torch.equal(masks[1], masks[2])


def test_only_layers_whose_parameters_are_given_are_disturbed():
    net, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), torch.randn(4, 3)
    seen = []
    net[0].register_forward_hook(lambda m, i, out: seen.append(out.clone()))
    found = NodePerturbation().estimate(lambda: net(x).sum(1), [net[1].weight], Key(0))
    assert torch.equal(seen[0], seen[1])
    assert found.gradients[0].shape == (2, 3)


@pytest.mark.parametrize("mode", ["noise", "activity"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_promoted(dtype, mode):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)
    twin = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    twin.load_state_dict(net.state_dict())
    x = torch.randn(256, 4).to(dtype)
    rule = NodePerturbation(samples=8, scale=0.5, mode=mode)
    found = rule.estimate(lambda: net(x).float().square().sum(1), list(net.parameters()), Key(0))
    want = rule.estimate(lambda: twin(x.float()).square().sum(1), list(twin.parameters()), Key(0))
    assert found.loss.dtype == torch.float32
    assert F.cosine_similarity(flat(found.gradients).float(), flat(want.gradients), dim=0) > 0.99


def test_autocast_in_the_closure_reaches_every_kind_of_layer():
    net, x = conv_net(), torch.randn(4, 2, 5, 5)

    def closure():
        with torch.autocast("cpu", torch.bfloat16):
            return net(x).float().square().sum(1)

    found = NodePerturbation(scale=0.3).estimate(closure, list(net.parameters()), Key(0))
    assert all(torch.isfinite(g).all() and g.any() for g in found.gradients)


@pytest.mark.parametrize("how", ["whole", "layer by layer"])
def test_compiled_models_give_the_same_gradient(how):
    net, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(6, 4)
    whole = torch.compile(net, backend="aot_eager")
    part = nn.Sequential(*(torch.compile(each, backend="aot_eager") for each in net))
    compiled = whole if how == "whole" else part
    parameters = list(net.parameters())
    got = NodePerturbation().estimate(lambda: compiled(x).square().sum(1), parameters, Key(0))
    want = NodePerturbation().estimate(lambda: net(x).square().sum(1), parameters, Key(0))
    torch.testing.assert_close(got.gradients, want.gradients)


@pytest.mark.parametrize("mode", ["noise", "activity"])
def test_estimates_run_on_fake_tensors(mode):
    with FakeTensorMode():
        net, x = conv_net(), torch.randn(3, 2, 5, 5)
        rule = NodePerturbation(mode=mode)
        found = rule.estimate(lambda: net(x).square().sum(1), list(net.parameters()), Key(0))
    assert [g.shape for g in found.gradients] == [p.shape for p in net.parameters()]


def test_a_scalar_loss_is_refused_with_the_mend():
    net, x = nn.Linear(3, 2), torch.randn(4, 3)
    with pytest.raises(ArgumentError, match=r"one loss per example.*reduction='none'"):
        backward(lambda: net(x).sum(), net.parameters(), gradient=NodePerturbation())
    assert net.weight.grad is None


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (nn.LayerNorm(3), r"parameters\[0\] \(of LayerNorm.*nodes=\(..., LayerNorm\)"),
        (nn.MultiheadAttention(3, 1), r"parameters\[\d\] \(of "),
    ],
    ids=["norm", "attention"],
)
def test_a_parameter_without_a_node_is_refused_by_name(extra, message):
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)

    def closure():
        hidden = extra(x, x, x)[0] if isinstance(extra, nn.MultiheadAttention) else extra(x)
        return layer(hidden).sum(1)

    with pytest.raises(ArgumentError, match=message):
        backward(closure, [*extra.parameters(), *layer.parameters()], gradient=NodePerturbation())


def test_a_parameter_that_no_module_ran_is_refused():
    layer, x, loose = nn.Linear(3, 2), torch.randn(4, 3), torch.ones(2, requires_grad=True)
    with pytest.raises(ArgumentError, match=r"parameters\[0\] \(of no module that ran\)"):
        backward(lambda: (layer(x) * loose).sum(1), [loose, layer.weight], gradient=NodePerturbation())


def test_outputs_that_are_not_rows_of_the_batch_are_refused():
    layer, x = nn.Linear(3, 2), torch.randn(4, 5, 3)
    with pytest.raises(ArgumentError, match=r"one row per loss"):
        backward(
            lambda: layer(x.flatten(0, 1)).view(4, -1).sum(1),
            layer.parameters(),
            gradient=NodePerturbation(),
        )


def test_batch_norm_in_training_is_refused_and_serves_in_evaluation():
    net, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), torch.randn(6, 3)
    rule = NodePerturbation()
    with pytest.raises(UnsupportedError, match="mixes examples"):
        backward(lambda: net(x).sum(1), net[0].parameters(), gradient=rule)
    assert net[1].num_batches_tracked == 0
    net.eval()
    backward(lambda: net(x).sum(1), net[0].parameters(), gradient=rule)
    assert net[0].weight.grad.any()


def test_a_closure_that_runs_other_layers_the_second_time_is_refused():
    net, x, calls = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), torch.randn(4, 3), []

    def closure():
        calls.append(1)
        return (net(x) if len(calls) == 1 else net[0](net[1](x))).sum(1)

    with pytest.raises(ArgumentError, match="the same layers in the same order"):
        backward(closure, net.parameters(), gradient=NodePerturbation())


def test_a_layer_with_several_outputs_is_refused():
    net, x = nn.GRU(3, 2, batch_first=True), torch.randn(4, 5, 3)
    with pytest.raises(UnsupportedError, match=r"GRU.*puts out tuple"):
        backward(lambda: net(x)[0].sum((1, 2)), net.parameters(), gradient=NodePerturbation(nodes=(nn.GRU,)))


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_weights_that_a_hook_makes_are_refused():
    layer, x = nn.utils.weight_norm(nn.Linear(3, 2)), torch.randn(4, 3)
    with pytest.raises(UnsupportedError, match="parametrizations serve"):
        backward(lambda: layer(x).sum(1), layer.parameters(), gradient=NodePerturbation())


def test_a_non_finite_loss_names_its_pass():
    layer, x, calls = nn.Linear(3, 2), torch.randn(4, 3), []

    def closure():
        calls.append(1)
        return layer(x).sum(1) * (float("nan") if len(calls) == 3 else 1)

    with pytest.raises(NonFiniteError, match="sample 1"):
        backward(closure, layer.parameters(), gradient=NodePerturbation(samples=2))


@pytest.mark.parametrize(
    ("fields", "error", "name"),
    [
        ({"samples": 0}, ArgumentError, "samples"),
        ({"samples": 1.5}, ArgumentTypeError, "samples"),
        ({"scale": 0.0}, ArgumentError, "scale"),
        ({"scale": float("nan")}, ArgumentError, "scale"),
        ({"mode": "weights"}, ArgumentError, "mode"),
        ({"layers": "some"}, ArgumentError, "layers"),
        ({"nodes": nn.Linear}, ArgumentTypeError, "nodes"),
        ({"nodes": (nn.Linear(1, 1),)}, ArgumentTypeError, "nodes"),
        ({"nodes": ()}, ArgumentError, "nodes"),
    ],
    ids=str,
)
def test_fields_out_of_range(fields, error, name):
    with pytest.raises(error, match=f"^{name}: "):
        NodePerturbation(**fields)


def test_it_is_a_policy():
    rule = NodePerturbation(mode="activity")
    assert pickle.loads(pickle.dumps(rule)) == rule
    assert "mode='activity'" in repr(rule)
