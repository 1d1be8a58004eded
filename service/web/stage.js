// The latest images: previews while they are made, then the images themselves.

import { guidance } from "./request.js";

const element = (id) => document.getElementById(id);

const STATUS = {
  waiting: "Waiting for the server",
  queued: (place) => (place === 1 ? "Next in the queue" : `Place ${place} in the queue`),
  steps: (done, steps) => `Step ${done} of ${steps}`,
  finishing: "Finishing",
};

export class Stage {
  #frames = [];

  /** Nothing has been made yet. */
  showNothing() {
    element("stage").classList.add("empty");
    this.#title("Nothing here yet", "Pick a class and press Generate: you will see the image come out of the noise.");
    this.#layOut(1);
  }

  /** A request has been sent. */
  begin(facts, numImages) {
    element("stage").classList.remove("empty");
    element("stage").setAttribute("aria-busy", "true");
    this.#title(facts.class_label ?? facts.model, described(facts));
    this.#layOut(numImages);
    element("stage-progress").hidden = false;
    element("progress").value = 0;
    this.#status(STATUS.waiting);
  }

  queued(place) {
    this.#status(STATUS.queued(place));
  }

  progress(steps, stepsDone) {
    // A request of several images may have some that wait: what is done is counted over all.
    const share = stepsDone.reduce((sum, done) => sum + done, 0) / (steps * stepsDone.length);
    element("progress").value = share;
    document.title = `${Math.round(100 * share)} % · LaMamba`;
    this.#status(share === 1 ? STATUS.finishing : STATUS.steps(Math.round(share * steps), steps));
  }

  preview(index, format, base64) {
    const image = this.#frames[index]?.querySelector("img");
    if (!image) return;
    image.src = `data:image/${format};base64,${base64}`;
    image.parentElement.classList.add("growing");
  }

  /** Show images of the gallery, each with what a click on it does. */
  show(facts, images, seconds) {
    element("stage").classList.remove("empty");
    this.#title(facts.class_label ?? facts.model, described(facts));
    if (seconds !== null) {
      element("stage-facts").textContent += ` · ${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s`;
    }
    if (this.#frames.length !== images.length || seconds === null) this.#layOut(images.length);
    for (const [index, { url, open }] of images.entries()) {
      const frame = this.#frames[index];
      const image = frame.querySelector("img");
      image.src = url;
      image.alt = facts.class_label ?? facts.model;
      frame.classList.remove("growing");
      frame.classList.add("made");
      frame.disabled = false;
      frame.setAttribute("aria-label", `Open image ${index + 1} of ${images.length}`);
      frame.addEventListener("click", open);
    }
    this.end();
  }

  /** Nothing runs any more. */
  end() {
    element("stage").removeAttribute("aria-busy");
    element("stage-progress").hidden = true;
    document.title = "LaMamba";
  }

  #title(title, facts) {
    element("stage-title").textContent = title;
    element("stage-facts").textContent = facts;
  }

  #status(text) {
    element("stage-status").textContent = text;
  }

  #layOut(count) {
    this.#frames = Array.from({ length: count }, () => {
      const frame = document.createElement("button");
      frame.type = "button";
      frame.className = "frame";
      frame.disabled = true;
      frame.append(Object.assign(document.createElement("img"), { alt: "" }));
      return frame;
    });
    element("frames").style.setProperty("--columns", Math.ceil(Math.sqrt(count)));
    element("frames").replaceChildren(...this.#frames);
  }
}

/** The settings in a line. */
export function described(facts) {
  const { model, class_label: label, steps, sampler, seed } = facts;
  const parts = [...(label === null ? [] : [model, `guidance ${guidance(facts)}`]), `${steps} steps`, sampler];
  return [...parts, seed === null ? null : `seed ${seed}`].filter(Boolean).join(" · ");
}
