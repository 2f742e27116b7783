"""Small sick models, each with one disease put in on purpose, and healthy twins: they judge the doctor.

The thresholds of `thalweg.doctor` are calibrated here; `benchmarks/doctor.py` prints the table of what was
found on whom. Every case is a function of a seed that returns a `Case`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.doctor.anatomy import DEPTH, WIDTH, Between, Recurrent, Residual, TwoHeads, stack
from thalweg.doctor.patient import Losses

BATCH = 64


@dataclass(frozen=True, slots=True)
class Case:
    """One training step and what is wrong with it.

    Args:
        model: the module.
        losses: as `thalweg.doctor.examine` takes them.
        optimizer: what steps it, or None.
        code: the code of the disease; "" on a healthy twin.
        where: path of the sick module.
    """

    model: nn.Module
    losses: Losses
    optimizer: torch.optim.Optimizer | None = None
    code: str = ""
    where: str = ""


def _classify(model: nn.Module, seed: int, shape: Sequence[int], code: str = "", where: str = "") -> Case:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, *shape, generator=generator)
    y = torch.randint(4, (BATCH,), generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return Case(model, lambda: nn.functional.cross_entropy(model(x), y), optimizer, code, where)


def _between(function: Callable[[Tensor], Tensor], code: str) -> Callable[[int], Case]:
    def build(seed: int) -> Case:
        torch.manual_seed(seed)
        return _classify(Between(function), seed, (8,), code, "middle")

    return build


def _deep(
    activation: type[nn.Module] | None, initialise: Callable[[Tensor], Any] | None, code: str = ""
) -> Callable[[int], Case]:
    return lambda seed: _classify(
        stack(activation, initialise, seed), seed, (WIDTH,), code, "0" if code else ""
    )


def _recurrent(gain: float, code: str = "") -> Callable[[int], Case]:
    def build(seed: int) -> Case:
        torch.manual_seed(seed)
        model = nn.Sequential(Recurrent(32, 30, gain), nn.Linear(32, 4))
        return _classify(model, seed, (8,), code, "0.cell" if code else "")

    return build


def _terms(kind: str) -> Callable[[int], Case]:
    def build(seed: int) -> Case:
        torch.manual_seed(seed)
        model = TwoHeads()
        if kind == "opposed":
            # heads that read the trunk alike, and want opposite things of it
            model.right.load_state_dict(model.left.state_dict())
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(BATCH, 8, generator=generator)
        targets = x[:, :1].sin(), x[:, 1:2].cos()

        def losses() -> dict[str, Tensor]:
            left, right = model(x)
            if kind == "opposed":
                return {"up": (left - 5).square().mean(), "down": (right + 5).square().mean()}
            scale = 1e3 if kind == "unbalanced" else 1.0
            return {
                "left": scale * (left - targets[0]).square().mean(),
                "right": (right - targets[1]).square().mean(),
            }

        code = {"opposed": "T2", "unbalanced": "T1"}.get(kind, "")
        return Case(model, losses, torch.optim.SGD(model.parameters(), 0.1), code, "trunk" if code else "")

    return build


def _through_numpy(x: Tensor) -> Tensor:
    import numpy

    return torch.from_numpy(numpy.tanh(x.detach().numpy()))


def _untracked(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x * 2


def _copied(x: Tensor) -> Tensor:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch advises against the very slip that is shown here
        return torch.tensor(x)


def _chosen(x: Tensor) -> Tensor:
    return nn.functional.one_hot(x.argmax(-1), x.shape[-1]).to(x.dtype)


def _entropy(x: Tensor) -> Tensor:
    share = torch.relu(x)
    return share * share.log()


def _ending(end: Callable[[Tensor, Tensor], Tensor], code: str, gain: float = 1.0) -> Callable[[int], Case]:
    """A healthy network whose loss is not: `end` makes it of logits and targets, outside of the model."""

    def build(seed: int) -> Case:
        torch.manual_seed(seed)
        model = Between(torch.tanh)
        with torch.no_grad():
            model.head.weight.mul_(gain)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(BATCH, 8, generator=generator)
        y = torch.randint(4, (BATCH,), generator=generator)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        return Case(model, lambda: end(model(x), y), optimizer, code, "(outside)")

    return build


def _errors(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits.argmax(-1) != targets).float().mean()


def _number(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.tensor(nn.functional.cross_entropy(logits, targets).item(), requires_grad=True)


def _reattached(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.detach().requires_grad_(), targets)


def _log_of_softmax(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.nll_loss(logits.softmax(-1).log(), targets)


def _outside_the_clamp(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits.clamp(10, 20)[:, 0] - targets).square().mean()


def _missing(seed: int) -> Case:
    torch.manual_seed(seed)
    model = Between(torch.tanh)
    case = _classify(model, seed, (8,))
    return Case(model, case.losses, torch.optim.Adam(model.head.parameters()), "H1", "encoder")


def _stale(seed: int) -> Case:
    torch.manual_seed(seed)
    model = Between(torch.tanh)
    optimizer = torch.optim.Adam(model.parameters())
    model.head = nn.Linear(16, 4)
    return Case(model, _classify(model, seed, (8,)).losses, optimizer, "H2", "head")


def _half(seed: int) -> Case:
    torch.manual_seed(seed)
    model = Between(torch.tanh).half()
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, 8, generator=generator).half()
    y = torch.randint(4, (BATCH,), generator=generator)
    return Case(model, lambda: 1e-6 * nn.functional.cross_entropy(model(x).float(), y), None, "V3", "encoder")


def _bfloat(seed: int) -> Case:
    torch.manual_seed(seed)
    model = Between(torch.tanh).bfloat16()
    x = torch.randn(BATCH, 8, generator=torch.Generator().manual_seed(seed)).bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    return Case(model, lambda: model(x).float().square().mean(), optimizer, "V3", "encoder")


def _convolutional(seed: int) -> Case:
    torch.manual_seed(seed)
    parts: list[nn.Module] = []
    for entering, leaving in ((3, 16), (16, 16), (16, 16), (16, 16)):
        parts += [
            nn.Conv2d(entering, leaving, 3, padding=1, bias=False),
            nn.BatchNorm2d(leaving),
            nn.ReLU(inplace=True),
        ]
    model = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    return _classify(model, seed, (3, 8, 8))


def _transformer(seed: int) -> Case:
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    model = nn.Sequential(encoder, nn.Flatten(), nn.Linear(32 * 6, 4))
    return _classify(model, seed, (6, 32))


def _residual(seed: int) -> Case:
    torch.manual_seed(seed)
    blocks = nn.Sequential(*[Residual(WIDTH) for _ in range(DEPTH)])
    return _classify(nn.Sequential(blocks, nn.Linear(WIDTH, 4)), seed, (WIDTH,))


def _kaiming(factor: float) -> Callable[[Tensor], Any]:
    def initialise(weight: Tensor) -> None:
        nn.init.kaiming_normal_(weight, nonlinearity="relu")
        with torch.no_grad():
            weight.mul_(factor)

    return initialise


def _xavier(factor: float) -> Callable[[Tensor], Any]:
    return lambda weight: nn.init.xavier_normal_(weight, gain=factor)


def _straight_through(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


SICK: dict[str, Callable[[int], Case]] = {
    "relu, torch's default init": _deep(nn.ReLU, None, "V1"),
    "relu, its weights alone": _deep(
        nn.ReLU, lambda weight: nn.init.kaiming_uniform_(weight, a=5**0.5), "V1"
    ),
    "sigmoid stack": _deep(nn.Sigmoid, _xavier(1.0), "V1"),
    "relu, twice He": _deep(nn.ReLU, _kaiming(2.0), "V2"),
    "tanh, three times Xavier": _deep(nn.Tanh, _xavier(3.0), "V2"),
    "recurrent tanh, gain 3": _recurrent(3.0, "V2"),
    "float16, tiny gradients": _half,
    "bfloat16, tiny steps": _bfloat,
    "0 * log 0": _between(_entropy, "V4"),
    "root under a where": _between(lambda x: torch.where(x > 0, x.sqrt(), 0 * x), "V4"),
    "unbalanced terms": _terms("unbalanced"),
    "opposed terms": _terms("opposed"),
    "detach": _between(lambda x: x.detach().tanh(), "D1"),
    "data": _between(lambda x: x.data.tanh(), "D1"),
    "torch.tensor(x)": _between(_copied, "D1"),
    "no_grad": _between(_untracked, "D1"),
    "argmax": _between(_chosen, "D1"),
    "comparison": _between(lambda x: (x > 0).to(x.dtype), "D1"),
    "round": _between(torch.round, "D1"),
    "sign": _between(torch.sign, "D1"),
    "floor": _between(lambda x: torch.floor(4 * x), "D1"),
    "numpy": _between(_through_numpy, "D2"),
    "dead relu": _between(lambda x: torch.relu(x - 5), "L2"),
    "errors counted as the loss": _ending(_errors, "D1"),
    "loss made anew from its number": _ending(_number, "D1"),
    "detached and told to require grad": _ending(_reattached, "D1"),
    "log of a saturated softmax": _ending(_log_of_softmax, "V4", gain=1e4),
    "clamp that holds every value": _ending(_outside_the_clamp, "L2"),
    "missing from the optimizer": _missing,
    "stale in the optimizer": _stale,
}

HEALTHY: dict[str, Callable[[int], Case]] = {
    "relu, He": _deep(nn.ReLU, _kaiming(1.0)),
    "tanh, Xavier": _deep(nn.Tanh, _xavier(1.0)),
    "linear, orthogonal": _deep(None, nn.init.orthogonal_),
    "pre-norm residual": _residual,
    "convolutions with BatchNorm": _convolutional,
    "transformer encoder": _transformer,
    "two terms": _terms("balanced"),
    "encoder and head": _between(torch.tanh, ""),
    "straight-through": _between(_straight_through, ""),
    "stopped target": _between(lambda x: x * torch.sigmoid(x.detach()), ""),
}
