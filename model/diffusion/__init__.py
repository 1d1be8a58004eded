"""The diffusion process: noise schedule, training loss, samplers, guidance, one step of a batch."""

from model.diffusion.guidance import check_guidance_interval, guided_eps, guided_steps
from model.diffusion.loss import DiffusionLoss, LossTables, diffusion_loss, q_sample
from model.diffusion.noise import gaussian_noise, philox_uniform
from model.diffusion.samplers import (
    SAMPLERS,
    TIMESTEP_SPACINGS,
    Coefficient,
    SamplerTable,
    diffusers_scheduler_config,
    sampler_step,
    sampler_table,
)
from model.diffusion.schedule import NoiseSchedule, respaced_timesteps
from model.diffusion.step import DenoisingNetwork, StepBatch, denoise_step
from model.diffusion.timesteps import TIMESTEP_DENSITIES, timestep_quantiles

__all__ = [
    "SAMPLERS",
    "TIMESTEP_DENSITIES",
    "TIMESTEP_SPACINGS",
    "Coefficient",
    "DenoisingNetwork",
    "DiffusionLoss",
    "LossTables",
    "NoiseSchedule",
    "SamplerTable",
    "StepBatch",
    "check_guidance_interval",
    "denoise_step",
    "diffusers_scheduler_config",
    "diffusion_loss",
    "gaussian_noise",
    "guided_eps",
    "guided_steps",
    "philox_uniform",
    "q_sample",
    "respaced_timesteps",
    "sampler_step",
    "sampler_table",
    "timestep_quantiles",
]
