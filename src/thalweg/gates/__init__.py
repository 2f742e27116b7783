"""Gates: the identity forward, your rule backward; and straight-through, their mirror."""

from thalweg.gates.straight_through import straight_through

__all__ = ["straight_through"]
