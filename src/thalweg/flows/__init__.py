"""A generative field: its path and predictions, sampling from it, and rewards through samplers."""

from thalweg.flows.field import Field, edm_preconditioned
from thalweg.flows.named_paths import (
    Cosine,
    GeometricVarianceExploding,
    OffsetCosine,
    Straight,
    SubVariancePreserving,
    Tabulated,
    VarianceExploding,
    VariancePreserving,
)
from thalweg.flows.path import Custom, Path, Rescaled, Retimed, shifted_clock
from thalweg.flows.pipeline import through
from thalweg.flows.prediction import KINDS, Kind

__all__ = [
    "KINDS",
    "Cosine",
    "Custom",
    "Field",
    "GeometricVarianceExploding",
    "Kind",
    "OffsetCosine",
    "Path",
    "Rescaled",
    "Retimed",
    "Straight",
    "SubVariancePreserving",
    "Tabulated",
    "VarianceExploding",
    "VariancePreserving",
    "edm_preconditioned",
    "shifted_clock",
    "through",
]
