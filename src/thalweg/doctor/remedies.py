"""Which piece mends which sign, and what it costs: one place, so that the names can be checked by a test."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Remedy:
    """What to do, in one line of use, and what it costs."""

    use: str
    cost: str


REMEDIES: dict[str, Remedy] = {
    "V1": Remedy(
        "initialise for the activation (nn.init.kaiming_normal_ before ReLU, xavier_normal_ before tanh), "
        "normalise (nn.LayerNorm before each block) or add residual connections",
        "nothing at initialisation; a normalisation is one pass over each activation",
    ),
    "V2": Remedy(
        "thalweg.gates.clip(h, 1.0) on the tensor between blocks, or a smaller gain at initialisation",
        "nothing; a clipped gradient is biased",
    ),
    "V3": Remedy(
        "scale the loss (torch.amp.GradScaler) or use torch.bfloat16",
        "nothing; bfloat16 keeps 8 bits of precision instead of 11",
    ),
    "V3 updates": Remedy(
        "keep the weights in float32 and compute in bfloat16 (torch.autocast)",
        "twice the bytes of the weights",
    ),
    "V4 forward": Remedy(
        "move the argument away from the edge of its domain (log(x.clamp_min(eps)), torch.special.xlogy, "
        "log_softmax in place of log of softmax)",
        "nothing",
    ),
    "V4 backward": Remedy(
        "choose a safe argument before the operation, not after: f(torch.where(ok, x, 1.0)) under the "
        "outer torch.where, or add eps under the root",
        "nothing",
    ),
    "V4 data": Remedy("clean the batch or the weights first: they already hold nan or infinity", "nothing"),
    "T1": Remedy(
        "weight the term by hand (try 10 and 100), or thalweg.gates.scale on what the large term alone uses",
        "nothing; the weight is one more number to choose",
    ),
    "T1 silent": Remedy("check that the term uses the model's output and is not constant", "nothing"),
    "T2": Remedy(
        "keep one term out of the shared part: thalweg.gates.stop(features) before its head",
        "nothing; the shared part no longer learns from that term",
    ),
    "D1": Remedy("remove the cut if it is a slip", "nothing"),
    "D1 integer": Remedy(
        "thalweg.gates.straight_through(logits, hard) for a hard choice, thalweg.BinaryNeuron for a "
        "random one",
        "nothing; biased",
    ),
    "D1 sample": Remedy(
        "use rsample where the distribution has it; thalweg.BinaryNeuron or thalweg.ScoreFunction otherwise",
        "nothing; a score estimator is unbiased and noisy",
    ),
    "D1 grad": Remedy("pass create_graph=True to torch.autograd.grad", "one more graph in memory"),
    "D1 flat": Remedy(
        "thalweg.gates.straight_through(x, hard) around the operation, or thalweg.SPSA(samples=4) for "
        "the whole step",
        "nothing, biased; or 2 forwards per sample, noisy",
    ),
    "D1 weight": Remedy(
        "check the operation's backward; thalweg.SPSA(samples=4) needs none",
        "2 forwards per sample, noisy",
    ),
    "D2": Remedy(
        "thalweg.backward(closure, parameters, gradient=thalweg.SPSA(samples=4)), or write the operation "
        "in torch",
        "2 forwards per sample, inference memory, noisy",
    ),
    "L2": Remedy(
        "initialise these units again, or a smoother activation (nn.LeakyReLU, nn.GELU)",
        "what was learned there",
    ),
    "M2": Remedy(
        "run the frozen part under torch.no_grad(), or requires_grad_(False) on its parameters",
        "nothing",
    ),
    "H1": Remedy(
        "optimizer.add_param_group({'params': [...]}), or requires_grad_(False) if meant", "nothing"
    ),
    "H2": Remedy(
        "build the optimizer after the model is final, from model.parameters()", "its state starts anew"
    ),
    "H3": Remedy("remove the module, use its output, or requires_grad_(False)", "nothing"),
    "H4": Remedy("follow the message: it is autograd's own", "nothing"),
}


def remedy(key: str) -> Remedy:
    """The remedy of a sign, by its code and, where one code has several causes, the cause."""
    return REMEDIES[key]
