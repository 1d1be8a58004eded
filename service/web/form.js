// The controls: their ranges come from the server's models, their errors from its answers.

import { ClassField } from "./classes.js";
import { json } from "./request.js";

const PREVIEWS = 16; // of each image: often enough to watch it grow
const FINE = 200; // positions of a slider over a range too wide to be even
const RANGED = ["num_images", "cfg_scale", "steps"];
const INTERVAL = ["interval-low", "interval-high"];

const element = (id) => document.getElementById(id);

export class Form {
  #classes = new ClassField();
  #models = [];
  #model = null;
  #defaults = {};

  constructor() {
    for (const name of RANGED) {
      slider(name).addEventListener("input", () => {
        element(name).value = this.#fromSlider(name);
        this.#speak(name);
      });
      element(name).addEventListener("input", () => this.#toSlider(name));
    }
    element("models").addEventListener("change", (event) => this.#select(event.target.value));
    element("samplers").addEventListener("change", () => this.#useDefaults());
    element("form").addEventListener("input", (event) => this.#clear(event.target.closest("[data-field]")));
    element("settings").open = matchMedia("(min-width: 820px)").matches;
  }

  /** The models of the server; the largest is chosen, for its images are the ones to look at. */
  set models(models) {
    this.#models = models.toSorted((one, other) => one.resolution - other.resolution);
    const clashing = new Set(models.map(({ resolution }) => resolution)).size < models.length;
    const options = this.#models.map(({ id, resolution }) => [id, clashing ? id : `${resolution} px`]);
    const chosen = this.#models.at(-1).id;
    element("models").replaceChildren(...segments("model", options, chosen));
    this.#select(chosen);
    element("form").hidden = false;
  }

  /** {text, facts}: the request's JSON, and what to show of it while it runs. */
  get request() {
    const numbers = Object.fromEntries(RANGED.map((name) => [name, number(element(name).value)]));
    const seed = element("seed").value.trim();
    const sampler = chosen("sampler");
    const label = element("class_id").value.trim();
    const text = json({
      model: this.#model.id,
      class_id: this.#classes.value,
      ...numbers,
      guidance_interval: this.#interval,
      sampler,
      seed: seed === "" ? undefined : /^-?\d+$/.test(seed) ? BigInt(seed) : seed,
      previews: Math.min(PREVIEWS, this.#model.limits.previews.maximum) || undefined,
    });
    const facts = {
      model: this.#model.id,
      class_label: this.#model.num_classes ? label : null,
      cfg_scale: numbers.cfg_scale ?? this.#defaults.cfg_scale,
      guidance_interval: this.#interval ?? null,
      steps: numbers.steps ?? this.#defaults.steps,
      sampler,
      seed: seed || null,
    };
    return { text, facts, numImages: Number(numbers.num_images ?? 1) };
  }

  /** Take over what an image was made with. */
  set settings(facts) {
    const model = this.#models.find(({ id }) => id === facts.model);
    if (model) {
      document.querySelector(`input[name=model][value="${CSS.escape(model.id)}"]`).checked = true;
      this.#select(model.id);
    }
    if (facts.class_label !== null) this.#classes.set(facts.class_id, facts.class_label);
    document.querySelector(`input[name=sampler][value="${facts.sampler}"]`).checked = true;
    this.#useDefaults();
    for (const name of ["cfg_scale", "steps", "seed"]) element(name).value = facts[name];
    for (const [end, id] of INTERVAL.entries()) element(id).value = facts.guidance_interval?.[end] ?? "";
    for (const name of RANGED) this.#toSlider(name);
    this.clearErrors();
  }

  /** Show an error at its field and go there; false if it has none. */
  showError(error) {
    const field = document.querySelector(`[data-field="${error.field === "resolution" ? "model" : error.field}"]`);
    if (!field) return false;
    field.classList.add("wrong");
    field.querySelector(".error").textContent = error.reason;
    const controls = field.querySelectorAll("input[type=text], input:checked");
    for (const control of controls) control.setAttribute("aria-invalid", "true");
    if (element("settings").contains(field)) element("settings").open = true;
    controls[0].focus();
    field.scrollIntoView({ block: "nearest" }); // the error, too, which stands below
    return true;
  }

  clearErrors() {
    for (const field of document.querySelectorAll("[data-field].wrong")) this.#clear(field);
  }

  #clear(field) {
    if (!field?.classList.contains("wrong")) return;
    field.classList.remove("wrong");
    field.querySelector(".error").textContent = "";
    for (const control of field.querySelectorAll("[aria-invalid]")) control.removeAttribute("aria-invalid");
  }

  #select(id) {
    this.#model = this.#models.find((model) => model.id === id);
    const { limits, num_classes: numClasses, device, dtype } = this.#model;
    element("model-facts").textContent = `${id}, ${dtype} on ${device}`;
    document.querySelector("[data-field=class_id]").hidden = !numClasses;
    document.querySelector("[data-field=cfg_scale]").hidden = !numClasses;
    this.#selectInterval(limits.guidance_interval);
    this.#classes.model = this.#model;
    const sampler = chosen("sampler");
    const known = limits.samplers.includes(sampler) ? sampler : "dpm++";
    element("samplers").replaceChildren(...segments("sampler", limits.samplers.map((name) => [name, name]), known));
    for (const name of RANGED) {
      const { minimum, maximum } = limits[name];
      const range = wide(limits[name])
        ? { min: 0, max: FINE, step: 1 }
        : { min: minimum, max: maximum, step: name === "cfg_scale" ? 0.1 : 1 };
      Object.assign(slider(name), range);
    }
    this.#useDefaults();
  }

  /** Say which timesteps there are; no range is a model without guidance. */
  #selectInterval(range) {
    document.querySelector("[data-field=guidance_interval]").hidden = range === null;
    if (range === null) return;
    const { minimum, maximum } = range;
    for (const [end, id] of INTERVAL.entries()) element(id).placeholder = [minimum, maximum][end];
    element("interval-hint").textContent = `Timesteps with guidance, ${minimum} clean to ${maximum} noise; others cost half.`;
  }

  /** The least and the greatest guided timestep, where one is given; the other is then the range's. */
  get #interval() {
    const range = this.#model.limits.guidance_interval;
    const [low, high] = INTERVAL.map((id) => number(element(id).value));
    if (range === null || (low === undefined && high === undefined)) return undefined;
    return [low ?? range.minimum, high ?? range.maximum];
  }

  /** Defaults where nobody has set anything else. */
  #useDefaults() {
    const { limits } = this.#model;
    const defaults = {
      num_images: limits.num_images.default,
      cfg_scale: limits.cfg_scale.default,
      steps: limits.steps.default[chosen("sampler")],
    };
    for (const name of RANGED) {
      const input = element(name);
      if (input.value.trim() === "" || input.value === String(this.#defaults[name])) input.value = defaults[name];
      input.placeholder = defaults[name];
      this.#toSlider(name);
    }
    this.#defaults = defaults;
  }

  #fromSlider(name) {
    const { minimum, maximum } = this.#model.limits[name];
    const position = Number(slider(name).value);
    if (!wide(this.#model.limits[name])) return position;
    return Math.round(minimum * (maximum / minimum) ** (position / FINE));
  }

  #toSlider(name) {
    const { minimum, maximum } = this.#model.limits[name];
    const value = Math.min(maximum, Math.max(minimum, Number(element(name).value) || minimum));
    slider(name).value = wide(this.#model.limits[name])
      ? (FINE * Math.log(value / minimum)) / Math.log(maximum / minimum)
      : value;
    this.#speak(name);
  }

  #speak(name) {
    const range = slider(name);
    range.setAttribute("aria-valuetext", element(name).value);
    const filled = (Number(range.value) - Number(range.min)) / (Number(range.max) - Number(range.min) || 1);
    range.style.setProperty("--filled", `${100 * filled}%`);
  }
}

const slider = (name) => document.querySelector(`input[type=range][data-for=${name}]`);
const chosen = (name) => document.querySelector(`input[name=${name}]:checked`)?.value;

// A thousand steps on a finger's width: there the slider goes by ratio.
const wide = ({ minimum, maximum }) => minimum > 0 && maximum / minimum > 100;

/** What the server is to read: nothing, a number, or the text as it is, for it to say what it accepts. */
function number(text) {
  const trimmed = text.trim();
  if (trimmed === "") return undefined;
  const value = Number(trimmed);
  return Number.isFinite(value) ? value : trimmed;
}

function segments(name, options, selected) {
  return options.map(([value, text]) => {
    const label = document.createElement("label");
    const input = Object.assign(document.createElement("input"), { type: "radio", name, value });
    input.checked = value === selected;
    const caption = document.createElement("span");
    caption.textContent = text;
    label.append(input, caption);
    return label;
  });
}
