"""The ways to train the blocks, their training, and what they answer."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thalweg.data import Classification
from thalweg.ledger import cost
from thalweg.local import (
    BackpropNoProp,
    ContinuousNoProp,
    DenoisingBlock,
    FlowNoProp,
    LabelEmbedding,
    NoProp,
    learned_labels,
    one_hot_labels,
    prototype_labels,
)
from thalweg.noise import Key
from thalweg.step import Step

Kind = Literal["discrete", "continuous", "flow", "stack", "block", "mlp"]
DRAWS = 5
"""Predictions start from noise: accuracies are means over so many draws, as in the paper."""
DECAY = 1e-3


@dataclass(frozen=True, slots=True)
class Route:
    """One row.

    Args:
        name: in tables and figures.
        kind: "discrete", "continuous", "flow": NoProp. "stack": the same blocks trained end to end. "block":
            one of them as an ordinary classifier. "mlp": a plain network, trained end to end.
        labels: how labels are embedded.
        equal_weights: whether every block's loss weighs the same, a control.
        shuffled: the training images are shuffled against their labels, a control.
        patient: whether it has the epochs of the continuous ways.
        rate: of AdamW.
    """

    name: str
    kind: Kind
    labels: Literal["one-hot", "learned", "prototype"] = "one-hot"
    equal_weights: bool = False
    shuffled: bool = False
    patient: bool = False
    rate: float = 1e-3


DISCRETE, CONTINUOUS, FLOW = "discrete", "continuous", "flow matching"
SHUFFLED, STACK, BLOCK, MLP = (
    "control: discrete, images shuffled",
    "backprop, same blocks",
    "backprop, one block",
    "backprop, plain network",
)
DIGIT_ROUTES = (
    Route(DISCRETE, "discrete"),
    Route("discrete, learned labels", "discrete", labels="learned"),
    Route("discrete, prototypes", "discrete", labels="prototype"),
    Route("discrete, equal weights", "discrete", equal_weights=True),
    Route(CONTINUOUS, "continuous", patient=True),
    # of 1e-3 and 2e-3 the better on other seeds' digits
    Route(FLOW, "flow", patient=True, rate=2e-3),
    Route(STACK, "stack"),
    Route(BLOCK, "block"),
    Route(MLP, "mlp"),
    Route(SHUFFLED, "discrete", shuffled=True),
)
IMAGE_ROUTES = (Route(DISCRETE, "discrete"), Route(STACK, "stack"), Route(BLOCK, "block"))


@dataclass(frozen=True, slots=True)
class Shape:
    """What the blocks are made of.

    Args:
        blocks: how many.
        width: of their layers; the flow's are twice as wide.
        channels: of their convolutions.
    """

    blocks: int
    width: int
    channels: tuple[int, int, int] = (8, 16, 32)


class OneBlock(nn.Module):
    """A denoising block that is told nothing about the label: an ordinary classifier of the same layers."""

    def __init__(self, block: DenoisingBlock, labels: LabelEmbedding) -> None:
        super().__init__()
        self.block, self.nothing = block, torch.zeros(labels.shape)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits."""
        found: Tensor = self.block(self.nothing.to(inputs).expand(len(inputs), *self.nothing.shape), inputs)
        return found


def make(route: Route, data: Classification, shape: Shape, seed: int) -> Any:
    """The model of a route."""
    torch.manual_seed(seed)
    labels = embedding(route, data, seed)
    inputs: Any = tuple(data.train_inputs.shape[1:])
    inputs = inputs if len(inputs) == 3 else inputs[0]
    timed = route.kind in ("continuous", "flow")
    width = shape.width * (2 if route.kind == "flow" else 1)

    def block() -> DenoisingBlock:
        return DenoisingBlock(labels, inputs, width=width, channels=shape.channels, timed=timed)

    if route.kind == "mlp":
        wide = (shape.width * 2, shape.width)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(data.train_inputs[0].numel(), wide[0]), nn.ReLU(),
            nn.Linear(*wide), nn.ReLU(), nn.Linear(wide[1], data.classes),
        )  # fmt: skip
    if route.kind == "block":
        return OneBlock(block(), labels)
    if route.kind == "continuous":
        return ContinuousNoProp(block(), labels)
    if route.kind == "flow":
        return FlowNoProp(block(), labels)
    blocks = [block() for _ in range(shape.blocks)]
    if route.kind == "stack":
        return BackpropNoProp(blocks, labels)
    return NoProp(blocks, labels, weights="one" if route.equal_weights else "snr")


def embedding(route: Route, data: Classification, seed: int) -> LabelEmbedding:
    """The labels of a route as points."""
    if route.labels == "learned":
        return learned_labels(data.classes, seed=seed)
    if route.labels == "prototype":
        return prototype_labels(data.train_inputs, data.train_labels, data.classes)
    return one_hot_labels(data.classes)


def step(route: Route, model: Any, optimizer: Any, x: Tensor, y: Tensor, key: Key) -> None:
    """Move all blocks once, each by its own loss, or the whole by one."""
    if isinstance(model, NoProp | ContinuousNoProp | FlowNoProp):
        for phase in model.phases((x, y), key=key):
            optimizer.zero_grad()
            phase.backward()
            optimizer.step()
        return
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def train(
    route: Route,
    data: Classification,
    shape: Shape,
    *,
    epochs: int,
    batch: int,
    seed: int,
    steps: int,
) -> dict[str, Any]:
    """Train one row.

    Args:
        steps: of a prediction in continuous time.

    Returns:
        Test accuracies in per cent, each the mean of five draws: `accuracy`; `quiet`, without noise on the
        way; `first`, the first block alone. The last two are None where there is no such thing.
    """
    model = make(route, data, shape, seed).to(data.train_inputs.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=route.rate, weight_decay=DECAY)
    x, y = data.train_inputs, data.train_labels
    draw = torch.Generator().manual_seed(seed)
    if route.shuffled:
        x = x[torch.randperm(len(x), generator=draw).to(x.device)]
    taken = 0
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(y), generator=draw).to(x.device)
        # without what is left of the last batch, on which batch norm would stumble
        for rows in order[: len(y) // batch * batch].split(batch):
            step(route, model, optimizer, x[rows], y[rows], Key(seed, taken))
            taken += 1
    model.eval()
    return {"steps": taken, **answers(model, data, seed, steps)}


def answers(model: Any, data: Classification, seed: int, steps: int) -> dict[str, float | None]:
    """Test accuracies of a trained model; see `train`."""
    if isinstance(model, NoProp):
        return {
            "accuracy": _accuracy(data, seed, lambda x, key: model.predict(x, key=key)),
            "quiet": _accuracy(data, seed, lambda x, key: model.predict(x, noise=False, key=key)),
            "first": _accuracy(data, seed, lambda x, key: model.predict(x, blocks=1, key=key)),
        }
    if isinstance(model, ContinuousNoProp | FlowNoProp):
        accuracy = _accuracy(data, seed, lambda x, key: model.predict(x, steps=steps, key=key))
        return {"accuracy": accuracy, "quiet": None, "first": None}
    if isinstance(model, BackpropNoProp):
        return {
            "accuracy": _accuracy(data, seed, lambda x, key: model(x, key=key)),
            "quiet": None,
            "first": None,
        }
    return {"accuracy": _accuracy(data, seed, lambda x, key: model(x)), "quiet": None, "first": None}


@torch.no_grad()
def _accuracy(data: Classification, seed: int, answer: Callable[[Tensor, Key], Tensor]) -> float:
    found = []
    for draw in range(DRAWS):
        right = torch.cat(
            [
                answer(x, Key(seed, step=draw * 1000 + part)).argmax(1) == y
                for part, (x, y) in enumerate(zip(data.test_inputs.split(500), data.test_labels.split(500)))
            ]
        )
        found.append(100 * float(right.double().mean()))
    return statistics.fmean(found)


def kept(route: Route, data: Classification, shape: Shape, batch: int, seed: int) -> int:
    """The most bytes kept at once for the backward passes of one step."""
    model = make(route, data, shape, seed).to(data.train_inputs.device)
    x, y = data.train_inputs[:batch], data.train_labels[:batch]
    closure: Callable[[], Any] = (
        (lambda: model.phases((x, y), key=Key(seed)))
        if isinstance(model, NoProp)
        else (lambda: F.cross_entropy(model(x), y))
    )
    return cost(Step(model, closure, tuple(model.parameters())), repeats=0).saved_bytes
