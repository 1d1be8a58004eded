"""/admin/models and the model repository: if this fails, a new version costs requests, a broken one takes the
server down, or strangers choose what it serves.

Most models are fakes behind real folders: a folder's index says what its fake computes. The last tests load
real ones.
"""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import logging
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image

from model.images import read_metadata
from model.pipeline import LaMambaPipeline
from service.api.answering import accept
from service.api.schemas import GenerateRequest
from service.api_keys import key_hash, new_key
from service.app import create_app
from service.errors import StartupError
from service.model_loading import ModelCopies, ModelSource
from service.model_repository import ModelRepository
from service.runtime import Runtime
from service.settings import Settings
from tests.fakes import LABELS, FakeNetwork, fake_pipeline
from tests.service.conftest import with_client
from tests.service.engine_requests import TIMEOUT_S, TOLERANCE
from tests.tiny_model import save_tiny_model

KEY, API_KEY = new_key(), new_key()
ADMIN = {"Authorization": f"Bearer {KEY}"}
BODY: dict[str, Any] = {"class_id": 2, "steps": 4, "seed": 9, "model": "small"}


class Repository:
    """A folder of models. `faults` has what a load of a folder raises, or the fake's hook that is set."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: dict[str, Exception | str] = {}
        self.gate = threading.Event()  # which loads wait for
        self.gate.set()
        self.loading = threading.Event()
        self.pipelines: dict[str, LaMambaPipeline] = {}
        """By weights hash."""

    def write(self, name: str, *, weights: int = 1, resolution: int = 16) -> None:
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        index = {"weights": weights, "resolution": resolution}
        (self.folder / name / "model_index.json").write_text(json.dumps(index))

    def load(self, source: ModelSource, device: torch.device, settings: Settings) -> LaMambaPipeline:
        folder = Path(source.folder)
        self.loading.set()
        assert self.gate.wait(TIMEOUT_S)
        fault = self.faults.get(folder.name)
        if isinstance(fault, Exception):
            raise fault
        index = json.loads((folder / "model_index.json").read_text())
        network: Any = WeightedNetwork(index["weights"])
        if fault is not None:
            setattr(network, fault, 0)
        pipeline = replace(
            fake_pipeline(source.name or folder.name, resolution=index["resolution"]),
            network=network,
            weights_hash=f"{folder.name}-{index['weights']}",
        )
        self.pipelines[pipeline.weights_hash] = pipeline
        return pipeline


class WeightedNetwork(FakeNetwork):
    """A fake whose images depend on one more number."""

    def __init__(self, weights: int) -> None:
        super().__init__(num_classes=len(LABELS))
        self.weights = weights

    def __call__(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor
    ) -> Any:
        return super().__call__(hidden_states + self.weights, timestep, class_labels)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    """A repository of two models, "small" at 16 and "large" at 32 pixels."""
    made = Repository(tmp_path / "repository")
    made.write("small")
    made.write("large", resolution=32)
    monkeypatch.setattr("service.model_loading.load_pipeline", made.load)
    return made


def app_of(repository: Repository, **settings: Any) -> FastAPI:
    settings = {"model_repository": repository.folder, "admin_key": f"root:{key_hash(KEY)}"} | settings
    return create_app(Settings(**settings))


def talk_to(app: FastAPI, talk: Callable[[httpx.AsyncClient], Any]) -> Any:
    """A conversation with a server that is ready, by a client with the admin key."""

    async def when_ready(client: httpx.AsyncClient) -> Any:
        while (await client.get("/health/ready")).status_code != 200:
            assert (await client.get("/health/live")).status_code == 200, app.state.runtime.failure
            await asyncio.sleep(0.001)
        client.headers.update(ADMIN)
        return await talk(client)

    return asyncio.run(with_client(app, when_ready))


async def listed(client: httpx.AsyncClient) -> dict[str, Any]:
    answer = await client.get("/admin/models")
    assert answer.status_code == 200, answer.text
    return {model["id"]: model for model in answer.json()["data"]}


async def until(condition: Callable[[], Any]) -> None:
    while not await condition():  # noqa: ASYNC110 - no event to wait for
        await asyncio.sleep(0.001)


def failure_of(app: FastAPI) -> str:
    """Why a server could not start."""

    async def start() -> str:
        async with app.router.lifespan_context(app):
            pass
        return str(app.state.runtime.failure)

    return asyncio.run(start())


# --- the repository at the start ---


def test_every_sub_folder_is_a_model_under_its_own_name(
    repository: Repository, caplog: pytest.LogCaptureFixture
) -> None:
    repository.write(".hidden")
    (repository.folder / "notes").mkdir()
    repository.write("two words")
    (repository.folder / "README").write_text("no folder")

    async def talk(client: httpx.AsyncClient) -> None:
        models = {model["id"]: model for model in (await client.get("/v1/models")).json()["data"]}
        assert {name: model["resolution"] for name, model in models.items()} == {"small": 16, "large": 32}
        assert {model["version"] for model in models.values()} == {1}
        by_resolution = await client.post("/generate", json={"class_id": 1, "steps": 1, "resolution": 32})
        assert by_resolution.json()["model"] == "large"
        await listed(client)
        await listed(client)

    with caplog.at_level("WARNING"):
        talk_to(app_of(repository), talk)
    skipped = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert len(skipped) == 2
    assert "notes is skipped: it has no model_index.json" in skipped[0]
    assert "two words is skipped: a model's name is" in skipped[1]


def test_a_repository_stands_beside_models(repository: Repository, tmp_path: Path) -> None:
    other = Repository(tmp_path)
    other.write("third", resolution=64)

    async def talk(client: httpx.AsyncClient) -> None:
        models = await listed(client)
        assert {name: model["state"] for name, model in models.items()} == dict.fromkeys(
            ("small", "large", "third"), "loaded"
        )
        other.write("third", weights=2, resolution=64)
        assert (await client.post("/admin/models/third/load")).json()["weights_hash"] == "third-2"

    talk_to(app_of(repository, models=(str(tmp_path / "third"),)), talk)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(lambda folder: None, "no such folder", id="missing"),
        pytest.param(lambda folder: folder.write_text(""), "Not a directory", id="file"),
        pytest.param(lambda folder: folder.mkdir(), "none of its sub-folders is a model", id="empty"),
    ],
)
def test_a_repository_without_a_model_is_a_failed_start(
    tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    folder = tmp_path / "models"
    spoil(folder)
    failure = failure_of(create_app(Settings(model_repository=folder)))
    assert failure.startswith(f"model_repository: {folder} given; {message}")


def test_a_name_in_both_settings_is_a_failed_start(repository: Repository, tmp_path: Path) -> None:
    other = Repository(tmp_path)
    other.write("small")
    failure = failure_of(app_of(repository, models=(str(tmp_path / "small"),)))
    assert failure.startswith("models: small, large, small given; names must differ")


def test_a_folder_of_the_repository_that_cannot_be_loaded_is_a_failed_start(repository: Repository) -> None:
    repository.faults["small"] = RuntimeError("no such operator")
    folder = repository.folder / "small"
    assert failure_of(app_of(repository)) == f"{folder}: RuntimeError: no such operator"


# --- who may ---


@pytest.mark.parametrize("api_keys", ["", f"alice:{key_hash(API_KEY)}"], ids=["open", "with-api-keys"])
def test_without_an_admin_key_there_is_nothing(repository: Repository, api_keys: str) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        for headers in ({}, ADMIN, {"X-API-Key": API_KEY}):
            client.headers.pop("authorization", None)
            for method, path in (("GET", ""), ("POST", "/small/load"), ("POST", "/small/unload")):
                answer = await client.request(method, f"/admin/models{path}", headers=headers)
                assert answer.status_code == 404, answer.text
                assert answer.json()["error"]["code"] == "not_found"

    talk_to(app_of(repository, admin_key="", api_keys=api_keys), talk)


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({}, id="none"),
        pytest.param({"Authorization": f"Bearer {API_KEY}"}, id="api-key"),
        pytest.param({"X-API-Key": key_hash(KEY)}, id="the-hash"),
        pytest.param({"X-API-Key": f"{KEY}x"}, id="wrong"),
    ],
)
def test_without_the_admin_key_all_answers_are_401(repository: Repository, headers: dict[str, str]) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        client.headers.pop("authorization")
        for method, path in (("GET", ""), ("POST", "/small/load"), ("POST", "/nowhere/unload")):
            answer = await client.request(method, f"/admin/models{path}", headers=headers)
            assert answer.status_code == 401, answer.text
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"].startswith("Bearer")
            assert KEY not in answer.text
        assert (await client.post("/generate", json=BODY, headers=ADMIN)).status_code == 401

    talk_to(app_of(repository, api_keys=f"alice:{key_hash(API_KEY)}"), talk)


def test_the_admin_key_is_in_no_log(repository: Repository, caplog: pytest.LogCaptureFixture) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        await client.post("/admin/models/small/load")
        await client.get("/admin/models", headers={"X-API-Key": f"{KEY}x"})

    app = app_of(repository)
    with caplog.at_level(logging.DEBUG):
        talk_to(app, talk)
    runtime: Runtime = app.state.runtime
    for text in (*(str(vars(record)) for record in caplog.records), repr(runtime.settings)):
        assert KEY not in text
        assert key_hash(KEY) not in text


def test_an_admin_key_that_clients_have_is_refused() -> None:
    entry = f"root:{key_hash(KEY)}"
    with pytest.raises(StartupError, match=r"^admin_key: .* it is the key of a client too") as refusal:
        create_app(Settings(admin_key=entry, api_keys=entry))
    assert key_hash(KEY) not in str(refusal.value)


def test_no_name_of_a_request_becomes_a_path(repository: Repository, tmp_path: Path) -> None:
    Repository(tmp_path).write("outside")

    async def talk(client: httpx.AsyncClient) -> None:
        for name in ("..%2Foutside", "%2e%2e", "..", "small%2F..%2Flarge", "small%00", ".hidden", "small%20"):
            for action in ("load", "unload"):
                answer = await client.post(f"/admin/models/{name}/{action}")
                assert answer.status_code == 404, (name, answer.text)

    repository.write(".hidden")
    talk_to(app_of(repository), talk)
    assert set(repository.pipelines) == {"small-1", "large-1"}


# --- swaps ---


def test_a_swap_under_load_fails_no_request_and_mixes_no_image(repository: Repository) -> None:
    app = app_of(repository)
    num_open = 12

    async def talk(client: httpx.AsyncClient) -> list[tuple[dict[str, Any], httpx.Response]]:
        requests: list[tuple[dict[str, Any], asyncio.Task[httpx.Response]]] = []

        async def send(count: int) -> None:
            for _ in range(count):
                seed = len(requests)
                body = BODY | {"seed": seed, "steps": 2 + seed % 9, "num_images": 1 + seed % 3}
                requests.append((body, asyncio.create_task(client.post("/generate", json=body))))
                if seed >= num_open:
                    await asyncio.wait([requests[-num_open][1]])

        await send(2 * num_open)
        repository.write("small", weights=2)
        swap = asyncio.create_task(client.post("/admin/models/small/load"))
        while not swap.done():
            await send(1)
        await send(2 * num_open)
        assert (swap.result().status_code, swap.result().json()["version"]) == (200, 2)
        assert weights_of(await client.post("/generate", json=BODY)) == {"small-2"}
        await until(lambda: gone(client))
        return [(body, await request) for body, request in requests]

    async def gone(client: httpx.AsyncClient) -> bool:
        return not (await listed(client))["small"]["retiring"]

    answers = talk_to(app, talk)
    for body, answer in answers:
        (weights,) = weights_of(answer)  # one version a request, each of them answered
        assert_made_by(repository.pipelines[weights], answer, body)
    assert set.union(*(weights_of(answer) for _, answer in answers)) == {"small-1", "small-2"}


def weights_of(answer: httpx.Response) -> set[str]:
    assert answer.status_code == 200, answer.text
    files = [base64.b64decode(image["b64_json"]) for image in answer.json()["images"]]
    return {read_metadata(file)["weights"] for file in files}


def assert_made_by(pipeline: LaMambaPipeline, answer: httpx.Response, body: dict[str, Any]) -> None:
    for image in answer.json()["images"]:
        alone = pipeline.generate(
            [pipeline.class_index(body["class_id"])],
            seeds=[body["seed"]],
            image_indices=[image["image_index"]],
            guidance_scale=body.get("cfg_scale"),
            num_inference_steps=body["steps"],
        )[0]
        with Image.open(BytesIO(base64.b64decode(image["b64_json"]))) as picture:
            difference = np.asarray(picture).astype(int) - alone.numpy().astype(int)
        assert np.abs(difference).max() <= TOLERANCE


def test_a_request_in_flight_keeps_its_version(repository: Repository) -> None:
    app = app_of(repository)

    async def talk(client: httpx.AsyncClient) -> None:
        network: Any = repository.pipelines["small-1"].network
        reached, gate = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        def hold() -> None:
            loop.call_soon_threadsafe(reached.set)
            gate.wait(0.05)

        network.before_call = hold
        body = BODY | {"steps": 8}
        request = asyncio.create_task(client.post("/generate", json=body))
        await reached.wait()
        repository.write("small", weights=2)
        assert (await client.post("/admin/models/small/load")).status_code == 200
        assert not request.done()
        model = (await listed(client))["small"]
        assert (model["state"], model["version"], model["retiring"]) == ("loaded", 2, {"1": 1})
        third = await client.post("/admin/models/small/load")
        assert (third.status_code, third.json()["error"]["code"]) == (409, "load_in_progress")
        assert "1 images of its version 1" in third.json()["error"]["message"]
        gate.set()
        assert weights_of(await request) == {"small-1"}
        assert weights_of(await client.post("/generate", json=body)) == {"small-2"}

    talk_to(app, talk)


def test_an_answer_that_is_not_read_keeps_no_model(repository: Repository) -> None:
    app = app_of(repository)

    async def talk(client: httpx.AsyncClient) -> None:
        body = GenerateRequest(**BODY)
        answer = accept(app.state.runtime, "a client", body, "r", format="png", quality=90, started=0.0)
        files = [await answer.image(job) for job in answer.ticket.jobs]
        old = weakref.ref(repository.pipelines.pop("small-1"))
        repository.write("small", weights=2)
        assert (await client.post("/admin/models/small/load")).status_code == 200
        await until(lambda: gone(old))
        assert (answer.facts()["model"], answer.class_label) == ("small", LABELS[2])
        assert read_metadata(files[0])["weights"] == "small-1"
        answer.close()

    async def gone(old: weakref.ref[LaMambaPipeline]) -> bool:
        return old() is None

    talk_to(app, talk)


def test_what_shows_models_follows_a_swap(repository: Repository) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        repository.write("small", weights=2, resolution=64)
        repository.write("new", resolution=128)
        loads = [await client.post(f"/admin/models/{name}/load") for name in ("small", "new")]
        assert [answer.json()["version"] for answer in loads] == [2, 1]
        assert loads[0].json() == {
            "id": "small",
            "state": "loaded",
            "version": 2,
            "weights_hash": "small-2",
            "resolution": 64,
            "retiring": {},
            "last_error": None,
        }
        models = (await client.get("/v1/models")).json()["data"]
        assert {model["id"]: model["resolution"] for model in models} == {
            "large": 32,
            "new": 128,
            "small": 64,
        }
        assert (await client.get("/v1/classes", params={"resolution": 64})).json()["model"] == "small"
        version = (await client.get("/version")).json()["models"]
        assert {model["weights_hash"] for model in version} == {"small-2", "large-1", "new-1"}
        metrics = (await client.get("/metrics")).text
        for line in (
            'model_loaded{model="new"} 1.0',
            'model_version{model="small"} 2.0',
            'model_loads_total{result="loaded"} 2.0',
        ):
            assert f"lamamba_{line}" in metrics
        assert (await client.get("/health/ready")).status_code == 200

    talk_to(app_of(repository), talk)


# --- loads that fail or have to wait ---


@pytest.mark.parametrize(
    ("fault", "status", "code", "message"),
    [
        pytest.param(ValueError("x: not a model folder"), 422, "unusable_model", "not a model", id="folder"),
        pytest.param("nan_label", 422, "unusable_model", "small computes values that are not", id="nan"),
        pytest.param(
            torch.OutOfMemoryError("CUDA out of memory"), 507, "insufficient_memory", "no memory", id="gpu"
        ),
        pytest.param(
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            *(507, "insufficient_memory", "no memory"),
            id="cpu",
        ),
        pytest.param(
            "failing_label", 500, "model_load_failed", "the device fails on class 0", id="first-image"
        ),
    ],
)
def test_a_load_that_fails_leaves_the_old_version_serving(
    repository: Repository, fault: Exception | str, status: int, code: str, message: str
) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        repository.faults["small"] = fault
        repository.write("small", weights=2)
        failed = await client.post("/admin/models/small/load")
        assert (failed.status_code, failed.json()["error"]["code"]) == (status, code)
        assert message in failed.json()["error"]["message"]
        model = (await listed(client))["small"]
        assert (model["state"], model["version"], model["weights_hash"]) == ("loaded", 1, "small-1")
        assert message in model["last_error"]
        assert weights_of(await client.post("/generate", json=BODY)) == {"small-1"}
        metrics = (await client.get("/metrics")).text
        assert 'lamamba_model_loads_total{result="failed"} 1.0' in metrics
        del repository.faults["small"]
        mended = await client.post("/admin/models/small/load")
        assert (mended.status_code, mended.json()["last_error"]) == (200, None)
        assert weights_of(await client.post("/generate", json=BODY)) == {"small-2"}

    talk_to(app_of(repository), talk)


def test_one_load_at_a_time_and_requests_meanwhile(repository: Repository) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        repository.gate.clear()
        repository.loading.clear()
        first = asyncio.create_task(client.post("/admin/models/small/load"))
        await asyncio.to_thread(repository.loading.wait, TIMEOUT_S)
        models = await listed(client)
        assert (models["small"]["state"], models["small"]["version"]) == ("loading", 1)
        assert models["large"]["state"] == "loaded"
        for path in ("large/load", "small/load", "small/unload"):
            refused = await client.post(f"/admin/models/{path}")
            assert (refused.status_code, refused.json()["error"]["code"]) == (409, "load_in_progress"), path
        assert weights_of(await client.post("/generate", json=BODY)) == {"small-1"}
        assert (await client.post("/admin/models/large/unload")).status_code == 200
        repository.gate.set()
        assert (await first).status_code == 200
        assert {name: model["state"] for name, model in (await listed(client)).items()} == {
            "small": "loaded",
            "large": "available",
        }

    talk_to(app_of(repository), talk)


def test_a_load_goes_on_when_its_client_leaves(repository: Repository) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        repository.gate.clear()
        repository.loading.clear()
        leaving = asyncio.create_task(client.post("/admin/models/small/load"))
        await asyncio.to_thread(repository.loading.wait, TIMEOUT_S)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        repository.gate.set()
        await until(lambda: swapped(client))

    async def swapped(client: httpx.AsyncClient) -> bool:
        return bool((await listed(client))["small"]["version"] == 2)

    talk_to(app_of(repository), talk)


def test_a_server_that_ends_takes_no_load(repository: Repository) -> None:
    app = app_of(repository)

    async def talk(client: httpx.AsyncClient) -> None:
        app.state.runtime.drain()
        refused = await client.post("/admin/models/small/load")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")

    talk_to(app, talk)


def test_a_repository_that_has_gone_is_said_so(repository: Repository) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        repository.folder.rename(repository.folder.with_name("moved"))
        for answer in (await client.get("/admin/models"), await client.post("/admin/models/small/load")):
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "model_load_failed")
            assert "cannot be read (No such file or directory)" in answer.json()["error"]["message"]
        assert (await client.post("/generate", json=BODY)).status_code == 200

    talk_to(app_of(repository), talk)


# --- unloads ---


def test_an_unloaded_model_finishes_what_it_has_accepted(repository: Repository) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        network: Any = repository.pipelines["small-1"].network
        gate = threading.Event()
        network.before_call = lambda: gate.wait(TIMEOUT_S) and None
        bodies = [BODY | {"seed": seed} for seed in range(12)]  # more than have slots
        requests = [asyncio.create_task(client.post("/generate", json=body)) for body in bodies]
        await until(lambda: accepted(client))
        unloaded = await client.post("/admin/models/small/unload")
        assert (unloaded.status_code, unloaded.json()["state"]) == (200, "unloading")
        assert unloaded.json()["retiring"] == {"1": 12}
        refused = await client.post("/generate", json=BODY)
        unknown = await client.post("/generate", json=BODY | {"model": "absent"})
        assert refused.status_code == unknown.status_code == 422
        assert refused.json()["error"]["message"] == 'model: "small" given; this server accepts large'
        assert (await client.get("/v1/models/small")).status_code == 404
        assert 'lamamba_model_loaded{model="small"} 0.0' in (await client.get("/metrics")).text
        gate.set()
        for body, answer in zip(bodies, await asyncio.gather(*requests), strict=True):
            assert_made_by(repository.pipelines["small-1"], answer, body)
        model = (await listed(client))["small"]
        assert (model["state"], model["version"], model["retiring"]) == ("available", None, {})
        loaded = await client.post("/admin/models/small/load")
        assert (loaded.json()["state"], loaded.json()["version"]) == ("loaded", 2)
        assert (await client.post("/generate", json=BODY)).status_code == 200

    async def accepted(client: httpx.AsyncClient) -> bool:
        metrics = (await client.get("/metrics")).text
        running = [line for line in metrics.splitlines() if line.startswith("lamamba_num_requests_")]
        return sum(float(line.split()[1]) for line in running) == 12

    talk_to(app_of(repository), talk)


def test_the_last_model_stays(repository: Repository) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        assert (await client.post("/admin/models/large/unload")).status_code == 200
        refused = await client.post("/admin/models/small/unload")
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "last_model")
        again = await client.post("/admin/models/large/unload")
        assert (again.status_code, again.json()["error"]["code"]) == (404, "not_found")
        assert (await client.post("/generate", json=BODY)).status_code == 200

    talk_to(app_of(repository), talk)


# --- real models ---


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models, the second one wider."""
    root = tmp_path_factory.mktemp("versions")
    return [save_tiny_model(root / str(width), hidden_size=width) for width in (8, 16)]


def test_a_real_model_is_swapped_by_its_link(versions: list[Path], tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    link = tmp_path / "places"
    link.symlink_to(versions[0])
    app = create_app(
        Settings(model_repository=tmp_path, admin_key=f"root:{key_hash(KEY)}", device="cpu", num_threads=1)
    )
    body = {"class_id": "blue house", "steps": 2, "seed": 5}

    async def talk(client: httpx.AsyncClient) -> list[httpx.Response]:
        answers = [await client.post("/generate", json=body)]
        link.unlink()
        link.symlink_to(versions[1])
        swapped = await client.post("/admin/models/places/load")
        assert swapped.status_code == 200, swapped.text
        answers.append(await client.post("/generate", json=body))
        (versions[1] / "transformer" / "config.json").rename(tmp_path / "config.json")
        broken = await client.post("/admin/models/places/load")
        (tmp_path / "config.json").rename(versions[1] / "transformer" / "config.json")
        assert (broken.status_code, broken.json()["error"]["code"]) == (422, "unusable_model")
        assert "the network cannot be loaded" in broken.json()["error"]["message"]
        return answers

    answers = talk_to(app, talk)
    torch.set_num_threads(threads)
    for folder, answer in zip(versions, answers, strict=True):
        pipeline = LaMambaPipeline.load(folder, device="cpu")
        assert answer.json()["model"] == "places"
        assert weights_of(answer) == {pipeline.weights_hash}
        assert_made_by(pipeline, answer, body)
    assert weights_of(answers[0]) != weights_of(answers[1])


def test_an_unloaded_model_is_collected_and_what_is_imported_is_not_looked_at(
    versions: list[Path], tmp_path: Path
) -> None:
    threads = torch.get_num_threads()
    for name, folder in zip(("gone", "kept"), versions, strict=True):
        (tmp_path / name).symlink_to(folder)
    app = create_app(
        Settings(model_repository=tmp_path, admin_key=f"root:{key_hash(KEY)}", device="cpu", num_threads=2)
    )

    async def talk(client: httpx.AsyncClient) -> None:
        assert gc.isenabled()
        assert gc.get_freeze_count() > 100_000
        pipeline: Any = app.state.runtime.catalog.model("gone").pipeline
        parts = [weakref.ref(part) for part in (pipeline, pipeline.network, pipeline.autoencoder.module)]
        parts += [weakref.ref(parameter) for parameter in pipeline.network.parameters()]
        pipeline.network.owner = [pipeline]  # a cycle, which only the collector can let go
        del pipeline
        body = {"class_id": "blue house", "steps": 2, "model": "gone"}
        assert (await client.post("/generate", json=body)).status_code == 200
        assert (await client.post("/admin/models/gone/unload")).status_code == 200
        await until(lambda: collected(parts))

    async def collected(parts: list[weakref.ref[Any]]) -> bool:
        gc.collect()
        return all(part() is None for part in parts)

    talk_to(app, talk)
    torch.set_num_threads(threads)


def test_copies_are_of_the_same_weights(versions: list[Path], tmp_path: Path) -> None:
    link = tmp_path / "model"
    link.symlink_to(versions[0])
    devices = [torch.device("cpu")] * 2
    copies = ModelCopies(ModelSource(folder=link, name="m"), devices, Settings(num_threads=1))
    first = copies(0)
    assert copies(1).weights_hash == first.weights_hash
    assert first.name == "m"
    link.unlink()
    link.symlink_to(versions[1])
    with pytest.raises(ValueError, match=rf"by now, and {first.weights_hash} are served as m"):
        copies(1)


def test_a_listing_follows_links_and_sees_what_comes(tmp_path: Path) -> None:
    repository = ModelRepository(tmp_path)
    assert repository.models() == {}
    Repository(tmp_path).write("b")
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    assert list(repository.models()) == ["a", "b"]


def test_the_schema_has_the_admin_routes_where_there_is_a_key(repository: Repository) -> None:
    with TestClient(app_of(repository)) as client:
        paths = client.get("/openapi.json").json()["paths"]
    admin = {path: operations for path, operations in paths.items() if path.startswith("/admin")}
    assert set(admin) == {"/admin/models", "/admin/models/{name}/load", "/admin/models/{name}/unload"}
    for operations in admin.values():
        for operation in operations.values():
            assert operation["security"]
            assert "401" in operation["responses"]
