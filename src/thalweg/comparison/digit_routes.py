"""The routes by which digits are learned: of a smooth network, through hard units, block by block."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from thalweg.blackbox import PGPE, SPSA, EvolutionStrategies, ForwardGradient, NodePerturbation
from thalweg.comparison.classifiers import HardClassifier, SmoothClassifier
from thalweg.comparison.learners import (
    AlignedClassifier,
    BlocksClassifier,
    DenoisingClassifier,
    EnergyClassifier,
    SettlingClassifier,
)
from thalweg.comparison.training import NoiseOfEqualNorm, Route
from thalweg.local import DirectFeedbackAlignment, FeedbackAlignment, SignSymmetry
from thalweg.local.alignment import Feedback
from thalweg.step import Backprop
from thalweg.stochastic import REBAR, Concrete, DisARM, MinimumVariance, ScoreFunction, StraightThrough


def all_routes() -> tuple[Route, ...]:
    """Every route, each beside the exact gradient of its own network."""
    return _smooth_routes() + _hard_routes() + _learner_routes()


def _smooth_routes() -> tuple[Route, ...]:
    """The routes of the smooth network; backprop is its exact gradient."""
    smooth: dict[str, Any] = {"network": "smooth", "reference": "backprop", "build": SmoothClassifier}
    values = smooth | {"needs": "values"}
    # one probe for each example: losses of single examples tell them apart
    nodes = smooth | {"needs": "losses per example"}

    def last_layer(inputs: int, classes: int) -> SmoothClassifier:
        return SmoothClassifier(inputs, classes, trained="last")

    return (
        Route("backprop", needs="backward", rule=Backprop(), unbiased=True, **smooth),
        Route("forward-gradient", needs="forward AD", rule=ForwardGradient(), unbiased=True, **smooth),
        Route("spsa", rule=SPSA(), unbiased=True, **values),
        Route("spsa-gaussian", rule=SPSA(directions="gaussian"), unbiased=True, **values),
        Route("evolution-strategies", rule=EvolutionStrategies(samples=4), unbiased=True, **values),
        # ranks make it blind to how the loss is scaled, and biased
        Route("pgpe", rule=PGPE(samples=2), **values),
        Route("node-perturbation", rule=NodePerturbation(), unbiased=True, **nodes),
        Route("activity-perturbation", rule=NodePerturbation(mode="activity"), **nodes),
        Route(
            "last-layer-only",
            needs="backward",
            rule=Backprop(),
            control=True,
            **smooth | {"build": last_layer},
        ),
        Route("noise", needs="-", rule=NoiseOfEqualNorm(), control=True, **smooth),
    )


def _hard_routes() -> tuple[Route, ...]:
    """The routes through hard units; the expectation over all their codes is the exact gradient."""

    def units(gradient: StraightThrough | Concrete | str | None) -> Callable[[int, int], HardClassifier]:
        return lambda inputs, classes: HardClassifier(inputs, classes, gradient)

    hard: dict[str, Any] = {"network": "hard units", "reference": "expected-loss"}
    through: dict[str, Any] = hard | {"needs": "backward", "rule": Backprop()}
    losses: dict[str, Any] = hard | {"needs": "losses per example", "build": units(None), "unbiased": True}
    return (
        Route("expected-loss", build=units("expected"), unbiased=True, **through | {"needs": "all codes"}),
        Route("straight-through", build=units(StraightThrough()), **through),
        Route("straight-through-sigmoid", build=units(StraightThrough(slope="sigmoid")), **through),
        Route("straight-through-gumbel", build=units(Concrete(temperature=0.5, hard=True)), **through),
        Route("score-function", rule=ScoreFunction(baseline="none"), **losses),
        Route("score-function-mean", rule=ScoreFunction(baseline="mean"), **losses),
        Route("score-function-minimum-variance", rule=ScoreFunction(baseline=MinimumVariance()), **losses),
        Route(
            "score-function-leave-one-out",
            rule=ScoreFunction(baseline="leave_one_out", samples=2),
            **losses,
        ),
        Route("disarm", rule=DisARM(), **losses),
        Route("rebar", rule=REBAR(), **losses | {"needs": "relaxed losses"}),
        Route("decoder-only", build=units("cut"), control=True, **through),
        Route("noise-hard", build=units("expected"), control=True, **through | {"rule": NoiseOfEqualNorm()}),
    )


def _learner_routes() -> tuple[Route, ...]:
    """The learners, each after the twin that sends a gradient through the same parameters."""
    local: dict[str, Any] = {"needs": "losses of blocks", "rule": Backprop(), "learner": True}
    exact: dict[str, Any] = {"needs": "backward", "rule": Backprop(), "unbiased": True}
    smooth = local | {"network": "smooth", "reference": "backprop"}
    blocks: dict[str, Any] = {"network": "blocks", "reference": "blocks-backprop"}
    energy: dict[str, Any] = {"network": "energy", "reference": "backprop-through-time"}
    denoising: dict[str, Any] = {"network": "denoising", "reference": "denoising-backprop"}

    def aligned(feedback: Feedback) -> Callable[[int, int], AlignedClassifier]:
        return lambda inputs, classes: AlignedClassifier(inputs, classes, feedback)

    return (
        Route(
            "feedback-alignment", build=aligned(FeedbackAlignment()), **smooth | {"needs": "fixed feedback"}
        ),
        Route(
            "direct-feedback",
            build=aligned(DirectFeedbackAlignment()),
            **smooth | {"needs": "fixed feedback"},
        ),
        Route("sign-symmetry", build=aligned(SignSymmetry()), **smooth | {"needs": "signs of weights"}),
        Route("predictive-coding", build=SettlingClassifier, **smooth | {"needs": "neighbours' errors"}),
        Route("blocks-backprop", build=BlocksClassifier, **blocks | exact),
        Route("blocks-local", build=partial(BlocksClassifier, learns="local"), **blocks | local),
        Route(
            "forward-forward",
            build=partial(BlocksClassifier, learns="forward-forward"),
            other_objective=True,
            **blocks | local,
        ),
        Route(
            "readouts-only",
            needs="backward",
            rule=Backprop(),
            build=partial(BlocksClassifier, learns="readouts"),
            control=True,
            **blocks,
        ),
        Route("backprop-through-time", build=EnergyClassifier, **energy | exact),
        Route(
            "equilibrium-propagation",
            build=partial(EnergyClassifier, learns="equilibrium"),
            **energy | local | {"needs": "relaxations"},
        ),
        Route(
            "coupled-learning",
            build=partial(EnergyClassifier, learns="coupled"),
            **energy | local | {"needs": "relaxations"},
        ),
        Route("denoising-backprop", build=DenoisingClassifier, other_objective=True, **denoising | exact),
        Route(
            "noprop",
            build=partial(DenoisingClassifier, learns="noprop"),
            other_objective=True,
            **denoising | local,
        ),
    )
