"""Fields from the models of others, and back: networks of diffusers, denoisers of k-diffusion.

Nothing of either package is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from thalweg.flows.field import Field, JoinedNetwork, Network, batched_times
from thalweg.flows.named_paths import Straight, VarianceExploding
from thalweg.flows.path import Curve, Path, over
from thalweg.flows.prediction import Kind
from thalweg.flows.tabulated import Tabulated

_PREDICTIONS: dict[str, Kind] = {
    "epsilon": "noise",
    "sample": "data",
    "v_prediction": "v",
    "flow_prediction": "velocity",
}


def from_denoiser(denoiser: Callable[..., Tensor], sigma_max: float = 80.0) -> Field:
    """A field from a denoiser in the convention of k-diffusion and EDM.

    Args:
        denoiser: `denoiser(x, sigma, **conditions)` predicts the data from x = data + sigma noise; sigma has
            shape (batch,).
        sigma_max: the level that t = 1 stands for.

    Example:
        >>> field = from_denoiser(lambda x, sigma: x / (1 + sigma[:, None] ** 2), sigma_max=10.0)
        >>> field.predict("noise", torch.ones(1, 2), 0.1)
        tensor([[0.5000, 0.5000]])
    """
    return Field(denoiser, VarianceExploding(sigma_max), "data", clock=lambda t: sigma_max * t)


def to_denoiser(field: Field) -> Network:
    """The field as `denoiser(x, sigma, **conditions)`, as the samplers of k-diffusion take it.

    Levels are sigma / alpha, so that any path will do.

    Returns:
        A module if the field's network is one; sigma of shape (batch,) or one for all.

    Example:
        >>> field = Field(lambda x, t: torch.zeros_like(x), Straight(), predicts="noise")
        >>> to_denoiser(field)(torch.ones(1, 2), torch.tensor([3.0]))
        tensor([[1., 1.]])
    """
    if not isinstance(field, Field):
        raise ArgumentTypeError("field", field, "a thalweg.flows.Field")

    def denoiser(x: Tensor, sigma: Tensor, **conditions: Any) -> Tensor:
        levels = torch.as_tensor(sigma, device=x.device).to(torch.float64).expand(len(x))
        times = field.path.time_at(-levels.log())
        alpha = field.path.coefficients(times).alpha
        return field.predict("data", over(alpha, x) * x, times, **conditions)

    return JoinedNetwork(denoiser, (field.network,)) if isinstance(field.network, nn.Module) else denoiser


def from_diffusers(scheduler: Any, model: Callable[..., Any]) -> Field:
    """A field from a diffusers model and the scheduler it was trained with; neither is changed.

    The scheduler says the path (its table of alphas, or the straight path of flow matching) and what the
    model predicts. Steps, spacing and solver are then yours.

    Args:
        scheduler: any scheduler with `alphas_cumprod`, or a flow-matching one.
        model: `model(x, timestep, **conditions)` returns a tensor, a tuple, or an object with `.sample`; the
            timestep has shape (batch,) and need not be an integer.

    Raises:
        ArgumentTypeError: not a scheduler.
        UnsupportedError: a scheduler whose path or prediction is not known, by name.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> field = from_diffusers(DDIMScheduler(), lambda x, timestep: 0.1 * x)
        >>> field.predicts, field(torch.ones(1, 3, 8, 8), 0.5).shape
        ('noise', torch.Size([1, 3, 8, 8]))
    """
    path, kind, clock, _ = _training(scheduler)
    if not callable(model):
        raise ArgumentTypeError("model", model, "a function model(x, timestep, **conditions)")

    def network(x: Tensor, timestep: Tensor, **conditions: Any) -> Tensor:
        found = model(x, timestep, **conditions)
        if isinstance(found, tuple):
            found = found[0]
        output: Tensor = found if isinstance(found, Tensor) else found.sample
        return output

    module = JoinedNetwork(network, (model,)) if isinstance(model, nn.Module) else network
    return Field(module, path, kind, clock=clock)


def to_diffusers(field: Field, scheduler: Any) -> Network:
    """The field as `model(x, timestep, **conditions)`, as a loop over a diffusers scheduler calls its model.

    Choose it to run a scheduler on an exact field, or to hand a field trained here to a pipeline's loop. The
    field is moved to the scheduler's path and prediction.

    Args:
        field: the field.
        scheduler: as in `from_diffusers`.

    Returns:
        A function that returns a tensor; a module if the field's network is one.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> model = to_diffusers(Field(lambda x, t: x, Straight(), "noise"), DDIMScheduler())
        >>> model(torch.ones(1, 2), 500).shape
        torch.Size([1, 2])
    """
    if not isinstance(field, Field):
        raise ArgumentTypeError("field", field, "a thalweg.flows.Field")
    path, kind, _, time = _training(scheduler)
    moved = (field if field.path == path else field.on(path)).converted(kind)

    def model(x: Tensor, timestep: Tensor | float, **conditions: Any) -> Tensor:
        steps = torch.as_tensor(timestep, device=x.device).to(torch.float64)
        return moved(x, batched_times(x.to(torch.float64), time(steps)), **conditions)

    return JoinedNetwork(model, (field.network,)) if isinstance(field.network, nn.Module) else model


def _training(scheduler: Any) -> tuple[Path, Kind, Curve, Curve]:
    """The path and prediction that a scheduler stands for, and timesteps as a function of time and back."""
    config = getattr(scheduler, "config", None)
    if config is None or not hasattr(scheduler, "set_timesteps"):
        raise ArgumentTypeError("scheduler", type(scheduler), "a diffusers scheduler")
    name = type(scheduler).__name__
    count = config.get("num_train_timesteps", 1000)
    prediction = config.get("prediction_type", "epsilon")
    if name.startswith("FlowMatch") or prediction == "flow_prediction":
        return Straight(), "velocity", lambda t: count * t, lambda n: n / count
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None or prediction not in _PREDICTIONS:
        raise UnsupportedError(
            f"{name} with prediction_type={prediction!r}: no path can be read off it. Write "
            "Field(model, path, predicts, clock=...) yourself"
        )
    if not bool(((table > 0) & (table < 1)).all()):
        mend = "Leave rescale_betas_zero_snr off, or write Field(model, path, ...) with a path of your own."
        raise ArgumentError("scheduler", name, "a table strictly between 0 and 1", mend)
    path = Tabulated(table.double())
    return path, _PREDICTIONS[prediction], lambda t: count * t - 1, lambda n: (n + 1) / count
