// A request as text: for the server, and for people as a curl command.

import { hasKey } from "./api.js";

/** JSON in which a BigInt is an integer: seeds go beyond what a Number holds exactly. */
export function json(fields) {
  const members = Object.entries(fields)
    .filter(([, value]) => value !== undefined)
    .map(([name, value]) => `${JSON.stringify(name)}: ${typeof value === "bigint" ? value : JSON.stringify(value)}`);
  return `{${members.join(", ")}}`;
}

/** Guidance in words: its scale and, where they are not all, its timesteps. */
export function guidance({ cfg_scale: scale, guidance_interval: interval }) {
  return interval ? `${scale} at timesteps ${interval[0]} to ${interval[1]}` : `${scale}`;
}

/** The command that makes one image of the gallery again, to the pixel. */
export function curl({ facts }) {
  const body = json({
    model: facts.model,
    class_id: facts.class_id ?? undefined,
    cfg_scale: facts.cfg_scale,
    guidance_interval: facts.guidance_interval ?? undefined,
    sampler: facts.sampler,
    steps: facts.steps,
    seed: BigInt(facts.seed),
    image_index: facts.image_index || undefined,
  });
  return [
    `curl -X POST ${quoted(new URL("generate", document.baseURI).href)}`,
    ...(hasKey() ? ['-H "authorization: Bearer $LAMAMBA_API_KEY"'] : []),
    "-H 'content-type: application/json'",
    `-H 'accept: image/${facts.format}'`,
    `-d ${quoted(body)}`,
    `-o ${quoted(fileName(facts))}`,
  ].join(" \\\n  ");
}

/** A name that says what the image is. */
export function fileName(facts) {
  const what = (facts.class_label ?? facts.model).toLowerCase().replace(/[^a-z0-9]+/g, "-");
  return `${what}-${facts.seed}-${facts.image_index}.${facts.format}`;
}

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
