"""Does step caching make images of a quality that fewer steps do not reach at the same cost?

In DeepCache (Ma et al., arXiv 2312.00858) every k-th step runs the whole U-Net. The steps between run its d
outer levels alone and take what comes up from below them as the last whole step left it, row by row. What
there is to beat is a sampler of fewer steps, which is cheaper, too: `places-128` makes the same seeds with
DPM-Solver++ and DDIM in several numbers of steps, with and without a cache, all guided at all steps. Both
samplers follow the same differential equation, so that images of very many steps are what all of them are
after:

    gmacs                     multiply-adds of an image, by the network's own count (`lamamba info`)
    psnr_db                   to the images of the same seeds of the reference, mean over images
    feature_distance          mean square distance of EfficientNet-Lite2's features from theirs
    frechet_distance          of these features from those of reserved views of places, and how far that is
                              above the baseline's, with the jackknife error of the difference; DPM-Solver++
                              alone. Of so few images it is far above the model card's, of 5,000, and tells
                              no setting here from another
    psnr_cost                 the cost over that of DPM-Solver++ without a cache at the same PSNR: a cache is
                              worth its while where this is below 1

The time of a forward of the outer levels, over that of the whole network, is measured beside their share of
the multiply-adds.

    python benchmarks/step_caching.py                   # half an hour on two busy cores
    python benchmarks/step_caching.py --images 21 --compared 4 --views 42
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.image_agreement import psnr
from benchmarks.study import feature_statistics
from model.autoencoder import to_pixels
from model.benchmark.environment import RESULTS, write_results
from model.benchmark.plot import can_plot
from model.config import LaMambaConfig
from model.cpu_rows import prepare_process
from model.cpu_threads import available_cpu_threads
from model.data.places import RESERVED_VIEW_IDS, Places
from model.evaluation.features import EfficientNetLite2
from model.evaluation.frechet import FeatureStatistics
from model.evaluation.jackknife import distances_without, jackknife_error
from model.network.block import LaMambaBlock
from model.network.lamamba import LaMambaDiff, meta_network
from model.network.macs import count_forward_macs
from model.pipeline import LaMambaPipeline
from model.pretrained import PRETRAINED_RESOLUTIONS, default_model_dir
from model.whole_file import whole_file

BATCH = 21
TIMED_ROWS, TIMED_ROUNDS = 8, 15

_COLORS = {"dpm++": "#c2410c", "ddim": "#1d4ed8"}
_STYLES = {0: ("o-", "no cache"), 1: ("s", "cached, d 1"), 2: ("^", "cached, d 2")}
"""By depth."""
_TICKS = (1.5, 2, 3, 4, 6, 8, 10)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A sampler, its steps, and what a cache saves of them."""

    sampler: str
    steps: int
    interval: int = 1
    """k: every k-th step is whole, from the first on; 1 is no cache."""
    depth: int = 0
    """d: levels that the other steps run, from the outermost; 0 without a cache."""
    start: int = 0
    """Steps at the beginning that are whole in any case."""

    def __str__(self) -> str:
        start = f" from step {self.start}" if self.start else ""
        cache = f", k {self.interval}, d {self.depth}{start}" if self.interval > 1 else ""
        return f"{self.sampler} {self.steps}{cache}"

    @property
    def whole_steps(self) -> int:
        return sum(self.is_whole(step) for step in range(self.steps))

    def is_whole(self, step: int) -> bool:
        return step < self.start or step % self.interval == 0


def _cached(sampler: str, steps: int, *caches: tuple[int, int], start: int = 0) -> list[Setting]:
    return [Setting(sampler=sampler, steps=steps, interval=k, depth=d, start=start) for k, d in caches]


REFERENCE = Setting(sampler="dpm++", steps=100)
BASELINE = Setting(sampler="dpm++", steps=20)
PLAIN = [
    *(Setting(sampler="dpm++", steps=steps) for steps in (6, 8, 10, 15, 20)),
    *(Setting(sampler="ddim", steps=steps) for steps in (20, 34, 50)),
]
CACHED = [
    *_cached("dpm++", 10, (2, 1), (2, 2)),
    *_cached("dpm++", 15, (2, 1)),
    *_cached("dpm++", 20, (2, 1), (2, 2), (3, 1)),
    *_cached("dpm++", 20, (2, 1), start=10),
    *_cached("ddim", 50, (2, 1), (5, 1)),
]


class StepCache:
    """What the outer levels of a network take from below, and whether the running call makes it anew."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.step = 0
        self.whole = True
        self._kept: Tensor | None = None

    def restart(self) -> None:
        """Begin with other images: the next call is their first step."""
        self.step = 0

    def count(self, *_: object) -> None:
        """A hook before each call of the network."""
        self.whole = self.setting.is_whole(self.step)
        self.step += 1

    def skipping(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward` of a deep module, which hands on its first argument at the calls that are not whole."""

        def skipped(x: Any, *others: Any) -> Any:
            return forward(x, *others) if self.whole else x

        return skipped

    def unconditioned(self, block: LaMambaBlock) -> Callable[[Tensor], Tensor]:
        """`adaln_vectors` of a deep block, which costs nothing at the calls that are not whole."""
        vectors, width = block.adaln_vectors, block.modulation.out_features
        return lambda c: vectors(c) if self.whole else c.new_empty(len(c), width)

    def keeping(self, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """`forward` of the module through which the deep levels come up."""

        def kept(x: Tensor) -> Tensor:
            if self.whole:
                self._kept = forward(x)
            assert self._kept is not None  # the first call is whole
            return self._kept

        return kept


@contextmanager
def step_cache(network: LaMambaDiff, setting: Setting) -> Iterator[StepCache]:
    """Have `network`, at its n-th call, run what `setting` says of its n-th step; the steps' number aside.

    The rows of the calls between must be those of the whole call before: the same images, in the same order.
    Raises ValueError for a depth that leaves no level to skip.
    """
    levels, depth = len(network.decoder), setting.depth
    if not 1 <= depth < levels:
        raise ValueError(f"depth: {depth} given; this network accepts 1 to {levels - 1}")
    above = levels - depth  # of the decoder, which counts from the deepest level: its first outer level
    blocks = [*itertools.chain(*network.encoder[depth:], network.middle, *network.decoder[:above])]
    resampling = [*network.mergings[depth - 1 :], *network.expandings[:above], *network.skips[:above]]
    cache = StepCache(setting)
    with ExitStack() as stack:
        for module in (*blocks, *resampling):
            stack.enter_context(patch.object(module, "forward", cache.skipping(module.forward)))
        for block in blocks:
            assert isinstance(block, LaMambaBlock)
            stack.enter_context(patch.object(block, "adaln_vectors", cache.unconditioned(block)))
        boundary = network.expandings[above]
        stack.enter_context(patch.object(boundary, "forward", cache.keeping(boundary.forward)))
        stack.callback(network.register_forward_pre_hook(cache.count).remove)
        yield cache


@functools.cache
def forward_macs(architecture: LaMambaConfig, depth: int) -> int:
    """Multiply-adds of a row: of the whole network for depth 0, else of its `depth` outer levels."""
    network = meta_network(architecture)
    if depth == 0:
        return count_forward_macs(network).total
    with step_cache(network, _every_second_step(depth)):
        count_forward_macs(network)
        return count_forward_macs(network).total


def image_macs(setting: Setting, architecture: LaMambaConfig) -> int:
    """Multiply-adds of a guided image: two rows a step."""
    macs = setting.whole_steps * forward_macs(architecture, 0)
    if setting.interval > 1:
        macs += (setting.steps - setting.whole_steps) * forward_macs(architecture, setting.depth)
    return 2 * macs


@torch.inference_mode()
def sampled(pipeline: LaMambaPipeline, setting: Setting, num_images: int) -> Tensor:
    """Pixels (n, H, W, 3) uint8 of images with the model's guidance, image i of seed i, classes in turn."""
    network = _lamamba(pipeline)
    parts = []
    with ExitStack() as stack:
        cache = None
        if setting.interval > 1:
            cache = stack.enter_context(step_cache(network, setting))
        for first in range(0, num_images, BATCH):
            seeds = range(first, min(first + BATCH, num_images))
            if cache is not None:
                cache.restart()
            parts.append(
                pipeline.generate(
                    [seed % pipeline.num_classes for seed in seeds],
                    seeds=seeds,
                    sampler=setting.sampler,
                    num_inference_steps=setting.steps,
                    batch_size=BATCH,
                )
            )
    return torch.cat(parts)


def time_share(network: LaMambaDiff, depth: int) -> float:
    """Time of a forward of so many outer levels over that of the whole network, on one core."""
    side, channels = network.architecture.sample_size, network.architecture.in_channels
    x = torch.randn(TIMED_ROWS, channels, side, side, generator=torch.Generator().manual_seed(0))
    t, y = torch.full((TIMED_ROWS,), 500), torch.zeros(TIMED_ROWS, dtype=torch.int64)
    ratios = []
    with torch.inference_mode(), step_cache(network, _every_second_step(depth)):
        for _ in range(TIMED_ROUNDS):
            moments = [time.perf_counter()]
            for _ in range(2):  # the whole network, then its outer levels
                network(x, t, y)
                moments.append(time.perf_counter())
            ratios.append((moments[2] - moments[1]) / (moments[1] - moments[0]))
    return statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--resolution", type=int, choices=PRETRAINED_RESOLUTIONS, default=128)
    parser.add_argument("--images", type=int, default=42, help="of a setting with a distance: seeds 0, 1, ..")
    parser.add_argument(
        "--compared", type=int, default=21, help="of the reference and of others: seeds 0, 1, .."
    )
    parser.add_argument("--views", type=int, default=252, help="reserved views of places")
    parser.add_argument("--name", default="step-caching", help="of the results' files")
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    prepare_process()
    results = measured(
        default_model_dir(arguments.resolution),
        [*PLAIN, *CACHED],
        num_images=arguments.images,
        num_compared=arguments.compared,
        num_views=arguments.views,
    )
    path = write_results(arguments.name, results, arguments.output_dir)
    if can_plot():
        plot(results, path.with_suffix(".png"))
    print(path)


def measured(
    folder: Path, settings: Sequence[Setting], *, num_images: int, num_compared: int, num_views: int
) -> dict[str, Any]:
    """The results of a model of places on the CPU, a core a setting; `BASELINE` is among the settings."""
    pipeline, extractor = LaMambaPipeline.load(folder, device="cpu"), EfficientNetLite2()
    network = _lamamba(pipeline)
    depths = sorted({setting.depth for setting in settings} - {0})
    whole = forward_macs(network.architecture, 0)
    results = {
        "model": pipeline.name,
        "weights": pipeline.weights_hash,
        "guidance_scale": pipeline.default_guidance_scale,
        "images": num_images,
        "compared_images": num_compared,
        "reference": str(REFERENCE),
        "baseline": str(BASELINE),
        "views": num_views,
        "extractor": {"name": extractor.name, "weights": extractor.weights_hash},
        "row_gmacs": round(whole / 1e9, 4),
        "macs_share": {
            depth: round(forward_macs(network.architecture, depth) / whole, 4) for depth in depths
        },
        "time_share": {depth: round(time_share(network, depth), 3) for depth in depths},
    }

    def made(setting: Setting) -> tuple[Tensor, Tensor]:
        number = num_images if has_distance(setting) else num_compared
        # A pipeline of its own: a cache belongs to one network.
        pixels = sampled(LaMambaPipeline.load(folder, device="cpu"), setting, number)
        print(f"{setting}: {number} images", flush=True)
        return pixels, extractor(pixels).pooled

    longest_first = sorted({REFERENCE, *settings}, key=lambda setting: -setting.whole_steps)
    with ThreadPoolExecutor(
        available_cpu_threads(), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        images = dict(zip(longest_first, pool.map(made, longest_first), strict=True))
        views = view_statistics(extractor, num_views, pipeline.resolution)
        with_distance = [setting for setting in settings if has_distance(setting)]
        distances = dict(
            zip(
                with_distance,
                pool.map(lambda setting: group_distances(images[setting][1], views), with_distance),
                strict=True,
            )
        )
    rows = []
    for setting in settings:
        row = {"name": str(setting), **dataclasses.asdict(setting)}
        row["gmacs"] = round(image_macs(setting, network.architecture) / 1e9, 3)
        row |= nearness(images[setting], images[REFERENCE], num_compared)
        if setting in distances:
            row |= distance_fields(distances[setting], distances[BASELINE])
        rows.append(row)
    for row in rows:
        row["psnr_cost"] = psnr_cost(row, rows)
        print(*(f"{name} {value}" for name, value in row.items()), sep=", ")
    return results | {"settings": rows}


def has_distance(setting: Setting) -> bool:
    """Whether a setting is set against views: those of the reference's own sampler, but for the reference."""
    return setting.sampler == REFERENCE.sampler and setting != REFERENCE


def view_statistics(extractor: EfficientNetLite2, num: int, size: int) -> FeatureStatistics:
    views, _ = Places.load().render(RESERVED_VIEW_IDS + torch.arange(num), size)
    return feature_statistics(extractor(to_pixels(views)).pooled)


def nearness(
    images: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor], num_compared: int
) -> dict[str, float]:
    """How near (pixels, features) of the first images are to those of the reference."""
    (pixels, expected), (features, expected_features) = (
        (ours[:num_compared], theirs[:num_compared]) for ours, theirs in zip(images, reference, strict=True)
    )
    deviation = (features - expected_features).square().sum(1)  # (n,)
    return {
        "psnr_db": round(statistics.fmean(psnr(expected, pixels)), 2),
        "feature_distance": round(deviation.mean().item(), 3),
    }


def group_distances(features: Tensor, views: FeatureStatistics) -> Tensor:
    """(1 + g,) float64: the distance of features (n, d), then those without each group of the jackknife."""
    distance = torch.tensor([views.distance(feature_statistics(features))], dtype=torch.float64)
    return torch.cat([distance, distances_without(features, views)])


def distance_fields(distances: Tensor, baseline: Tensor) -> dict[str, float]:
    """The distance, how far it is above the baseline's, and the jackknife error of that difference.

    Both are of the same seeds, so that the error of the difference is smaller than that of either.
    """
    difference = distances - baseline
    return {
        "frechet_distance": round(distances[0].item(), 2),
        "frechet_difference": round(difference[0].item(), 2),
        "frechet_difference_error": round(jackknife_error(difference[1:]), 2),
    }


def psnr_cost(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The cost of `row` over that of the reference's sampler without a cache at the same PSNR, interpolated
    between its numbers of steps; None beyond them.
    """
    plain = [
        (other["psnr_db"], other["gmacs"])
        for other in rows
        if other["sampler"] == REFERENCE.sampler and other["interval"] == 1
    ]
    decibels, gmacs = zip(*sorted(plain), strict=True)
    if not decibels[0] <= row["psnr_db"] <= decibels[-1]:
        return None
    return round(row["gmacs"] / float(np.interp(row["psnr_db"], decibels, gmacs)), 2)


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Write PSNR and feature distance against cost, a line for what has no cache and points for what has."""
    import matplotlib as mpl

    mpl.use("Agg")  # writes files; no display is looked for
    from matplotlib import pyplot as plt

    rows = results["settings"]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    panels = {"psnr_db": "PSNR, dB", "feature_distance": "mean square distance of features"}
    for axis, (field, label) in zip(axes, panels.items(), strict=True):
        for sampler, color in _COLORS.items():
            mine = [row for row in rows if row["sampler"] == sampler]
            for depth, (style, name) in _STYLES.items():
                points = sorted((row["gmacs"], row[field]) for row in mine if row["depth"] == depth)
                if points:
                    axis.plot(
                        *zip(*points, strict=True), style, color=color, mfc="none", label=f"{sampler}, {name}"
                    )
        for row in rows:
            cache = f" k{row['interval']}" if row["interval"] > 1 else ""
            start = f" from {row['start']}" if row["start"] else ""
            axis.annotate(
                f"{row['steps']}{cache}{start}",
                (row["gmacs"], row[field]),
                xytext=(5, -9 if cache else 3),
                textcoords="offset points",
                fontsize=7,
            )
        axis.set_xscale("log")
        axis.set_xticks(_TICKS, [f"{tick:g}" for tick in _TICKS])
        axis.minorticks_off()
        axis.set_xlabel("GMACs an image, guided")
        axis.set_ylabel(f"{label}, to {results['reference']}")
        axis.grid(alpha=0.25)
    axes[1].legend(fontsize=8)
    figure.suptitle(f"{results['model']}: fewer steps (lines), or cached ones", fontsize=11)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)


def _every_second_step(depth: int) -> Setting:
    return Setting(sampler=REFERENCE.sampler, steps=2 * TIMED_ROUNDS, interval=2, depth=depth)


def _lamamba(pipeline: LaMambaPipeline) -> LaMambaDiff:
    network = pipeline.network
    if not isinstance(network, LaMambaDiff):
        raise ValueError(f"model: {pipeline.name} is a {type(network).__name__}; a LaMambaDiff is accepted")
    return network


if __name__ == "__main__":
    main()
