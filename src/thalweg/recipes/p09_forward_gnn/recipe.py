"""Graph networks without a backward pass through them: nodes, links, what it costs, and what it is worth.

Four panels: nodes classified by every way of forward learning, beside backpropagation, the features alone
and controls; links; memory against depth; and identities that must hold to the last digit. Settings are the
paper's, or were chosen on validation nodes. Every seed has a split of its own. The citation graphs come from
files in THALWEG_DATA (see `thalweg.data.citations`); without them the recipe takes the graph of
scikit-learn's digits, which decides no claim.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from thalweg.data import citations, digits_graph
from thalweg.data.graph import Graph
from thalweg.errors import ArgumentError, require_choice, require_integer, require_positive
from thalweg.lab import Claim, Lab
from thalweg.recipes.p09_forward_gnn import figures, tables, verdicts
from thalweg.recipes.p09_forward_gnn.exact import identities
from thalweg.recipes.p09_forward_gnn.links_panel import LINK_ROUTES, train_links
from thalweg.recipes.p09_forward_gnn.memory_panel import kept_bytes
from thalweg.recipes.p09_forward_gnn.routes import CONTROLS, MAIN, VARIANTS, Budget, Route, train_nodes

GRAPHS = ("cora", "citeseer", "pubmed", "digits")
CONVS = ("gcn", "sage", "gat")


@dataclass(frozen=True, slots=True)
class Config:
    """The fields of the recipe.

    Args:
        graphs: names of the graphs whose nodes are classified, or "auto": Cora and CiteSeer where
            THALWEG_DATA is set, and else the graph of digits. Links, variants and memory take the first.
        convs: "gcn", "sage", "gat" (PyTorch Geometric's).
        layers: numbers of layers.
        hidden: width of a layer.
        rate: of Adam.
        steps: of a layer at most.
        patience: judgements without a better one that end a training.
        link_steps: of a layer at most, on links; 0 leaves them out.
        link_seeds: on how many of the run's seeds links are predicted.
        variants: whether forward-forward and word from above are trained too.
        depths: of the memory panel.
    """

    graphs: tuple[str, ...] = ("auto",)
    convs: tuple[str, ...] = ("gcn",)
    layers: tuple[int, ...] = (2,)
    hidden: int = 64
    rate: float = 1e-2
    steps: int = 200
    patience: int = 25
    link_steps: int = 100
    link_seeds: int = 2
    variants: bool = True
    depths: tuple[int, ...] = (2, 4, 8, 16)

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {"graphs": ("digits",), "hidden": 16, "steps": 6, "link_steps": 4, "depths": (2, 4)},
        "small": {},
        "gpu": {
            "graphs": ("pubmed",),
            "convs": CONVS,
            "layers": (1, 2, 3, 4),
            "hidden": 128,
            "rate": 1e-3,
            "steps": 1000,
            "patience": 100,
        },
    }

    def __post_init__(self) -> None:
        for name in ("graphs", "convs", "layers", "depths"):
            if not getattr(self, name):
                raise ArgumentError(name, getattr(self, name), "at least one")
        for graph in self.graphs:
            require_choice("graphs", graph, (*GRAPHS, "auto"))
        for conv in self.convs:
            require_choice("convs", conv, CONVS)
        for each in (*self.layers, *self.depths):
            require_integer("layers", each, 1)
        for name in ("hidden", "steps", "patience", "link_seeds"):
            require_integer(name, getattr(self, name), 1)
        require_integer("link_steps", self.link_steps, 0)
        require_positive("rate", self.rate)


def run(config: Config, lab: Lab) -> list[Claim]:
    """The panels, one after the other: identities, nodes, links, memory."""
    graphs = [_load(name) for name in _names(config)]
    exact = [lab.cell("identities", partial(identities, seed), seed=seed) for seed in lab.seeds]
    claims = verdicts.identity_claims(exact)
    claims += _nodes(config, lab, graphs)
    if config.link_steps:
        claims += _links(config, lab, graphs[0])
    return claims + _memory(config, lab, graphs[0])


def _names(config: Config) -> list[str]:
    known = ["cora", "citeseer"] if os.environ.get("THALWEG_DATA") else ["digits"]
    return [name for each in config.graphs for name in (known if each == "auto" else [each])]


def _load(name: str) -> Graph:
    return digits_graph() if name == "digits" else citations(name)


def _decisive(lab: Lab, graph: Graph) -> bool:
    """A run of seconds, or one on a graph that is not the paper's, decides nothing that is not exact."""
    return lab.preset != "smoke" and not graph.name.startswith("digits")


def _budget(config: Config, steps: int, conv: str = "gcn", layers: int = 2) -> Budget:
    return Budget(config.hidden, config.rate, steps, config.patience, conv, layers)


def _nodes(config: Config, lab: Lab, graphs: list[Graph]) -> list[Claim]:
    claims, drawn = [], {}
    for graph in graphs:
        for conv in config.convs:
            for layers in config.layers:
                plain = len(config.convs) * len(config.layers) == 1
                title = graph.name if plain else f"{graph.name}, {conv}, {layers} layers"
                routes: tuple[Route, ...] = (*MAIN, *CONTROLS)
                varied = config.variants and graph is graphs[0] and plain
                budget = _budget(config, config.steps, conv, layers)
                routes += VARIANTS if varied else ()
                results = {
                    route.name: [
                        lab.cell(
                            f"{title}: {route.name}",
                            partial(train_nodes, route, graph, budget, seed, lab.device),
                            seed=seed,
                        )
                        for seed in lab.seeds
                    ]
                    for route in routes
                }
                tables.nodes(lab, title, results)
                drawn[title] = results
                decisive = _decisive(lab, graph)
                claims += verdicts.node_claims(title, results, decisive=decisive)
                if varied:
                    shown = {r.name: results[r.name] for r in (*MAIN, *VARIANTS)}
                    claims += verdicts.variant_claims(title, shown, decisive=decisive)
    lab.figure("nodes", figures.nodes(drawn), NODES_CAPTION)
    return claims


def _links(config: Config, lab: Lab, graph: Graph) -> list[Claim]:
    budget = _budget(config, config.link_steps)
    results = {
        route.name: [
            lab.cell(
                f"links: {route.name}",
                partial(train_links, route, graph, budget, seed, lab.device),
                seed=seed,
            )
            for seed in lab.seeds[: config.link_seeds]
        ]
        for route in LINK_ROUTES
    }
    tables.links(lab, graph.name, results)
    lab.figure("links", figures.links(results, graph.name), LINKS_CAPTION)
    return verdicts.link_claims(graph.name, results, decisive=_decisive(lab, graph))


def _memory(config: Config, lab: Lab, graph: Graph) -> list[Claim]:
    seed = lab.seeds[0]
    kept = lab.cell(
        "memory", partial(kept_bytes, graph, config.depths, config.hidden, seed, lab.device), seed=seed
    )
    tables.memory(lab, graph.name, config.depths, kept)
    lab.figure("memory", figures.memory(config.depths, kept), MEMORY_CAPTION)
    return verdicts.memory_claims(graph.name, config.depths, kept, decisive=_decisive(lab, graph))


NODES_CAPTION = (
    "Test accuracy of every way of training, one dot for each seed and its split. Diamond: the first layer "
    "alone, mean over seeds."
)
LINKS_CAPTION = (
    "Links told from absent pairs. Diamond: the first layer alone. Plain backprop does not normalise its "
    "inputs as forward learning does; with inputs of unit length most of the difference is gone."
)
MEMORY_CAPTION = (
    "Bytes kept at once for backward in a first step, aggregates and the copy of the features that has the "
    "virtual nodes included. Accumulating the gradient over eight groups of nodes helps backprop "
    "only while a group's neighbourhood is smaller than the graph."
)
