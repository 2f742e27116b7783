"""Draws of a gradient under keys of their own, and their moments against the exact gradient, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from thalweg.ledger.gradients import gradients_of
from thalweg.ledger.storages import written_name
from thalweg.noise import Key
from thalweg.parameters import require_finite_all
from thalweg.step import Rule, Step


class Source:
    """Gradients of one step by one rule, each a function of the key and the number of the draw.

    Args:
        step: as `thalweg.step.as_step` returns it.
        rule: how to differentiate it.
        key: names all draws.
    """

    def __init__(self, step: Step, rule: Rule, key: Key) -> None:
        self.step = step
        self.rule = rule
        self.key = key
        self.random = False  # whether a draw took numbers from torch's default generators
        self.keyed = False  # whether the rule read its key
        self.phased = False  # whether it is a learner
        self._device = step.parameters[0].device

    def draw(self, index: int) -> Tensor:
        """The gradient of draw `index` as one float64 vector; parameters without a gradient count as zero."""
        key = self.key.at(step=self.key.step + index)
        self._seed(key)
        before = self._random_state()
        for parameter in (*self.step.parameters, *self.step.model.parameters()):
            parameter.grad = None
        found = gradients_of(self.step, self.rule, _NoticedKey(key, self._notice))
        self.phased = found.phased
        if not all(torch.equal(a, b) for a, b in zip(before, self._random_state())):
            self.random = True
        require_finite_all("the gradient", [g for g in found.gradients if g is not None])
        return self.flat(found.gradients)

    def _notice(self) -> None:
        self.keyed = True

    def flat(self, gradients: tuple[Tensor | None, ...]) -> Tensor:
        """One float64 vector on the device of the first parameter."""
        return torch.cat(
            [
                torch.zeros(p.numel(), dtype=torch.float64, device=self._device)
                if g is None
                else (g.to_dense() if g.is_sparse else g).detach().reshape(-1).to(self._device, torch.float64)
                for g, p in zip(gradients, self.step.parameters)
            ]
        )

    def layer_names(self) -> list[str]:
        """Paths of the modules that own the parameters, in order."""
        return list(dict.fromkeys(self._owners()))

    def layers(self) -> Tensor:
        """For each entry of the vector the number of its layer, int64."""
        index = {name: number for number, name in enumerate(self.layer_names())}
        numbers = [index[owner] for owner in self._owners()]
        sizes = [p.numel() for p in self.step.parameters]
        return torch.repeat_interleave(torch.tensor(numbers), torch.tensor(sizes)).to(self._device)

    def _owners(self) -> list[str]:
        named = self.step.model.named_parameters()
        names = {id(p): written_name(name.rpartition(".")[0]) for name, p in named}
        return [names.get(id(p), f"parameters[{i}]") for i, p in enumerate(self.step.parameters)]

    def _seed(self, key: Key) -> None:
        # the closure's own draws; `isolated` gives the generators back. A key of its own, since a rule draws
        # from a generator seeded with `key.bits()`, and equal seeds would tie the two together
        seed = Key(key.bits(), call=1).bits()
        torch.default_generator.manual_seed(seed)
        if self._device.type == "cuda":
            with torch.cuda.device(self._device):
                torch.cuda.manual_seed(seed)

    def _random_state(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        if self._device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self._device))
        return states


class _NoticedKey(Key):
    """A key that says when it is read: a rule that never does has no randomness of its own."""

    def __init__(self, key: Key, notice: Callable[[], None]) -> None:
        super().__init__(key.seed, key.step, key.call, key.device)
        object.__setattr__(self, "_plain", key)
        object.__setattr__(self, "_notice", notice)

    def __getattribute__(self, name: str) -> Any:
        if name in ("seed", "step", "call", "at", "bits"):
            own = object.__getattribute__(self, "__dict__")
            if "_notice" in own:
                own["_notice"]()
                return getattr(own["_plain"], name)
        return object.__getattribute__(self, name)


class Moments:
    """Running moments of draws h of a gradient whose exact value is g.

    Args:
        exact: g, a float64 vector of shape (total,), not zero.
        layers: for each entry the number of its layer, int64 of shape (total,).
    """

    def __init__(self, exact: Tensor, layers: Tensor) -> None:
        self.draws = 0
        self._exact = exact
        self._layers = layers
        self._count = int(layers.max()) + 1
        self._scale = float(exact.square().sum())
        self._error_mean = torch.zeros_like(exact)  # of h minus its reference
        self._error_spread = 0.0
        self._mean = torch.zeros_like(exact)  # of h - g
        self._spread = 0.0
        self._bias_mean = 0.0
        self._bias_spread = 0.0
        self._totals = torch.zeros(2, self._count + 1, dtype=torch.float64)  # cosines and norm ratios

    def add(self, drawn: Tensor, paired: Tensor | None = None) -> None:
        """Take one draw; `paired` is the reference's draw under the same randomness, or None for g."""
        self.draws += 1
        reference = self._exact if paired is None else paired
        error = drawn - reference
        self._error_spread += _welford(self._error_mean, error, self.draws)
        if paired is not None:
            self._spread += _welford(self._mean, drawn - self._exact, self.draws)
        along = float(torch.dot(error, self._exact)) / self._scale
        step = along - self._bias_mean
        self._bias_mean += step / self.draws
        self._bias_spread += step * (along - self._bias_mean)
        self._totals += self._alignment(drawn, reference, error)
        if paired is None:
            self._spread = self._error_spread

    def bias(self) -> float:
        """Mean of <h - g, g> / |g|^2."""
        return self._bias_mean

    def bias_se(self) -> float:
        """Standard error of `bias`; infinite before the second draw."""
        if self.draws < 2:
            return math.inf
        return math.sqrt(self._bias_spread / (self.draws - 1) / self.draws)

    def variance(self) -> float:
        """Unbiased estimate of E |h - E h|^2 / |g|^2."""
        return self._spread / (self.draws - 1) / self._scale

    def squared_bias(self) -> float:
        """Unbiased estimate of |E h - g|^2 / |g|^2: the square of the mean error less the mean's variance."""
        noise = self._error_spread / (self.draws - 1) / self.draws
        return (float(self._error_mean.square().sum()) - noise) / self._scale

    def cosine(self) -> float:
        """Mean cosine over the draws."""
        return float(self._totals[0, -1]) / self.draws

    def norm_ratio(self) -> float:
        """Mean of |h| / |g| over the draws."""
        return float(self._totals[1, -1]) / self.draws

    def by_layer(self) -> tuple[list[float], list[float]]:
        """Mean cosine and mean norm ratio per layer; nan where g is zero."""
        cosines, ratios = (self._totals[:, :-1] / self.draws).tolist()
        return cosines, ratios

    def _alignment(self, drawn: Tensor, reference: Tensor, error: Tensor) -> Tensor:
        products = torch.stack([drawn * reference, drawn.square(), reference.square(), error.square()])
        sums = products.new_zeros(4, self._count).index_add_(1, self._layers, products)
        sums = torch.cat([sums, sums.sum(dim=1, keepdim=True)], dim=1)
        dot, own, exact, difference = sums.cpu()
        cosine = dot / (own.sqrt() * exact.sqrt())
        cosine = torch.where(own == 0, 0.0, cosine).clamp(-1, 1)
        ratio = (own / exact).sqrt()
        # equal bits give exactly 1, whatever the rounding of the norms
        same = difference == 0
        nothing = exact == 0
        return torch.stack(
            [
                torch.where(nothing, math.nan, torch.where(same, 1.0, cosine)),
                torch.where(nothing, math.nan, torch.where(same, 1.0, ratio)),
            ]
        )


def _welford(mean: Tensor, value: Tensor, count: int) -> float:
    difference = value - mean
    mean += difference / count
    return float(torch.dot(difference, value - mean))
