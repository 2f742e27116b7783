"""A run: presets, seeds, progress, claims, figures, and cells that resume."""

from thalweg.lab.claim import Claim
from thalweg.lab.record import read_run, record
from thalweg.lab.run import Lab
from thalweg.lab.workers import Job

__all__ = ["Claim", "Job", "Lab", "read_run", "record"]
