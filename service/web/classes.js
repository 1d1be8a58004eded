// The class field: a combobox (as WAI-ARIA describes it) whose suggestions the server searches for.

import { getJSON } from "./api.js";

const WAIT_MS = 120; // between a key and the search: people type in bursts
const SHOWN = 50;

export class ClassField {
  #input = document.getElementById("class_id");
  #list = document.getElementById("class-list");
  #model = null;
  #chosen = null;
  #active = -1;
  #found = [];
  #timer = 0;
  #search = new AbortController();

  constructor() {
    const input = this.#input;
    input.addEventListener("input", () => this.#searchSoon(input.value, WAIT_MS));
    input.addEventListener("keydown", (event) => this.#key(event));
    input.addEventListener("click", () => this.#browse());
    input.addEventListener("focus", () => input.select());
    input.addEventListener("blur", () => this.#close());
    // Before the blur that a click would cause.
    this.#list.addEventListener("pointerdown", (event) => event.preventDefault());
    this.#list.addEventListener("click", (event) => {
      const option = event.target.closest("[role=option]");
      if (option) this.#choose(this.#found[Number(option.dataset.index)]);
    });
    document.getElementById("shuffle").addEventListener("click", () => this.shuffle());
  }

  /** Search the classes of this model from now on. */
  set model(model) {
    const label = this.#input.value;
    this.#model = model;
    this.#input.placeholder = `Search ${model.num_classes} classes`;
    this.#chosen = null;
    this.#close();
    if (label === "" && model.num_classes) this.shuffle();
  }

  /** What the request says: the id of a suggestion, a number, or text for the server to find. */
  get value() {
    const text = this.#input.value.trim();
    if (!this.#model.num_classes || text === "") return undefined;
    if (this.#chosen?.label === text) return this.#chosen.class_id;
    return /^\d{1,9}$/.test(text) ? Number(text) : text;
  }

  set(classId, label) {
    this.#chosen = { class_id: classId, label };
    this.#input.value = label;
  }

  shuffle() {
    const labels = this.#model.labels;
    let index = Math.floor(Math.random() * labels.length);
    if (labels[index] === this.#input.value) index = (index + 1) % labels.length;
    this.set(index, labels[index]);
    this.#close();
  }

  /** All classes where one is already named, else those that match what is typed. */
  #browse() {
    const text = this.#input.value.trim();
    this.#searchSoon(text === this.#chosen?.label || this.#model.labels.includes(text) ? "" : text, 0);
  }

  #searchSoon(text, waitMs) {
    clearTimeout(this.#timer);
    this.#search.abort();
    this.#search = new AbortController();
    const { signal } = this.#search;
    this.#timer = setTimeout(async () => {
      const query = new URLSearchParams({ q: text.trim(), model: this.#model.id, limit: SHOWN });
      try {
        this.#show((await getJSON(`v1/classes?${query}`, signal)).data);
      } catch {
        this.#close(); // no suggestions: the text itself can still be sent
      }
    }, waitMs);
  }

  #show(found) {
    if (document.activeElement !== this.#input) return;
    this.#found = found;
    this.#list.replaceChildren(
      ...found.map(({ class_id: classId, label }, index) => {
        const option = document.createElement("li");
        const number = document.createElement("span");
        number.className = "count";
        number.textContent = classId;
        Object.assign(option, { id: `class-option-${index}`, role: "option", textContent: label });
        option.setAttribute("aria-label", label);
        option.dataset.index = index;
        option.append(number);
        return option;
      }),
    );
    if (!found.length) {
      const none = document.createElement("li");
      none.className = "hint";
      none.textContent = "No such class";
      this.#list.append(none);
    }
    this.#list.hidden = false;
    this.#input.setAttribute("aria-expanded", "true");
    this.#activate(this.#input.value.trim() ? found.findIndex(({ label }) => label === this.#input.value) : -1);
  }

  #close() {
    clearTimeout(this.#timer);
    this.#search.abort();
    this.#list.hidden = true;
    this.#input.setAttribute("aria-expanded", "false");
    this.#activate(-1);
  }

  #activate(index) {
    this.#active = index;
    for (const option of this.#list.children) {
      option.setAttribute("aria-selected", String(option.dataset.index === String(index)));
    }
    const option = index < 0 ? null : this.#list.children[index];
    if (option) this.#input.setAttribute("aria-activedescendant", option.id);
    else this.#input.removeAttribute("aria-activedescendant");
    option?.scrollIntoView({ block: "nearest" });
  }

  #choose({ class_id: classId, label }) {
    this.set(classId, label);
    this.#close();
  }

  #key(event) {
    const open = !this.#list.hidden;
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (!open) this.#browse();
      else if (this.#found.length) {
        const step = event.key === "ArrowDown" ? 1 : -1;
        const from = this.#active < 0 && step < 0 ? 0 : this.#active;
        this.#activate((from + step + this.#found.length) % this.#found.length);
      }
    } else if (event.key === "Enter" && open && this.#active >= 0) {
      event.preventDefault();
      this.#choose(this.#found[this.#active]);
    } else if (event.key === "Enter") {
      this.#close();
    } else if (event.key === "Escape" && open) {
      event.stopPropagation(); // it closes the list and cancels nothing
      this.#close();
    }
  }
}
