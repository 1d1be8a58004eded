// One image of the gallery, large, with what it was made with and what can be done with it.

import { curl, fileName, guidance } from "./request.js";

const element = (id) => document.getElementById(id);

export class Viewer {
  #dialog = element("viewer");
  #entry = null;
  #entries;
  #urlOf;

  /** `entries` and `urlOf` give the gallery; `remove`, `reuse` and `say` do what the buttons say. */
  constructor({ entries, urlOf, remove, reuse, say }) {
    this.#entries = entries;
    this.#urlOf = urlOf;
    element("viewer-close").addEventListener("click", () => this.#dialog.close());
    element("viewer-newer").addEventListener("click", () => this.#go(-1));
    element("viewer-older").addEventListener("click", () => this.#go(1));
    element("viewer-reuse").addEventListener("click", () => {
      this.#dialog.close();
      reuse(this.#entry.facts);
    });
    element("viewer-delete").addEventListener("click", () => {
      this.#dialog.close();
      remove(this.#entry);
    });
    element("viewer-curl").addEventListener("click", () => this.#copy(say));
    this.#dialog.addEventListener("click", (event) => {
      if (event.target === this.#dialog) this.#dialog.close(); // beside the content
    });
    this.#dialog.addEventListener("keydown", (event) => {
      if (event.key === "ArrowLeft") this.#go(-1);
      if (event.key === "ArrowRight") this.#go(1);
    });
  }

  open(entry) {
    this.#show(entry);
    this.#dialog.showModal();
  }

  #go(step) {
    const entries = this.#entries();
    const next = entries[entries.indexOf(this.#entry) + step];
    if (next) this.#show(next);
  }

  #show(entry) {
    const { facts } = entry;
    const url = this.#urlOf(entry);
    this.#entry = entry;
    element("viewer-title").textContent = facts.class_label ?? facts.model;
    Object.assign(element("viewer-image"), { src: url, alt: facts.class_label ?? facts.model });
    Object.assign(element("viewer-download"), { href: url, download: fileName(facts) });
    const rows = [
      ["Model", `${facts.model}, ${facts.resolution} px`],
      ...(facts.class_label === null ? [] : [["Guidance", guidance(facts)]]),
      ["Sampler", `${facts.sampler}, ${facts.steps} steps`],
      ["Seed", facts.image_index ? `${facts.seed}, image ${facts.image_index}` : facts.seed],
      ["Made", new Date(facts.created * 1000).toLocaleString()],
    ];
    element("viewer-facts").replaceChildren(
      ...rows.flatMap(([name, value]) => [
        Object.assign(document.createElement("dt"), { textContent: name }),
        Object.assign(document.createElement("dd"), { textContent: value }),
      ]),
    );
    const entries = this.#entries();
    element("viewer-newer").disabled = entries[0] === entry;
    element("viewer-older").disabled = entries.at(-1) === entry;
    element("viewer-command").hidden = true;
  }

  async #copy(say) {
    const command = element("viewer-command");
    command.textContent = curl(this.#entry);
    command.hidden = false;
    try {
      await navigator.clipboard.writeText(command.textContent);
      say("Copied");
    } catch {
      // Browsers give the clipboard to https and localhost alone: elsewhere it is selected, to be copied by hand.
      getSelection().selectAllChildren(command);
      say("Selected: copy it with Ctrl + C");
    }
  }
}
