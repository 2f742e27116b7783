"""The asymmetry of a field's Jacobian: 0 for a gradient, whole, by blocks of coordinates or by probes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from thalweg.errors import ArgumentError, ArgumentTypeError, UnsupportedError, require_choice, require_integer
from thalweg.flows.field import Field
from thalweg.flows.prediction import Kind
from thalweg.flows.vector_field import VectorField, per_example, state_and_times, vector_field
from thalweg.noise import Key, fresh_key, rademacher

METHODS = ("exact", "hutchinson", "two_probe")


@dataclass(frozen=True, slots=True, eq=False)
class JacobianAsymmetry:
    """How asymmetric Jacobians are, per example; tensors carry gradients where the field's do.

    Args:
        asymmetry: |J - J^T|^2 / 2 in the Frobenius norm, which is |J|^2 - tr(J J); estimated or
            exact, (batch,).
        square: |J|^2, likewise.
    """

    asymmetry: Tensor
    square: Tensor

    @property
    def ratio(self) -> Tensor:
        """|(J - J^T) / 2|^2 / |J|^2 as a ratio of means over the batch: 0 for a gradient, 1 for a rotation.

        The mean of the examples' ratios would be decided by those whose Jacobian is nearly 0. Under "exact"
        it lies in [0, 1]; estimates may leave it by their error.
        """
        return self.asymmetry.sum() / (2 * self.square.sum())

    @property
    def standard_error(self) -> Tensor:
        """Of `ratio`, over examples and probes, to first order; nan for one example."""
        leaning = self.asymmetry / 2 - self.ratio * self.square
        return leaning.std() / (self.square.mean() * math.sqrt(len(leaning)))


def jacobian(
    field: Field | VectorField,
    x: Tensor,
    t: Tensor | float,
    *,
    kind: Kind | None = None,
    coordinates: Sequence[int] | None = None,
    conditions: Mapping[str, Any] | None = None,
    chunk: int | None = None,
) -> Tensor:
    """The derivative of a field's output by its state, per example: one product with it per feature.

    Args:
        field: a field, or a function of x and t. Examples must not act on each other.
        x: (batch, ...).
        t: (batch,) or one for all.
        kind: which prediction; None for the score.
        coordinates: of the flattened features, to take only those rows and columns; None for all d.
        conditions: handed to the network.
        chunk: how many products at once, which bounds the memory; None for all.

    Returns:
        (batch, d, d), or (batch, m, m) for m coordinates; row i is the gradient of output i. Composes with
        `torch.func` and `torch.compile`, and differentiates by the network's parameters.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument; a network with batch statistics.

    Example:
        >>> jacobian(lambda x, t: x.flip(1) * torch.tensor([2.0, 3.0]), torch.ones(1, 2), 0.5)
        tensor([[[0., 2.],
                 [3., 0.]]])
    """
    function = vector_field(field, kind, conditions)
    x, times = state_and_times(x, t)
    features = x[0].numel()
    rows = list(range(features)) if coordinates is None else _checked(coordinates, features)
    with sdpa_kernel(SDPBackend.MATH):
        pull = torch.func.vjp(lambda at: function(at, times), x)[1]
        units = torch.eye(features, dtype=x.dtype, device=x.device)[rows]
        units = units.reshape(-1, 1, *x.shape[1:]).expand(-1, *x.shape)
        pulled = torch.func.vmap(lambda unit: pull(unit)[0], chunk_size=chunk)(units)
    found: Tensor = pulled.flatten(2).movedim(0, 1)
    return found if coordinates is None else found[:, :, rows]


def jacobian_asymmetry(
    field: Field | VectorField,
    x: Tensor,
    t: Tensor | float,
    *,
    kind: Kind | None = None,
    method: str = "exact",
    coordinates: Sequence[int] | None = None,
    probes: int = 1,
    conditions: Mapping[str, Any] | None = None,
    key: Key | None = None,
) -> JacobianAsymmetry:
    """How far a field is from being a gradient, by the antisymmetric part of its Jacobian.

    A smooth field is a gradient if and only if its Jacobian is symmetric everywhere. It tells of the
    *derivative* of an error: a fine ripple has much of it, a constant bias none; whether it harms what is
    generated is another question, see `gradient_part`.

    | method | cost | choose it |
    | --- | --- | --- |
    | "exact" | a product per feature | up to a few hundred features |
    | "exact" with `coordinates` | a product per coordinate | for images; a necessary condition only |
    | "hutchinson" | two products per probe | for everything else |
    | "two_probe" | two products per probe | forward-mode derivatives only; heavier tails |

    "hutchinson" takes |J^T v - J v|^2 / 2, not v^T J (J^T - J) v, which has the same mean but keeps only half
    of the digits near symmetry.

    Args:
        field: a field, or a function of x and t. Examples must not act on each other.
        x: where, (batch, ...): noised data, or points on generated trajectories. The two differ.
        t: (batch,) or one for all.
        kind: which prediction; None for the score. Predictions differ by a multiple of x, whose symmetric
            Jacobian dominates that of "data" when there is little noise: compare like with like.
        method: as above. Probes are random signs.
        coordinates: of the flattened features, for "exact" alone.
        probes: for the others, at least 1; the mean over them is returned.
        conditions: handed to the network.
        key: names the probes; None takes a fresh one.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument; a network with batch statistics.

    Paper:
        Chao, Sun, Cheng, Lee: On Investigating the Conservative Property of Score-Based Generative Models.
        ICML 2023. Vuong, McCann, Santos, Lin: Are We Really Learning the Score Function? TMLR 2025, arXiv
        2509.00336.

    Example:
        >>> turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        >>> found = jacobian_asymmetry(lambda x, t: x + x @ turn, torch.ones(3, 2), 0.5)
        >>> float(found.ratio)
        0.5
    """
    require_choice("method", method, METHODS)
    if method == "exact":
        found = jacobian(field, x, t, kind=kind, coordinates=coordinates, conditions=conditions)
        return JacobianAsymmetry(per_example((found - found.mT).square()) / 2, per_example(found.square()))
    if coordinates is not None:
        raise ArgumentError("coordinates", coordinates, f"None for {method!r}, which looks along all of them")
    require_integer("probes", probes, 1)
    function = vector_field(field, kind, conditions)
    x, times = state_and_times(x, t)
    pairs = _hutchinson if method == "hutchinson" else _two_probe
    estimates = pairs(lambda at: function(at, times), x, probes, key)
    asymmetry, square = (torch.stack(parts).mean(0) for parts in zip(*estimates))
    return JacobianAsymmetry(asymmetry, square)


def asymmetry_penalty(
    field: Field | VectorField,
    x: Tensor,
    t: Tensor | float,
    *,
    kind: Kind | None = "noise",
    probes: int = 1,
    conditions: Mapping[str, Any] | None = None,
    key: Key | None = None,
) -> Tensor:
    """An unbiased estimate of the Jacobian's asymmetry to add to a loss, which makes a field conservative.

    Not a default: it costs two more derivatives of the network and their backward, and samples need not
    improve. Choose it where the field is to be an energy later and `potential_field` is not possible.

    Args:
        field: what is trained. It needs smooth activations and attention without a fused kernel.
        x: (batch, ...).
        t: (batch,) or one for all.
        kind: which prediction's Jacobian; "noise" is that of the score with the weight sigma^2.
        probes: at least 1.
        conditions: handed to the network.
        key: names the probes; None takes a fresh one.

    Returns:
        |J - J^T|^2 / 2, one per example, (batch,), nowhere negative.

    Raises:
        UnsupportedError: a field that cannot be differentiated twice.
        ArgumentError, ArgumentTypeError: a wrong argument.

    Paper:
        Chao, Sun, Cheng, Lee: On Investigating the Conservative Property of Score-Based Generative Models.
        ICML 2023.

    Example:
        >>> net = torch.nn.Linear(2, 2)
        >>> asymmetry_penalty(lambda x, t: net(x).tanh(), torch.ones(4, 2), 0.5, kind=None).mean().backward()
        >>> net.weight.grad.shape
        torch.Size([2, 2])
    """
    found = jacobian_asymmetry(
        field, x, t, kind=kind, method="hutchinson", probes=probes, conditions=conditions, key=key
    )
    penalty = found.asymmetry
    if torch.is_grad_enabled() and not penalty.requires_grad:
        trained = vector_field(field, kind, conditions)(*state_and_times(x, t))
        if trained.requires_grad:
            raise UnsupportedError(
                "asymmetry_penalty: the field can be differentiated once, not twice, so that the penalty has "
                "no gradient; write it with smooth operations and without detached or in-place derivatives"
            )
    return penalty


def _hutchinson(function: Any, x: Tensor, probes: int, key: Key | None) -> list[tuple[Tensor, Tensor]]:
    found = []
    with sdpa_kernel(SDPBackend.MATH):
        pull = torch.func.vjp(function, x)[1]
        for probe in _signs(x, probes, key):
            pulled = pull(probe)[0]
            pushed = torch.func.jvp(function, (x,), (probe,))[1]
            # the two squares have one mean, and half of their sum less variance than either
            square = (per_example(pulled.square()) + per_example(pushed.square())) / 2
            found.append((per_example((pulled - pushed).square()) / 2, square))
    return found


def _two_probe(function: Any, x: Tensor, probes: int, key: Key | None) -> list[tuple[Tensor, Tensor]]:
    found = []
    signs = _signs(x, 2 * probes, key)
    with sdpa_kernel(SDPBackend.MATH):
        for first, second in zip(signs[::2], signs[1::2]):
            ahead = torch.func.jvp(function, (x,), (first,))[1]
            aside = torch.func.jvp(function, (x,), (second,))[1]
            leaning = per_example(first * aside) - per_example(second * ahead)
            square = (per_example(ahead.square()) + per_example(aside.square())) / 2
            found.append((leaning.square() / 2, square))
    return found


def _signs(x: Tensor, count: int, key: Key | None) -> Tensor:
    like = x.detach().new_empty((count, *x.shape))
    return rademacher(like, fresh_key(x) if key is None else key)


def _checked(coordinates: Sequence[int], features: int) -> list[int]:
    expected = f"different integers below {features}, at least 2"
    if isinstance(coordinates, str) or not isinstance(coordinates, Sequence):
        raise ArgumentTypeError("coordinates", coordinates, expected)
    wanted = list(coordinates)
    if any(isinstance(index, bool) or not isinstance(index, int) for index in wanted):
        raise ArgumentTypeError("coordinates", coordinates, expected)
    if len(wanted) < 2 or len(set(wanted)) < len(wanted) or not all(0 <= i < features for i in wanted):
        raise ArgumentError("coordinates", coordinates, expected)
    return wanted
