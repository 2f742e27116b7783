from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny  # noqa: E402

from thalweg.errors import ArgumentError, ArgumentTypeError, UnsupportedError  # noqa: E402
from thalweg.flows import through  # noqa: E402
from thalweg.flows.schedule import read_schedule  # noqa: E402
from thalweg.ledger.cost import cost, saved_bytes  # noqa: E402
from thalweg.ledger.price import price  # noqa: E402
from thalweg.noise import Key, normal  # noqa: E402
from thalweg.rollouts import Checkpointed, Gate, RandomLast, Route, Skipped, Truncated  # noqa: E402
from thalweg.step import Backprop  # noqa: E402

MAKES = {"sd": tiny.stable_diffusion, "sd3": tiny.stable_diffusion_3}
# diffusers' flow-matching and Euler steps compute in float32 whatever the network's precision is
ROUND_OFF = {"sd": 1e-12, "sd3": 3e-6}


def reward(images: Tensor) -> Tensor:
    weights = torch.linspace(-1, 1, images[0].numel(), dtype=images.dtype).reshape(images[0].shape)
    return (images.clamp(0, 1) * weights).sum() + images.clamp(0, 1).square().sum()


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    assert len(found) == len(expected)
    for gradient in expected:
        assert gradient.norm() > 1e-6
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected))


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("kind", MAKES)
def test_images_and_gradients_equal_the_pipelines_own_loop(kind: str, guidance: float) -> None:
    pipe = MAKES[kind]()
    start, given = tiny.latents(pipe), tiny.conditions(pipe, guidance)
    given["prompt_embeds"].requires_grad_()
    wanted = [start, given["prompt_embeds"], *tiny.adapters(pipe)]
    images = tiny.own_call(pipe, start, 3, "pt", **given)
    expected = torch.autograd.grad(reward(images), wanted)
    for policy in (None, Backprop(), Checkpointed(slots=2), Checkpointed(segments=2)):
        found = through(pipe, start, 3, gradient=policy, **given)
        torch.testing.assert_close(found.clamp(0, 1), images, rtol=ROUND_OFF[kind], atol=ROUND_OFF[kind])
        value = through(pipe, start, 3, gradient=policy, then=reward, **given)
        gradients = torch.autograd.grad(value, wanted)
        assert distance(list(gradients), list(expected)) < 10 * ROUND_OFF[kind], policy


@pytest.mark.parametrize("kind", MAKES)
def test_float32_latents_equal_the_pipelines_own(kind: str) -> None:
    pipe = MAKES[kind](dtype=torch.float32)
    start, given = tiny.latents(pipe), tiny.conditions(pipe, 3.0)
    wanted = [start, *tiny.adapters(pipe)]
    expected = tiny.own_call(pipe, start, 4, "latent", **given)
    found = through(pipe, start, 4, decode=False, gradient=Checkpointed(slots=1), **given)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    gradients = torch.autograd.grad(found.square().sum(), wanted)
    assert distance(list(gradients), list(torch.autograd.grad(expected.square().sum(), wanted))) < 1e-4


SCHEDULERS = {
    "EulerDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": True},
    "LMSDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "DEISMultistepScheduler": {"solver_order": 3},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_other_solvers_and_their_history(name: str) -> None:
    pipe = tiny.stable_diffusion(getattr(diffusers, name)(steps_offset=1, **SCHEDULERS[name]))
    start, given = tiny.latents(pipe, 1), tiny.conditions(pipe, 2.0, 1)
    wanted = [start, *tiny.adapters(pipe)]
    expected = tiny.own_call(pipe, start, 5, "latent", **given)
    loss = expected.square().sum()
    gradients = torch.autograd.grad(loss, wanted)
    for policy in (Backprop(), Checkpointed(slots=2)):
        found = through(pipe, start, 5, decode=False, gradient=policy, **given)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        again = torch.autograd.grad(found.square().sum(), wanted)
        assert distance(list(again), list(gradients)) < 1e-5


def test_a_dynamic_time_shift_is_the_pipelines() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = tiny.stable_diffusion_3(scheduler)
    start, given = tiny.latents(pipe), tiny.conditions(pipe, 1.0)
    expected = tiny.own_call(pipe, start, 3, "latent", **given)
    found = through(pipe, start, 3, decode=False, **given)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_run_of_the_pipeline_in_between_changes_nothing() -> None:
    pipe = tiny.stable_diffusion(diffusers.DPMSolverMultistepScheduler(steps_offset=1))
    start, given = tiny.latents(pipe), tiny.conditions(pipe, 1.0)
    # the scheduler is left holding outputs that hang in a graph
    expected = tiny.own_call(pipe, start, 4, "latent", **given)
    found = through(pipe, start, 4, decode=False, **given)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    first = read_schedule(pipe.scheduler, 4)
    tiny.own_call(pipe, start, 4, "latent", **given)
    assert read_schedule(pipe.scheduler, 4) is first


@pytest.mark.parametrize("kind", MAKES)
@pytest.mark.parametrize("store", [Backprop(), Checkpointed(slots=1)])
def test_truncated_equals_a_detach_in_the_pipelines_own_loop(kind: str, store: Any) -> None:
    pipe = MAKES[kind]()
    start, given = tiny.latents(pipe), tiny.conditions(pipe, 2.0)
    wanted = tiny.adapters(pipe)

    def cut(pipe: Any, k: int, t: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": state["latents"].detach()} if k == 1 else state

    images = tiny.own_call(pipe, start, 4, "pt", callback_on_step_end=cut, **given)
    expected = torch.autograd.grad(reward(images), wanted)
    full = torch.autograd.grad(through(pipe, start, 4, then=reward, **given), wanted)
    assert distance(list(full), list(expected)) > 1e-2
    value = through(pipe, start, 4, then=reward, gradient=Truncated(last=2, store=store), **given)
    found = torch.autograd.grad(value, [start, *wanted], allow_unused=True)
    assert found[0] is None
    assert distance(list(found[1:]), list(expected)) < 10 * ROUND_OFF[kind]


def test_skipped_is_the_product_of_the_schedulers_own_weights() -> None:
    pipe = tiny.stable_diffusion()
    start, given = tiny.latents(pipe), tiny.conditions(pipe, 2.0)
    found = through(pipe, start, 4, decode=False, gradient=Skipped(), **given)
    found.sum().backward()
    alphas = pipe.scheduler.alphas_cumprod.double()
    pipe.scheduler.set_timesteps(4)
    ahead = [alphas[t] for t in pipe.scheduler.timesteps]
    # DDIM: x' = sqrt(alpha'/alpha) x + ..., the last alpha being the scheduler's own
    product = (pipe.scheduler.final_alpha_cumprod.double() / ahead[0]).sqrt()
    assert start.grad is not None
    torch.testing.assert_close(start.grad, product.expand_as(start), rtol=1e-6, atol=0)
    assert all(parameter.grad is None for parameter in tiny.adapters(pipe))


def test_noise_comes_from_the_key() -> None:
    pipe = tiny.stable_diffusion()
    start, given = tiny.latents(pipe), tiny.conditions(pipe, 1.0)
    wanted, key = [start, *tiny.adapters(pipe)], Key(3)
    found = through(pipe, start, 4, eta=1.0, decode=False, key=key, gradient=Checkpointed(slots=2), **given)
    scheduler = copy.copy(pipe.scheduler)
    scheduler.set_timesteps(4)
    x: Tensor = start
    for k, t in enumerate(scheduler.timesteps):
        output = pipe.unet(x, t, encoder_hidden_states=given["prompt_embeds"]).sample
        noise = normal(x, key.at(step=k))
        x = scheduler.step(output, t, x, eta=1.0, variance_noise=noise).prev_sample
    torch.testing.assert_close(found, x, rtol=1e-10, atol=1e-10)
    gradients = torch.autograd.grad(found.square().sum(), wanted)
    assert distance(list(gradients), list(torch.autograd.grad(x.square().sum(), wanted))) < 1e-10
    other = through(pipe, start, 4, eta=1.0, decode=False, key=Key(4), **given)
    assert not torch.allclose(other, x)


def test_random_truncation_and_gates_run() -> None:
    from thalweg import gates

    pipe = tiny.stable_diffusion()
    start, given = tiny.latents(pipe), tiny.conditions(pipe, 1.0)
    policy = Truncated(last=RandomLast(2, 2))
    value = through(pipe, start, 3, then=reward, gradient=policy, key=Key(0), **given)
    expected = through(pipe, start, 3, then=reward, gradient=Truncated(last=2), **given)
    wanted = tiny.adapters(pipe)
    expected = list(torch.autograd.grad(expected, wanted))
    assert distance(list(torch.autograd.grad(value, wanted)), expected) < 1e-12
    # a gate that halves behind each of three steps
    halved = Route(cotangent=Gate(gates.scale, factor=0.5))
    value = through(pipe, start, 3, then=reward, gradient=halved, **given)
    exact = torch.autograd.grad(through(pipe, start, 3, then=reward, **given), start)[0]
    assert distance([torch.autograd.grad(value, start)[0]], [exact / 8]) < 1e-12


@pytest.mark.parametrize("kind", MAKES)
def test_kept_bytes_are_flat_and_the_decoder_is_moved(kind: str) -> None:
    pipe = MAKES[kind](dtype=torch.float32)
    start, given = tiny.latents(pipe), tiny.conditions(pipe, 2.0)

    def kept(steps: int, policy: Any, **options: Any) -> int:
        def run() -> Any:
            return through(pipe, start, steps, gradient=policy, **options, **given)

        run()  # the schedule is read once
        return saved_bytes(run)

    state = start.numel() * start.element_size()
    few = {n: kept(n, Checkpointed(slots=2), then=reward) for n in (3, 9)}
    assert abs(few[9] - few[3]) <= 2 * state
    everything = {n: kept(n, Backprop(), then=reward) for n in (3, 9)}
    assert everything[9] > 2 * everything[3] - kept(3, Backprop(), then=reward)
    decoder = everything[3] - kept(3, Backprop(), decode=False)
    assert decoder > 20 * state
    assert few[3] < decoder / 10
    assert few[9] < everything[9] / 10


def test_a_budget_is_met() -> None:
    pipe = tiny.stable_diffusion(dtype=torch.float32)
    start, given = tiny.latents(pipe), tiny.conditions(pipe, 2.0)
    wanted = [start, *tiny.adapters(pipe)]

    def peak(policy: Any) -> int:
        def closure() -> Tensor:
            value: Tensor = through(pipe, start, 4, gradient=policy, then=reward, **given)
            return value

        return cost((pipe.unet, closure, wanted), repeats=0).peak_bytes

    everything = peak(Backprop())
    budget = everything // 2
    assert peak(Checkpointed(budget=budget)) <= budget
    with pytest.raises(ArgumentError, match="budget"):
        through(pipe, start, 4, gradient=Checkpointed(budget=1000), then=reward, **given)


def test_price_tells_the_cost_before_anything_runs() -> None:
    pipe = tiny.stable_diffusion(dtype=torch.float32)
    start, given = tiny.latents(pipe), tiny.conditions(pipe, 2.0)

    def closure() -> Tensor:
        policy = Checkpointed(slots=2)
        value: Tensor = through(pipe, start, 3, gradient=policy, then=reward, **given)
        return value

    step = (pipe.unet, closure, tiny.adapters(pipe))
    # priced first, so that the schedule is read among fake tensors
    priced, counted = next(iter(price(step))), cost(step, repeats=0)
    assert priced.saved_bytes == counted.saved_bytes
    assert priced.operations == counted.operations


@pytest.mark.parametrize("kind", MAKES)
def test_the_pipeline_is_left_unchanged(kind: str) -> None:
    pipe = MAKES[kind]()
    start, given = tiny.latents(pipe), tiny.conditions(pipe, 2.0)
    tiny.network(pipe).train()
    pipe.vae.eval()
    before = {name: copy.copy(value) for name, value in vars(pipe.scheduler).items()}
    weights = {name: p.clone() for name, p in tiny.network(pipe).state_dict().items()}
    drawn = torch.get_rng_state()
    value = through(pipe, start, 3, gradient=Checkpointed(slots=1), then=reward, **given)
    torch.autograd.grad(value, tiny.adapters(pipe))
    assert torch.equal(torch.get_rng_state(), drawn)
    assert vars(pipe.scheduler).keys() == before.keys()
    for name, old in before.items():
        new = vars(pipe.scheduler)[name]
        assert torch.equal(new, old) if isinstance(old, Tensor) else new == old, name
    assert tiny.network(pipe).training
    assert not pipe.vae.training
    for name, parameter in tiny.network(pipe).state_dict().items():
        assert torch.equal(parameter, weights[name])
    modules = (tiny.network(pipe), pipe.vae)
    assert all(p.grad is None for module in modules for p in module.parameters())


def test_training_lora_weights_raises_the_reward() -> None:
    pipe = tiny.stable_diffusion(dtype=torch.float32)
    start, given = tiny.latents(pipe).detach(), tiny.conditions(pipe, 2.0)
    optimizer = torch.optim.Adam(tiny.adapters(pipe), lr=1e-2)
    values = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = through(pipe, start, 3, gradient=Checkpointed(slots=1), then=lambda x: x.mean(), **given)
        loss.backward()
        optimizer.step()
        values.append(float(loss.detach()))
    assert values[-1] < values[0]


class _Other:
    scheduler, vae = object(), object()

    def __call__(self, prompt: str) -> None: ...


class _FromImage(_Other):
    def __call__(self, prompt: str, image: Tensor) -> None: ...  # type: ignore[override]


def test_other_pipelines_are_refused_by_name() -> None:
    pipe = tiny.stable_diffusion()
    given = tiny.conditions(pipe, 1.0)
    start = tiny.latents(pipe)
    for other, why in (
        (_Other(), "neither a unet"),
        (_FromImage(), "takes image"),
        (object(), "no scheduler"),
    ):
        with pytest.raises(ArgumentTypeError, match=why):
            through(other, start, 3, **given)
    with pytest.raises(ArgumentTypeError, match=r"class _Other"):
        through(_Other(), start, 3, **given)
    flux = SimpleNamespace(vae=pipe.vae, scheduler=pipe.scheduler, transformer=torch.nn.Linear(1, 1))
    with pytest.raises(ArgumentTypeError, match="takes other arguments"):
        through(flux, start, 3, **given)
    pipe.unet.register_to_config(addition_embed_type="text_time")
    with pytest.raises(ArgumentTypeError, match="addition_embed_type"):
        through(pipe, start, 3, **given)
    pipe.unet.register_to_config(addition_embed_type=None)
    pipe._all_hooks = [object()]
    with pytest.raises(UnsupportedError, match="remove_all_hooks"):
        through(pipe, start, 3, **given)


def test_wrong_arguments_are_refused_by_name() -> None:
    pipe, pipe3 = tiny.stable_diffusion(), tiny.stable_diffusion_3()
    start, given = tiny.latents(pipe), tiny.conditions(pipe, 2.0)
    wrong: list[tuple[str, Any]] = [
        ("guidance_scale", -1.0),
        ("guidance_scale", float("nan")),
        ("guidance_scale", "7"),
        ("eta", 1.5),
        ("decode", 1),
        ("then", 3),
        ("prompt_embeds", None),
        ("prompt_embeds", given["prompt_embeds"][:1]),
        ("prompt_embeds", given["prompt_embeds"][0]),
        ("negative_prompt_embeds", None),
        ("negative_prompt_embeds", given["negative_prompt_embeds"][:, :3]),
        ("pooled_prompt_embeds", torch.zeros(2, 8)),
        ("gradient", Backprop),
        ("key", 3),
    ]
    for argument, value in wrong:
        with pytest.raises((ArgumentError, ArgumentTypeError), match=f"^{argument}"):
            through(pipe, start, 3, **{**given, argument: value})
    with pytest.raises((ArgumentError, ArgumentTypeError), match=r"^latents"):
        through(pipe, torch.randn(2, 3, 16, 16), 3, **given)
    with pytest.raises((ArgumentError, ArgumentTypeError), match=r"^steps"):
        through(pipe, start, 0, **given)
    with pytest.raises(ArgumentError, match=r"^steps"):
        through(pipe, start, 5000, **given)
    with pytest.raises(ArgumentTypeError, match=r"^pooled_prompt_embeds"):
        through(pipe3, start, 3, **{**tiny.conditions(pipe3, 1.0), "pooled_prompt_embeds": None})
    with pytest.raises(ArgumentError, match=r"^eta"):
        through(pipe3, start, 3, eta=0.5, **tiny.conditions(pipe3, 1.0))


def test_the_schedule_follows_the_scheduler() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    first = read_schedule(scheduler, 4)
    assert read_schedule(scheduler, 4) is first
    scheduler.set_shift(3.0)
    assert read_schedule(scheduler, 4).times != first.times
    with pytest.raises(UnsupportedError, match=r"DDIMScheduler.*clip_sample"):
        read_schedule(diffusers.DDIMScheduler(), 4)
    with pytest.raises(UnsupportedError, match=r"EulerAncestralDiscreteScheduler.*own noise"):
        read_schedule(diffusers.EulerAncestralDiscreteScheduler(), 4)
    with pytest.raises(UnsupportedError, match=r"UniPCMultistepScheduler.*looks back"):
        read_schedule(diffusers.UniPCMultistepScheduler(), 20)
    with pytest.raises(ArgumentTypeError, match=r"scheduler"):
        read_schedule(object(), 4)


def test_a_flow_matching_step_is_the_schedulers_to_one_unit_in_the_last_place() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    schedule = read_schedule(scheduler, 20)
    scheduler.set_timesteps(20)
    for k, time in enumerate(scheduler.timesteps):
        x, v = torch.randn(2, 1000)
        expected = scheduler.step(v, time, x, return_dict=False)[0]
        largest = torch.maximum(x.abs(), expected.abs())
        unit = torch.nextafter(largest, torch.tensor(torch.inf)) - largest
        assert bool(((schedule.advance(k, x, v, None) - expected).abs() <= unit).all())
