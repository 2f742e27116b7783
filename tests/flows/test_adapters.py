"""Models of diffusers and denoisers of k-diffusion as fields, and fields as such models."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from thalweg.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from thalweg.flows import (
    DDIM,
    Cosine,
    DPMSolverPP2M,
    Euler,
    Straight,
    VariancePreserving,
    from_denoiser,
    from_diffusers,
    sample,
    to_denoiser,
    to_diffusers,
)
from thalweg.noise import Key
from thalweg.problems import GaussianMixture
from thalweg.rollouts import Checkpointed

diffusers = pytest.importorskip("diffusers")
MIXTURE = GaussianMixture.drawn(3, 2, seed=1)
STEPS = 10


class Model(nn.Module):
    """Calls like a UNet: a timestep per example, an object with `.sample` back."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x, timestep, shift=0.0):
        wave = torch.sin(timestep.expand(len(x)) / 300)[:, None].to(x)
        return SimpleNamespace(sample=torch.tanh(self.inner(x)) + wave + shift)


def loop(scheduler, model, x, **options):
    scheduler.set_timesteps(STEPS)
    for t in scheduler.timesteps:
        inputs = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = model(inputs, t)
        output = output if isinstance(output, torch.Tensor) else output.sample
        x = scheduler.step(output, t, x, return_dict=False, **options)[0]
    return x


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_model_of_diffusers_samples_as_its_scheduler_does(kind):
    scheduler = diffusers.DDIMScheduler(clip_sample=False, prediction_type=kind)
    model = Model()
    field = from_diffusers(scheduler, model)
    x = torch.randn(4, 2)
    with torch.no_grad():
        expected = loop(scheduler, model, x)
        times = torch.cat([(scheduler.timesteps + 1) / 1000, torch.zeros(1)])
        found = sample(field, x, times, solver=DDIM())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_flow_model_of_diffusers_samples_as_its_scheduler_does():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    model = Model()
    field = from_diffusers(scheduler, model)
    assert field.path == Straight()
    x = torch.randn(4, 2)
    with torch.no_grad():
        expected = loop(scheduler, model, x)
        found = sample(field, x, scheduler.sigmas, solver=Euler())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_parameters_of_the_model_get_their_gradients():
    model = Model()
    field = from_diffusers(diffusers.DDIMScheduler(), model)
    assert {id(p) for p in field.network.parameters()} == {id(p) for p in model.parameters()}
    x = sample(
        field, torch.randn(3, 2), [0.9, 0.5, 0.1], gradient=Checkpointed(slots=1), conditions={"shift": 0.1}
    )
    x.sum().backward()
    assert model.inner.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_schedulers_sample_the_exact_field(name):
    """The oracle, handed to diffusers: many steps end on the mixture, with the right share per component."""
    options = {"clip_sample": False} if name == "DDIMScheduler" else {}
    scheduler = getattr(diffusers, name)(**options)
    model = to_diffusers(MIXTURE.field(Cosine(), "v"), scheduler)
    scheduler.set_timesteps(100)
    x = torch.randn(2000, 2, dtype=torch.float64) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = model(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(output, t, x, return_dict=False)[0].double()
    labels = MIXTURE.label_log_probabilities(x, 0.0, Straight()).argmax(1)
    exact = MIXTURE.sample(200_000, Key(0))[0]
    wanted = MIXTURE.label_log_probabilities(exact, 0.0, Straight()).argmax(1)
    shares, expected = (torch.bincount(v, minlength=3).double() / len(v) for v in (labels, wanted))
    assert ((shares - expected).abs() < 5 * (expected / len(x)).sqrt() + 0.02).all()


def test_to_diffusers_and_back_is_the_field():
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction")
    field = MIXTURE.field(VariancePreserving(), "noise")
    back = from_diffusers(scheduler, to_diffusers(field, scheduler))
    x, t = torch.randn(8, 2, dtype=torch.float64), torch.linspace(0.05, 0.95, 8, dtype=torch.float64)
    torch.testing.assert_close(back(x, t), MIXTURE.predict("v", x, t, back.path), rtol=1e-7, atol=1e-8)


def test_denoisers_go_both_ways():
    sigma = torch.linspace(0.01, 50, 12, dtype=torch.float64)
    x = torch.randn(12, 2, dtype=torch.float64) * sigma[:, None]
    exact = from_denoiser(to_denoiser(MIXTURE.field(Cosine(), "v")), sigma_max=50.0)
    torch.testing.assert_close(
        exact(x, sigma / 50), MIXTURE.predict("data", x, sigma / 50, exact.path), rtol=1e-8, atol=1e-8
    )
    one = to_denoiser(MIXTURE.field(Straight()))(x, torch.tensor(2.0))
    assert one.shape == x.shape
    net = Model()
    assert isinstance(to_denoiser(from_diffusers(diffusers.DDIMScheduler(), net)), nn.Module)


def test_a_denoiser_samples():
    field = from_denoiser(lambda x, sigma: x / (1 + sigma[:, None] ** 2))
    assert sample(field, 80 * torch.randn(3, 2), [1.0, 0.1, 0.001], solver=DPMSolverPP2M()).abs().max() < 10


def test_what_cannot_be_adapted_is_refused():
    with pytest.raises(ArgumentTypeError, match="scheduler"):
        from_diffusers(object(), lambda x, t: x)
    with pytest.raises(ArgumentTypeError, match="model"):
        from_diffusers(diffusers.DDIMScheduler(), None)
    with pytest.raises(ArgumentError, match="rescale_betas_zero_snr"):
        from_diffusers(diffusers.DDIMScheduler(rescale_betas_zero_snr=True), lambda x, t: x)
    odd = SimpleNamespace(config={"prediction_type": "epsilon"}, set_timesteps=print)
    with pytest.raises(UnsupportedError, match="prediction_type"):
        from_diffusers(odd, lambda x, t: x)
    for adapt in (to_denoiser, lambda f: to_diffusers(f, diffusers.DDIMScheduler())):
        with pytest.raises(ArgumentTypeError, match="field"):
            adapt(lambda x, t: x)
