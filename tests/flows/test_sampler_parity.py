"""Coefficients of the samplers against diffusers, by running it, and against k-diffusion, by its formulas.

k-diffusion cannot be installed beside this torch. The formulas are those of crowsonkb/k-diffusion (MIT),
k_diffusion/sampling.py at v0.1.1, in its coordinates: alpha = 1, a denoiser D(x, sigma), sigmas falling to 0.
"""

import math

import pytest
import torch

from thalweg.flows import (
    DDIM,
    EDM,
    AdamsBashforth,
    DPMSolverPP2M,
    Euler,
    Field,
    Heun,
    Straight,
    VarianceExploding,
    VariancePreserving,
    sample,
    time_grid,
)
from thalweg.noise import Key, normal

STEPS = 8
TOP = 80.0
KEY = Key(7)
PATH = VarianceExploding(TOP)


def noise_at(x, k):
    return normal(x, KEY.at(step=k, call=0))


def denoiser(x, sigma):
    """Any smooth function will do: coefficients are compared, not samples."""
    return torch.tanh(x / (1 + sigma**2) ** 0.5) + 0.1 * torch.cos(x)


def exploding_field(top=TOP):
    return Field(
        lambda x, sigma: denoiser(x, sigma[:, None]), VarianceExploding(top), "data", clock=lambda t: top * t
    )


def k_sigmas():
    """get_sigmas_karras(n, sigma_min, sigma_max, rho=7), with append_zero."""
    ramp = torch.linspace(0, 1, STEPS, dtype=torch.float64)
    low, high = 0.02 ** (1 / 7), TOP ** (1 / 7)
    return torch.cat([(high + ramp * (low - high)) ** 7, torch.zeros(1, dtype=torch.float64)])


def k_euler(x, sigmas):
    for i in range(STEPS):
        d = (x - denoiser(x, sigmas[i])) / sigmas[i]
        x = x + d * (sigmas[i + 1] - sigmas[i])
    return x


def k_euler_ancestral(x, sigmas):
    for i in range(STEPS):
        old, new = sigmas[i], sigmas[i + 1]
        up = min(new, (new**2 * (old**2 - new**2) / old**2) ** 0.5)
        down = (new**2 - up**2) ** 0.5
        d = (x - denoiser(x, old)) / old
        drawn = noise_at(x, i)
        x = x + d * (down - old)
        if new > 0:
            x = x + drawn * up
    return x


def k_heun(x, sigmas, churn=0.0, least=0.0, most=math.inf, inflation=1.0):
    for i in range(STEPS):
        inside = least <= sigmas[i] <= most
        gamma = min(churn / (len(sigmas) - 1), 2**0.5 - 1) if inside else 0.0
        hat = sigmas[i] * (gamma + 1)
        if gamma > 0:
            x = x + noise_at(x, i) * inflation * (hat**2 - sigmas[i] ** 2) ** 0.5
        d = (x - denoiser(x, hat)) / hat
        dt = sigmas[i + 1] - hat
        if sigmas[i + 1] == 0:
            x = x + d * dt
        else:
            x_2 = x + d * dt
            d_2 = (x_2 - denoiser(x_2, sigmas[i + 1])) / sigmas[i + 1]
            x = x + (d + d_2) / 2 * dt
    return x


def k_lms(x, sigmas, order=4):
    from scipy import integrate

    levels, history = sigmas.tolist(), []
    for i in range(STEPS):
        history.append((x - denoiser(x, sigmas[i])) / sigmas[i])
        history = history[-order:]
        used = min(i + 1, order)

        def coefficient(j, i=i, used=used):
            def basis(tau):
                product = 1.0
                for k in range(used):
                    if k != j:
                        product *= (tau - levels[i - k]) / (levels[i - j] - levels[i - k])
                return product

            return integrate.quad(basis, levels[i], levels[i + 1], epsrel=1e-10)[0]

        x = x + sum(coefficient(j) * d for j, d in zip(range(used), reversed(history)))
    return x


def k_dpmpp_2m(x, sigmas):
    old = None
    for i in range(STEPS):
        denoised = denoiser(x, sigmas[i])
        t, t_next = -sigmas[i].log(), -sigmas[i + 1].log()
        h = t_next - t
        if old is None or sigmas[i + 1] == 0:
            x = (sigmas[i + 1] / sigmas[i]) * x - (-h).expm1() * denoised
        else:
            r = (t + sigmas[i - 1].log()) / h
            denoised_d = (1 + 1 / (2 * r)) * denoised - (1 / (2 * r)) * old
            x = (sigmas[i + 1] / sigmas[i]) * x - (-h).expm1() * denoised_d
        old = denoised
    return x


def k_dpmpp_2m_sde(x, sigmas, eta=1.0):
    old, h_last = None, None
    for i in range(STEPS):
        denoised = denoiser(x, sigmas[i])
        if sigmas[i + 1] == 0:
            x = denoised
        else:
            h = sigmas[i].log() - sigmas[i + 1].log()
            eta_h = eta * h
            x = sigmas[i + 1] / sigmas[i] * (-eta_h).exp() * x + (-h - eta_h).expm1().neg() * denoised
            if old is not None:
                r = h_last / h
                x = x + 0.5 * (-h - eta_h).expm1().neg() * (1 / r) * (denoised - old)
            x = x + noise_at(x, i) * sigmas[i + 1] * (-2 * eta_h).expm1().neg().sqrt()
            h_last = h
        old = denoised
    return x


K_DIFFUSION = {
    "euler": (k_euler, Euler()),
    "euler_as_ddim": (k_euler, DDIM()),
    "euler_ancestral": (k_euler_ancestral, DDIM(eta=1.0)),
    "heun": (k_heun, EDM()),
    "heun_in_time": (k_heun, Heun()),
    "heun_churn": (
        lambda x, s: k_heun(x, s, 3.0, 0.05, 50.0, 1.003),
        EDM(churn=3.0, least=0.05, most=50.0, inflation=1.003),
    ),
    "lms_4": (k_lms, AdamsBashforth(4)),
    "lms_2": (lambda x, s: k_lms(x, s, 2), AdamsBashforth(2)),
    "dpmpp_2m": (k_dpmpp_2m, DPMSolverPP2M()),
    "dpmpp_2m_sde": (k_dpmpp_2m_sde, DPMSolverPP2M(eta=1.0)),
    "dpmpp_2m_sde_half": (lambda x, s: k_dpmpp_2m_sde(x, s, 0.5), DPMSolverPP2M(eta=0.5)),
}


@pytest.mark.parametrize(("theirs", "ours"), K_DIFFUSION.values(), ids=list(K_DIFFUSION))
def test_samplers_are_those_of_k_diffusion(theirs, ours):
    sigmas = k_sigmas()
    x = TOP * torch.randn(5, 3, dtype=torch.float64)
    found = sample(exploding_field(), x, sigmas / TOP, solver=ours, key=KEY)
    torch.testing.assert_close(found, theirs(x, sigmas), rtol=1e-8, atol=1e-9)


def test_grids_are_those_of_k_diffusion():
    grid = time_grid(PATH, STEPS, "karras", last=0.02 / TOP, to_data=True)
    torch.testing.assert_close(TOP * grid, k_sigmas(), rtol=1e-10, atol=0)
    # get_sigmas_exponential: even in log sigma
    even = torch.linspace(math.log(TOP), math.log(0.02), STEPS, dtype=torch.float64).exp()
    grid = time_grid(PATH, STEPS, "half_log_snr", last=0.02 / TOP, to_data=True)
    torch.testing.assert_close(TOP * grid[:-1], even, rtol=1e-10, atol=0)


diffusers = pytest.importorskip("diffusers")


def run_exploding(scheduler, x):
    """A scheduler in the coordinates alpha = 1, asked for noise at its own states and sigmas."""
    for t in scheduler.timesteps:
        scheduler.scale_model_input(x, t)
        sigma = scheduler.sigmas[scheduler.step_index].double()
        x = scheduler.step((x - denoiser(x, sigma)) / sigma, t, x, return_dict=False)[0].double()
    return x


@pytest.mark.parametrize(
    ("name", "options", "ours"),
    [
        ("EulerDiscreteScheduler", {}, Euler()),
        ("HeunDiscreteScheduler", {}, EDM()),
        ("LMSDiscreteScheduler", {}, AdamsBashforth(4)),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, DDIM()),
    ],
    ids=["euler", "heun", "lms", "karras"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_samplers_are_those_of_diffusers_where_alpha_is_one(name, options, ours):
    scheduler = getattr(diffusers, name)(timestep_spacing="leading", **options)
    scheduler.set_timesteps(STEPS)
    sigmas = scheduler.sigmas.double()
    if name == "HeunDiscreteScheduler":
        sigmas = torch.cat([sigmas[:1], sigmas[1::2]])[: STEPS + 1]
        sigmas[-1] = 0
    top = float(sigmas[0]) * 1.01
    x = float(sigmas[0]) * torch.randn(5, 3, dtype=torch.float64)
    found = sample(exploding_field(top), x, sigmas / top, solver=ours)
    torch.testing.assert_close(found, run_exploding(scheduler, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "ours"),
    [
        ({"algorithm_type": "dpmsolver++", "solver_order": 2}, DPMSolverPP2M()),
        ({"algorithm_type": "dpmsolver++", "solver_order": 1}, DDIM()),
        ({"algorithm_type": "sde-dpmsolver++", "solver_order": 2}, DPMSolverPP2M(eta=1.0)),
    ],
    ids=["dpm_solver_pp_2m", "first_order", "sde_dpm_solver_pp_2m"],
)
def test_dpm_solver_is_that_of_diffusers(options, ours):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear", final_sigmas_type="zero", **options
    )
    scheduler.set_timesteps(STEPS)
    path = VariancePreserving()
    times = path.time_at(-scheduler.sigmas.double().log())
    x = torch.randn(5, 3, dtype=torch.float64)
    field = Field(lambda x, t: torch.sin(x + 2 * t[:, None]), path, "noise")
    found = sample(field, x, times, solver=ours, key=KEY)
    for k, t in enumerate(scheduler.timesteps):
        output = field(x, times[k])
        x = scheduler.step(output, t, x, variance_noise=noise_at(x, k), return_dict=False)[0].double()
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_ddim_is_that_of_diffusers(eta, kind):
    scheduler = diffusers.DDIMScheduler(clip_sample=False, prediction_type=kind)
    scheduler.set_timesteps(STEPS)
    path = VariancePreserving()
    squares = scheduler.alphas_cumprod[scheduler.timesteps].double()
    times = path.time_at(torch.log(squares / (1 - squares)) / 2)
    times = torch.cat([times, times.new_zeros(1)])
    predicts = {"epsilon": "noise", "v_prediction": "v", "sample": "data"}[kind]
    field = Field(lambda x, t: torch.sin(x + 2 * t[:, None]), path, predicts)
    x = torch.randn(5, 3, dtype=torch.float64)
    found = sample(field, x, times, solver=DDIM(eta), key=KEY)
    for k, t in enumerate(scheduler.timesteps):
        # the last step goes to data, where nobody adds noise; diffusers' own variance there is 0 as well
        options = {"eta": eta, "variance_noise": noise_at(x, k)} if eta else {}
        x = scheduler.step(field(x, times[k]), t, x, return_dict=False, **options)[0].double()
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-5)


def test_flow_matching_is_that_of_diffusers():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(STEPS)
    field = Field(lambda x, t: torch.sin(x + 2 * t[:, None]), Straight())
    times = scheduler.sigmas.double()
    x = torch.randn(5, 3, dtype=torch.float64)
    found = sample(field, x, times, solver=Euler())
    for k, t in enumerate(scheduler.timesteps):
        x = scheduler.step(field(x, times[k]), t, x, return_dict=False)[0].double()
    torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-6)
