"""A long process or an ODE, and how it is differentiated."""

from thalweg.rollouts.backsolve import Backsolve
from thalweg.rollouts.checkpointed import Checkpointed, step_calls
from thalweg.rollouts.discrete import Discrete
from thalweg.rollouts.masks import Bernoulli, Last, RandomLast
from thalweg.rollouts.ode import integrate
from thalweg.rollouts.plan import Plan
from thalweg.rollouts.reversible import Reversible
from thalweg.rollouts.rollout import plan, rollout
from thalweg.rollouts.route import Gate, Route, Skipped, Truncated
from thalweg.rollouts.tableaus import Tableau

__all__ = [
    "Backsolve",
    "Bernoulli",
    "Checkpointed",
    "Discrete",
    "Gate",
    "Last",
    "Plan",
    "RandomLast",
    "Reversible",
    "Route",
    "Skipped",
    "Tableau",
    "Truncated",
    "integrate",
    "plan",
    "rollout",
    "step_calls",
]
