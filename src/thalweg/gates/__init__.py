"""Gates: the identity forward, your rule backward; and straight-through, their mirror."""

from thalweg.gates.clip import ClipStatistics, clip
from thalweg.gates.scale import reverse, scale
from thalweg.gates.stop import stop
from thalweg.gates.straight_through import round, sign, straight_through, threshold

__all__ = [
    "ClipStatistics",
    "clip",
    "reverse",
    "round",
    "scale",
    "sign",
    "stop",
    "straight_through",
    "threshold",
]
