"""The page in a real browser, against the real server with a fake model: if this fails, people who come with
a browser see errors, lose images, or cannot use the page at all."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from model.limits import MAX_SEED
from model.pipeline import LaMambaPipeline
from service.api_keys import key_hash
from service.app import create_app
from service.server import DrainingServer, bind_socket
from service.settings import Settings
from tests.fakes import LABELS, fake_pipeline

TIMEOUT_S = 10.0
KEY = "a-key-of-the-tests"
DESKTOP = {"width": 1280, "height": 860}
PHONE = {"width": 390, "height": 844}


class Gate:
    """Lets a network's calls through until it is told to hold them, so that a test can look in between."""

    def __init__(self, pipeline: LaMambaPipeline) -> None:
        network: Any = pipeline.network
        self._permits = threading.Semaphore(0)
        self._holds = False
        network.before_call = self._pass

    def hold_after(self, calls: int) -> None:
        self._permits = threading.Semaphore(calls)
        self._holds = True

    def allow(self, calls: int) -> None:
        self._permits.release(calls)

    def release(self) -> None:
        self._holds = False
        self._permits.release()  # the call that waits

    def _pass(self) -> None:
        if self._holds:
            self._permits.acquire(timeout=TIMEOUT_S)


class Site:
    """A server on a free port, whose model a test can hold."""

    def __init__(self, url: str, pipeline: LaMambaPipeline, gate: Gate) -> None:
        self.url = url
        self.pipeline = pipeline
        self.gate = gate


SiteFactory = Callable[..., Site]
PageFactory = Callable[..., Page]


@pytest.fixture
def site_of() -> Iterator[SiteFactory]:
    """Makes servers, each with its own settings and larger model; they end with the test."""
    with ExitStack() as stack:

        def make(*, num_classes: int = len(LABELS), **settings: Any) -> Site:
            pipeline = fake_pipeline("fake-32", resolution=32, num_classes=num_classes)
            given = Settings(**settings)
            app = create_app(given, (fake_pipeline(), pipeline))
            gate = Gate(pipeline)
            bound = stack.enter_context(bind_socket("127.0.0.1", 0))
            server = DrainingServer(app, given)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})

            def stop() -> None:
                gate.release()
                server.should_exit = True
                thread.join(TIMEOUT_S)

            thread.start()
            stack.callback(stop)
            return Site(f"http://127.0.0.1:{bound.getsockname()[1]}{given.root_path}/", pipeline, gate)

        yield make


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The system's Chromium, shared by the tests of this file."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is on the path")
    with (
        sync_playwright() as playwright,
        # Chromium's sandbox does not start as root, which containers of CI often are.
        playwright.chromium.launch(executable_path=path, args=["--no-sandbox"]) as launched,
    ):
        yield launched


@pytest.fixture
def open_page(browser: Browser) -> Iterator[PageFactory]:
    """Opens pages in a profile of their own. Fails a test whose page had an error or broke its own policy."""
    context = browser.new_context(viewport=DESKTOP, reduced_motion="reduce", accept_downloads=True)
    context.set_default_timeout(1000 * TIMEOUT_S)
    problems: list[str] = []

    def make(url: str) -> Page:
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda entry: problems.append(entry.text) if "Policy" in entry.text else None)
        page.goto(url)
        return page

    yield make
    context.close()
    assert problems == []


def generate(page: Page, label: str = "forest", **settings: object) -> None:
    page.get_by_role("combobox").fill(label)
    for name, value in settings.items():
        page.locator(f"#{name}").fill(str(value))
    page.get_by_role("button", name="Generate").click()


def tiles(page: Page) -> Locator:
    return page.locator("#tiles").get_by_role("button")


def pixels(file: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(file)) as image:
        return np.asarray(image).astype(int)


def test_an_image_grows_in_previews_and_is_the_pipelines_own(
    site_of: SiteFactory, open_page: PageFactory
) -> None:
    site = site_of()
    page = open_page(site.url)
    site.gate.hold_after(10)
    generate(page, "kitchen", seed=MAX_SEED, cfg_scale="3.5")
    expect(page.locator("#stage-status")).to_have_text("Step 10 of 20")
    expect(page.locator("#frames img")).to_have_attribute("src", re.compile("^data:image/png;base64,"))
    assert float(page.get_by_role("progressbar").evaluate("bar => bar.value")) == 0.5
    site.gate.release()
    page.get_by_role("button", name="Open image 1 of 1").click()
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == f"kitchen-{MAX_SEED}-0.png"
    file = download.value.path().read_bytes()
    alone = site.pipeline.generate([1], seeds=[MAX_SEED], guidance_scale=3.5)[0]
    assert np.abs(pixels(file) - alone.numpy().astype(int)).max() <= 1
    page.get_by_role("button", name="Copy as curl").click()
    command = shlex.split(page.locator("#viewer-command").inner_text())
    body = json.loads(command[command.index("-d") + 1])
    assert body["seed"] == MAX_SEED
    again = httpx.post(command[3], json=body, headers={"accept": "image/png"})
    assert np.array_equal(pixels(again.content), pixels(file))


def test_cancel_gives_the_slot_back_and_leaves_the_gallery_alone(
    site_of: SiteFactory, open_page: PageFactory
) -> None:
    site = site_of()
    page = open_page(site.url)
    generate(page, seed=1)
    expect(tiles(page)).to_have_count(1)
    site.gate.hold_after(3)
    generate(page, seed=2, steps=1000)
    expect(page.locator("#stage-status")).to_have_text("Step 3 of 1000")
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("button", name="Generate")).to_be_focused()
    expect(page.locator("#stage-facts")).to_contain_text("seed 1")
    site.gate.release()
    generate(page, seed=3, steps=2)
    expect(tiles(page)).to_have_count(2)
    metrics = httpx.get(f"{site.url}metrics").text
    assert "lamamba_cancellations_total 1.0" in metrics


def test_who_waits_sees_the_place_in_the_queue(site_of: SiteFactory, open_page: PageFactory) -> None:
    site = site_of(max_rows=2)
    page = open_page(site.url)
    site.gate.hold_after(1)
    body = {"class_id": 0, "resolution": 32, "steps": 200}
    with httpx.stream("POST", f"{site.url}generate", json=body, headers={"accept": "text/event-stream"}):
        generate(page)
        status = page.locator("#stage-status")
        for _ in range(100):  # the engine looks at its queue between two steps
            site.gate.allow(1)
            if status.text_content():
                break
            page.wait_for_timeout(20)
        expect(status).to_have_text("Next in the queue")
    site.gate.release()
    expect(tiles(page)).to_have_count(1)


def test_a_mistake_is_shown_at_its_field_in_the_servers_words(
    site_of: SiteFactory, open_page: PageFactory
) -> None:
    page = open_page(site_of().url)
    wrong = page.get_by_role("textbox", name="Guidance")
    for name, value, message in (
        ("cfg_scale", "25", "25.0 given; this model accepts 1 to 20"),
        ("cfg_scale", "much", '"much" given; this model accepts a number, 1 to 20'),
    ):
        generate(page, **{name: value})
        expect(wrong).to_have_accessible_description(re.compile(re.escape(message) + "$"))
        expect(wrong).to_have_attribute("aria-invalid", "true")
        expect(wrong).to_be_focused()
    wrong.fill("2")
    expect(page.locator("#cfg_scale-error")).to_be_empty()
    generate(page, "forrest")
    expect(page.locator("#class_id-error")).to_contain_text("forest")
    expect(page.get_by_role("combobox")).to_be_focused()
    page.locator("#settings summary").click()
    generate(page)
    expect(tiles(page)).to_have_count(1)


def test_the_interval_of_guidance_reaches_the_server_and_comes_back(
    site_of: SiteFactory, open_page: PageFactory
) -> None:
    site = site_of()
    page = open_page(site.url)
    low = page.get_by_role("textbox", name="Guided from timestep")
    high = page.get_by_role("textbox", name="Guided to timestep")
    expect(low).to_have_accessible_description(re.compile("0 clean to 999 noise"))
    low.fill("300")  # and up to the last one
    with page.expect_request("**/generate") as request:
        generate(page, "kitchen", seed=5, cfg_scale="3.5")
    assert request.value.post_data_json["guidance_interval"] == [300, 999]
    page.get_by_role("button", name="Open image 1 of 1").click()
    viewer = page.get_by_role("dialog")
    expect(viewer).to_contain_text("3.5 at timesteps 300 to 999")
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    alone = site.pipeline.generate([1], seeds=[5], guidance_scale=3.5, guidance_interval=(300, 999))[0]
    made = pixels(download.value.path().read_bytes())
    assert np.abs(made - alone.numpy().astype(int)).max() <= 1
    page.get_by_role("button", name="Copy as curl").click()
    expect(page.locator("#viewer-command")).to_contain_text('"guidance_interval": [300,999]')
    page.get_by_role("button", name="Close").click()
    low.fill("")
    with page.expect_request("**/generate") as request:
        generate(page, "kitchen", seed=6)
    assert "guidance_interval" not in request.value.post_data_json
    expect(tiles(page)).to_have_count(2)
    tiles(page).nth(1).click()
    page.get_by_role("button", name="Use settings").click()
    expect(low).to_have_value("300")
    expect(high).to_have_value("999")


def test_a_model_without_classes_has_nothing_to_guide(site_of: SiteFactory, open_page: PageFactory) -> None:
    page = open_page(site_of(num_classes=0).url)
    page.get_by_label("16 px").check()
    page.locator("#interval-low").fill("300")
    page.get_by_label("32 px").check()
    for field in ("Guidance", "Guided from timestep"):
        expect(page.get_by_role("textbox", name=field)).to_be_hidden()
    page.get_by_role("button", name="Generate").click()
    expect(tiles(page)).to_have_count(1)


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        pytest.param("700", "200", "[700, 200] given; this model accepts two timesteps", id="reversed"),
        pytest.param("", "1000", "[0, 1000] given; this model accepts two timesteps from 0", id="beyond"),
        pytest.param("0.5", "", "0.5 given; this model accepts two timesteps from 0 to 999", id="fraction"),
        pytest.param("half", "", '"half" given; this model accepts two timesteps from 0 to 999', id="text"),
    ],
)
def test_a_wrong_interval_is_shown_at_both_of_its_ends(
    site_of: SiteFactory, open_page: PageFactory, low: str, high: str, message: str
) -> None:
    page = open_page(site_of().url)
    ends = page.get_by_role("group", name="Guided").get_by_role("textbox")
    generate(page, **{"interval-low": low, "interval-high": high})
    expect(ends.first).to_be_focused()
    expect(page.locator("#interval-error")).to_be_in_viewport(ratio=1)
    for end in ends.all():
        expect(end).to_have_attribute("aria-invalid", "true")
        expect(end).to_have_accessible_description(re.compile(re.escape(message)))
    ends.last.fill("1")
    expect(page.locator("#interval-error")).to_be_empty()
    expect(page.locator("#form [aria-invalid]")).to_have_count(0)


def test_a_failure_on_the_way_is_told_with_its_id_and_the_page_goes_on(
    site_of: SiteFactory, open_page: PageFactory
) -> None:
    site = site_of()
    page = open_page(site.url)
    expect(page.get_by_role("button", name="Generate")).to_be_visible()  # the models are warm
    network: Any = site.pipeline.network
    network.failing_label = 0
    generate(page, "forest", seed=1)
    expect(page.get_by_role("alert").first).to_have_text(re.compile(r"\(request [0-9a-f]{24}\)$"))
    expect(page.locator("#stage-title")).to_have_text("Nothing here yet")
    page.route("**/generate", lambda route: route.abort())
    generate(page, "kitchen")
    expect(page.get_by_role("alert").first).to_have_text("The server cannot be reached.")
    page.unroute("**/generate")
    generate(page, "kitchen")
    expect(tiles(page)).to_have_count(1)
    expect(page.locator("#notice")).to_be_hidden()


def test_a_reload_keeps_the_gallery_and_delete_can_be_undone(
    site_of: SiteFactory, open_page: PageFactory
) -> None:
    page = open_page(site_of().url)
    generate(page, "garden", seed=4, num_images=3)
    expect(tiles(page)).to_have_count(3)
    page.reload()
    expect(tiles(page)).to_have_count(3)
    assert page.locator("#tiles img").first.evaluate("async i => (await i.decode(), i.naturalWidth)") == 32
    tiles(page).nth(1).click()
    expect(page.get_by_role("dialog")).to_contain_text("4, image 1")
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(tiles(page)).to_have_count(2)
    page.get_by_role("button", name="Undo").click()
    expect(tiles(page)).to_have_count(3)
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete all").click()
    expect(page.locator("#stage-title")).to_have_text("Nothing here yet")
    page.reload()
    expect(page.get_by_role("button", name="Generate")).to_be_visible()
    expect(tiles(page)).to_have_count(0)


def test_the_keyboard_alone_is_enough(site_of: SiteFactory, open_page: PageFactory) -> None:
    page = open_page(site_of().url)
    field = page.get_by_role("combobox")
    expect(field).to_be_visible()
    keys = page.keyboard
    for _ in range(4):  # the link to the images, API, theme, the class
        keys.press("Tab")
    expect(field).to_be_focused()
    keys.type("ven")
    expect(page.get_by_role("option")).to_have_count(1)
    keys.press("ArrowDown")
    expect(page.get_by_role("option", selected=True)).to_have_accessible_name("venice square")
    keys.press("Enter")
    expect(field).to_have_value("venice square")
    expect(page.get_by_role("listbox")).to_be_hidden()
    keys.press("Enter")
    expect(tiles(page)).to_have_count(1)
    for _ in range(20):
        keys.press("Tab")
        if tiles(page).first.evaluate("tile => tile === document.activeElement"):
            break
    expect(tiles(page).first).to_be_focused()
    assert tiles(page).first.evaluate("tile => getComputedStyle(tile).outlineStyle") == "solid"
    keys.press("Enter")
    expect(page.get_by_role("dialog", name="venice square")).to_be_visible()
    keys.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    keys.press("Delete")
    expect(tiles(page)).to_have_count(0)
    expect(page.get_by_role("button", name="Generate")).to_be_focused()


def test_a_server_with_keys_behind_a_proxys_path_asks_for_one(
    site_of: SiteFactory, open_page: PageFactory
) -> None:
    site = site_of(root_path="/x", api_keys={"tests": key_hash(KEY)})
    page = open_page(site.url.removesuffix("/"))  # as people type it
    expect(page).to_have_url(site.url)
    expect(page.get_by_role("button", name="Generate")).to_be_hidden()
    page.get_by_label("API key").fill("mistyped")
    page.get_by_role("button", name="Unlock").click()
    expect(page.locator("#key-error")).to_contain_text("does not know")
    page.get_by_label("API key").fill(KEY)
    page.get_by_role("button", name="Unlock").click()
    generate(page)
    expect(tiles(page)).to_have_count(1)
    page.reload()
    expect(page.get_by_role("button", name="Generate")).to_be_visible()
    tiles(page).first.click()
    page.get_by_role("button", name="Copy as curl").click()
    command = page.locator("#viewer-command").inner_text()
    assert "$LAMAMBA_API_KEY" in command
    assert KEY not in command


def test_the_page_fits_a_phone_and_keeps_its_theme(site_of: SiteFactory, open_page: PageFactory) -> None:
    page = open_page(site_of().url)
    page.set_viewport_size(PHONE)
    page.get_by_role("button", name="Dark theme").click()
    page.reload()
    expect(page.get_by_role("button", name="Dark theme", pressed=True)).to_be_visible()
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "dark"
    expect(page.locator("#seed")).to_be_hidden()  # the settings are folded
    generate(page)
    expect(tiles(page)).to_have_count(1)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    tiles(page).first.click()
    page.get_by_role("button", name="Use settings").click()
    expect(page.get_by_role("combobox")).to_have_value("forest")


def test_the_files_come_with_their_types_and_headers(client: TestClient) -> None:
    for path, media_type in (
        ("/", "text/html"),
        ("/web/main.js", "javascript"),
        ("/web/style.css", "text/css"),
        ("/web/icon.svg", "image/svg+xml"),
    ):
        answer = client.get(path)
        assert answer.status_code == 200
        assert media_type in answer.headers["content-type"]
        policy = answer.headers["content-security-policy"].split("; ")
        assert {"default-src 'self'", "img-src 'self' blob: data:", "frame-ancestors 'none'"} <= set(policy)
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        again = client.get(path, headers={"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert client.head(path).status_code == 200
    assert all(label not in client.get("/").text for label in LABELS)  # classes come from the API alone


@pytest.mark.parametrize("path", ["/web/", "/web/nothing.js", "/web/../app.py", "/web/%2e%2e/app.py"])
def test_no_other_file_is_given(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


def test_the_page_is_not_written_to(client: TestClient) -> None:
    answer = client.post("/web/main.js")
    assert answer.status_code == 405
    assert "GET" in answer.headers["allow"]
