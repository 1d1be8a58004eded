"""LaMamba behind LitServe's dynamic batching: what `lamamba bench batching` can compare the server with.

LitServe (0.2.19) collects requests until a batch is full or the first has waited long enough, hands the batch
to one call, and answers all of it when that call returns. Each image of a batch has its own number of steps;
a finished one leaves the computation, not the batch. Steps, kernels, CPU threads and PNG encoder are those of
`lamamba serve`; queue, batches, processes and HTTP are LitServe's.

Its server brings uvloop and httptools, which uvicorn uses wherever it finds them: install it apart, so that
`lamamba serve` stays as it is.

    python -m venv peers && peers/bin/pip install -e '.[bench-peers]'
    lamamba bench batching --peer "litserve=peers/bin/python benchmarks/litserve_server.py --port {port}"

POST /generate takes one image a request and answers `images`, `seed` and `timings` (denoise, decode, encode);
GET /health/live and /health/ready. A request that is refused fails its whole batch, as LitServe has it.
"""

# No `from __future__ import annotations`: LitServe hands those of `decode_request` to FastAPI as they are.
import argparse
import base64
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import litserve
from fastapi import HTTPException
from pydantic import ValidationError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.cpu_rows import prepare_process
from model.cpu_threads import available_cpu_threads
from model.images import encode_image, image_metadata
from model.pipeline import LaMambaPipeline
from model.pretrained import default_model_dir
from service.api.schemas import GenerateRequest
from service.catalog import Catalog, ServedModel
from service.engine.request import GenerationRequest, Ticket
from service.engine.runner import Runner
from service.errors import InvalidField

MAX_TIMEOUT_S = 600.0


class LaMambaAPI(litserve.LitAPI):
    """One model, a batch a call. `setup` runs in LitServe's worker process, all else after it."""

    def __init__(self, folder: Path, *, max_batch_size: int, batch_timeout: float) -> None:
        super().__init__(max_batch_size=max_batch_size, batch_timeout=batch_timeout, api_path="/generate")
        self.folder = folder

    def setup(self, device: str) -> None:
        """Load and warm the model, as `lamamba serve` does."""
        prepare_process()
        self.serve(LaMambaPipeline.load(self.folder, device=device, num_row_threads=available_cpu_threads()))
        self.runner.warm_up(decode_batch=self.max_batch_size)

    def serve(self, pipeline: LaMambaPipeline) -> None:
        """Answer with a loaded model."""
        self.pipeline = pipeline
        self.runner = Runner(pipeline, num_slots=self.max_batch_size)
        self.catalog = Catalog(
            (
                ServedModel(
                    pipeline=pipeline,
                    max_images_per_request=1,
                    max_timeout_s=MAX_TIMEOUT_S,
                    default_timeout_s=None,
                ),
            )
        )

    def decode_request(self, request: dict[str, Any]) -> GenerationRequest:
        """What is asked for. Raises HTTPException 422 for what the model does not make."""
        try:
            return self.catalog.resolve(GenerateRequest.model_validate(request), request_id="")
        except (ValidationError, InvalidField) as error:
            raise HTTPException(422, str(error)) from error

    def batch(self, inputs: Sequence[GenerationRequest]) -> list[GenerationRequest]:
        return list(inputs)

    def predict(self, requests: Sequence[GenerationRequest]) -> list[dict[str, Any]]:
        """The answers to a batch, each step with the images that still have steps to do."""
        started = time.perf_counter()
        jobs = [Ticket(request, submitted_at=started).jobs[0] for request in requests]
        for slot, job in enumerate(jobs):
            job.slot = slot
        while active := [job for job in jobs if not job.finished]:
            self.runner.step(active)
            for job in active:
                job.step_index += 1
        latents = self.runner.take(jobs).latents  # (n, C, H, W)
        denoised = time.perf_counter()
        images = self.pipeline.decode(latents).numpy()  # (n, height, width, 3)
        timings = {"denoise": denoised - started, "decode": time.perf_counter() - denoised}
        return [
            {"request": request, "pixels": pixels, "timings": timings}
            for request, pixels in zip(requests, images, strict=True)
        ]

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        """The JSON of one answer."""
        started = time.perf_counter()
        request: GenerationRequest = output["request"]
        metadata = image_metadata(
            seed=request.seed,
            image_index=request.image_index,
            class_label=self.pipeline.labels[request.class_label] if self.pipeline.num_classes else None,
            guidance_scale=request.guidance_scale,
            num_inference_steps=request.num_inference_steps,
            sampler=request.sampler,
            model=request.model,
            weights_hash=self.pipeline.weights_hash,
        )
        file = encode_image(output["pixels"], "png", 90, metadata)
        image = {"index": 0, "seed": request.seed, "image_index": request.image_index}
        return {
            "seed": request.seed,
            "images": [image | {"b64_json": base64.b64encode(file).decode("ascii")}],
            "timings": output["timings"] | {"encode": time.perf_counter() - started},
        }


def end_on_sigterm() -> None:
    """Let SIGTERM do what Ctrl-C does: LitServe leaves its processes behind otherwise."""
    own = os.getpid()

    def end(signum: int, frame: object) -> None:
        if os.getpid() == own:  # its HTTP process is a fork, which uvicorn ends
            raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--models", type=Path, default=default_model_dir(128), help="one model folder")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch-size", type=int, default=4, help="2 and more: LitServe batches nothing at 1")
    parser.add_argument("--batch-wait-ms", type=float, default=20.0)
    arguments = parser.parse_args()
    if arguments.batch_size < 2:
        parser.error(f"--batch-size: {arguments.batch_size} given; 2 or more is accepted")

    end_on_sigterm()
    api = LaMambaAPI(
        arguments.models,
        max_batch_size=arguments.batch_size,
        batch_timeout=arguments.batch_wait_ms / 1000,
    )
    server = litserve.LitServer(
        api, accelerator=arguments.device, devices=1, timeout=False, healthcheck_path="/health/ready"
    )
    server.app.add_api_route("/health/live", lambda: {"status": "live"})
    server.run(host="127.0.0.1", port=arguments.port, log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    main()
