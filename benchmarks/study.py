"""Does the paper's ranking of networks hold on `places`, with equal images, batch and seeds?

Each recipe (LaMamba-Diff's sizes, its ablations, DiT) is trained by the training loop on 256 px views of
places, 32x32 latents, for the same number of images. Then `--num` samples without guidance, as in the paper's
Tables 2 to 4, are set against as many reserved views by Frechet distance of EfficientNet-Lite2's features.
Error bars are the jackknife's standard errors of other samples; what training itself varies by shows between
seeds.

A finished run is a row of `benchmarks/results/study.json`, keyed by the hash of all that it depends on: rows
that are there are not made again, so the study goes on whenever this is started again. Unfinished runs are in
the work folder as saved states and go on as well; where that folder is lost, only the run under way is.
`--limit-s` ends in time: training stops with a saved state. Runs come seed by seed, in the order of
`--recipes`.

The table and, of several networks, the bubble plot (distance against multiply-adds, areas are parameters) are
drawn at the end: study.md and study.png beside the results, by `benchmarks/study_report.py`.

    python benchmarks/study.py --limit-s 520
    python benchmarks/study.py --recipes imagenet-256-b imagenet-256-dit-b-2 --seeds 0 --limit-s 520

Options of training are compared in the same way, in a file of their own, and so are lengths of averages:

    python benchmarks/study.py --recipes imagenet-256-s --results benchmarks/results/study-options.json \\
        --set min_snr_gamma=5
    python benchmarks/study.py --recipes imagenet-256-s --results benchmarks/results/study-options.json \\
        --set 'ema_tracks=[0.05,0.1]' snapshot_every=50000 --sigma-rel 0.05 0.1 0.15 0.2
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.study_report import FLOOR, RECIPES, draw
from model.architecture import Architecture, architecture_fields
from model.autoencoder import to_pixels
from model.benchmark.environment import RESULTS, environment
from model.data.places import RESERVED_VIEW_IDS, Places
from model.device import resolve_device
from model.evaluation.features import EfficientNetLite2, FeatureExtractor
from model.evaluation.frechet import FeatureStatistics, StatisticsStream
from model.evaluation.jackknife import distance_error
from model.network.kinds import network_macs, network_parameters
from model.pipeline import LaMambaPipeline
from model.recipes import load_recipe
from model.training.config import TrainConfig
from model.training.export import export_run
from model.training.run import Diverged, train
from model.whole_file import write_json

PLACES_CLASSES, DOWNSAMPLING, LATENT_CHANNELS = 21, 8, 4
LEAST_START_S = 60.0
"""Less time than this is not worth the start of a run."""
EVALUATION_S = 60.0
"""What measuring a trained run may take: sampling, features and distances on a GPU."""
BATCH = 256

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run of the study and how its model is measured."""

    recipe: str
    seed: int
    fields: dict[str, Any]
    """Of TrainConfig, all but the run's folder and limits."""
    evaluation: dict[str, Any]
    """Number of samples, sampler and steps; `sigma_rel` where an average of this length is measured instead
    of the EMA.
    """
    overrides: tuple[str, ...] = ()
    """What of the recipe was set otherwise, for the row to say."""

    @property
    def architecture(self) -> Architecture:
        config = TrainConfig.from_dict(self.fields)
        return config.network_config(
            num_classes=PLACES_CLASSES, downsampling=DOWNSAMPLING, in_channels=LATENT_CHANNELS
        )

    @property
    def key(self) -> str:
        """16 hex digits of all that the row depends on: a network's field that is new changes it, too."""
        return _hash({"training": self._training, "evaluation": self.evaluation})

    @property
    def _training(self) -> dict[str, Any]:
        config = TrainConfig.from_dict(self.fields).to_dict()  # with the defaults, which may change
        depends = {name: value for name, value in config.items() if name not in ("name", "output_dir")}
        return depends | {"network": architecture_fields(self.architecture)}

    def config(self, work_dir: Path, *, stop_after_s: float) -> TrainConfig:
        """The run in its folder, without what only somebody who watches needs."""
        return TrainConfig.from_dict(
            self.fields
            | {"output_dir": str(self.folder(work_dir)), "stop_after_s": stop_after_s}
            | {"sample_every": 0, "keep_states": 1, "tensorboard": False}
        )

    def folder(self, work_dir: Path) -> Path:
        return work_dir / f"{self.recipe}-{self.seed}-{_hash(self._training)}"


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--images", type=int, default=1_000_000, help="that each run trains on")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="fields of every recipe to replace"
    )
    parser.add_argument(
        "--sigma-rel", nargs="*", type=float, default=[], help="lengths of averages to measure beside the EMA"
    )
    parser.add_argument("--num", type=int, default=5000, help="samples, and views of a distance")
    parser.add_argument("--sampler", default="dpm++")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="for this call as a whole")
    parser.add_argument("--device", default=None)
    parser.add_argument("--work-dir", type=Path, default=Path("runs/study"))
    parser.add_argument("--results", type=Path, default=RESULTS / "study.json")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    deadline = time.monotonic() + arguments.limit_s
    evaluation = {"num": arguments.num, "sampler": arguments.sampler, "num_inference_steps": arguments.steps}
    runs = planned_runs(
        *(arguments.recipes, arguments.seeds, arguments.images),
        evaluation,
        arguments.set,
        sigma_rels=arguments.sigma_rel,
    )
    study = Study(runs, arguments.work_dir, arguments.results, device=resolve_device(arguments.device))
    missing = study.go_on(deadline)
    print(draw(arguments.results, [run.recipe for run in runs]))
    print(f"{len(runs) - missing} of {len(runs)} runs are finished; the same command goes on")


def planned_runs(
    recipes: Sequence[str],
    seeds: Sequence[int],
    num_images: int,
    evaluation: dict[str, Any],
    overrides: Sequence[str] = (),
    *,
    sigma_rels: Sequence[float] = (),
) -> list[Run]:
    """The runs in the order in which they are made. ValueError for an unknown recipe or a wrong field.

    `sigma_rels`: lengths of averages of the same training, each a run that only measures.
    """
    shared = ["data=places", "autoencoder=places", "num_views=100000", f"num_images={num_images}"]
    runs = []
    for seed in seeds:
        for recipe in recipes:
            fields = load_recipe(recipe, [*shared, f"seed={seed}", *overrides])
            config = TrainConfig.from_dict(fields)
            if sigma_rels and not (config.snapshot_every and len(config.ema_tracks) > 1):
                raise ValueError(
                    f"sigma_rel: {sigma_rels[0]:g} given; it is accepted with "
                    "--set 'ema_tracks=[0.05,0.1]' snapshot_every=N"
                )
            runs += [
                Run(
                    recipe=config.name,
                    seed=seed,
                    fields=fields,
                    evaluation=evaluation | length,
                    overrides=tuple(overrides),
                )
                for length in ({}, *({"sigma_rel": sigma_rel} for sigma_rel in sigma_rels))
            ]
    return runs


class Study:
    """The rows that are there, and what makes the others."""

    def __init__(self, runs: Sequence[Run], work_dir: Path, results: Path, *, device: torch.device) -> None:
        self.runs, self.work_dir, self.results, self.device = runs, work_dir, results, device
        contents = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
        self.rows: dict[str, dict[str, Any]] = {row["key"]: row for row in contents.get("rows", [])}
        self._extractor: FeatureExtractor | None = None
        self._places: Places | None = None

    def go_on(self, deadline: float) -> int:
        """Make rows until none is missing or time is up (`time.monotonic`); how many are still missing.

        A run that diverges is left out, and stays missing.
        """
        for run in [run for run in self.runs if run.key not in self.rows]:
            if deadline - time.monotonic() < LEAST_START_S:
                break
            try:
                trained = self._trained(run, deadline)
            except Diverged as error:
                logger.warning("%s, seed %d: %s", run.recipe, run.seed, error)
                continue
            if not trained or deadline - time.monotonic() < EVALUATION_S:
                break
            self._measure(run)
        return sum(run.key not in self.rows for run in self.runs)

    def _trained(self, run: Run, deadline: float) -> bool:
        """Train, or go on with, a run; whether it is at its end."""
        folder = run.folder(self.work_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "model" / "model_index.json").is_file():
            return True
        latents = self.work_dir / "latents"  # the same for all runs, encoded once
        latents.mkdir(exist_ok=True)
        if not (folder / "latents").exists():
            (folder / "latents").symlink_to(latents.resolve(), target_is_directory=True)
        limit_s = deadline - time.monotonic() - LEAST_START_S / 2
        return train(run.config(self.work_dir, stop_after_s=limit_s), device=self.device) is not None

    def _measure(self, run: Run) -> None:
        """Add the row of a trained run, and throw its states away, which are 16 bytes a parameter, unless
        other averages come from them.
        """
        folder = run.folder(self.work_dir)
        model, sampling = folder / "model", dict(run.evaluation)
        sigma_rel = sampling.pop("sigma_rel", None)
        if sigma_rel is not None:
            model = folder / f"model-{sigma_rel:g}"
            export_run(folder, model, sigma_rel=sigma_rel)
        pipeline = LaMambaPipeline.load(model, device=self.device)
        samples = torch.cat([self._features(pixels) for pixels in sampled(pipeline, **sampling)])
        distance, error = distance_to(samples, self._reference(run, pipeline.resolution))
        architecture = run.architecture
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        row = {
            "key": run.key,
            "recipe": run.recipe,
            "set": list(run.overrides),
            "seed": run.seed,
            "frechet_distance": round(distance, 4),
            "standard_error": round(error, 4),
            "parameters": network_parameters(architecture),
            "gmacs": round(network_macs(architecture) / 1e9, 4),
            "images": run.fields["num_images"],
            "loss": lines[-1]["loss"],
            "images_per_second": statistics.median(line["images_per_second"] for line in lines),
            "training_seconds": round(step_seconds(lines), 1),
            "samples": run.evaluation | {"guidance_scale": 1.0, "weights": pipeline.weights_hash},
            "extractor": {"name": self.extractor.name, "weights": self.extractor.weights_hash},
            "autoencoder": pipeline.autoencoder.weights_hash[:12],
            "config": run.fields | {"network": architecture_fields(architecture)},
            "environment": environment(),
        }
        self._add(row)
        if not run.fields.get("ema_tracks"):
            shutil.rmtree(folder / "states", ignore_errors=True)
        logger.info("%s, seed %d: distance %.2f +- %.2f", run.recipe, run.seed, distance, error)

    def _reference(self, run: Run, size: int) -> FeatureStatistics:
        """Statistics of reserved views; at first also the row of as many others, the floor of any model."""
        num = run.evaluation["num"]
        name = f"{FLOOR}-{size}-{num}-{self.extractor.weights_hash}-{self.places.digest[:12]}"
        path = self.work_dir / f"{name}.safetensors"
        if not path.is_file():
            views = torch.cat([self._features(pixels) for pixels in self._views(0, num, size)])
            found = feature_statistics(views)
            tensors = {"mean": found.mean, "covariance": found.covariance}
            save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, path)
        tensors = load_file(path, device=str(self.device))
        reference = FeatureStatistics(count=num, mean=tensors["mean"], covariance=tensors["covariance"])
        if name not in self.rows:
            others = torch.cat([self._features(pixels) for pixels in self._views(num, num, size)])
            distance, error = distance_to(others, reference)
            self._add(
                {"key": name, "recipe": FLOOR, "seed": None, "frechet_distance": round(distance, 4)}
                | {"standard_error": round(error, 4), "num": num, "environment": environment()}
            )
        return reference

    def _views(self, first: int, num: int, size: int) -> Iterator[Tensor]:
        ids = RESERVED_VIEW_IDS + torch.arange(first, first + num, device=self.device)
        for part in ids.split(BATCH):
            yield to_pixels(self.places.render(part, size)[0])

    def _features(self, pixels: Tensor) -> Tensor:
        return self.extractor(pixels).pooled  # (n, d)

    def _add(self, row: dict[str, Any]) -> None:
        self.rows[row["key"]] = row
        write_json(self.results, {"rows": list(self.rows.values())})

    @property
    def extractor(self) -> FeatureExtractor:
        if self._extractor is None:
            self._extractor = EfficientNetLite2(self.device)
        return self._extractor

    @property
    def places(self) -> Places:
        if self._places is None:
            self._places = Places.load(device=self.device)
        return self._places


def sampled(
    pipeline: LaMambaPipeline, *, num: int, sampler: str, num_inference_steps: int
) -> Iterator[Tensor]:
    """Pixels (n, H, W, 3) of `num` samples without guidance, all classes equally often, image i of seed i."""
    for first in range(0, num, BATCH):
        seeds = range(first, min(first + BATCH, num))
        yield pipeline.generate(
            [seed % pipeline.num_classes for seed in seeds],
            seeds=seeds,
            guidance_scale=1.0,
            sampler=sampler,
            num_inference_steps=num_inference_steps,
            batch_size=BATCH,
        )


def feature_statistics(features: Tensor) -> FeatureStatistics:
    """Of features (n, d), on their device, where a distance is a matter of a GPU's seconds."""
    stream = StatisticsStream()
    stream.add(features)
    return stream.statistics().to(features.device)


def distance_to(features: Tensor, reference: FeatureStatistics) -> tuple[float, float]:
    """The distance of features (n, d) and its standard error."""
    return reference.distance(feature_statistics(features)), distance_error(features, reference)


def step_seconds(lines: Sequence[Mapping[str, Any]]) -> float:
    """Seconds of a run's steps by its log, without what comes before, between and after them."""
    seen = [0, *(line["images"] for line in lines)]
    return sum(
        (line["images"] - before) / line["images_per_second"]
        for before, line in zip(seen[:-1], lines, strict=True)
    )


if __name__ == "__main__":
    main()
