"""The judge: a small classifier, trained on real views alone, that says which place an image shows.

It measures whether generated images show the class they were asked for, so it must be nearly always right on
real views it has not seen (at least 97 %; every report states its figure). Images of any size are reduced to
64 px first, so that one judge serves models of every resolution.

    images in [-1, 1] -> 64 px -> 4 stages of (convolution /2, residual block) -> mean -> linear

Legend: n images, K classes.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model.data.places import Places
from model.whole_file import whole_file

__all__ = ["REQUIRED_ACCURACY", "Confusion", "Judge", "judge_training", "train_judge"]

logger = logging.getLogger(__name__)

REQUIRED_ACCURACY = 0.97
"""The least share of reserved real views that a judge must get right."""

INPUT_SIZE = 64
_WIDTHS = (24, 48, 96, 128)
_RENDER_SIZE = 128
_BATCH_SIZE = 512
_FIRST_VIEW_ID = 2**39  # below the reserved ids, above those that networks are trained on
_PEAK_LEARNING_RATE = 3e-3
_WEIGHT_DECAY = 0.02
_WARMUP_SHARE = 0.05
_LABEL_SMOOTHING = 0.05
_GAIN, _OFFSET, _BLUR = 0.2, 0.1, 0.7


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside the identity; (n, width, h, w) in and out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = _convolution(width, width, 1), _convolution(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(F.relu(self.first(x))))


class Judge(nn.Module):
    """Images (n, 3, H, W) in [-1, 1] -> logits (n, K)."""

    def __init__(self, labels: tuple[str, ...]) -> None:
        super().__init__()
        self.labels = labels
        self.training_record: dict[str, Any] = {}
        stages: list[nn.Module] = []
        for before, width in zip((3, *_WIDTHS), _WIDTHS, strict=False):
            stages += [_convolution(before, width, 2), nn.ReLU(), ResidualBlock(width)]
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(_WIDTHS[-1], len(labels))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """(n, 128): what the classifier sees of images (n, 3, H, W) in [-1, 1]."""
        return self.stages(_reduced(images)).mean(dim=(2, 3))

    @torch.inference_mode()
    def classify(self, pixels: Tensor) -> Tensor:
        """The class, (n,) int64 on the judge's device, of pixels (n, H, W, 3) uint8; fp32."""
        x = pixels.to(self.head.weight.device).movedim(-1, 1).float() / 127.5 - 1
        return self(x).argmax(dim=1)

    def save(self, path: Path) -> None:
        """Write weights, labels and the training record as safetensors."""
        metadata = {"labels": json.dumps(self.labels), "training": json.dumps(self.training_record)}
        weights = {name: value.contiguous().cpu() for name, value in self.state_dict().items()}
        with whole_file(path) as temporary:
            save_file(weights, temporary, metadata)

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> Judge:
        """Read what `save` wrote; a ValueError names the file and what is wrong with it."""
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                judge = cls(tuple(json.loads(metadata["labels"])))
                judge.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
                judge.training_record = dict(json.loads(metadata["training"]))
        except (OSError, KeyError, RuntimeError, json.JSONDecodeError, SafetensorError) as error:
            raise ValueError(
                f"judge: {path} given; the judge.safetensors of an earlier evaluation is accepted "
                f"({type(error).__name__}: {' '.join(str(error).split())[:200]})"
            ) from error
        return _placed(judge, torch.device(device)).eval()


class Confusion:
    """Counts of (asked class, judged class); `counts` (K, K) int64 on the CPU."""

    def __init__(self, labels: tuple[str, ...]) -> None:
        self.labels = labels
        self.counts = torch.zeros(len(labels), len(labels), dtype=torch.int64)

    def add(self, asked: Tensor, judged: Tensor) -> None:
        """Count the images with these classes, (n,) int64 each."""
        classes = len(self.labels)
        pairs = torch.bincount(asked.cpu() * classes + judged.cpu(), minlength=classes**2)
        self.counts += pairs.view(classes, classes)

    @property
    def accuracy(self) -> float:
        """The share of images judged to be what they were asked to be, in [0, 1]."""
        return (self.counts.trace() / self.counts.sum()).item()

    def report(self, num_pairs: int = 5) -> dict[str, Any]:
        """Accuracy over all, by class (None: no image of it), and the pairs most often confused."""
        totals = self.counts.sum(dim=1)
        by_class = {
            label: round((self.counts[i, i] / totals[i]).item(), 4) if totals[i] else None
            for i, label in enumerate(self.labels)
        }
        wrong = self.counts - torch.diag(self.counts.diagonal())
        worst = wrong.flatten().topk(min(num_pairs, wrong.numel()))
        pairs = [
            {
                "asked": self.labels[index // len(self.labels)],
                "judged": self.labels[index % len(self.labels)],
                "images": n,
            }
            for n, index in zip(worst.values.tolist(), worst.indices.tolist(), strict=True)
            if n
        ]
        return {
            "accuracy": round(self.accuracy, 5),
            "num_images": int(totals.sum()),
            "by_class": by_class,
            "most_confused": pairs,
        }


def judge_training(num_views: int, *, batch_size: int = _BATCH_SIZE, seed: int = 0) -> dict[str, int]:
    """What `train_judge` of these arguments records: of the views only whole batches are seen."""
    batch_size = min(batch_size, num_views)
    return {"num_views": num_views // batch_size * batch_size, "batch_size": batch_size, "seed": seed}


def train_judge(
    places: Places,
    *,
    num_views: int,
    batch_size: int = _BATCH_SIZE,
    seed: int = 0,
    progress: Progress | None = None,
) -> Judge:
    """A judge of `places`, on its device, trained on `num_views` views that are not reserved, each seen once.

    Views are mildly changed (gain, offset, blur). A function of the arguments, up to CUDA's order of sums.
    """
    device = places.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge(places.labels)
    judge = _placed(judge, device)
    record = judge_training(num_views, batch_size=batch_size, seed=seed)
    batch_size = record["batch_size"]
    num_steps = record["num_views"] // batch_size
    optimizer = torch.optim.AdamW(judge.parameters(), lr=0.0, weight_decay=_WEIGHT_DECAY, fused=True)
    generator = torch.Generator(device).manual_seed(seed)
    task = progress.add_task("training the judge", total=num_steps) if progress else None
    loss = torch.zeros(())
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, num_steps)
        ids = torch.arange(batch_size, device=device) + (_FIRST_VIEW_ID + step * batch_size)
        images, labels = places.render(ids, _RENDER_SIZE)
        images = _augmented(_reduced(images), generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = judge(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=_LABEL_SMOOTHING)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if progress and task is not None:
            progress.update(task, advance=1)
    judge.training_record = record
    logger.info("judge: trained on %d views, last loss %.3f", num_steps * batch_size, loss.item())
    return judge.eval()


def _convolution(before: int, after: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after))


def _placed(judge: Judge, device: torch.device) -> Judge:
    judge.to(device=device)
    judge.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
    return judge


def _reduced(images: Tensor) -> Tensor:
    """Images (n, 3, H, W) at the judge's input size."""
    if images.shape[2:] == (INPUT_SIZE, INPUT_SIZE):
        return images
    return F.interpolate(
        images, (INPUT_SIZE, INPUT_SIZE), mode="bilinear", align_corners=False, antialias=True
    )


def _augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image with its own gain in 1 +- 0.2, offset in +- 0.1 and blur (0 to 0.7 of a 3x3 box)."""
    uniform = torch.rand(3, images.shape[0], 1, 1, 1, generator=generator, device=images.device)
    gain, offset = 1 + _GAIN * (2 * uniform[0] - 1), _OFFSET * (2 * uniform[1] - 1)
    blurred = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    return torch.lerp(images, blurred, _BLUR * uniform[2]) * gain + offset


def _learning_rate(step: int, num_steps: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    done = (step + 1) / num_steps
    if done <= _WARMUP_SHARE:
        return _PEAK_LEARNING_RATE * done / _WARMUP_SHARE
    return _PEAK_LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * (done - _WARMUP_SHARE) / (1 - _WARMUP_SHARE)))
