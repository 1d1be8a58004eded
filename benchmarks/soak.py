"""Does a server under faults answer every request that it accepts, exactly once, and give all back?

A real `lamamba serve` behind clients that try again: mixed requests of 2 to 12 steps, a tenth of which leave
before the answer, a twentieth with deadlines that pass, a twentieth with bodies that are wrong. Meanwhile the
server is told to end (SIGTERM) and started again, evenly spread over the run. A client tries again after 429,
503 and a connection that failed, each time under another `X-Request-ID`. Then it is checked that

    answers   each request ends as it must: an image (as the in-process pipeline makes it alone, to 1 of 255),
              504 for a passed deadline, a 4xx that names the field for a wrong body
    log       the servers' logs name each id once, and every answer that they log was received, unless its
              client had left: nothing is lost, nothing done twice
    end       each server exits with 0, with no request and no slot in use before it
    memory    resident memory at the end of the last server is within 10 % of that after its first requests

Exit code 1 where anything differs.

    python benchmarks/soak.py                           # 5,000 requests, about half an hour on two cores
    python benchmarks/soak.py --requests 200 --restarts 1
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import httpx
import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.concurrent_requests import MAX_DIFFERENCE, alone
from model.benchmark.environment import RESULTS, write_results
from model.cpu_rows import prepare_process
from model.diffusion.samplers import SAMPLERS
from model.pipeline import LaMambaPipeline
from model.pretrained import default_model_dir
from model.progress import progress_display
from service.benchmark.server import free_port

LEAVING, LATE, INVALID = 0.10, 0.05, 0.05
"""Shares of the requests."""
DIFFERENT_IMAGES = 64
"""Of which each request for an image asks for one: each is made alone once, to be compared with."""
CONCURRENCY = 24
START_LIMIT_S = 120.0
END_LIMIT_S = 120.0
ANSWER_LIMIT_S = 300.0
RETRY_S = 0.25
SETTLED = 0.1
"""Of all requests: after so many, a server's memory is taken as what it needs."""
MEMORY_GROWTH = 1.10
WRONG_BODIES: tuple[tuple[bytes, int], ...] = (
    (b'{"class_id": 0, "steps": 0}', 422),
    (b'{"class_id": 9999}', 422),
    (b'{"class_id": 0, "cfg_scale": "much"}', 422),
    (b'{"class_id": 0, "resolution": 100}', 422),
    (b'{"class_id": 0, "colour": "red"}', 422),
    (b'{"class_id": 0,', 400),
)


@dataclass(frozen=True, kw_only=True)
class SoakRequest:
    """One request and how it must end."""

    index: int
    kind: str
    """ "image", "leaves", "late" or "invalid"."""
    body: bytes
    expected: int
    """The status; for "leaves", of an answer that comes before the client has left."""
    image: Mapping[str, Any] = field(default_factory=dict)
    """What is asked for; empty where the body is wrong."""
    leaves_after_s: float = 0.0


@dataclass(kw_only=True)
class Ending:
    """What became of one request."""

    request: SoakRequest
    tried: list[str]
    """The ids that it was sent under."""
    status: int = 0
    """Of the answer; 0 where the client left or gave up."""
    answered_id: str = ""
    file: bytes = field(default=b"", repr=False)
    left: bool = False


def plan(count: int, num_classes: int, seed: int = 0) -> list[SoakRequest]:
    """`count` requests, the same for the same seed."""
    draw = random.Random(seed)
    images = [
        {
            "class_id": draw.randrange(num_classes),
            "cfg_scale": draw.choice((1.0, 1.5, 2.5)),
            "steps": draw.randint(2, 12),
            "sampler": draw.choice(SAMPLERS),
            "seed": draw.randrange(2**32),
        }
        for _ in range(DIFFERENT_IMAGES)
    ]
    requests = []
    for index in range(count):
        image, chance = draw.choice(images), draw.random()
        if chance < INVALID:
            body, expected = draw.choice(WRONG_BODIES)
            requests.append(SoakRequest(index=index, kind="invalid", body=body, expected=expected))
        elif chance < INVALID + LATE:
            body = json.dumps(image | {"steps": 200, "sampler": "ddim", "timeout_s": 0.02}).encode()
            requests.append(SoakRequest(index=index, kind="late", body=body, expected=504, image=image))
        else:
            kind = "leaves" if chance < INVALID + LATE + LEAVING else "image"
            requests.append(
                SoakRequest(
                    index=index,
                    kind=kind,
                    body=json.dumps(image).encode(),
                    expected=200,
                    image=image,
                    leaves_after_s=draw.uniform(0.0, 1.0) if kind == "leaves" else 0.0,
                )
            )
    return requests


class Server:
    """`lamamba serve` on one port, through all its lives."""

    def __init__(self, folder: Path, log: IO[bytes]) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.folder, self.log = folder, log
        self.lives: list[dict[str, Any]] = []
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def life(self) -> dict[str, Any]:
        """Facts of the present one."""
        return self.lives[-1]

    def start(self) -> None:
        """Start it; whoever needs it ready asks it."""
        options = ["--models", str(self.folder), "--device", "cpu", "--port", str(self.port), "--log-json"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("LAMAMBA_")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "service.cli", "serve", *options],
            cwd=Path(__file__).resolve().parent.parent,
            env=environment,
            stderr=self.log,
        )
        self.lives.append({"started_at": time.monotonic(), "settled_rss_bytes": None})

    def end(self) -> None:
        """SIGTERM, and wait for the end: it drains first."""
        assert self._process is not None
        self.life["rss_bytes"] = self.rss_bytes()
        self._process.send_signal(signal.SIGTERM)
        try:
            self.life["exit_code"] = self._process.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            self.life["exit_code"] = None
        self.life["lived_s"] = round(time.monotonic() - self.life.pop("started_at"), 1)

    def kill(self) -> None:
        """End it at once, if it lives."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def rss_bytes(self) -> int:
        """Its resident memory."""
        assert self._process is not None
        lines = Path(f"/proc/{self._process.pid}/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


async def wait_until_ready(client: httpx.AsyncClient, server: Server) -> None:
    """Raises TimeoutError where the server does not become ready."""
    async with asyncio.timeout(START_LIMIT_S):
        while True:
            try:
                if (await client.get(f"{server.url}/health/ready")).status_code == 200:
                    return
            except httpx.TransportError:
                pass  # not listening yet
            await asyncio.sleep(RETRY_S)


async def send(client: httpx.AsyncClient, url: str, request: SoakRequest) -> Ending:
    """Ask until there is an answer, or the client leaves."""
    ending = Ending(request=request, tried=[])
    deadline = time.monotonic() + ANSWER_LIMIT_S
    while time.monotonic() < deadline:
        ending.tried.append(f"soak-{request.index}-{len(ending.tried)}")
        headers = {"content-type": "application/json", "x-request-id": ending.tried[-1]}
        post = client.post(f"{url}/generate", content=request.body, headers=headers)
        try:
            if request.kind == "leaves":
                response = await asyncio.wait_for(post, request.leaves_after_s)
            else:
                response = await post
        except TimeoutError:
            ending.left = True
            return ending
        except httpx.TransportError:
            await asyncio.sleep(RETRY_S)
            continue
        if response.status_code in (429, 503):
            await asyncio.sleep(RETRY_S)
            continue
        ending.status, ending.answered_id = response.status_code, response.headers["x-request-id"]
        if response.status_code == 200:
            ending.file = base64.b64decode(response.json()["images"][0]["b64_json"])
        return ending
    return ending


async def soak(
    server: Server, requests: Sequence[SoakRequest], restarts: int, report: Callable[[], None]
) -> list[Ending]:
    """All requests, `CONCURRENCY` at a time, with `restarts` of the server in between.

    `report` is called after each request.
    """
    waiting = iter(requests)
    endings: list[Ending] = []
    restarts_due = [asyncio.Event() for _ in range(restarts)]
    settled_after = max(1, int(len(requests) * SETTLED))
    in_life = 0
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=ANSWER_LIMIT_S, limits=limits, trust_env=False) as client:

        async def send_in_turn() -> None:
            nonlocal in_life
            for request in waiting:
                endings.append(await send(client, server.url, request))
                report()
                for due in restarts_due[: len(endings) * (restarts + 1) // len(requests)]:
                    due.set()
                in_life += 1
                if in_life >= settled_after and server.life["settled_rss_bytes"] is None:
                    server.life["settled_rss_bytes"] = server.rss_bytes()

        async def restart_in_turn() -> None:
            nonlocal in_life
            for due in restarts_due:
                await due.wait()
                await asyncio.to_thread(server.end)
                server.start()
                in_life = 0
                await wait_until_ready(client, server)

        server.start()
        await wait_until_ready(client, server)
        async with asyncio.TaskGroup() as group:
            group.create_task(restart_in_turn())
            for _ in range(CONCURRENCY):
                group.create_task(send_in_turn())
        server.life["in_use_at_the_end"] = await in_use(client, server.url)
        await asyncio.to_thread(server.end)
    return endings


async def in_use(client: httpx.AsyncClient, url: str) -> dict[str, float]:
    """Requests and slots that the server counts, once what clients have left is given up."""
    names = ("active_slots", "num_requests_running", "num_requests_waiting")
    for _ in range(40):
        text = (await client.get(f"{url}/metrics")).text
        values = {
            name: sum(
                float(line.rsplit(" ", 1)[1])
                for line in text.splitlines()
                if line.startswith(f"lamamba_{name}{{")
            )
            for name in names
        }
        if not any(values.values()):
            break
        await asyncio.sleep(RETRY_S)
    return values


def logged_answers(log: bytes) -> list[tuple[str, int]]:
    """Id and status of each request to /generate that the servers' logs hold."""
    answers = []
    for line in log.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # Python's own words, about a warning
        if record.get("logger") == "service.access" and record.get("path") == "/generate":
            answers.append((record["request_id"], record["status"]))
    return answers


def faults_of(endings: Sequence[Ending], logged: Sequence[tuple[str, int]]) -> list[str]:
    """What is not as it must be, in words; images are compared elsewhere."""
    faults = []
    for ending in endings:
        request = ending.request
        if ending.left:
            continue
        if ending.status != request.expected:
            faults.append(f"{request.kind} {request.index}: {ending.status}, not {request.expected}")
        elif ending.answered_id != ending.tried[-1]:
            faults.append(f"{request.kind} {request.index}: answered under {ending.answered_id}")
    times = Counter(request_id for request_id, _ in logged)
    faults += [f"{request_id}: {n} answers in the log" for request_id, n in times.items() if n > 1]
    received = {ending.answered_id for ending in endings if ending.status}
    left = {ending.tried[-1] for ending in endings if ending.left}
    for request_id, status in logged:
        if status not in (0, 429, 503) and request_id not in received | left:
            faults.append(f"{request_id}: {status} in the log was not received")
    faults += [f"{request_id}: received and not in the log" for request_id in received - set(times)]
    return faults


def wrong_images(pipeline: LaMambaPipeline, endings: Sequence[Ending]) -> tuple[int, list[str]]:
    """The largest difference of a channel of all images, and those that differ by more than 1 of 255."""
    made: dict[str, Any] = {}
    largest, wrong = 0, []
    for ending in endings:
        if not ending.file:
            continue
        key = json.dumps(dict(ending.request.image))
        if key not in made:
            made[key] = alone(pipeline, ending.request.image, 0).astype(int)
        with Image.open(io.BytesIO(ending.file)) as image:
            difference = int(np.abs(np.asarray(image).astype(int) - made[key]).max())
        largest = max(largest, difference)
        if difference > MAX_DIFFERENCE:
            wrong.append(f"image {ending.request.index}: differs by {difference}")
    return largest, wrong


def server_faults(lives: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of the servers' ends and of the last one's memory."""
    faults = [
        f"server {number}: ended with {life['exit_code']}"
        for number, life in enumerate(lives)
        if life["exit_code"] != 0
    ]
    last = lives[-1]
    if any(last["in_use_at_the_end"].values()):
        faults.append(f"in use at the end: {last['in_use_at_the_end']}")
    settled = last["settled_rss_bytes"]
    if settled is not None and last["rss_bytes"] > MEMORY_GROWTH * settled:
        faults.append(f"memory: {settled} bytes after the first requests, {last['rss_bytes']} at the end")
    return faults


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=default_model_dir(128), help="one model folder")
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    if given.requests < 1 or given.restarts < 0:
        parser.error("--requests: 1 or more is accepted; --restarts: 0 or more")

    prepare_process()  # as `lamamba` does
    pipeline = LaMambaPipeline.load(given.model, device="cpu", dtype=torch.float32)
    requests = plan(given.requests, pipeline.num_classes)
    with tempfile.TemporaryFile() as log:
        server = Server(given.model, log)
        started = time.perf_counter()
        try:
            with progress_display() as progress:
                task = progress.add_task("requests", total=len(requests))
                endings = asyncio.run(soak(server, requests, given.restarts, lambda: progress.advance(task)))
        finally:
            server.kill()
        total_s = time.perf_counter() - started
        log.seek(0)
        logged = logged_answers(log.read())
    largest, wrong = wrong_images(pipeline, endings)
    faults = [*faults_of(endings, logged), *wrong, *server_faults(server.lives)]
    results = {
        "requests": dict(sorted(Counter(ending.request.kind for ending in endings).items())),
        "ends": dict(
            sorted(Counter("left" if e.left else str(e.status) for e in endings).items()),
        ),
        "tries": sum(len(ending.tried) for ending in endings),
        "logged": dict(sorted(Counter(str(status) for _, status in logged).items())),
        "total_s": round(total_s, 1),
        "largest_difference": largest,
        "servers": server.lives,
        "faults": faults,
    }
    print(json.dumps(results, indent=2))
    print(write_results("soak-cpu", results, given.output_dir))
    if faults:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
