"""A small sampler of digits with a decoder and a reward: the process that policies are compared on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.data import Classification
from thalweg.rollouts import integrate, rollout

SIDE = 8
LATENT = 16


class Velocity(nn.Module):
    """The velocity of a straight path from data (t = 0) to noise (t = 1), in latent space.

    Args:
        width: hidden units of each of its three layers.
    """

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(LATENT + 6, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, LATENT),
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Velocity of shape (batch, latent) at x of that shape and times t of shape (batch,)."""
        phase = torch.stack([t, 1 - t, *(torch.sin(k * torch.pi * t) for k in (1, 2, 4, 8))], dim=1)
        velocity: Tensor = self.body(torch.cat([x, phase], dim=1))
        return velocity


def encoder() -> nn.Module:
    """Images of shape (batch, 64) to latents of shape (batch, 16)."""
    return nn.Sequential(nn.Linear(SIDE * SIDE, 128), nn.SiLU(), nn.Linear(128, LATENT))


def decoder() -> nn.Module:
    """Latents to images in [0, 1], shape (batch, 64), through feature maps much larger than the latent."""
    return nn.Sequential(
        nn.Linear(LATENT, 32 * 4),
        nn.Unflatten(1, (32, 2, 2)),
        nn.SiLU(),
        nn.Upsample(scale_factor=4),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(32, 1, 3, padding=1),
        nn.Sigmoid(),
        nn.Flatten(),
    )


def classifier() -> nn.Module:
    """Images to logits of shape (batch, 10)."""
    return nn.Sequential(
        nn.Unflatten(1, (1, SIDE, SIDE)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(16 * 16, 10),
    )


class RewardedSampler(nn.Module):
    """Noise to a latent by many steps of a field, to an image by a decoder, to a reward by a classifier.

    Args:
        steps: Euler steps of the sampler.
        wanted: the digit whose log-probability is the reward.
    """

    def __init__(self, steps: int = 64, wanted: int = 3) -> None:
        super().__init__()
        self.steps, self.wanted = steps, wanted
        self.field, self.decoder, self.judge = Velocity(), decoder(), classifier()
        # it never sees a gradient of the fine-tuning: what only pleases the judge does not please it
        self.second_judge = classifier()

    def step(self, field: nn.Module, x: Tensor, k: int) -> Tensor:
        """One Euler step from time 1 - k / steps towards the data."""
        t = torch.full(x.shape[:1], 1 - k / self.steps, dtype=x.dtype, device=x.device)
        moved: Tensor = x - field(x, t) / self.steps
        return moved

    def losses(self, noise: Tensor, gradient: Any, method: str | None = None) -> Tensor:
        """Minus the reward per example, shape (batch,), for noise of shape (batch, latent).

        Args:
            noise: where the samples start.
            gradient: the policy.
            method: None for a rollout of Euler steps; or the solver of `thalweg.rollouts.integrate`, which
                with "euler" takes the same steps.
        """
        if method is not None:
            times = torch.tensor([1.0, 0.0], dtype=noise.dtype, device=noise.device)

            def velocity(x: Tensor, t: Tensor) -> Tensor:
                moved: Tensor = self.field(x, t.expand(len(x)))
                return moved

            ends = integrate(
                velocity, noise, times, method=method, gradient=gradient, steps_between=self.steps
            )
            return self.read_out(ends[-1])
        losses: Tensor = rollout(
            self.step, noise, self.steps, gradient=gradient, network=self.field, then=self.read_out
        )
        return losses

    def read_out(self, latent: Tensor) -> Tensor:
        """Minus the log-probability of the wanted digit, by example."""
        loss: Tensor = -nn.functional.log_softmax(self.judge(self.decoder(latent)), dim=1)[:, self.wanted]
        return loss

    @torch.no_grad()
    def reward(self, noise: Tensor) -> dict[str, float]:
        """The mean reward, and how often the second judge sees the wanted digit."""
        latent = noise
        for k in range(self.steps):
            latent = self.step(self.field, latent, k)
        image = self.decoder(latent)
        seen = self.second_judge(image).argmax(dim=1) == self.wanted
        return {"reward": -float(self.read_out(latent).mean()), "second_judge": float(seen.float().mean())}


def pretrain(sampler: RewardedSampler, data: Classification, steps: int) -> None:
    """Train decoder, field and both judges on the digits, by backprop, each on its own loss."""
    inputs, labels = data.train_inputs.flatten(1), data.train_labels
    encode = encoder()
    autoencoder = nn.ModuleList([encode, sampler.decoder])

    def reconstruction(x: Tensor, y: Tensor) -> Tensor:
        latent = encode(x)
        # latents near the unit ball, so that noise of unit size is a fair other end of the path
        loss: Tensor = nn.functional.mse_loss(sampler.decoder(latent), x) + 1e-3 * latent.square().mean()
        return loss

    _fit(autoencoder, reconstruction, inputs, labels, steps)
    with torch.no_grad():
        latents = encode(inputs)

    def matching(x: Tensor, y: Tensor) -> Tensor:
        noise, t = torch.randn_like(x), torch.rand(len(x))
        path = (1 - t)[:, None] * x + t[:, None] * noise
        loss: Tensor = nn.functional.mse_loss(sampler.field(path, t), noise - x)
        return loss

    _fit(sampler.field, matching, latents, labels, 2 * steps)
    for judge in (sampler.judge, sampler.second_judge):
        _fit(judge, _cross_entropy(judge), inputs, labels, steps)


def _cross_entropy(judge: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    # blurred and noisy images too: the judges will see samples, not photographs
    return lambda x, y: nn.functional.cross_entropy(judge(x + 0.1 * torch.randn_like(x)), y)


def _fit(
    model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], inputs: Tensor, labels: Tensor, steps: int
) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        chosen = torch.randint(len(inputs), (128,))
        optimizer.zero_grad()
        loss(inputs[chosen], labels[chosen]).backward()
        optimizer.step()
        schedule.step()
