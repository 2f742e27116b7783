"""The authors' toy, two modes to two modes, and the small network that learns flows between them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from thalweg.flows import Coupling, Field, Independent, Paired, rectified_loss
from thalweg.flows.path import Path
from thalweg.noise import Key, normal
from thalweg.problems import GaussianMixture, MixturePair
from thalweg.recipes.p24_rectified_flow.training import Loss, fit

HEIGHT, DISTANCE, DEVIATION = 7.5, 15.0, 0.5
TOY = MixturePair(
    data=GaussianMixture.isotropic([[DISTANCE, HEIGHT], [DISTANCE, -HEIGHT]], DEVIATION),
    source=GaussianMixture.isotropic([[0.0, HEIGHT], [0.0, -HEIGHT]], DEVIATION),
)
# calls of a seed's keys, so far apart that no two draws share a number: a draw of pairs takes four of them
_TRAINING, _FRESH, _FLOOR = 0, 10, 20


@dataclass(frozen=True, slots=True)
class Training:
    """How each flow is trained, all of them alike.

    Args:
        pairs: how many points of each end there are to learn from.
        width: units of a hidden layer.
        layers: hidden layers.
        updates: steps of Adam, whose step size falls to 0 along a cosine.
        batch: pairs in one of them.
        learning_rate: at the beginning.
        simulation: Euler steps of the simulations that make pairs.
        distillation: updates of a distillation.
        judged: fresh points of each end that a flow is judged on.
        standardised: whether the network sees points and times with mean 0 and deviation 1. In raw
            coordinates, up to 15, so small a network has not settled after so few updates.
    """

    pairs: int = 20_000
    width: int = 64
    layers: int = 2
    updates: int = 2500
    batch: int = 512
    learning_rate: float = 1e-3
    simulation: int = 200
    distillation: int = 1500
    judged: int = 3000
    standardised: bool = True


class VelocityNetwork(nn.Module):
    """Rectified layers on a point and its time.

    Args:
        width: units of a hidden layer.
        layers: hidden layers, at least 1.
        centre: what is subtracted from a point and its time, (3,).
        spread: what these are divided by, (3,); velocities are multiplied by that of points.
    """

    centre: Tensor
    spread: Tensor

    def __init__(self, width: int, layers: int, centre: Tensor, spread: Tensor) -> None:
        super().__init__()
        self.register_buffer("centre", centre)
        self.register_buffer("spread", spread)
        sizes = [3, *[width] * layers]
        inner: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            inner += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.inner = nn.Sequential(*inner, nn.Linear(width, 2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The velocity at points (batch, 2) and times (batch,)."""
        inputs = (torch.cat([x, t[:, None].to(x)], 1) - self.centre) / self.spread
        return self.spread[:2] * self.inner(inputs)  # type: ignore[no-any-return]


def stratified_pairs(count: int, seed: int) -> Paired:
    """Independent pairs in blocks of 8: each noise and its mirror image with each pair of components.

    Args:
        count: a multiple of 8.
        seed: of the noise.

    Returns:
        Pairs in float64, whose means scatter much less than those of plain draws.
    """
    drawn = DEVIATION * normal(torch.empty(count // 8, 1, 4, dtype=torch.float64), Key(seed))
    base = drawn.expand(-1, 4, -1)
    noise = torch.cat([base, -base], 1).reshape(count, 4)
    # so that the mirror image meets the same four pairs of components
    signs = noise.new_tensor([[1, 1], [1, -1], [-1, -1], [-1, 1]]).repeat(count // 4, 1) * HEIGHT
    source = noise[:, :2] + torch.stack([torch.zeros_like(signs[:, 0]), signs[:, 0]], 1)
    data = noise[:, 2:] + torch.stack([torch.full_like(signs[:, 1], DISTANCE), signs[:, 1]], 1)
    return Paired(data, source)


def training_points(count: int, seed: int) -> Independent:
    """What there is to learn from: so many points of each end, paired anew whenever they are drawn."""
    pair = TOY.draw(count, Key(seed, _TRAINING))
    return Independent(pair.data.float(), pair.source.float())


def fresh_points(count: int, seed: int) -> tuple[Paired, Tensor]:
    """Pairs that no flow has been trained on, and another draw of the data for the floor of distances."""
    pair = TOY.draw(count, Key(seed, _FRESH))
    return Paired(pair.data.float(), pair.source.float()), TOY.draw(count, Key(seed, _FLOOR)).data.float()


def new_field(training: Training, path: Path, points: Independent) -> Field:
    """A field that has learnt nothing, its network drawn from torch's default generator.

    Args:
        training: sizes.
        path: of the field.
        points: where the units of the network come from, if it is standardised.
    """
    both = torch.cat([end for end in (points.data, points.source) if isinstance(end, Tensor)])
    centre, spread = torch.zeros(3), torch.ones(3)
    if training.standardised:
        # of a uniform time mean and spread are known
        centre = torch.cat([both.mean(0), torch.tensor([0.5])])
        spread = torch.cat([both.std(0), torch.tensor([12**-0.5])])
    return Field(VelocityNetwork(training.width, training.layers, centre, spread), path, coupled=True)


def fit_toy(
    field: Field,
    pairs: Coupling,
    training: Training,
    seed: int,
    *,
    updates: int | None = None,
    loss: Loss = rectified_loss,
) -> tuple[Field, float]:
    """`fit` with the sizes of `training`; another number of updates and another loss where they are given."""
    return fit(
        field,
        pairs,
        updates=training.updates if updates is None else updates,
        batch=training.batch,
        learning_rate=training.learning_rate,
        seed=seed,
        loss=loss,
    )
