"""Evaluate generated images: `lamamba evaluate --model DIR --output-dir OUT`.

The images of a model, at each guidance scale, go into an .npz (`samples`) and are compared with a
reference by each extractor (`measure`). A reference is a file of ADM's, an .npz, a folder of
pictures, or `num` reserved views of places. With places there is more, as its views have no end:

Floor: what the metrics say of the next `num` reserved views, equal in distribution, with so few images.
Reconstructions of the reference views by the autoencoder: the price of latents.
Judge: the share of samples that a classifier, trained on real views, takes for the class asked for.
Nearest: how near samples lie to training views, beside how near unseen real views lie to them.

Outputs: evaluation.json (each number with all that it depends on; rewritten after each part, so that an
interrupted run keeps what it measured) and the samples; on places also judge.safetensors and the pictures
grid, real, guidance and nearest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.progress import Progress

from model.data.places import RESERVED_VIEW_IDS, Places
from model.diffusion.guidance import check_guidance_interval
from model.evaluation.config import EvaluationConfig
from model.evaluation.features import HASH_DIGITS, FeatureExtractor, file_hash
from model.evaluation.judge import REQUIRED_ACCURACY, Judge, judge_training, train_judge
from model.evaluation.measure import Measured, measure, measure_reference
from model.evaluation.places_pictures import nearest_training_views, save_pictures
from model.evaluation.ranks import Ranks
from model.evaluation.report import Report, file_source, require_enough_images, shown
from model.evaluation.samples import SampleFile, require_disk_space
from model.evaluation.sources import ImageSet, NpzImages, RealViews, ReconstructedViews, first_pixels
from model.lock_file import locked
from model.pipeline import LaMambaPipeline
from model.progress import progress_display

__all__ = ["Evaluation", "evaluate_file"]

logger = logging.getLogger(__name__)

_JUDGE_FILE, _LOCK_FILE = "judge.safetensors", ".lock"


class Evaluation:
    """One evaluation of one model, by one process or by several ranks."""

    def __init__(
        self,
        pipeline: LaMambaPipeline,
        config: EvaluationConfig,
        *,
        extractors: Sequence[FeatureExtractor],
        output_dir: Path,
        reference: ImageSet | None = None,
        places: Places | None = None,
        judge_file: Path | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """Against `reference`, or else against `places` with all that can be measured there.

        `judge_file`: the judge of an earlier evaluation; without it one is trained.

        Raises ValueError, before any work, for what does not fit together or on the disk.
        """
        self.pipeline, self.config, self.extractors = pipeline, config, extractors
        self.output_dir, self.judge_file, self.ranks = output_dir, judge_file, ranks or Ranks()
        self.places = places if reference is None else None
        self.reference = reference if self.places is None else self._reference_views(self.places)
        self._check_settings()
        self.files = {
            scale: SampleFile(output_dir, config.sample_plan(scale), pipeline)
            for scale in config.guidance_scales
        }
        self.ranks.from_main(self._check_output_dir)
        self.judge: Judge | None = None
        if judge_file is not None and self.places is not None:
            self.judge = _judge_of(judge_file, self.places)
        self.judge_hash = ""
        self.progress = progress_display()
        self.progress.disable = not self.ranks.is_main
        self.report = Report(output_dir, ranks=self.ranks, device=pipeline.device)
        self.report.fields |= {
            "model": {
                "name": pipeline.name,
                "weights": pipeline.weights_hash,
                "autoencoder": pipeline.autoencoder.weights_hash[:HASH_DIGITS],  # as loaded, in `dtype`
                "resolution": pipeline.resolution,
                # With autoguidance of both networks, as `weights`.
                "parameters": sum(p.numel() for network in pipeline.networks for p in network.parameters()),
                "dtype": str(pipeline.dtype).removeprefix("torch."),
                "scan_backend": pipeline.scan_backend,
            },
            "class_accuracy": [],
        }

    def run(self) -> dict[str, Any]:
        """Measure, write evaluation.json and the pictures; returns what the file holds.

        Raises ValueError where another evaluation writes to the folder.
        """
        with _claimed(self.output_dir, self.ranks), self.progress:
            self._make_samples()
            if self.reference is not None:
                self._measure_all(self.reference)
            if self.places is not None and self.ranks.is_main:
                self._show(self.places)
        return self.report.fields

    @property
    def shown_scale(self) -> float:
        """The guidance scale whose samples the pictures show: the nearest to the model's default."""
        return min(self.config.guidance_scales, key=lambda s: abs(s - self.pipeline.default_guidance_scale))

    def _reference_views(self, places: Places) -> RealViews:
        if self.pipeline.labels != places.labels:
            raise ValueError(
                f"model: {self.pipeline.name} has the classes {', '.join(self.pipeline.labels) or 'none'}; "
                f"accepted is a model of the {len(places.labels)} classes of places, or another reference"
            )
        if self.config.classes != "balanced":
            raise ValueError(f"classes: {self.config.classes} given; balanced is accepted with places")
        return RealViews(
            places=places,
            first_id=RESERVED_VIEW_IDS,
            num=self.config.num,
            size=self.pipeline.resolution,
        )

    def _check_settings(self) -> None:
        config, pipeline = self.config, self.pipeline
        if config.guidance_interval is not None:
            check_guidance_interval(config.guidance_interval, pipeline.schedule.num_timesteps)
        if config.num_inference_steps > pipeline.schedule.num_timesteps:
            raise ValueError(
                f"num_inference_steps: {config.num_inference_steps} given; {pipeline.name} accepts 1 to "
                f"{pipeline.schedule.num_timesteps}"
            )
        if not pipeline.num_classes and config.guidance_scales != (1,):
            raise ValueError(
                f"guidance_scales: {list(config.guidance_scales)} given; {pipeline.name} has no classes and "
                "accepts 1"
            )
        if self.reference is not None:
            require_enough_images(self.extractors, config.num, self.reference)

    def _check_output_dir(self) -> None:
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"output_dir: {self.output_dir} is no folder and cannot be made ({error.strerror})"
            ) from error
        for file in self.files.values():
            file.check()
        require_disk_space(self.output_dir, list(self.files.values()))

    def _make_samples(self) -> None:
        if self.config.compile and not all(file.is_made for file in self.files.values()):
            for network in self.pipeline.networks:
                network.compile(dynamic=False)
        for scale, file in self.files.items():
            with self.report.part(f"guidance {scale:g}"):
                file.make(
                    ranks=self.ranks,
                    batch_size=self.config.batch_size(scale),
                    fixed_shapes=self.config.compile,
                    progress=self.progress,
                )

    def _measure_all(self, images: ImageSet) -> None:
        if self.places is not None:
            self.judge = self._make_judge(self.places)
        with self.report.part("reference"):
            reference = measure_reference(
                images,
                self.extractors,
                ranks=self.ranks,
                judge=self.judge,
                advance=self._advance("reference", images),
            )
        if isinstance(images, RealViews):
            self._report_judge(reference)
            with self.report.part("real views"):
                others = RealViews(
                    places=images.places,
                    first_id=images.first_id + images.num,
                    num=images.num,
                    size=images.size,
                )
                self._compare(others, reference, {"images": "reserved real views", "resolution": images.size})
            with self.report.part("reconstructions"):
                model = self.report.fields["model"]
                source = {
                    "images": "reconstructions of the reference",
                    "resolution": images.size,
                    "autoencoder": model["autoencoder"],
                    "dtype": model["dtype"],
                }
                self._compare(
                    ReconstructedViews(views=images, autoencoder=self.pipeline.autoencoder), reference, source
                )
        for scale, file in self.files.items():
            with self.report.part(f"metrics at guidance {scale:g}"):
                source = {"images": "samples", **file.record}
                del source["num"]  # each number says of how many images it is
                wanted = self.config.measures_distance(scale)
                self._compare(NpzImages(file.path), reference, source, with_metrics=wanted)

    def _make_judge(self, places: Places) -> Judge:
        path = self.judge_file or self.output_dir / _JUDGE_FILE
        if self.judge_file is None:
            with self.report.part("judge"):
                self.ranks.from_main(lambda: self._train_judge(places, path))
        self.judge_hash = file_hash(path)
        return self.judge or _judge_of(path, places)

    def _train_judge(self, places: Places, path: Path) -> None:
        """Unless an interrupted run has done so."""
        config = self.config
        record = judge_training(config.judge_views, seed=config.seed)
        if path.is_file() and Judge.load(path).training_record == record:
            return
        train_judge(places, num_views=config.judge_views, seed=config.seed, progress=self.progress).save(path)

    def _report_judge(self, reference: Measured | None) -> None:
        if self.judge is None or reference is None or reference.confusion is None:
            return
        accuracy = reference.confusion.accuracy
        self.report.fields["judge"] = {
            "weights": self.judge_hash,
            "training": self.judge.training_record,
            "reserved_views": reference.confusion.report(),
            "required_accuracy": REQUIRED_ACCURACY,
        }
        if accuracy < REQUIRED_ACCURACY:
            logger.warning("judge: only %.4f of reserved views right", accuracy)
        logger.info("judge: %.4f of %d reserved views right", accuracy, self.config.num)

    def _compare(
        self,
        images: ImageSet,
        reference: Measured | None,
        source: dict[str, Any],
        *,
        with_metrics: bool = True,
    ) -> None:
        """Put one set of images into the report: its metrics, if wanted, and the judge's verdicts."""
        extractors = self.extractors if with_metrics else ()
        measured = measure(
            images,
            extractors,
            ranks=self.ranks,
            judge=self.judge,
            advance=self._advance(source["images"], images),
        )
        if measured is None or reference is None:  # rank 0 reports
            return
        if with_metrics:
            description = self.reference.description if self.reference is not None else {}
            self.report.add_metrics(measured, reference, extractors, description=description, source=source)
        if measured.confusion is not None:
            verdicts = {**measured.confusion.report(), "judge": self.judge_hash, **source}
            self.report.fields["class_accuracy"].append(verdicts)
            logger.info("%s: %.4f judged right", shown(source), measured.confusion.accuracy)

    def _show(self, places: Places) -> None:
        per_class, scale, folder = self.config.images_per_class, self.shown_scale, self.output_dir
        samples = {
            s: first_pixels(NpzImages(file.path), per_class * len(places.labels))
            for s, file in sorted(self.files.items())
        }
        with self.report.part("pictures"):
            self.report.fields["pictures"] = save_pictures(
                samples, places, folder, shown_scale=scale, per_class=per_class
            )
        with self.report.part("nearest"):
            found, picture = nearest_training_views(
                samples[scale],
                places,
                folder,
                extractor=self.extractors[0],
                num=self.config.num_training_views,
                per_class=per_class,
            )
            weights = self.report.fields["model"]["weights"]
            self.report.fields["nearest"] = {**found, "guidance_scale": scale, "weights": weights}
            self.report.fields["pictures"].append(picture)

    def _advance(self, what: str, images: ImageSet) -> Callable[[int], None]:
        return _counter(self.progress, what, images, self.ranks)


def evaluate_file(
    samples: NpzImages,
    reference: ImageSet,
    *,
    extractors: Sequence[FeatureExtractor],
    output_dir: Path,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Compare images that are there with a reference; writes evaluation.json and returns what it holds.

    Raises ValueError for too few images, or where another evaluation writes to the folder.
    """
    ranks = ranks or Ranks()
    require_enough_images(extractors, samples.num, reference, field="samples")
    output_dir.mkdir(parents=True, exist_ok=True)
    report = Report(output_dir, ranks=ranks, device=extractors[0].device)
    progress = progress_display()
    progress.disable = not ranks.is_main
    with _claimed(output_dir, ranks), progress:
        with report.part("reference"):
            advance = _counter(progress, "reference", reference, ranks)
            expected = measure_reference(reference, extractors, ranks=ranks, advance=advance)
        with report.part("samples"):
            advance = _counter(progress, samples.path.name, samples, ranks)
            measured = measure(samples, extractors, ranks=ranks, advance=advance)
        with report.part("metrics"):
            if measured is not None and expected is not None:
                report.add_metrics(
                    measured,
                    expected,
                    extractors,
                    description=reference.description,
                    source=file_source(samples),
                )
    return report.fields


@contextmanager
def _claimed(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Keep other evaluations out of the folder while the block runs; all ranks call it together."""
    with ExitStack() as stack:

        def claim() -> None:
            if not stack.enter_context(locked(folder / _LOCK_FILE)):
                raise ValueError(
                    f"output_dir: {folder} is being written to by another evaluation; wait for its end, or "
                    "choose another folder"
                )

        ranks.from_main(claim)
        yield


def _counter(progress: Progress, what: str, images: ImageSet, ranks: Ranks) -> Callable[[int], None]:
    """A function that counts this rank's images as looked at on the display."""
    task = progress.add_task(f"measuring {what}", total=len(ranks.share(images.num)))
    return lambda num: progress.advance(task, num)


def _judge_of(path: Path, places: Places) -> Judge:
    """The judge of the file, on the device of `places`. ValueError for one of other classes."""
    judge = Judge.load(path, places.device)
    if judge.labels != places.labels:
        raise ValueError(f"judge: {path} knows {', '.join(judge.labels)}; a judge of places is accepted")
    return judge
