"""Conditional computation: a layer of experts, most of which a gate switches off on each example."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from thalweg.errors import (
    ArgumentError,
    ArgumentTypeError,
    NonFiniteError,
    UnsupportedError,
    require_choice,
    require_floating,
    require_integer,
    require_positive,
)
from thalweg.stochastic.neurons import BinaryNeuron
from thalweg.stochastic.noisy_rectifier import NoisyRectifier, fraction
from thalweg.stochastic.sparsity import AdaptiveL1Sparsity, KLSparsity

Backend = Literal["masked", "gather"]
Batches = Tensor | Iterable[Tensor | Sequence[Tensor]]
_MULTIPLIER, _SPARSE_ENTRIES = 4.0, 15


class ConditionalLinear(nn.Module):
    """Linear experts times gates that are zero on most examples, so that their experts need not run.

    For an input x: experts z = x W0 + b0; bottleneck t = tanh(x W1 + b1); gates h = gate(t W2 + b2); output
    h * z, for a layer of your own to read. Choose it for a wide layer of which each example needs a little:
    per example in_features * experts multiply-adds become in_features * experts * fraction, plus a gater of
    in_features * bottleneck + bottleneck * experts.

    A step of training is: forward; add `penalty()` to the loss; backward; the optimizer's step;
    `constrain_()`. With `BinaryNeuron(gradient=None)` the backward is that of `thalweg.backward` with losses
    per example. Before evaluation call `calibrate`: one threshold for all gates, chosen on held-out data, so
    that the target fraction is open; thresholds at probability 1/2 give another fraction altogether.

    It supports what its gate supports under `torch.utils.checkpoint`, autocast and `torch.compile` (for the
    backend "masked"); not `vmap`, because it notes the batch's fraction of open gates.

    Args:
        in_features: size of the input's last dimension.
        experts: N, how many experts, and the size of the output's last dimension.
        bottleneck: M, units of the gater's hidden layer.
        gate: `BinaryNeuron` (default, with `StraightThrough()`), `StochasticTimesSmooth`, `NoisyRectifier`,
            or any module with `forward(logits, threshold)` and `probability(logits)` like theirs.
        sparsity: `KLSparsity(target)`, `AdaptiveL1Sparsity(target)`, or None for no cost.
        max_norm: bound on the Euclidean norm of each unit's incoming weights in all three layers, above 0,
            applied by `constrain_`; None for no bound.
        backend: how evaluation computes; training is always "masked". "masked" runs all experts and
            multiplies by the gates; "gather" runs only the experts whose gate is open, example by example,
            in float32 or float64 and without gradients. On a CPU "gather" is faster where reading the
            weights is what takes time (few examples at a time); in large batches of small layers a dense
            product may still win, with ten times the operations.

    Shape:
        Input (..., in_features), output (..., experts).

    Attributes:
        threshold: on the gates' logits, set by `calibrate`; nan before. A buffer.
        active: fraction of gates open in the last forward, training or evaluation. A buffer, not saved.

    Raises:
        ArgumentTypeError, ArgumentError: a wrong argument.
        UnsupportedError: evaluation before `calibrate`; "gather" in training mode or where gradients would
            be lost.

    Paper:
        Bengio, Léonard, Courville: Estimating or Propagating Gradients Through Stochastic Neurons for
        Conditional Computation. arXiv 1308.3432, 2013, section 5 and appendix A.

    Example:
        >>> layer = ConditionalLinear(16, experts=50, bottleneck=8, sparsity=KLSparsity(target=0.1))
        >>> x = torch.randn(32, 16)
        >>> loss = layer(x).square().mean() + layer.penalty()
        >>> loss.backward(); layer.constrain_()
        >>> _ = layer.calibrate(x)
        >>> with torch.no_grad():
        ...     skipped = layer.eval()(x, backend="gather")
        >>> layer.active
        tensor(0.1000)
    """

    threshold: Tensor
    active: Tensor

    def __init__(
        self,
        in_features: int,
        experts: int,
        bottleneck: int,
        gate: nn.Module | None = None,
        *,
        sparsity: KLSparsity | AdaptiveL1Sparsity | None = None,
        max_norm: float | None = 2.0,
        backend: Backend = "masked",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("in_features", in_features), ("experts", experts), ("bottleneck", bottleneck)):
            require_integer(name, size, 1)
        gate = BinaryNeuron() if gate is None else gate
        if not isinstance(gate, nn.Module) or not callable(getattr(gate, "probability", None)):
            expected = "BinaryNeuron(), StochasticTimesSmooth(), NoisyRectifier() or a module like them"
            raise ArgumentTypeError("gate", gate, expected)
        if sparsity is not None and not isinstance(sparsity, KLSparsity | AdaptiveL1Sparsity):
            raise ArgumentTypeError("sparsity", sparsity, "KLSparsity(), AdaptiveL1Sparsity() or None")
        if max_norm is not None:
            require_positive("max_norm", max_norm)
        require_choice("backend", backend, ("masked", "gather"))
        self.experts = nn.Linear(in_features, experts, device=device, dtype=dtype)
        self.bottleneck = nn.Linear(in_features, bottleneck, device=device, dtype=dtype)
        self.gater = nn.Linear(bottleneck, experts, device=device, dtype=dtype)
        self.gate = gate.to(device=device)
        self.sparsity = None if sparsity is None else sparsity.to(device=device)
        self.max_norm = max_norm
        self.backend: Backend = backend
        self.register_buffer("threshold", torch.full((), torch.nan, device=device, dtype=dtype))
        self.register_buffer("active", torch.full((), torch.nan, device=device), persistent=False)
        self._penalty: Tensor | None = None
        # kept as a flag, because to look at the threshold's value would make the device wait
        self._calibrated = False
        self.register_load_state_dict_post_hook(_note_calibration)  # type: ignore[no-untyped-call]
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights as the paper does: Glorot-uniform, the gater's four times as large; biases zero.

        Before a `NoisyRectifier` each gate is fed by 15 units of the bottleneck, with normal weights.
        """
        nn.init.xavier_uniform_(self.experts.weight)
        nn.init.xavier_uniform_(self.bottleneck.weight)
        if isinstance(self.gate, NoisyRectifier):
            weight = self.gater.weight
            chosen = torch.rand_like(weight).argsort(1)[:, :_SPARSE_ENTRIES]
            weight.zero_().scatter_(1, chosen, torch.randn_like(weight)[:, :_SPARSE_ENTRIES])
        else:
            nn.init.xavier_uniform_(self.gater.weight, gain=_MULTIPLIER)
        for layer in (self.experts, self.bottleneck, self.gater):
            layer.bias.zero_()

    def forward(self, x: Tensor, *, backend: Backend | None = None) -> Tensor:
        """Gate the experts; `backend` replaces the layer's own, and "gather" is refused in training mode."""
        self._require_input("x", x)
        if backend is not None:
            require_choice("backend", backend, ("masked", "gather"))
        if self.training:
            if backend == "gather":
                raise UnsupportedError("gather in training mode: call .eval(), or use backend='masked'")
            return self._train(x)
        if not self._calibrated:
            raise UnsupportedError(
                "evaluation before calibrate: call layer.calibrate(held_out_inputs), which chooses the "
                "threshold that keeps the target fraction of gates open"
            )
        gather = (backend or self.backend) == "gather"
        if gather:
            self._require_gather(x)
        gates: Tensor = self.gate(self.logits(x), self.threshold)
        self._note(gates)
        return _gathered(x, self.experts, gates) if gather else _masked(x, self.experts, gates)

    def _train(self, x: Tensor) -> Tensor:
        logits = self.logits(x)
        gates: Tensor = self.gate(logits)
        self._note(gates)
        self._penalty = None if self.sparsity is None else self.sparsity(self.gate, logits, gates)
        return _masked(x, self.experts, gates)

    def logits(self, x: Tensor) -> Tensor:
        """The gates' logits, shape (..., experts)."""
        scores: Tensor = self.gater(torch.tanh(self.bottleneck(x)))
        return scores

    def penalty(self) -> Tensor:
        """The sparsity cost of the last forward in training mode, a scalar with a graph: add it to the loss.

        Raises:
            UnsupportedError: the layer has no sparsity cost, or has not run in training mode.
        """
        if self._penalty is None:
            why = "has no sparsity cost" if self.sparsity is None else "has not run in training mode"
            raise UnsupportedError(f"penalty: the layer {why}")
        return self._penalty

    @torch.no_grad()
    def constrain_(self) -> None:
        """Call it after each step: bound the incoming weights of each unit; let the sparsity cost adapt."""
        if self.max_norm is not None:
            for layer in (self.experts, self.bottleneck, self.gater):
                norms = torch.linalg.vector_norm(layer.weight, dim=1, keepdim=True)
                layer.weight.mul_((self.max_norm / norms.clamp(min=1e-12)).clamp(max=1.0))
        if self.sparsity is not None and self._penalty is not None:
            self.sparsity.update_(self.active)

    @torch.no_grad()
    def calibrate(self, inputs: Batches, target: float | None = None) -> Tensor:
        """Set the one threshold above which the target fraction of all gates on held-out data lies.

        For a `NoisyRectifier`, which in evaluation runs without its noise, this is a shift of its bias.
        Calibrate again after more training: the threshold belongs to the weights.

        Args:
            inputs: what reaches this layer: a tensor (..., in_features), or an iterable of such tensors or of
                tuples that begin with one (a loader).
            target: fraction of open gates, between 0 and 1; None takes that of `sparsity`.

        Returns:
            The threshold on the logits, a scalar.

        Raises:
            ArgumentTypeError, ArgumentError: no target, no inputs, or inputs of a wrong shape.
            NonFiniteError: a logit is nan, so that there is no order.
        """
        if target is None and self.sparsity is None:
            raise ArgumentError("target", target, "a fraction, because the layer has no sparsity cost")
        share = self.sparsity.target if target is None and self.sparsity is not None else target
        share = fraction("target", share)
        batches = [inputs] if isinstance(inputs, Tensor) else inputs
        if not isinstance(batches, Iterable):
            raise ArgumentTypeError("inputs", inputs, "a tensor or an iterable of tensors")
        found = []
        for batch in batches:
            x: Any = batch[0] if isinstance(batch, list | tuple) and batch else batch
            self._require_input("inputs", x)
            found.append(self.logits(x.to(self.threshold.device)).flatten())
        values = torch.cat(found) if found else torch.empty(0)
        if not len(values):
            raise ArgumentError("inputs", inputs, "at least one example")
        if bool(values.isnan().any()):
            raise NonFiniteError("calibrate: logits of the gates are nan")
        closed = min(max(len(values) - round(share * len(values)), 1), len(values))
        self.threshold.copy_(values.kthvalue(closed).values)
        self._calibrated = True
        return self.threshold.clone()

    def _note(self, gates: Tensor) -> None:
        with torch.no_grad():
            # of an empty batch nan, as a mean is
            self.active.copy_(torch.count_nonzero(gates) / torch.tensor(gates.numel()))

    def _require_input(self, name: str, x: object) -> None:
        features = self.experts.in_features
        if require_floating(name, x).ndim < 1 or require_floating(name, x).shape[-1] != features:
            raise ArgumentError(name, x, f"shape (..., {features})")

    def _require_gather(self, x: Tensor) -> None:
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters())):
            raise UnsupportedError(
                "gather where gradients would be lost: call it under torch.no_grad(), or use backend='masked'"
            )
        if x.dtype not in (torch.float32, torch.float64):
            mend = "Use backend='masked' for other dtypes."
            raise ArgumentError("x", x, "float32 or float64 for backend='gather'", mend)

    def __getstate__(self) -> dict[str, Any]:
        # a tensor with a graph can be neither copied nor pickled
        return {**self.__dict__, "_penalty": None}

    def extra_repr(self) -> str:
        """The fields, for printing."""
        return f"max_norm={self.max_norm}, backend={self.backend!r}"


def _note_calibration(layer: ConditionalLinear, _keys: object) -> None:
    layer._calibrated = not bool(layer.threshold.isnan())


def _masked(x: Tensor, experts: nn.Linear, gates: Tensor) -> Tensor:
    values: Tensor = experts(x)
    return gates * values


@cache
def _hear_the_warning() -> None:
    """Take torch's one remark, that CSR tensors are in beta, where no user has to read it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.zeros(1, 1).to_sparse_csr()


def _gathered(x: Tensor, experts: nn.Linear, gates: Tensor) -> Tensor:
    """gates * experts(x), of which only the entries with an open gate are computed."""
    _hear_the_warning()
    rows, width = x.reshape(-1, x.shape[-1]), gates.shape[-1]
    flat = gates.reshape(-1)
    opened = flat.nonzero().squeeze(1)
    columns = opened % width
    # a sampled product: one dot product of a row of x with a row of weights for each open gate
    ends = torch.arange(0, (len(rows) + 1) * width, width, device=x.device)
    pattern = torch.sparse_csr_tensor(
        torch.searchsorted(opened, ends),
        columns,
        torch.zeros(len(columns), dtype=x.dtype, device=x.device),
        (len(rows), width),
        check_invariants=False,
    )
    products = torch.sparse.sampled_addmm(pattern, rows, experts.weight.t(), beta=0.0).values()
    out = torch.zeros_like(flat)
    out[opened] = (products + experts.bias[columns]) * flat[opened]
    return out.reshape(gates.shape)
