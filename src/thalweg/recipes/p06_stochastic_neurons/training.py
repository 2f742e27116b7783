"""Train one gated network and judge it on data that chose nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import thalweg as tw
from thalweg.data import Classification
from thalweg.recipes.p06_stochastic_neurons.gaters import GatedNetwork, Gater, rule_of


def train(
    gater: Gater,
    network: GatedNetwork,
    fit: Classification,
    held_out: Classification,
    *,
    epochs: int,
    batch: int,
    learning_rate: float,
    target: float,
    tick: Callable[[], Any],
) -> list[dict[str, float]]:
    """Train by the paper's recipe; keep the weights of the epoch with the least error on `held_out`.

    Returns:
        One row for each epoch: training loss, held-out error, fraction of open gates in training.
    """
    frozen = gater.control == "frozen gater"
    groups: list[dict[str, Any]] = [{"params": network.other_parameters()}]
    if not frozen:
        groups.append({"params": network.gater_parameters(), "lr": learning_rate * gater.gater_rate})
    optimizer = torch.optim.SGD(groups, lr=learning_rate, momentum=gater.momentum)
    learned = [parameter for group in groups for parameter in group["params"]]
    rule = rule_of(gater)
    curve: list[dict[str, float]] = []
    kept, best = copy.deepcopy(network.state_dict()), float("inf")
    for _ in range(epochs):
        network.train()
        total, opened = torch.zeros(()), torch.zeros(())
        parts = torch.randperm(len(fit.train_labels)).split(batch)
        for chosen in parts:
            x, labels = fit.train_inputs[chosen], fit.train_labels[chosen]
            optimizer.zero_grad()
            closure = partial(_losses, gater, network, x, labels)
            total += tw.backward(closure, learned, gradient=rule)
            optimizer.step()
            network.layer.constrain_()
            opened += network.layer.active
        network.layer.calibrate(held_out.train_inputs, target)
        wrong = error(network, held_out.train_inputs, held_out.train_labels)
        curve.append(
            {
                "training_loss": float(total) / len(parts),
                "held_out_error": wrong,
                "open_in_training": float(opened) / len(parts),
            }
        )
        if wrong < best:
            kept, best = copy.deepcopy(network.state_dict()), wrong
        tick()
    network.load_state_dict(kept)
    return curve


def _losses(gater: Gater, network: GatedNetwork, x: Tensor, labels: Tensor) -> Tensor:
    losses = network.losses(x, labels)
    if gater.control != "shuffled losses":
        return losses
    # the gates are judged by another example's loss; experts and read-out keep their own gradient
    return losses + (losses[torch.randperm(len(losses))] - losses).detach()


@torch.no_grad()
def error(network: GatedNetwork, x: Tensor, labels: Tensor, backend: Any = None) -> float:
    """The share of wrong answers in evaluation, in per cent."""
    network.eval()
    outputs = network.head(network.layer(x, backend=backend))
    return 100 * float((outputs.argmax(1) != labels).double().mean())


def judge(network: GatedNetwork, data: Classification, held_out: Classification, target: float) -> Any:
    """Test error and open fraction: calibrated on `held_out`, and for rectifiers without any shift too."""
    network.layer.calibrate(held_out.train_inputs, target)
    found = {"error": error(network, data.test_inputs, data.test_labels)}
    found["open"] = float(network.layer.active)
    network.layer.threshold.zero_()
    found["uncalibrated_error"] = error(network, data.test_inputs, data.test_labels)
    found["uncalibrated_open"] = float(network.layer.active)
    return found
