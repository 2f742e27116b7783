"""The ledger on real work: routes side by side, on a task of ours or a step of yours."""

from thalweg.comparison.compare import compare, default_routes
from thalweg.comparison.rows import Comparison, Row

__all__ = ["Comparison", "Row", "compare", "default_routes"]
