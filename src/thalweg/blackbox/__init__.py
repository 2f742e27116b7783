"""No derivative: gradients from the values of the loss, or from one forward derivative.

Which order of derivative to buy, for d weights, q directions and F the time of one forward pass:

| order | method | needs | evaluations a step | time |
| --- | --- | --- | --- | --- |
| 2 | `torch.optim.LBFGS` around `thalweg.backward` | gradients | 1 and a line search | 3 F each |
| 2 | `NewtonCG`, `NaturalGradient`, `CubicRegularization` of torchzero | H v | 1 and CG | 6 F each |
| 1 | `thalweg.Backprop` | backward, stored activations | 1 | 3 F |
| 1, forward only | `ForwardGradient` | forward derivatives | q | 2 to 3 F each |
| 0, coordinate | `SPSA(directions="coordinate")`, `Coordinates` | values | 2 d, one-sided d + 1 | F each |
| 0, random | `SPSA`: also `LowRank`, `Sparse`, `Blocks`, `MeZO`, `Streamed` | values | 2 q | F each |
| 0, random | `EvolutionStrategies`, `PGPE`: losses through their ranks | values | 2 q | F each |
| 0, structured | `NodePerturbation`, behind `Decorrelation` | losses per example | 1 + q | F each |
| 0, one point | `OnePoint`, `SPSA(side="one")` | values, one at a time | q | F each |
| 0, continuous time | `OrnsteinUhlenbeck` | a stream of rewards | 1 a tick | F each |

Variance, not time, decides between them: one direction gives a gradient whose cosine with the exact one is
about sqrt(2 / (pi d)), so divide the learning rate by (d + q + 1) / q. The second-order rows are other
packages' work and compose with these rules through `.grad`; they are not written again here.

`Budget` stops any of them after so many evaluations; `replay_` makes a run of `MeZO` again from its log;
`Distributed` shares a step between processes that tell each other keys and scalars only.
"""

from thalweg.blackbox.blocks import Blocks
from thalweg.blackbox.budget import Budget, BudgetSpent
from thalweg.blackbox.coordinates import Coordinates
from thalweg.blackbox.decorrelation import Decorrelation
from thalweg.blackbox.distributed import Distributed, rank_key
from thalweg.blackbox.evolution_strategies import EvolutionStrategies
from thalweg.blackbox.forward_gradient import ForwardGradient
from thalweg.blackbox.low_rank import LowRank
from thalweg.blackbox.mezo import MeZO, replay_
from thalweg.blackbox.nodes import NodePerturbation
from thalweg.blackbox.one_point import OnePoint
from thalweg.blackbox.ornstein_uhlenbeck import OrnsteinUhlenbeck
from thalweg.blackbox.pgpe import PGPE
from thalweg.blackbox.sparse import Sparse
from thalweg.blackbox.spsa import SPSA
from thalweg.blackbox.streamed import Streamed

__all__ = [
    "PGPE",
    "SPSA",
    "Blocks",
    "Budget",
    "BudgetSpent",
    "Coordinates",
    "Decorrelation",
    "Distributed",
    "EvolutionStrategies",
    "ForwardGradient",
    "LowRank",
    "MeZO",
    "NodePerturbation",
    "OnePoint",
    "OrnsteinUhlenbeck",
    "Sparse",
    "Streamed",
    "rank_key",
    "replay_",
]
