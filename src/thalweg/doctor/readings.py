"""Numbers collected on the device during a forward and a backward, brought over in one transfer."""

from __future__ import annotations

import torch
from torch import Tensor


class Readings:
    """A list of 0-dim tensors that stays on the device until it is read once.

    Reading a number inside a hook would synchronise the device at every layer; this does it once a report.

    Example:
        >>> readings = Readings()
        >>> slot = readings.norm(torch.tensor([3.0, 4.0]))
        >>> readings.read()[slot]
        5.0
    """

    def __init__(self) -> None:
        self._values: list[Tensor] = []

    def add(self, value: Tensor) -> int:
        """Keep one 0-dim tensor; returns its place in what `read` returns."""
        self._values.append(value.detach())
        return len(self._values) - 1

    def norm(self, tensor: Tensor) -> int:
        """Keep the Euclidean norm; it is nan or infinite exactly when an entry is.

        In double precision: the square of a gradient of 1e-25 would vanish in single precision.
        """
        return self.add(norm(tensor))

    def read(self) -> list[float]:
        """All values so far, as Python numbers: one stack and one transfer for each device."""
        values: list[float] = [0.0] * len(self._values)
        by_device: dict[torch.device, list[int]] = {}
        for index, value in enumerate(self._values):
            by_device.setdefault(value.device, []).append(index)
        for indices in by_device.values():
            packed = torch.stack([self._values[index].to(_widest(self._values[index])) for index in indices])
            for index, number in zip(indices, packed.tolist()):
                values[index] = number
        return values


def norm(tensor: Tensor) -> Tensor:
    """Euclidean norm in double precision where the device has it."""
    detached = tensor.detach()
    if detached.is_sparse:
        detached = detached.coalesce().values()
    if detached.is_complex():
        detached = torch.view_as_real(detached)
    length: Tensor = torch.linalg.vector_norm(detached, dtype=_widest(detached))
    return length


def _widest(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64
