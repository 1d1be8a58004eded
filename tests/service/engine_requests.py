"""A request to an engine, and what its images must be."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from model.pipeline import LaMambaPipeline
from service.engine.request import GenerationRequest, Ticket

TIMEOUT_S = 30.0  # an answer that does not come is a failure, not a hang
TOLERANCE = 1  # of 255: rounding at the boundary of two pixel values; sums of another batch size

REQUEST = GenerationRequest(
    request_id="r",
    model="fake-16",
    class_label=1,
    guidance_scale=2.5,
    num_inference_steps=6,
    sampler="dpm++",
    seed=11,
)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def images(ticket: Ticket) -> list[np.ndarray]:
    return [job.result.result(TIMEOUT_S) for job in ticket.jobs]


def alone(pipeline: LaMambaPipeline, request: GenerationRequest) -> np.ndarray:
    """What the in-process pipeline makes of a request, one image at a time."""
    made = [
        pipeline.generate(
            [request.class_label],
            seeds=[request.seed],
            image_indices=[request.image_index + offset],
            guidance_scale=request.guidance_scale,
            guidance_interval=request.guidance_interval,
            num_inference_steps=request.num_inference_steps,
            sampler=request.sampler,
        )
        for offset in range(request.num_images)
    ]
    return torch.cat(made).numpy()


def assert_equals_alone(ticket: Ticket, pipeline: LaMambaPipeline) -> None:
    difference = np.abs(np.stack(images(ticket)).astype(int) - alone(pipeline, ticket.request).astype(int))
    assert difference.max() <= TOLERANCE, ticket.request
