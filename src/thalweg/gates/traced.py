"""Make `clip` one node of a compiled graph; imported only while compiling, as torch's compiler loads slowly.

Dynamo rejects a custom Function with a `jvp` and, inside `torch.func.grad`, ignores its backward. As a node
of its graph, the Function is traced one level down, where autograd and functorch are both at work.
"""

import torch

from thalweg.gates.clip_function import gated

torch.compiler.allow_in_graph(gated)
