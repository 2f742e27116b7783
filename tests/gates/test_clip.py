"""The exact checks of pixel-wise gradient clipping, and what `clip` refuses."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, vmap

from thalweg.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from thalweg.gates import ClipStatistics, clip

PER = ("pixel", "sample", "tensor", "value")
every_norm = pytest.mark.parametrize("norm", ["inf", "l2"])
every_per = pytest.mark.parametrize("per", PER)


def treated(cotangent: Tensor, limit: float, **options: object) -> Tensor:
    """What the gate makes of a cotangent."""
    x = torch.zeros_like(cotangent, requires_grad=True)
    clip(x, limit, **options).backward(cotangent)
    return x.grad


def spiky(seed: int = 0, shape: tuple[int, ...] = (2, 3, 4, 4), dtype: torch.dtype = torch.float64) -> Tensor:
    """A cotangent whose pixels differ in size by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(3 * torch.randn(shape[0], 1, *shape[2:], generator=generator, dtype=torch.float64))
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * sizes).to(dtype)


def norms(cotangent: Tensor, per: str, norm: str) -> Tensor:
    order = math.inf if norm == "inf" else 2
    if per == "value":
        return cotangent.abs()
    if per == "pixel":
        return torch.linalg.vector_norm(cotangent, order, dim=1)
    if per == "sample":
        return torch.linalg.vector_norm(cotangent.flatten(1), order, dim=1)
    return torch.linalg.vector_norm(cotangent, order)


def test_forward_is_the_identity_bit_for_bit() -> None:
    x = torch.tensor([[-0.0, 1e-45, math.inf, math.nan]], requires_grad=True)
    assert torch.equal(clip(x, 1.0).view(torch.int32), x.view(torch.int32))


@every_norm
@every_per
def test_infinite_limit_is_the_identity_backward(per: str, norm: str) -> None:
    cotangent = spiky()
    assert torch.equal(treated(cotangent, math.inf, per=per, norm=norm), cotangent)
    assert torch.equal(treated(cotangent, math.inf, per=per, norm=norm, mode="normalize"), cotangent)


@every_norm
@every_per
def test_norms_below_the_limit_pass_unchanged(per: str, norm: str) -> None:
    cotangent = spiky()
    limit = float(norms(cotangent, per, norm).max()) * 1.001
    assert torch.equal(treated(cotangent, limit, per=per, norm=norm), cotangent)


@every_norm
@every_per
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_end_at_the_limit(per: str, norm: str, dtype: torch.dtype) -> None:
    cotangent = spiky(dtype=dtype)
    before = norms(cotangent, per, norm)
    limit = float(before.median())
    out = norms(treated(cotangent, limit, per=per, norm=norm), per, norm)
    assert bool((out <= limit * (1 + 1e-6)).all())
    torch.testing.assert_close(out, before.clamp(max=limit))


@every_norm
def test_direction_of_every_pixel_stays_and_zero_stays_zero(norm: str) -> None:
    cotangent = spiky()
    cotangent[0, :, 0, 0] = 0
    out = treated(cotangent, 0.1, norm=norm)
    cosine = torch.cosine_similarity(out, cotangent, dim=1)
    assert torch.equal(out[0, :, 0, 0], torch.zeros(3, dtype=out.dtype))
    cosine[0, 0, 0] = 1
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
    turned = torch.cosine_similarity(treated(cotangent, 0.1, per="value"), cotangent, dim=1)
    assert float(turned.min()) < 0.99


@every_norm
@every_per
def test_clipping_twice_is_clipping_once(per: str, norm: str) -> None:
    once = treated(spiky(), 0.3, per=per, norm=norm)
    torch.testing.assert_close(treated(once, 0.3, per=per, norm=norm), once)


@every_norm
@every_per
@pytest.mark.parametrize("mode", ["clip", "normalize"])
def test_homogeneous_which_is_the_rule_for_mixed_precision(per: str, norm: str, mode: str) -> None:
    options = {"per": per, "norm": norm, "mode": mode}
    cotangent, loss_scale = spiky(), 2.0**16
    expected = loss_scale * treated(cotangent, 0.3, **options)
    torch.testing.assert_close(treated(loss_scale * cotangent, 0.3, scale=loss_scale, **options), expected)


def test_one_channel_l2_is_value_clip_is_clamp() -> None:
    cotangent = spiky(shape=(2, 1, 4, 4))
    clamped = cotangent.clamp(-0.1, 0.1)
    for options in ({"norm": "l2"}, {"norm": "inf"}, {"per": "value"}):
        torch.testing.assert_close(treated(cotangent, 0.1, **options), clamped)


def test_a_single_pixel_equals_clip_grad_norm() -> None:
    cotangent = torch.tensor([3.0, -4.0, 12.0], dtype=torch.float64)
    parameter = nn.Parameter(torch.zeros_like(cotangent))
    parameter.grad = cotangent.clone()
    nn.utils.clip_grad_norm_([parameter], 0.5)
    pixel = treated(cotangent.reshape(1, 3, 1, 1), 0.5, norm="l2").flatten()
    # torch adds 1e-6 to the norm it divides by
    torch.testing.assert_close(pixel, parameter.grad, rtol=1e-6, atol=0)


def test_per_sample_equals_the_norm_clip_of_each_image() -> None:
    cotangent = spiky()
    out = treated(cotangent, 0.7, per="sample", norm="l2")
    for image, got in zip(cotangent, out):
        torch.testing.assert_close(got, image * min(1.0, 0.7 / float(image.norm())))


def test_two_gates_on_the_same_tensor_do_not_accumulate() -> None:
    module = nn.Conv2d(3, 3, 1)
    x = torch.zeros(1, 3, 2, 2, requires_grad=True)
    for _ in range(3):
        x.grad = None
        # normalising twice differs from normalising once: a hook left on the leaf would show
        (module(clip(x, 1.0, mode="normalize")) * 50).sum().backward()
    column = 50 * module.weight.detach().sum(0).flatten()
    expected = column / (column.abs().max() + 1)
    torch.testing.assert_close(x.grad[0, :, 0, 0], expected)


def test_a_global_clip_never_turns_the_gradient_and_a_pixel_clip_can() -> None:
    two_pixels = torch.tensor([[100.0, 0, 0], [0, 1, 0]]).T.reshape(1, 3, 1, 2)

    def turn(**options: object) -> float:
        return float(
            torch.cosine_similarity(two_pixels.flatten(), treated(two_pixels, 1.0, **options).flatten(), 0)
        )

    assert turn(per="tensor", norm="l2") == pytest.approx(1.0)
    # (1, 0, 0) and (0, 1, 0) are left: 101 / (sqrt(10001) sqrt(2))
    assert turn(per="pixel") == pytest.approx(101 / math.sqrt(10001 * 2))


def test_normalize_never_reaches_the_limit() -> None:
    out = treated(spiky(), 0.1, mode="normalize")
    assert float(out.abs().max()) < 0.1
    torch.testing.assert_close(
        out, 0.1 * spiky() / (spiky().abs().amax(1, keepdim=True) + 0.1), rtol=1e-9, atol=0
    )


@every_per
def test_nonfinite_values_become_zero_and_are_counted(per: str) -> None:
    cotangent = torch.ones(2, 3, 2, 2)
    cotangent[0, 0, 0, 0], cotangent[0, 1, 0, 0], cotangent[1, 0, 1, 1] = math.nan, math.inf, -math.inf
    statistics = ClipStatistics()
    out = treated(cotangent, 10.0, per=per, statistics=statistics)
    assert torch.equal(out, torch.where(torch.isfinite(cotangent), cotangent, 0.0))
    assert statistics.nonfinite() == 3
    assert statistics.clipped_fraction() == 0


@every_per
def test_nonfinite_values_kept_stay_with_their_group_alone(per: str) -> None:
    cotangent = torch.full((2, 3, 2, 2), 5.0)
    cotangent[0, 0, 0, 0] = math.inf
    out = treated(cotangent, 1.0, per=per, nonfinite="keep")
    assert out[0, 0, 0, 0] == math.inf
    untouched = {"value": 0, "pixel": 2, "sample": 11, "tensor": 23}[per]
    assert int((out == 5).sum()) == untouched
    assert int((out == 1).sum()) == 23 - untouched


def test_spikes_and_trifles_beyond_the_square_root_of_the_range() -> None:
    for size in (1e30, 1e-30):
        cotangent = size * torch.tensor([3.0, 4.0, 0.0]).reshape(1, 3, 1, 1)
        out = treated(cotangent, size, norm="l2").flatten()
        torch.testing.assert_close(out / size, torch.tensor([0.6, 0.8, 0.0]))


def test_statistics_count_pixels_add_up_and_reset() -> None:
    statistics = ClipStatistics()
    assert math.isnan(statistics.clipped_fraction())
    cotangent = torch.ones(1, 3, 2, 2)
    cotangent[0, 1, 0, 0] = 7
    for _ in range(2):
        treated(cotangent, 2.0, statistics=statistics)
    assert statistics.counts.tolist() == [8, 2, 0]
    assert statistics.clipped_fraction() == 0.25
    statistics.reset()
    assert statistics.counts.tolist() == [0, 0, 0]


@pytest.mark.parametrize("how", ["aot_eager", "inductor", "vmap of grad", "grad of vmap"])
def test_statistics_count_in_compiled_and_mapped_code(how: str) -> None:
    statistics = ClipStatistics()
    x, weight = torch.zeros(4, 3, 2, 2), spiky(shape=(4, 3, 2, 2), dtype=torch.float32)

    def loss(one: Tensor, each: Tensor) -> Tensor:
        return (clip(one, 1.0, dim=-3, statistics=statistics) * each).sum()

    if how == "vmap of grad":
        vmap(grad(loss))(x, weight)
    elif how == "grad of vmap":
        grad(lambda y: vmap(loss)(y, weight).sum())(x)
    else:
        compiled = torch.compile(loss, fullgraph=True, backend=how)
        compiled(x.requires_grad_(), weight).backward()
        torch._dynamo.reset()
    assert statistics.counts.tolist() == [16, int((weight.abs().amax(1) > 1).sum()), 0]


def test_amp_scaler_leaves_the_clipped_gradient_it_would_without() -> None:
    weight = spiky(dtype=torch.float32)
    expected = treated(weight, 0.5)
    x = torch.zeros_like(weight, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for _ in range(2):
        x.grad = None
        scaler.scale((clip(x, 0.5, scale=scaler) * weight).sum()).backward()
        scaler.unscale_(optimizer)
        torch.testing.assert_close(x.grad, expected)
        scaler.step(optimizer)
        scaler.update()
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    torch.testing.assert_close(treated(weight, 0.5, scale=disabled), expected)
    torch.testing.assert_close(treated(weight * 4, 0.5, scale=torch.tensor([4.0])), 4 * expected)


def test_amp_scaler_sees_an_overflow_that_is_kept() -> None:
    for policy, expected in (("keep", 2.0**11), ("zero", 2.0**12)):
        x = torch.zeros(1, 3, 1, 1, requires_grad=True)
        optimizer = torch.optim.SGD([x], lr=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        scaler.scale((clip(x, 1.0, scale=scaler, nonfinite=policy) * math.inf).nan_to_num(1).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == expected


def test_a_scaler_in_compiled_code_is_refused_by_name() -> None:
    scaler = torch.amp.GradScaler("cpu")
    compiled = torch.compile(lambda x: clip(x, 1.0, scale=scaler), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="pass the scale as a tensor"):
        compiled(torch.zeros(1, 3, requires_grad=True))
    torch._dynamo.reset()


def test_a_scale_given_as_a_tensor_does_not_recompile() -> None:
    scales = [2.0, 8.0]
    weight = spiky(dtype=torch.float32)
    seen = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x, s: (clip(x, 0.5, scale=s) * weight).sum(), fullgraph=True, backend=seen
    )
    for value in scales:
        x = torch.zeros_like(weight, requires_grad=True)
        compiled(x, torch.tensor(value)).backward()
        torch.testing.assert_close(x.grad, treated(weight, 0.5 * value))
    assert seen.frame_count == 1
    torch._dynamo.reset()


def test_a_fresh_process_loads_the_compiler_only_to_compile() -> None:
    program = """if True:
        import sys, torch
        from thalweg.gates import clip
        x = torch.zeros(1, 3, requires_grad=True)
        clip(x, 1.0, dim=-1).backward(torch.full((1, 3), 5.0))
        assert x.grad.tolist() == [[1.0, 1.0, 1.0]], x.grad
        assert "torch._dynamo" not in sys.modules
        loss = torch.func.grad(lambda y: (5 * clip(y, 1.0, dim=-1)).sum())
        print(torch.compile(loss, fullgraph=True, backend="aot_eager")(torch.zeros(1, 3)).tolist())
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[[1.0, 1.0, 1.0]]", done.stderr


def test_second_derivative_in_compiled_code_is_refused() -> None:
    def inner(x: Tensor) -> Tensor:
        return (clip(x, 0.1, dim=-1) ** 2).sum()

    nested = grad(lambda x: grad(inner)(x).sum())
    with pytest.raises(Exception, match="second derivative"):
        torch.compile(nested, fullgraph=True, backend="aot_eager")(torch.ones(2, 3))
    torch._dynamo.reset()
    with pytest.raises(UnsupportedError, match="second derivative"):
        torch.func.hessian(inner)(torch.ones(2, 3))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"limit": 0.0}, "limit"),
        ({"limit": -1}, "limit"),
        ({"limit": math.nan}, "limit"),
        ({"limit": "1"}, "limit"),
        ({"limit": True}, "limit"),
        ({"per": "channel"}, "per"),
        ({"norm": 2}, "norm"),
        ({"mode": "value"}, "mode"),
        ({"nonfinite": "raise"}, "nonfinite"),
        ({"dim": 4}, "dim"),
        ({"dim": -5}, "dim"),
        ({"dim": 1.0}, "dim"),
        ({"scale": 0.0}, "scale"),
        ({"scale": math.inf}, "scale"),
        ({"scale": "auto"}, "scale"),
        ({"scale": torch.ones(2)}, "scale"),
        ({"scale": torch.ones((), dtype=torch.int64)}, "scale"),
        ({"statistics": {}}, "statistics"),
        ({"statistics": ClipStatistics("meta")}, "statistics"),
        ({"x": torch.zeros(())}, "dim"),
        ({"x": torch.zeros(()), "per": "sample"}, "x"),
    ],
)
def test_refuses_a_wrong_argument_by_name(wrong: dict[str, object], named: str) -> None:
    arguments = {"x": torch.zeros(2, 3, 4, 4, requires_grad=True), "limit": 1.0} | wrong
    with pytest.raises((ArgumentError, ArgumentTypeError)) as refusal:
        clip(**arguments)
    assert refusal.value.argument == named


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    shape=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    per=st.sampled_from(PER),
    norm=st.sampled_from(["inf", "l2"]),
    mode=st.sampled_from(["clip", "normalize"]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    limit=st.floats(1e-3, 1e3),
    fill=st.sampled_from([0.0, 1.0, -1e4, math.inf, math.nan]),
    data=st.data(),
)
def test_whatever_comes_the_result_is_finite_and_bounded(
    shape: list[int],
    per: str,
    norm: str,
    mode: str,
    dtype: torch.dtype,
    limit: float,
    fill: float,
    data: st.DataObject,
) -> None:
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    cotangent = torch.randn(shape).mul_(100).to(dtype)
    if cotangent.numel():
        cotangent.view(-1)[0] = fill
    out = treated(cotangent, limit, per=per, norm=norm, mode=mode, dim=dim)
    assert out.shape == cotangent.shape
    assert out.dtype == dtype
    assert bool(torch.isfinite(out).all())
    if out.numel():
        assert float(out.double().abs().max()) <= limit * (1 + 2 * torch.finfo(dtype).eps)
