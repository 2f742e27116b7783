"""How much an input may be moved before the answer turns, by attacks that check one another."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from thalweg.attacks.losses import Bounds, Model, Target, attacked, clipped, cross_entropy, require_radius
from thalweg.attacks.pgd import fgsm, pgd
from thalweg.attacks.square import square
from thalweg.errors import ArgumentError, ArgumentTypeError, require_choice, require_floating, require_integer
from thalweg.noise import Key, uniform
from thalweg.step import draw_key
from thalweg.table import align, short


@dataclass(frozen=True, slots=True)
class AttackRow:
    """One attack at one radius.

    Args:
        attack: "fgsm", "fgsm-margin", "pgd", "pgd-margin" or "square"; those without "-margin" climb the
            cross-entropy.
        radius: of the box around each input.
        accuracy: share of inputs that are still answered right, in [0, 1].
    """

    attack: str
    radius: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class RobustnessReport:
    """What `robustness` found; `print` it, or take a number by `accuracy`.

    Args:
        examples: how many inputs were attacked.
        clean: accuracy without any attack, in [0, 1].
        noisy: accuracy under noise of the same range for every input; None where it was not asked for.
        rows: the attacks, by radius.
        zero_gradients: share of inputs where the cross-entropy's gradient is exactly 0.
        largest_logit: the largest |logit| on clean inputs.
        signs: why the gradient counts as masked; empty where nothing speaks for it.
    """

    examples: int
    clean: float
    noisy: float | None
    rows: tuple[AttackRow, ...]
    zero_gradients: float
    largest_logit: float
    signs: tuple[str, ...]

    @property
    def masked(self) -> bool:
        """Whether the model hides its gradient: the weaker attacks' numbers are then no robustness."""
        return bool(self.signs)

    def accuracy(self, attack: str, radius: float) -> float:
        """The accuracy under one attack.

        Raises:
            ArgumentError: no such row.
        """
        for row in self.rows:
            if row.attack == attack and row.radius == radius:
                return row.accuracy
        known = ", ".join(f"{row.attack} at {row.radius}" for row in self.rows)
        raise ArgumentError("attack", f"{attack} at {radius}", f"one of: {known}")

    def worst(self, radius: float) -> float:
        """The least accuracy that any of the attacks leaves at this radius: the number to state."""
        found = [row.accuracy for row in self.rows if row.radius == radius]
        if not found:
            raise ArgumentError("radius", radius, f"one of {sorted({row.radius for row in self.rows})}")
        return min(found)

    def __str__(self) -> str:
        lines = [["clean", "-", _percent(self.clean)]]
        if self.noisy is not None:
            lines.append(["noisy", "-", _percent(self.noisy)])
        lines += [[row.attack, short(row.radius), _percent(row.accuracy)] for row in self.rows]
        table = align(["attack", "radius", "accuracy %"], lines)
        found = "; ".join(self.signs) if self.signs else "no sign of it"
        return (
            f"{table}\n{self.examples} inputs; zero gradients: {_percent(self.zero_gradients)} %; "
            f"largest |logit|: {short(self.largest_logit)}\n"
            f"gradient masking: {found}"
        )


def robustness(
    model: Model,
    inputs: Tensor,
    labels: Tensor,
    *,
    radii: Sequence[float] = (0.1, 0.3),
    noise: float | None = 0.1,
    steps: int = 20,
    restarts: int = 1,
    queries: int = 0,
    against: Literal["labels", "predictions"] = "labels",
    tolerance: float = 0.05,
    batch: int = 1000,
    bounds: Bounds = (0.0, 1.0),
    key: Key | None = None,
) -> RobustnessReport:
    """Attack a classifier in several ways at once, and say whether its gradient is masked.

    Choose it before any claim of robustness. Each published attack stands beside the same attack on the
    margin, which no scale of the logits can blind; where they disagree by more than `tolerance` and five
    standard errors, where one step does more harm than many, where random search does more harm than the
    gradient, or where gradients are exactly zero, the report says "masked" and why.

    Args:
        model: returns logits (batch, classes); a module is attacked in evaluation mode and left as it was.
        inputs: (examples, ...), inside the bounds.
        labels: int64, (examples,); accuracy is always against these.
        radii: of the boxes; each 0 or more.
        noise: inputs plus noise times a uniform draw from [0, 1), clipped to the bounds; None for none.
        steps, restarts: of projected gradient descent.
        queries: of the random search by squares; 0 leaves it out.
        against: what the attacks climb away from: the true labels, or the model's own predictions, as the
            library did in which the published numbers were taken.
        tolerance: the difference in accuracy from which attacks disagree, above 0 and below 1.
        batch: how many inputs are attacked at a time.
        bounds: the range of inputs, or None.
        key: of the random draws; None takes a fresh one, governed by `torch.manual_seed`.

    Returns:
        A `RobustnessReport`.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument.

    Paper:
        Athalye, Carlini, Wagner: Obfuscated Gradients Give a False Sense of Security. ICML 2018,
        arXiv 1802.00420.

    Example:
        >>> inputs, labels = torch.eye(3), torch.arange(3)
        >>> report = robustness(lambda x: 1e4 * x, inputs, labels, radii=[0.6], noise=None)
        >>> report.accuracy("fgsm", 0.6), report.accuracy("fgsm-margin", 0.6), report.masked
        (1.0, 0.0, True)
    """
    far = _radii(radii)
    require_choice("against", against, ("labels", "predictions"))
    require_integer("batch", batch, 1)
    require_integer("queries", queries, 0)
    if not isinstance(tolerance, int | float) or not 0 < tolerance < 1:
        raise ArgumentError("tolerance", tolerance, "a number above 0 and below 1")
    if noise is not None:
        require_radius(noise)
    key = draw_key() if key is None else key
    attacks = _attacks(model, steps, restarts, queries, bounds)
    counts: dict[tuple[str, float], int] = {(name, radius): 0 for radius in far for name in attacks}
    clean = noisy = zero = 0
    largest = 0.0
    for index, (x, y) in enumerate(_batches(inputs, labels, batch)):
        own = key.at(step=key.step + index)
        climbed = y if against == "labels" else None
        with attacked(model, x, climbed, bounds) as target:
            logits = _logits(target, x)
            clean += int((logits.argmax(1) == y).sum())
            largest = max(largest, float(logits.abs().max()))
            gradient, _ = target.gradient(target.inputs, cross_entropy)
            zero += int((gradient.flatten(1) == 0).all(1).sum())
            if noise is not None:
                drawn = clipped(x + noise * uniform(x, own.at(call=0)), bounds)
                noisy += int((_logits(target, drawn).argmax(1) == y).sum())
        for name, radius in counts:
            moved = attacks[name](x, climbed, radius, own.at(call=1))
            with attacked(model, moved, climbed, None) as target:
                counts[name, radius] += int((_logits(target, moved).argmax(1) == y).sum())
    examples = len(inputs)
    rows = tuple(AttackRow(name, radius, count / examples) for (name, radius), count in counts.items())
    signs = tuple(_signs(rows, zero / examples, examples, tolerance))
    return RobustnessReport(
        examples,
        clean / examples,
        None if noise is None else noisy / examples,
        rows,
        zero / examples,
        largest,
        signs,
    )


_Attack = Callable[[Tensor, Tensor | None, float, Key], Tensor]


def _attacks(model: Model, steps: int, restarts: int, queries: int, bounds: Bounds) -> dict[str, _Attack]:
    def one_step(loss: Literal["margin", "cross_entropy"]) -> _Attack:
        return lambda x, y, radius, key: fgsm(model, x, y, radius=radius, loss=loss, bounds=bounds)

    def many_steps(loss: Literal["margin", "cross_entropy"]) -> _Attack:
        return lambda x, y, radius, key: pgd(
            model, x, y, radius=radius, loss=loss, steps=steps, restarts=restarts, bounds=bounds, key=key
        )

    found: dict[str, _Attack] = {
        "fgsm": one_step("cross_entropy"),
        "fgsm-margin": one_step("margin"),
        "pgd": many_steps("cross_entropy"),
        "pgd-margin": many_steps("margin"),
    }
    if queries:
        found["square"] = lambda x, y, radius, key: square(
            model, x, y, radius=radius, queries=queries, bounds=bounds, key=key
        )
    return found


def _signs(rows: Sequence[AttackRow], zero: float, examples: int, tolerance: float) -> Iterator[str]:
    left = {(row.attack, row.radius): row.accuracy for row in rows}
    if zero > 0.01:
        yield f"{_percent(zero)} % of the gradients of the cross-entropy are exactly zero"
    # the stronger attack of each pair should leave the least; the sentence says what it means if not
    pairs = (
        ("fgsm", "fgsm-margin", "the margin does more harm than the cross-entropy in one step"),
        ("pgd", "pgd-margin", "the margin does more harm than the cross-entropy in many steps"),
        ("pgd-margin", "fgsm-margin", "one step does more harm than many"),
        ("pgd-margin", "square", "random search does more harm than the gradient"),
    )
    for radius in sorted({row.radius for row in rows}):
        for weaker, stronger, meaning in pairs:
            if (stronger, radius) not in left:
                continue
            gap = left[weaker, radius] - left[stronger, radius]
            # both counts are on the same inputs: at least this share of them changed sides
            error = math.sqrt(max(gap, 0.0) * (1 - max(gap, 0.0)) / examples)
            if gap > tolerance and gap > 5 * error:
                numbers = f"{_percent(left[weaker, radius])} % against {_percent(left[stronger, radius])} %"
                yield f"{meaning} at radius {short(radius)}: {numbers}"


def _batches(inputs: Tensor, labels: Tensor, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    require_floating("inputs", inputs)
    if not isinstance(labels, Tensor):
        raise ArgumentTypeError("labels", labels, "an int64 tensor of shape (examples,)")
    if labels.shape != inputs.shape[:1]:
        raise ArgumentError("labels", labels, f"one label for each of {len(inputs)} inputs")
    for start in range(0, max(len(inputs), 1), batch):
        yield inputs[start : start + batch], labels[start : start + batch]


def _logits(target: Target, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return target.logits(inputs)


def _radii(radii: Sequence[float]) -> tuple[float, ...]:
    if isinstance(radii, int | float) or not isinstance(radii, Sequence) or not radii:
        raise ArgumentTypeError("radii", radii, "a list of at least one radius")
    return tuple(dict.fromkeys(require_radius(radius) for radius in radii))


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
