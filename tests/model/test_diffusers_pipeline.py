"""If this fails, users who run our folders with diffusers' own pipeline get other images than from us."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DPMSolverMultistepScheduler
from torch import Tensor

from model.diffusion import NoiseSchedule
from model.diffusion.samplers import diffusers_scheduler_config, sampler_table
from model.diffusion.step import StepBatch, denoise_step
from model.model_folder import save_model_folder
from model.network.lamamba import LaMambaDiff
from model.pipeline import LaMambaPipeline

STEPS = 8  # divides 1000: with others diffusers' DDIM steps to another noise level than its next timestep has
GUIDANCE_SCALE = 3.0
MAX_DIFFERENCE = 2  # of 255, fp32: another order of the same arithmetic


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 16 px images, 8x8 latents under an f2 autoencoder, in which every part has an effect."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("diffusers")
    levels: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, sample_size=16, latent_channels=4, **levels
    ).save_pretrained(root / "vae")
    network = LaMambaDiff(sample_size=8, hidden_size=8, num_heads=2, window_size=4, num_classes=3)
    for name, parameter in network.named_parameters():
        if ".modulation." in name or "label_embed" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    save_model_folder(
        root / "model",
        network=network,
        autoencoder=root / "vae",
        labels=("red", "green", "blue"),
        name="tiny",
        dtype=torch.float32,
    )
    return root / "model"


def ddim() -> tuple[Any, str]:
    scheduler = DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing"
    )
    return scheduler, "ddim"


def dpm_solver() -> tuple[Any, str]:
    config = diffusers_scheduler_config(NoiseSchedule.linear())
    return DPMSolverMultistepScheduler.from_config(config), "dpm++"


def ours(pipeline: LaMambaPipeline, latents: Tensor, labels: Tensor, sampler: str) -> Tensor:
    table = sampler_table(sampler, STEPS, pipeline.schedule)
    rows, history = len(latents), torch.zeros_like(latents)
    for i in range(STEPS):
        batch = StepBatch(
            latents=latents,
            history=history,
            timesteps=table.timesteps[i].expand(rows),
            coefficients=table.coefficients[i].expand(rows, -1),
            class_labels=labels,
            guidance_scale=torch.full((rows,), GUIDANCE_SCALE),
            guided=torch.arange(rows),
            noise=None,
        )
        latents, history = denoise_step(pipeline.network, batch, null_label=pipeline.null_label)
    return pipeline.decode(latents)


@pytest.mark.parametrize("scheduler", [ddim, dpm_solver], ids=["ddim", "dpm++"])
def test_diffusers_pipeline_makes_the_same_images(folder: Path, scheduler: Any) -> None:
    pipeline = LaMambaPipeline.load(folder, device="cpu")
    theirs = DiTPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler, sampler = scheduler()
    labels = torch.tensor([0, 2])
    images = theirs(
        labels.tolist(),
        guidance_scale=GUIDANCE_SCALE,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(5),
        output_type="np",
    ).images
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    expected = torch.from_numpy(images).mul(255).round()
    given = ours(pipeline, latents, labels, sampler).float()
    assert (given - expected).abs().max() <= MAX_DIFFERENCE
    assert given.std() > 5


def test_a_loaded_diffusers_pipeline_has_our_parts(folder: Path) -> None:
    loaded = DiTPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    assert isinstance(loaded.transformer, LaMambaDiff)
    assert isinstance(loaded.scheduler, DPMSolverMultistepScheduler)
    assert loaded.get_label_ids(["green"]) == [1]
