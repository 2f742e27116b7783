"""Models that people train every day, as they come: nothing serious is found on them, whatever their size."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from thalweg.doctor import examine

transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

Healthy = tuple[nn.Module, Callable[[], Tensor]]


def language_model() -> Healthy:
    config = transformers.GPT2Config(
        n_layer=4, n_head=4, n_embd=64, vocab_size=200, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    tokens = torch.randint(200, (4, 16))
    return model, lambda: model(input_ids=tokens, labels=tokens).loss


def image_classifier() -> Healthy:
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
        num_labels=5,
    )
    model = transformers.ViTForImageClassification(config)
    images, labels = torch.randn(4, 3, 16, 16), torch.randint(5, (4,))
    return model, lambda: model(pixel_values=images, labels=labels).loss


def denoiser() -> Healthy:
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    latents, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    times, prompt = torch.tensor([10, 500]), torch.randn(2, 5, 16)
    return model, lambda: nn.functional.mse_loss(model(latents, times, prompt).sample, noise)


@pytest.mark.parametrize("build", [language_model, image_classifier, denoiser])
def test_nothing_serious_is_found(build: Callable[[], Healthy]) -> None:
    model, closure = build()
    report = examine(model, closure, optimizer=torch.optim.AdamW(model.parameters(), 1e-4))
    assert report.worst < 2, report.findings
    # and the same eyes see what is wrong once something is
    name, sick = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.LayerNorm))
    sick.register_forward_hook(lambda _module, _inputs, output: output.round())
    assert any(f.code == "D1" and f.severity >= 2 for f in examine(model, closure).findings), name
