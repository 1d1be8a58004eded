"""Evaluate a model folder on places: `lamamba evaluate --model DIR --output-dir OUT`.

Distances: Frechet distance of features between `num` images and the first `num` reserved real views, for
    real views    the next `num` reserved views: the floor, what equal distributions give with so few images
    reconstructions of the reference views by the autoencoder: the price of latents
    samples       at each guidance scale, all classes equally often
Judge: the share of samples that a classifier, trained on real views, takes for the class asked for.
Nearest: how near samples lie to training views, beside how near unseen real views lie to them.

Outputs: evaluation.json (each number with all that it depends on; rewritten after each part, so that an
interrupted run keeps what it measured), judge.safetensors, and the pictures grid, real, guidance and nearest.
"""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.autoencoder import to_pixels
from model.data.places import RESERVED_VIEW_IDS, Places
from model.evaluation import sources
from model.evaluation.config import EvaluationConfig
from model.evaluation.features import HASH_DIGITS, FeatureExtractor, file_hash
from model.evaluation.frechet import FeatureStatistics, feature_statistics
from model.evaluation.judge import REQUIRED_ACCURACY, Confusion, Judge, train_judge
from model.evaluation.nearest import nearest_views
from model.evaluation.pictures import class_grid, labelled_grid, save_picture, spread
from model.model_folder import write_json
from model.pipeline import LaMambaPipeline
from model.progress import progress_display
from model.whole_file import whole_file

__all__ = ["Evaluation"]

logger = logging.getLogger(__name__)

_JUDGE_FILE = "judge.safetensors"
_GUIDANCE_CLASSES = 6
_NEAREST_SHOWN = 8


class Evaluation:
    """One evaluation of one model. `run` does everything; `report` is what evaluation.json holds."""

    def __init__(
        self,
        pipeline: LaMambaPipeline,
        config: EvaluationConfig,
        *,
        places: Places,
        extractor: FeatureExtractor,
        output_dir: Path,
        judge_file: Path | None = None,
    ) -> None:
        """`judge_file`: the judge of an earlier evaluation; without it one is trained."""
        if pipeline.labels != places.labels:
            raise ValueError(
                f"model: {pipeline.name} has the classes {', '.join(pipeline.labels) or 'none'}; "
                f"accepted is a model of the {len(places.labels)} classes of places"
            )
        self.pipeline, self.config, self.places, self.extractor = pipeline, config, places, extractor
        self.output_dir, self.judge_file = output_dir, judge_file
        self.progress = progress_display()
        self.size = pipeline.resolution
        self.kept = len(places.labels) * config.images_per_class  # samples of each scale kept for pictures
        self.samples: dict[float, Tensor] = {}  # guidance scale -> (kept, H, W, 3) uint8
        self.report: dict[str, Any] = {
            "model": {
                "name": pipeline.name,
                "weights": pipeline.weights_hash,
                "autoencoder": pipeline.autoencoder.weights_hash[:HASH_DIGITS],  # as loaded, in `dtype`
                "resolution": pipeline.resolution,
                "parameters": sum(p.numel() for p in pipeline.network.parameters()),
                "dtype": str(pipeline.dtype).removeprefix("torch."),
                "scan_backend": pipeline.scan_backend,
            },
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": _device_name(pipeline.device),
            "torch": torch.__version__,
            "distances": [],
            "class_accuracy": [],
            "seconds": {},
        }

    def run(self) -> dict[str, Any]:
        """Measure, write evaluation.json and the pictures; returns the report."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        with self.progress:
            self.judge, self.judge_hash = self._judge()
            reference = self._real_views()
            if self.config.compile:
                self.pipeline.network.compile(dynamic=False)
            for scale in self.config.guidance_scales:
                with self._part(f"guidance {scale:g}"):
                    self._samples(scale, reference)
            with self._part("pictures"):
                self.report["pictures"] = self._pictures()
            with self._part("nearest"):
                self.report["nearest"] = self._nearest()
        return self.report

    @property
    def shown_scale(self) -> float:
        """The guidance scale whose samples the pictures show: the nearest to the model's default."""
        return min(self.config.guidance_scales, key=lambda s: abs(s - self.pipeline.default_guidance_scale))

    def _judge(self) -> tuple[Judge, str]:
        path = self.judge_file or self.output_dir / _JUDGE_FILE
        if self.judge_file is None:
            with self._part("judge"):
                judge = train_judge(
                    self.places,
                    num_views=self.config.judge_views,
                    seed=self.config.seed,
                    progress=self.progress,
                )
                judge.save(path)
        judge = Judge.load(path, self.places.device)
        if judge.labels != self.places.labels:
            raise ValueError(f"judge: {path} knows {', '.join(judge.labels)}; a judge of places is accepted")
        return judge, file_hash(path)

    def _real_views(self) -> FeatureStatistics:
        """Measure reference, floor and reconstructions; returns the reference's statistics."""
        num, first = self.config.num, RESERVED_VIEW_IDS
        with self._part("real views"):
            reference, confusion = self._measure(sources.views(self.places, first, num, self.size))
            assert reference is not None  # measured with features
            self.report["judge"] = {
                "weights": self.judge_hash,
                "training": self.judge.training_record,
                "reserved_views": confusion.report(),
                "required_accuracy": REQUIRED_ACCURACY,
            }
            if confusion.accuracy < REQUIRED_ACCURACY:
                logger.warning("judge: only %.4f of reserved views right", confusion.accuracy)
            logger.info("judge: %.4f of %d reserved views right", confusion.accuracy, num)
            floor, confusion = self._measure(sources.views(self.places, first + num, num, self.size))
            self._add("reserved real views", floor, confusion, reference)
        with self._part("reconstructions"):
            reconstructions, confusion = self._measure(
                sources.reconstructed_views(self.places, self.pipeline.autoencoder, first, num, self.size)
            )
            self._add("reconstructions of the reference", reconstructions, confusion, reference)
        return reference

    def _samples(self, scale: float, reference: FeatureStatistics) -> None:
        config, num = self.config, self.config.num_images(scale)
        task = self.progress.add_task(
            f"sampling at guidance {scale:g}", total=num * config.num_inference_steps
        )
        settings = {
            "sampler": config.sampler,
            "num_inference_steps": config.num_inference_steps,
            "seed": config.seed,
        }
        batches = sources.sampled_images(
            self.pipeline,
            num,
            guidance_scale=scale,
            num_rows=config.num_rows,
            fixed_shapes=config.compile,
            progress=lambda steps: self.progress.update(task, advance=steps),
            **settings,  # type: ignore[arg-type]
        )
        keep: list[Tensor] = []
        statistics, confusion = self._measure(
            sources.first_kept(batches, keep, self.kept), with_features=config.measures_distance(scale)
        )
        self.samples[scale] = torch.cat(keep)[: self.kept]
        self._add("samples", statistics, confusion, reference, guidance_scale=scale, **settings)

    def _measure(
        self, batches: sources.Batches, *, with_features: bool = True
    ) -> tuple[FeatureStatistics | None, Confusion]:
        """Feature statistics, if wanted, and the judge's verdicts over all batches."""
        features = []
        confusion = Confusion(self.places.labels)
        for pixels, labels in batches:
            confusion.add(labels, self.judge.classify(pixels))
            if with_features:
                features.append(self.extractor(pixels))
        return feature_statistics(torch.cat(features)) if features else None, confusion

    def _add(
        self,
        images: str,
        statistics: FeatureStatistics | None,
        confusion: Confusion,
        reference: FeatureStatistics,
        **settings: Any,
    ) -> None:
        """Put one set of images into the report, with everything that its numbers depend on."""
        model = self.report["model"]
        source = {
            "images": images,
            "resolution": self.size,
            "weights": model["weights"] if images == "samples" else None,
            "autoencoder": None if images == "reserved real views" else model["autoencoder"],
            **settings,
        }
        source = {key: value for key, value in source.items() if value is not None}
        if statistics is not None:
            distance = statistics.distance(reference)
            self.report["distances"].append(
                {
                    "frechet_distance": round(distance, 4),
                    "num_images": statistics.count,
                    "num_reference_views": reference.count,
                    "extractor": self.extractor.name,
                    "extractor_weights": self.extractor.weights_hash,
                    **source,
                }
            )
            logger.info("%s %s: frechet distance %.3f", images, settings.get("guidance_scale", ""), distance)
        self.report["class_accuracy"].append({**confusion.report(), "judge": self.judge_hash, **source})
        logger.info(
            "%s %s: %.4f judged right", images, settings.get("guidance_scale", ""), confusion.accuracy
        )

    def _pictures(self) -> list[str]:
        labels, samples = self.places.labels, {s: _array(x) for s, x in sorted(self.samples.items())}
        real = _array(self._render(sources.balanced_view_ids(self.places, self.config.images_per_class)))
        classes = spread(min(len(labels), *map(len, samples.values())), _GUIDANCE_CLASSES)
        guidance = [[images[c] for images in samples.values()] for c in classes]
        pictures = {
            "grid": class_grid(samples[self.shown_scale], labels),
            "real": class_grid(real, labels),
            "guidance": labelled_grid(guidance, [labels[c] for c in classes], [f"{s:g}" for s in samples]),
        }
        return [save_picture(image, self.output_dir, stem) for stem, image in pictures.items()]

    def _nearest(self) -> dict[str, Any]:
        """Training views nearest to samples and, as a measure of what is usual, to unseen real views."""
        samples, labels = self.samples[self.shown_scale], self.places.labels
        real = self._render(sources.balanced_view_ids(self.places, self.config.images_per_class))
        num_views = self.config.num_training_views
        found = nearest_views(
            torch.cat([samples.to(real.device), real]),
            sources.views(self.places, 0, num_views, self.size),
            extractor=self.extractor,
        )
        shown = spread(min(len(labels), len(samples)), _NEAREST_SHOWN)
        rows = [samples[shown], *(self._render(search.ids[shown]) for search in found.values())]
        picture = labelled_grid(
            [list(_array(row)) for row in rows],
            ["sample", *(f"nearest by {name}" for name in found)],
            [labels[c] for c in shown],
        )
        self.report["pictures"].append(save_picture(picture, self.output_dir, "nearest"))
        return {
            "num_training_views": num_views,
            "num_images": len(samples),
            "guidance_scale": self.shown_scale,
            "weights": self.report["model"]["weights"],
            "extractor_weights": self.extractor.weights_hash,
            "samples": {name: search.summary(slice(0, len(samples))) for name, search in found.items()},
            "unseen_real_views": {
                name: search.summary(slice(len(samples), None)) for name, search in found.items()
            },
        }

    def _render(self, ids: Tensor) -> Tensor:
        """Pixels (n, H, W, 3) uint8 of the views with these ids."""
        return to_pixels(self.places.render(ids, self.size)[0])

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        """Time a part of the evaluation and write the report after it."""
        started = time.perf_counter()
        yield
        self.report["seconds"][name] = round(time.perf_counter() - started, 2)
        path = self.output_dir / "evaluation.json"
        with whole_file(path) as temporary:
            write_json(temporary, self.report)
        logger.info("%s: %.1f s", name, self.report["seconds"][name])


def _array(pixels: Tensor) -> NDArray[np.uint8]:
    return pixels.cpu().numpy()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
