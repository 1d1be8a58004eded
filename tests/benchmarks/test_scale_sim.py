"""benchmarks/scale_sim.py: if these fail, it tells how many replicas a load needs, and is wrong."""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path

import pytest

from benchmarks.scale_sim import (
    Image,
    Replica,
    StepTimes,
    arrivals,
    capacity,
    chooser,
    main,
    measure,
    parse_steps,
    simulate,
)
from service.benchmark.mix import MixEntry

ONE_ROW = (MixEntry(steps=1, cfg_scale=1.0),)
MIXED = (MixEntry(steps=10), MixEntry(steps=50), MixEntry(steps=20, cfg_scale=1.0))


def constant(rows: int) -> float:
    return 0.1


def waits(mix: tuple[MixEntry, ...], share: float, count: int, balancer: str, replicas: int) -> list[float]:
    draw = random.Random(0)
    images = list(arrivals(mix, share * replicas * capacity(mix, 1, constant), count, draw))
    simulate(images, num_replicas=replicas, max_rows=1, step_s=constant, balancer=balancer, draw=draw)
    return [image.started_at - image.came_at for image in images]


@pytest.mark.parametrize("share", [0.3, 0.6, 0.8])
def test_one_row_and_one_step_are_a_queue_with_a_known_mean_wait(share: float) -> None:
    """M/D/1: of service time s and load r the mean wait is r s / (2 (1 - r))."""
    mean = statistics.fmean(waits(ONE_ROW, share, 60_000, "random", 1))
    assert mean == pytest.approx(share * 0.1 / (2 * (1 - share)), rel=0.05)


def test_random_shares_are_as_many_queues_of_their_own() -> None:
    mean = statistics.fmean(waits(ONE_ROW, 0.6, 60_000, "random", 5))
    assert mean == pytest.approx(0.6 * 0.1 / (2 * 0.4), rel=0.05)


def test_a_balancer_that_looks_is_better_than_one_that_does_not() -> None:
    by_balancer = {
        name: statistics.fmean(waits(ONE_ROW, 0.8, 20_000, name, 8))
        for name in ("random", "round-robin", "least-of-two", "least")
    }
    assert by_balancer["least"] < by_balancer["least-of-two"] < by_balancer["random"]
    assert by_balancer["round-robin"] < by_balancer["random"]


def test_the_least_loaded_has_the_fewest_unanswered_images_and_of_equals_had_so_many_for_longest() -> None:
    first, second = replicas = [Replica(max_rows=2, after_s=1.0) for _ in range(2)]
    choose = chooser("least", replicas, random.Random(0))
    for came_at, replica in ((0.0, first), (0.5, second)):
        assert choose(came_at) is replica
        replica.accept(Image(came_at=came_at, steps_left=1, rows=2))
        replica.begin_step(came_at)
    first.end_step(1.0)
    second.end_step(1.25)
    assert choose(1.5) is first  # both images are made and not answered; the first has had one for longer
    assert choose(2.0) is first  # answered
    assert choose(2.25) is first  # the second's too, later
    first.accept(Image(came_at=2.25, steps_left=1, rows=2))
    assert choose(2.5) is second


def test_every_image_has_its_steps_and_no_step_more_rows_than_there_are() -> None:
    draw = random.Random(1)
    images = list(arrivals(MIXED, 20.0, 500, draw))
    steps = [image.steps_left for image in images]
    rows: list[int] = []

    def step_s(number: int) -> float:
        rows.append(number)
        return 0.01

    simulate(images, num_replicas=2, max_rows=7, step_s=step_s, balancer="least", draw=draw)
    assert all(image.steps_left == 0 for image in images)
    assert max(rows) <= 7
    assert sum(rows) == sum(n * image.rows for n, image in zip(steps, images, strict=True))
    for image, least in zip(images, steps, strict=True):
        assert image.came_at <= image.started_at <= image.finished_at - 0.01 * least + 1e-9


def test_an_image_alone_takes_its_steps() -> None:
    image = Image(came_at=1.0, steps_left=4, rows=2)
    simulate(
        [image], num_replicas=1, max_rows=8, step_s=lambda rows: 0.5, balancer="least", draw=random.Random(0)
    )
    assert (image.started_at, image.finished_at) == (1.0, 3.0)


def test_replicas_beyond_the_simulated_ones_are_like_them() -> None:
    def p95(replicas: int) -> float:
        figures = measure(
            MIXED,
            replicas=replicas,
            share=0.7,
            images=4000,
            simulated=16,
            max_rows=8,
            step_s=constant,
            after_s=0.0,
            balancer="least-of-two",
            seed=0,
        )
        return float(figures["latency_p95_s"])

    assert p95(10_000) == p95(16)
    assert p95(16) < p95(1)


def test_times_of_steps_lie_between_the_measured_ones() -> None:
    steps = StepTimes((2, 4), (0.2, 0.4))
    assert [steps(rows) for rows in (1, 2, 3, 4, 8)] == pytest.approx([0.2, 0.2, 0.3, 0.4, 0.8])


@pytest.mark.parametrize("text", ["2", "2:x", "4:10,2:20", "0:10", "2:0"])
def test_what_is_no_table_of_steps_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="step-ms"):
        parse_steps(text, 0.0)


def test_a_run_writes_a_row_for_each_case(tmp_path: Path) -> None:
    options = [
        "--step-ms",
        "2:46,16:270",
        "--max-rows",
        "16",
        "--replicas",
        "1,2",
        "--images",
        "50",
        "--least-images",
        "100",
    ]
    main([*options, "--output-dir", str(tmp_path)])
    results = json.loads((tmp_path / "scale-sim.json").read_text())["results"]
    assert len(results["rows"]) == 2 * 3 * 2
    assert results["images_per_s_of_a_full_replica"] == pytest.approx(16 / 0.271 / (2 * 27.5), rel=1e-3)


def test_a_wrong_option_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--balancers", "best"])
    assert "balancers: best given" in capsys.readouterr().err
