// The page: joins the form, the stage, the gallery and the viewer to the server.

import { ApiError, generate, getJSON, hasKey, keepKey } from "./api.js";
import { Form } from "./form.js";
import { openGallery } from "./gallery.js";
import { Stage } from "./stage.js";
import { Viewer } from "./viewer.js";

const UNDO_MS = 6000;
const element = (id) => document.getElementById(id);

const form = new Form();
const stage = new Stage();
const gallery = await openGallery();
const urls = new Map(); // of blobs, by the id of their image
const viewer = new Viewer({
  entries: () => gallery.entries,
  urlOf,
  remove,
  reuse(facts) {
    form.settings = facts;
    element("generate").focus();
    say("Settings taken over");
  },
  say: toast,
});
let running = null; // the AbortController of the request on its way
let afterKey = start; // what an accepted key goes on with

// --- the server ---

async function start() {
  for (;;) {
    try {
      const { data } = await getJSON("v1/models");
      form.models = data;
      notice(null);
      return;
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      if (error.status === 401) return askForKey(start, error);
      notice(error.reason);
      await new Promise((resolve) => setTimeout(resolve, 1000 * Math.min(10, error.retryAfterS ?? 3)));
    }
  }
}

function askForKey(next, error) {
  afterKey = next;
  notice(null);
  element("form").hidden = true;
  element("key-form").hidden = false;
  element("key-error").textContent = hasKey() ? error.reason : "";
  element("key").focus();
}

async function run() {
  if (running) return;
  form.clearErrors();
  notice(null);
  const { text, facts, numImages } = form.request;
  const started = performance.now();
  setRunning(new AbortController());
  let accepted = false; // until the first event a mistake may come back, and the stage keeps what it has
  try {
    for await (const [name, data] of generate(text, running.signal)) {
      if (!accepted) begin(facts, numImages);
      accepted = true;
      if (name === "queued") stage.queued(data.queue_position);
      if (name === "queued" && data.queue_position > 1) say(`Place ${data.queue_position} in the queue`);
      if (name === "progress") stage.progress(data.steps, data.steps_done);
      if (name === "preview") stage.preview(data.index, data.format, data.b64_json);
      if (name === "result") await keep(data, facts.seed, (performance.now() - started) / 1000);
    }
  } catch (error) {
    stage.end();
    if (accepted) showLatest();
    if (error.name === "AbortError") say("Cancelled");
    else if (!(error instanceof ApiError)) throw error;
    else if (error.status === 401) askForKey(goOn, error);
    else if (!form.showError(error)) notice(error.reason, error.requestId);
  } finally {
    setRunning(null);
  }
}

function goOn() {
  element("form").hidden = false;
  run();
}

function begin(facts, numImages) {
  stage.begin(facts, numImages);
  say("Generating");
  const gentle = matchMedia("(prefers-reduced-motion: reduce)").matches;
  element("stage").scrollIntoView({ block: "nearest", behavior: gentle ? "auto" : "smooth" });
}

function setRunning(controller) {
  const hadFocus = [element("generate"), element("cancel")].includes(document.activeElement);
  running = controller;
  element("generate").hidden = controller !== null;
  element("cancel").hidden = controller === null;
  if (hadFocus) element(controller ? "cancel" : "generate").focus({ preventScroll: true });
}

async function keep(result, givenSeed, seconds) {
  const now = Date.now();
  const made = result.images.map(({ index, image_index, b64_json }) => ({
    id: `${now} ${9999 - index} ${result.request_id}`,
    blob: blobOf(b64_json, result.format),
    facts: {
      model: result.model,
      class_id: result.class_id,
      class_label: result.class_label,
      cfg_scale: result.cfg_scale,
      guidance_interval: result.guidance_interval,
      resolution: result.resolution,
      steps: result.steps,
      sampler: result.sampler,
      seed: givenSeed ?? String(result.seed), // a drawn one is small enough to be exact; a given one may not be
      image_index,
      format: result.format,
      created: result.created,
    },
  }));
  const kept = await Promise.all(made.map((entry) => gallery.add(entry)));
  showOnStage(made, seconds);
  showTiles();
  say(`${made.length === 1 ? "Image" : `${made.length} images`} of ${made[0].facts.class_label ?? result.model} made`);
  if (kept.includes(false)) toast("This browser does not keep the image: download it before you leave");
}

function blobOf(base64, format) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  return new Blob([bytes], { type: `image/${format}` });
}

// --- the gallery ---

function urlOf({ id, blob }) {
  if (!urls.has(id)) urls.set(id, URL.createObjectURL(blob));
  return urls.get(id);
}

function showOnStage(entries, seconds) {
  const images = entries.map((entry) => ({ url: urlOf(entry), open: () => viewer.open(entry) }));
  stage.show(entries[0].facts, images, seconds);
}

function showLatest() {
  const [latest] = gallery.entries;
  if (latest) showOnStage([latest], null);
  else stage.showNothing();
}

function showTiles() {
  element("gallery").hidden = gallery.entries.length === 0;
  element("gallery-count").textContent = gallery.entries.length;
  element("tiles").replaceChildren(...gallery.entries.map(tileOf));
}

function tileOf(entry) {
  const { facts } = entry;
  const what = facts.class_label ?? facts.model;
  const tile = Object.assign(document.createElement("button"), { type: "button", className: "tile" });
  tile.setAttribute("aria-label", `${what}, seed ${facts.seed}`);
  const image = Object.assign(document.createElement("img"), { alt: "", loading: "lazy", src: urlOf(entry) });
  const caption = Object.assign(document.createElement("span"), { textContent: what });
  tile.append(image, caption);
  tile.addEventListener("click", () => viewer.open(entry));
  tile.addEventListener("keydown", (event) => {
    if (event.key === "Delete") remove(entry);
  });
  const item = document.createElement("li");
  item.append(tile);
  return item;
}

async function remove(entry) {
  const place = gallery.entries.indexOf(entry);
  await gallery.remove(entry);
  URL.revokeObjectURL(urls.get(entry.id));
  urls.delete(entry.id);
  showTiles();
  if (!running) showLatest();
  const tiles = document.querySelectorAll(".tile");
  (tiles[Math.min(place, tiles.length - 1)] ?? element("generate")).focus();
  toast("Image deleted", async () => {
    await gallery.add(entry);
    showTiles();
    if (!running) showLatest();
  });
}

element("clear").addEventListener("click", async () => {
  if (!confirm(`Delete all ${gallery.entries.length} images of this gallery?`)) return;
  await gallery.clear();
  showTiles();
  if (!running) showLatest();
  element("generate").focus();
});

// --- what is said ---

function say(text) {
  element("announcer").textContent = text;
}

function notice(text, requestId = null) {
  element("notice").hidden = text === null;
  element("notice").textContent = requestId ? `${text} (request ${requestId})` : text;
}

let toastTimer = 0;
function toast(text, undo = null) {
  clearTimeout(toastTimer);
  element("toast-text").textContent = text;
  element("toast-undo").hidden = undo === null;
  element("toast-undo").onclick = () => {
    element("toast").hidden = true;
    undo();
  };
  // A modal dialog hides what is outside of it.
  (document.querySelector("dialog[open]") ?? document.body).append(element("toast"));
  element("toast").hidden = false;
  toastTimer = setTimeout(() => (element("toast").hidden = true), UNDO_MS);
}

// --- buttons and keys ---

element("form").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
element("cancel").addEventListener("click", () => running?.abort());
element("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  keepKey(element("key").value.trim());
  element("key").value = "";
  element("key-form").hidden = true;
  afterKey();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !element("viewer").open) running?.abort();
  if (event.key === "Enter" && event.ctrlKey && !element("viewer").open && !element("form").hidden) element("form").requestSubmit();
});

const dark = matchMedia("(prefers-color-scheme: dark)");
function showTheme() {
  const isDark = (document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";
  element("theme").setAttribute("aria-pressed", String(isDark));
}
element("theme").addEventListener("click", () => {
  const theme = element("theme").getAttribute("aria-pressed") === "true" ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  localStorage.setItem("lamamba-theme", theme);
  showTheme();
});
dark.addEventListener("change", showTheme);

showTheme();
showLatest();
showTiles();
await start();
