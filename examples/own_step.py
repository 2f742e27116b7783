"""A training step of one's own, as `thalweg compare` and `thalweg doctor` take it."""

import torch
from torch import nn


def step():
    """Return the model, a closure that computes the loss on one batch, and the parameters to learn."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 5))
    inputs, labels = torch.randn(128, 20), torch.randint(5, (128,))
    return model, lambda: nn.functional.cross_entropy(model(inputs), labels), list(model.parameters())


def rounded():
    """The same step with a slip: the features are rounded, and nothing below learns."""
    model, _, parameters = step()
    inputs, labels = torch.randn(128, 20), torch.randint(5, (128,))

    def loss():
        features = torch.round(model[:3](inputs))
        return nn.functional.cross_entropy(model[3:](features), labels)

    return model, loss, parameters
