"""How many replicas does a load need, and how long do its requests take? A queueing simulation.

Each replica is the engine's loop: an image joins the running batch at the next step, oldest first, as long as
the step has rows (a guided image takes two); a step takes the time that was measured for its rows, between
two measured sizes in proportion; an image that is finished leaves at once and is decoded beside the loop.
What is not in it: clients that leave, priorities, several models, and what the network between balancer and
replica takes.

Requests come as a Poisson process and are shared out by one of

    random           each to any replica
    round-robin      to one after the other
    least-of-two     to the one with fewer unanswered images of two that are drawn
    least            to the one with the fewest of all, of equals to the one that has had so many for longest
                     (HAProxy's `leastconn`)

A balancer counts an image until it is answered, which is some time after its last step.

The load is a share of what the replicas can make together. Above `--simulated` replicas that many stand for
all: they get their part of the arrivals, and the others would be like them.

    python benchmarks/scale_sim.py                      # XL at 256 px, by benchmarks/results/model-h100.json
    python benchmarks/scale_sim.py --step-ms 2:46,4:79,8:141,16:270 --max-rows 16 --replicas 1,2,4
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import math
import random
import sys
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.benchmark.environment import RESULTS, write_results
from service.benchmark.mix import DEFAULT_MIX, MixEntry, load_mix
from service.benchmark.summary import percentiles

BALANCERS = ("random", "round-robin", "least-of-two", "least")
ROWS_OF_A_GUIDED_IMAGE = 2
WARM_UP = 0.2
"""Of the images: those that come first find empty replicas, and are not counted. At nine tenths of its
capacity a replica takes some hundred images to fill."""


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a step by its rows; ValueError for what is no such table."""

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        ascending = all(low < high for low, high in itertools.pairwise(self.rows))
        if not self.rows or not ascending or self.rows[0] < 1 or min(self.seconds) <= 0:
            raise ValueError(
                "step-ms: numbers of rows from 1 on, ascending, with times above 0, are accepted"
            )

    def __call__(self, rows: int) -> float:
        """Of a step of `rows` rows: in proportion between two measured sizes, and beyond the largest."""
        index = bisect_left(self.rows, rows)
        if (index < len(self.rows) and self.rows[index] == rows) or index == 0:
            return self.seconds[index]
        if index == len(self.rows):
            return self.seconds[-1] * rows / self.rows[-1]
        low, high = self.rows[index - 1], self.rows[index]
        part = (rows - low) / (high - low)
        return self.seconds[index - 1] * (1 - part) + self.seconds[index] * part


@dataclass(kw_only=True)
class Image:
    """One image on its way. Times in seconds of the simulation."""

    came_at: float
    steps_left: int
    rows: int
    started_at: float = math.nan
    finished_at: float = math.nan


@dataclass
class Replica:
    """One engine: what waits, and what is in its present step."""

    max_rows: int
    after_s: float = 0.0
    """From the end of an image's last step to its answer."""
    waiting: deque[Image] = field(default_factory=deque)
    active: list[Image] = field(default_factory=list)
    answers_at: deque[float] = field(default_factory=deque)
    """Of finished images, as far as `unanswered` has not passed them."""
    changed_at: float = 0.0
    """When the number of unanswered images last was another, as `unanswered` knows it."""
    stepping: bool = False

    def accept(self, image: Image) -> None:
        """Let an image wait for the next step."""
        self.waiting.append(image)
        self.changed_at = image.came_at

    def unanswered(self, now: float) -> int:
        """Images accepted and not answered; `now` never goes back."""
        while self.answers_at and self.answers_at[0] <= now:
            self.changed_at = max(self.changed_at, self.answers_at.popleft())
        return len(self.waiting) + len(self.active) + len(self.answers_at)

    def begin_step(self, now: float) -> int:
        """Let images join; the rows of the step, 0 where there is none."""
        rows = sum(image.rows for image in self.active)
        while self.waiting and rows + self.waiting[0].rows <= self.max_rows:
            image = self.waiting.popleft()
            image.started_at = now
            self.active.append(image)
            rows += image.rows
        self.stepping = rows > 0
        return rows

    def end_step(self, now: float) -> list[Image]:
        """The images that the step has finished."""
        finished = []
        for image in self.active:
            image.steps_left -= 1
            if not image.steps_left:
                image.finished_at = now
                self.answers_at.append(now + self.after_s)
                finished.append(image)
        if finished:
            self.active = [image for image in self.active if image.steps_left]
        return finished


def rows_of(entry: MixEntry) -> int:
    """Rows of a step of one of its images."""
    return 1 if entry.cfg_scale == 1 else ROWS_OF_A_GUIDED_IMAGE


def arrivals(
    mix: Sequence[MixEntry], images_per_s: float, count: int, draw: random.Random
) -> Iterator[Image]:
    """`count` images of single-image requests, in order of arrival."""
    now = 0.0
    weights = [entry.weight for entry in mix]
    for entry in draw.choices(mix, weights, k=count):
        now += draw.expovariate(images_per_s)
        yield Image(came_at=now, steps_left=entry.steps, rows=rows_of(entry))


def chooser(balancer: str, replicas: Sequence[Replica], draw: random.Random) -> Callable[[float], Replica]:
    """What names the replica of an image that comes at a time."""
    turns = itertools.cycle(replicas)
    return {
        "random": lambda now: draw.choice(replicas),
        "round-robin": lambda now: next(turns),
        "least-of-two": lambda now: min(
            draw.choices(replicas, k=2), key=lambda replica: replica.unanswered(now)
        ),
        "least": lambda now: min(replicas, key=lambda replica: (replica.unanswered(now), replica.changed_at)),
    }[balancer]


def simulate(
    images: Sequence[Image],
    *,
    num_replicas: int,
    max_rows: int,
    step_s: Callable[[int], float],
    balancer: str,
    draw: random.Random,
    after_s: float = 0.0,
) -> None:
    """Run all images to their ends, which are noted in them; each is answered `after_s` later."""
    replicas = [Replica(max_rows, after_s) for _ in range(num_replicas)]
    choose = chooser(balancer, replicas, draw)
    order = itertools.count()
    ends: list[tuple[float, int, Replica]] = []

    def begin(replica: Replica, now: float) -> None:
        rows = replica.begin_step(now)
        if rows:
            heapq.heappush(ends, (now + step_s(rows), next(order), replica))

    def run_until(limit: float) -> None:
        while ends and ends[0][0] <= limit:
            now, _, replica = heapq.heappop(ends)
            replica.end_step(now)
            begin(replica, now)

    for image in images:
        run_until(image.came_at)
        replica = choose(image.came_at)
        replica.accept(image)
        if not replica.stepping:
            begin(replica, image.came_at)
    run_until(math.inf)


def capacity(mix: Sequence[MixEntry], max_rows: int, step_s: Callable[[int], float]) -> float:
    """Images a second of a replica whose steps are all full."""
    weights = [entry.weight for entry in mix]
    row_steps = [entry.steps * rows_of(entry) * entry.weight for entry in mix]
    return max_rows / step_s(max_rows) / (sum(row_steps) / sum(weights))


def measure(
    mix: Sequence[MixEntry],
    *,
    replicas: int,
    share: float,
    images: int,
    simulated: int,
    max_rows: int,
    step_s: Callable[[int], float],
    after_s: float,
    balancer: str,
    seed: int,
) -> dict[str, Any]:
    """Waits and latencies of `images` images at `share` of the replicas' capacity."""
    draw = random.Random(seed)
    present = min(replicas, simulated)
    each = capacity(mix, max_rows, step_s)
    plan = list(arrivals(mix, share * each * present, images, draw))
    simulate(
        plan,
        num_replicas=present,
        max_rows=max_rows,
        step_s=step_s,
        balancer=balancer,
        draw=draw,
        after_s=after_s,
    )
    counted = plan[int(len(plan) * WARM_UP) :]
    waits = percentiles([image.started_at - image.came_at for image in counted]) or {}
    latencies = percentiles([image.finished_at - image.came_at + after_s for image in counted]) or {}
    return {
        "replicas": replicas,
        "balancer": balancer,
        "share": share,
        "images_per_s": round(share * each * replicas, 3),
        "wait_p50_s": waits["p50"],
        "wait_p95_s": waits["p95"],
        "latency_p50_s": latencies["p50"],
        "latency_p95_s": latencies["p95"],
        "latency_mean_s": latencies["mean"],
    }


def measured_steps(path: Path, side: int, overhead_s: float) -> StepTimes:
    """Forwards of ours in a file of `lamamba bench model`, with what a step takes beside them."""
    rows = {
        row["rows"]: row["ms"] / 1000 + overhead_s
        for row in json.loads(path.read_text(encoding="utf-8"))["results"]
        if row["provider"] == "lamamba" and row["scope"] == "forward" and row["side"] == side and "ms" in row
    }
    if not rows:
        raise ValueError(f"results: {path} has no forward of ours at side {side}")
    return StepTimes(tuple(sorted(rows)), tuple(rows[number] for number in sorted(rows)))


def parse_steps(text: str, overhead_s: float) -> StepTimes:
    """ "2:46,4:79" as times of steps. Raises ValueError for anything else."""
    try:
        pairs = [(int(rows), float(ms)) for rows, ms in (part.split(":") for part in text.split(","))]
    except ValueError:
        raise ValueError(f"step-ms: {text} given; ROWS:MS with commas between is accepted") from None
    return StepTimes(tuple(rows for rows, _ in pairs), tuple(ms / 1000 + overhead_s for _, ms in pairs))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS / "model-h100.json")
    parser.add_argument("--side", type=int, default=32, help="of the latents, in --results")
    parser.add_argument("--step-ms", help="ROWS:MS,ROWS:MS in place of --results")
    parser.add_argument("--overhead-ms", type=float, default=1.0, help="of a step, beside the network")
    parser.add_argument("--after-ms", type=float, default=30.0, help="decoding, encoding and answering")
    parser.add_argument("--mix", type=Path, help="as of `lamamba bench serve`; default: 10 to 50 steps")
    parser.add_argument("--max-rows", type=int, default=128)
    parser.add_argument("--replicas", default="1,2,4,16,64,1000,10000")
    parser.add_argument("--balancers", default="round-robin,least-of-two")
    parser.add_argument("--shares", default="0.5,0.7,0.9")
    parser.add_argument("--images", type=int, default=2000, help="of each simulated replica, on average")
    parser.add_argument("--least-images", type=int, default=10_000, help="of each simulation")
    parser.add_argument("--simulated", type=int, default=64, help="most replicas that are simulated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="scale-sim", help="of the results file")
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    try:
        mix = DEFAULT_MIX if given.mix is None else load_mix(given.mix)
        overhead_s = given.overhead_ms / 1000
        step_s = (
            measured_steps(given.results, given.side, overhead_s)
            if given.step_ms is None
            else parse_steps(given.step_ms, overhead_s)
        )
        balancers = given.balancers.split(",")
        if unknown := [name for name in balancers if name not in BALANCERS]:
            raise ValueError(f"balancers: {unknown[0]} given; {', '.join(BALANCERS)} are accepted")
        replicas = [int(text) for text in given.replicas.split(",")]
        shares = [float(text) for text in given.shares.split(",")]
        if min(replicas) < 1 or not all(0 < share < 1 for share in shares):
            raise ValueError("replicas: 1 or more, shares: above 0 and below 1, are accepted")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    rows = []
    for balancer, share, number in itertools.product(balancers, shares, replicas):
        row = measure(
            mix,
            replicas=number,
            share=share,
            images=max(given.least_images, given.images * min(number, given.simulated)),
            simulated=given.simulated,
            max_rows=given.max_rows,
            step_s=step_s,
            after_s=given.after_ms / 1000,
            balancer=balancer,
            seed=given.seed,
        )
        print(json.dumps(row), flush=True)
        rows.append(row)
    results = {
        "step_ms": dict(zip(step_s.rows, (round(1000 * s, 3) for s in step_s.seconds), strict=True)),
        "images_per_s_of_a_full_replica": round(capacity(mix, given.max_rows, step_s), 3),
        "mix": [entry.model_dump() for entry in mix],
        "max_rows": given.max_rows,
        "rows": rows,
    }
    print(write_results(given.name, results, given.output_dir))


if __name__ == "__main__":
    main()
