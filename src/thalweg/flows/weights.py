"""How much each noise level counts in training: weights of the loss.

A weight and a law of times are one choice: what counts is the weight times the density, which
`effective_weight` reports. Weights are always those of the squared error of the predicted data, whatever the
network predicts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from thalweg.errors import require_choice, require_positive
from thalweg.flows.path import Path
from thalweg.flows.prediction import Kind, require_kind
from thalweg.flows.time_laws import TimeLaw, require_law

WeightName = Literal[
    "data", "noise", "score", "velocity", "v", "elbo", "truncated", "min_snr", "edm", "sigmoid"
]
WEIGHTS: tuple[WeightName, ...] = get_args(WeightName)
Weight = WeightName | Callable[[Path, Tensor], Tensor]


def data_weight(
    weight: Weight, path: Path, t: Tensor, *, clip: float = 5.0, sigma_data: float = 0.5, bias: float = 0.0
) -> Tensor:
    """The weight of |predicted data - data|^2 at times t.

    With snr = (alpha / sigma)^2 and lambda = log(alpha / sigma):

    | weight | is | |
    | --- | --- | --- |
    | "data" | 1 | the plain error of the data |
    | "noise" | snr | that of the noise, as in DDPM |
    | "score" | snr / sigma^2 | that of the score |
    | "velocity" | (alpha lambda')^2 | that of the velocity: flow matching |
    | "v" | ((alpha^2 + sigma^2) / sigma)^2 | that of v; snr + 1 where variance is preserved |
    | "elbo" | - lambda' snr | the variational bound, for uniform times |
    | "truncated" | max(snr, 1) | progressive distillation |
    | "min_snr" | min(snr, clip) | Min-SNR |
    | "edm" | 1 / s^2 + 1 / sigma_data^2, s = sigma / alpha | EDM |
    | "sigmoid" | snr sigmoid(bias - 2 lambda) | sigmoid weighting of the noise error |

    Args:
        weight: a name, or a function of the path and the times.
        path: the noising path.
        t: times, any shape.
        clip: of "min_snr", above 0.
        sigma_data: of "edm", above 0.
        bias: of "sigmoid".

    Returns:
        Shape of t, float64; infinite at t = 0 where the name says so.

    Paper:
        Hang et al.: Efficient Diffusion Training via Min-SNR Weighting Strategy. ICCV 2023. Kingma, Gao:
        Understanding Diffusion Objectives as the ELBO with Simple Data Augmentation. NeurIPS 2023.

    Example:
        >>> from thalweg.flows import Straight
        >>> data_weight("noise", Straight(), torch.tensor(0.5))
        tensor(1., dtype=torch.float64)
    """
    if callable(weight):
        return weight(path, t)
    require_choice("weight", weight, WEIGHTS)
    if weight in ("data", "noise", "score", "velocity", "v"):
        return data_error_share(weight, path, t)
    alpha, sigma = path.coefficients(t)[:2]
    snr = (alpha / sigma) ** 2
    if weight == "elbo":
        return -path.half_log_snr_rate(t) * snr
    if weight == "truncated":
        return snr.clamp(min=1)
    if weight == "min_snr":
        require_positive("clip", clip)
        return snr.clamp(max=clip)
    if weight == "edm":
        require_positive("sigma_data", sigma_data)
        return snr + 1 / sigma_data**2
    return snr * torch.sigmoid(bias - 2 * path.half_log_snr(t))


def data_error_share(kind: Kind, path: Path, t: Tensor) -> Tensor:
    """The squared error of a prediction of `kind`, as a multiple of that of the data it implies."""
    require_kind("kind", kind)
    alpha, sigma, alpha_rate, sigma_rate = path.coefficients(t)
    if kind == "data":
        return torch.ones_like(alpha)
    if kind == "noise":
        return (alpha / sigma) ** 2
    if kind == "score":
        return (alpha / sigma**2) ** 2
    if kind == "v":
        return ((alpha**2 + sigma**2) / sigma) ** 2
    # alpha lambda', without dividing by an alpha of 0
    return (alpha_rate - alpha * sigma_rate / sigma) ** 2


def effective_weight(weight: Weight, law: TimeLaw, path: Path, t: Tensor) -> Tensor:
    """What training really weighs: weight times density of the time, per unit of log(alpha / sigma).

    Two trainings with the same effective weight have the same loss in expectation, up to a factor.

    Returns:
        Shape of t, float64.

    Example:
        >>> from thalweg.flows import Straight, UniformTime
        >>> effective_weight("elbo", UniformTime(), Straight(), torch.tensor([0.5]))
        tensor([1.], dtype=torch.float64)
    """
    require_law(law)
    density = law.log_density(t, path).exp() / path.half_log_snr_rate(t).abs()
    return data_weight(weight, path, t) * density
