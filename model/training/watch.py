"""What a run tells while it goes: log.jsonl, the progress line, TensorBoard and W&B by option.

Only the main rank has one. A resumed run takes back what was told after the state that it goes on from.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.progress import Progress

from model.benchmark.ceilings import measure_ceilings
from model.training.config import TrainConfig
from model.whole_file import whole_file

__all__ = ["Watch", "full_images_per_second", "peak_flops"]

logger = logging.getLogger(__name__)

# Dense bf16 operations a second, by what torch calls the card, of the makers' data sheets.
_PEAK_TFLOPS = {
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "H800": 989.4,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.2,
}
_OPERATIONS_PER_MAC = 6  # two forward, and twice as many backward
_LOG_FILE = "log.jsonl"


def peak_flops(device: torch.device) -> float | None:
    """Operations a second that the card can do in bf16 at most: off its data sheet, else measured.

    None for a CPU.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for card, tflops in _PEAK_TFLOPS.items():
        if card in name:
            return tflops * 1e12
    measured = measure_ceilings(device, torch.bfloat16)["matmul_tflops"] * 1e12
    logger.info("MFU is of %.0f TFLOPS, the measured peak of %s", measured / 1e12, name)
    return measured


def full_images_per_second(macs: int, device: torch.device, num_devices: int = 1) -> float | None:
    """How many images a second so many devices would train on if they did nothing but the network's `macs`
    multiply-adds, the MFU's 1; None for a CPU.
    """
    peak = peak_flops(device)
    return None if peak is None else peak * num_devices / (_OPERATIONS_PER_MAC * macs)


class Watch:
    """The log of a run that goes on after `images_seen` images."""

    def __init__(
        self,
        config: TrainConfig,
        progress: Progress,
        *,
        images_seen: int,
        full_speed: float | None,
        device: torch.device,
    ) -> None:
        """`full_speed`: `full_images_per_second` of all devices."""
        self._config, self._progress, self._device = config, progress, device
        self._full_speed = full_speed
        self._folder = Path(config.output_dir)
        self._folder.mkdir(parents=True, exist_ok=True)
        _take_back(self._folder / _LOG_FILE, images_seen)
        self._task = progress.add_task(config.name, total=config.num_images, completed=images_seen)
        self._time, self._images = time.monotonic(), images_seen
        self._board = _tensorboard(self._folder, images_seen) if config.tensorboard else None
        self._wandb = None if config.wandb is None else _wandb_run(config)

    def record(self, images_seen: int, values: dict[str, float], *, skipped_steps: int) -> None:
        """Tell the means since the last record; it waits for nothing."""
        now = time.monotonic()
        speed = (images_seen - self._images) / (now - self._time)
        self._time, self._images = now, images_seen
        record: dict[str, Any] = {"images": images_seen}
        # JSON has no NaN: the mean of no steps.
        record |= {name: round(v, 5) if math.isfinite(v) else None for name, v in values.items()}
        record |= {"skipped_steps": skipped_steps, "images_per_second": round(speed, 1)}
        if self._full_speed is not None:
            record["mfu"] = round(speed / self._full_speed, 4)
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device) / 2**30
            record["peak_memory_gib"] = round(peak, 2)
        with (self._folder / _LOG_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        logger.info("%s", json.dumps(record))
        note = f"{self._config.name}  loss {record['loss']}  grad {record['grad_norm']}  {speed:.0f} images/s"
        note += f"  MFU {record['mfu']:.1%}" if "mfu" in record else ""
        note += f"  {record['peak_memory_gib']} GiB" if "peak_memory_gib" in record else ""
        self._progress.update(self._task, completed=images_seen, description=note)
        numbers = {name: value for name, value in record.items() if name != "images" and value is not None}
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(f"train/{name}", value, images_seen)
        if self._wandb is not None:
            self._wandb.log({"images": images_seen} | numbers)

    def picture(self, images_seen: int, pixels: NDArray[np.uint8]) -> None:
        """Keep a grid of samples (H, W, 3)."""
        folder = self._folder / "samples"
        folder.mkdir(exist_ok=True)
        path = folder / f"samples-{images_seen:012d}.png"
        with whole_file(path) as temporary:
            Image.fromarray(pixels).save(temporary, format="png")
        if self._board is not None:
            self._board.add_image("samples", pixels, images_seen, dataformats="HWC")
        if self._wandb is not None:
            image = importlib.import_module("wandb").Image(str(path))
            self._wandb.log({"images": images_seen, "samples": image})

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the block out of images a second, which are those of training; waits for the device first."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        started = time.monotonic()
        yield
        self._time += time.monotonic() - started

    def close(self) -> None:
        """Write what is not yet written."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _take_back(path: Path, images_seen: int) -> None:
    """Remove the records of steps that are taken again, and lines that are none, as a crash leaves them."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        images = record.get("images") if isinstance(record, dict) else None
        if isinstance(images, int) and images <= images_seen:
            kept.append(line + "\n")
    with whole_file(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


def _tensorboard(folder: Path, images_seen: int) -> Any:
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError:
        logger.info(
            "tensorboard is not installed (pip install 'lamamba[train]'): %s alone is kept", _LOG_FILE
        )
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=images_seen + 1)


def _wandb_run(config: TrainConfig) -> Any:
    """The run at Weights & Biases, the same one after a resumption."""
    wandb = importlib.import_module("wandb")
    path = Path(config.output_dir) / "wandb-run"
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
    return wandb.init(
        project=config.wandb,
        name=config.name,
        id=path.read_text(encoding="utf-8"),
        resume="allow",
        dir=config.output_dir,
        config=config.to_dict(),
    )
