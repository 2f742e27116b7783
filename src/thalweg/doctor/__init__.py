"""Symptoms of a gradient, measured; remedies, named."""

from thalweg.doctor.examine import CHECKS, examine
from thalweg.doctor.findings import Evidence, Examination, Finding, NotMeasured

__all__ = ["CHECKS", "Evidence", "Examination", "Finding", "NotMeasured", "examine"]
