"""Fields that are gradients by construction: a scalar network, differentiated, with an energy to read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from thalweg.errors import ArgumentError, ArgumentTypeError
from thalweg.flows.field import Field, JoinedNetwork, Network, batched_times
from thalweg.flows.losses import noised_batch
from thalweg.flows.path import Curve, Path, clock_times, require_path
from thalweg.flows.prediction import Kind, conversion, require_regular
from thalweg.flows.time_laws import TimeLaw
from thalweg.flows.vector_field import per_example, scores
from thalweg.noise import Key


class PotentialGradient(nn.Module):
    """The gradient by x of a scalar network: what a field of `potential_field` has as its network.

    Args:
        potential: `potential(x, t, **conditions)`, one number per example, shape (batch,).

    Example:
        >>> PotentialGradient(lambda x, t: x.square().sum(1) / 2)(torch.ones(1, 2), torch.zeros(1))
        tensor([[1., 1.]])
    """

    def __init__(self, potential: Network) -> None:
        super().__init__()
        if not callable(potential) or isinstance(potential, type):
            expected = "a function potential(x, t, **conditions)"
            raise ArgumentTypeError("potential", potential, expected)
        self.potential = potential

    def forward(self, x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        """The gradient, shaped as x; differentiable again."""

        def scalar(at: Tensor) -> Tensor:
            return self.value(at, t, **conditions)

        with sdpa_kernel(SDPBackend.MATH):
            return scores(scalar, x)[1]

    def value(self, x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        """The potential itself, (batch,)."""
        found = self.potential(x, t, **conditions)
        if not isinstance(found, Tensor) or found.shape != (len(x),):
            raise ArgumentError("potential", found, f"one number per example, shape ({len(x)},)")
        return found


def potential_field(
    potential: Network, path: Path, predicts: Kind = "noise", *, clock: Curve | None = None
) -> Field:
    """A field whose predictions of every kind are gradients: choose it where an energy is needed.

    For composition of energies, Metropolis corrections, differences of log-densities and curvature. About
    twice the cost of a free network of the same size, and activations must be smooth: with ReLU the gradient
    is constant in pieces. Every kind is a multiple of x, a gradient itself, plus a multiple of
    the output, so that all of them are gradients.

    Args:
        potential: `potential(x, t, **conditions)`, shape (batch,); a module or any function.
        path: the noising path.
        predicts: what the gradient of the potential is.
        clock: what the potential is told of the time.

    Returns:
        A field; `energy` reads it.

    Paper:
        Salimans, Ho: Should EBMs Model the Energy or the Score? ICLR 2021 workshop.

    Example:
        >>> from thalweg.flows import Straight
        >>> field = potential_field(lambda x, t: x.square().sum(1) / 2, Straight())
        >>> field(torch.ones(1, 2), 0.5), energy(field, torch.ones(1, 2), 0.5)
        (tensor([[1., 1.]]), tensor([2.]))
    """
    require_path("path", path)
    return Field(PotentialGradient(potential), path, predicts, clock=clock)


def denoising_potential(network: Network, path: Path, *, clock: Curve | None = None) -> Network:
    """|x - n(x, t)|^2 / (2 sigma): a potential made of a network with an output per feature.

    Choose it to turn a network as it is into an energy: its gradient is the noise prediction of the denoiser
    n but for a term with n's Jacobian, so hand it to `potential_field(..., predicts="noise")` without clock.

    Args:
        network: `network(x, t, **conditions)`, shaped as x.
        path: the noising path; sigma is its share of noise.
        clock: what the network is told of the time.

    Example:
        >>> from thalweg.flows import VarianceExploding
        >>> path = VarianceExploding(2.0)
        >>> field = potential_field(denoising_potential(lambda x, t: 0.5 * x, path), path)
        >>> field(torch.ones(1, 2), 0.5)
        tensor([[0.2500, 0.2500]])
    """
    require_path("path", path)
    if not callable(network) or isinstance(network, type):
        raise ArgumentTypeError("network", network, "a function network(x, t, **conditions)")

    def potential(x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        sigma = path.coefficients(t).sigma.to(x)
        told = t if clock is None else clock(t)
        return per_example((x - network(x, told, **conditions)).square()) / (2 * sigma)

    return JoinedNetwork(potential, (network,)) if isinstance(network, nn.Module) else potential


def energy(field: Field, x: Tensor, t: Tensor | float, **conditions: Any) -> Tensor:
    """- log p_t(x) up to a number that depends on t and the conditions, of a field that is a potential's.

    Args:
        field: from `potential_field`.
        x: (batch, ...).
        t: (batch,) or one for all; within the path, where there is noise.
        conditions: handed to the potential.

    Returns:
        (batch,), in nats.

    Raises:
        ArgumentError: a field that is not a potential's: differences of an "energy" would depend on the way.
    """
    if not isinstance(field, Field):
        raise ArgumentTypeError("field", field, "a thalweg.flows.Field")
    network = field.network
    if not isinstance(network, PotentialGradient) or field.direction != "data_at_0" or field.coupled:
        mend = "Make it one by potential_field, or fit one to yours: projection_loss."
        got = "a field that is not certified to be a gradient"
        raise ArgumentError("field", got, "one of potential_field", mend)
    times = batched_times(x, t)
    told = times if field.clock is None else field.clock(times)
    value = network.value(x, told, **conditions)
    coefficients = field.path.coefficients(clock_times(times))
    found = require_regular(conversion(field.predicts, "score", coefficients), field.predicts, "score", t)
    state, output = (torch.as_tensor(part).to(x) for part in found)
    return -(state * per_example(x.square()) / 2 + output * value)


def projection_loss(
    student: Field,
    teacher: Field,
    data: Tensor,
    *,
    law: TimeLaw | None = None,
    distance: Callable[[Tensor, Tensor], Tensor] | None = None,
    conditions: Mapping[str, Any] | None = None,
    key: Key | None = None,
) -> Tensor:
    """The squared difference of two fields on noised data: fits a potential to a trained field.

    Its minimum over potentials is the teacher's projection onto gradients under p_t, the only part of it that
    moves the marginals. Nothing is said of the data but through the teacher, whose errors stay.

    Args:
        student: as a rule from `potential_field`; trained.
        teacher: on an equal path; gets no gradient.
        data: (batch, ...).
        law: the law of the times; None for `UniformTime()`.
        distance: `distance(found, wanted)`, (batch,); None for the mean square over features.
        conditions: handed to both networks.
        key: names times and noise; None takes a fresh one.

    Returns:
        One loss per example, (batch,).

    Example:
        >>> from thalweg.flows import Straight
        >>> student = potential_field(lambda x, t: x.square().sum(1) / 2, Straight())
        >>> teacher = Field(lambda x, t: x, Straight(), "noise")
        >>> projection_loss(student, teacher, torch.ones(3, 2))
        tensor([0., 0., 0.])
    """
    for name, value in (("student", student), ("teacher", teacher)):
        if not isinstance(value, Field):
            raise ArgumentTypeError(name, value, "a thalweg.flows.Field")
    if teacher.path != student.path:
        mend = "Move it: teacher.on(student.path)."
        raise ArgumentError("teacher", teacher.path, f"a field on {student.path}", mend)
    given = dict(conditions or {})
    batch = noised_batch(student, data, law=law, key=key)
    with torch.no_grad():
        wanted = teacher.predict(student.predicts, batch.x, batch.t, **given)
    found = student(batch.x, batch.t, **given)
    if distance is not None:
        return distance(found, wanted)
    return (found - wanted).square().flatten(1).mean(1)
