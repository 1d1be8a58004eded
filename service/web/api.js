// The server's API: JSON, events, errors in one shape, and the key where one is asked for.

const KEY = "lamamba-api-key";

/** An error of the server, or of the way there (`status` 0). */
export class ApiError extends Error {
  constructor(status, { code, message, field = null, request_id: requestId = null }, retryAfterS = null) {
    super(message);
    Object.assign(this, { status, code, field, requestId, retryAfterS });
  }

  /** The message without the name of its field, which stands beside it on the page. */
  get reason() {
    const text = this.field ? this.message.replace(`${this.field}: `, "") : this.message;
    return text.charAt(0).toUpperCase() + text.slice(1);
  }
}

export const hasKey = () => sessionStorage.getItem(KEY) !== null;
export const keepKey = (key) => sessionStorage.setItem(KEY, key);

/** The answer of a GET. */
export async function getJSON(path, signal) {
  return (await ask(path, { signal, headers: { accept: "application/json" } })).json();
}

/** The events of a POST /generate, as [name, data], until the result; its text is the JSON of the request. */
export async function* generate(text, signal) {
  const response = await ask("generate", {
    method: "POST",
    body: text,
    signal,
    headers: { "content-type": "application/json", accept: "text/event-stream" },
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let unread = "";
  for (;;) {
    const { value, done } = await read(reader);
    if (done) throw lost();
    const events = (unread + value).split("\n\n");
    unread = events.pop();
    for (const event of events) {
      const lines = event.split("\n");
      const name = lines.find((line) => line.startsWith("event: "))?.slice(7);
      if (!name) continue; // a comment, which keeps the connection open
      const data = JSON.parse(lines.find((line) => line.startsWith("data: ")).slice(6));
      if (name === "error") throw new ApiError(200, data.error);
      yield [name, data];
      if (name === "result") return;
    }
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    throw error.name === "AbortError" ? error : lost();
  }
}

const lost = () =>
  new ApiError(0, { code: "connection_lost", message: "The connection ended before the images were there." });

async function ask(path, options) {
  const key = sessionStorage.getItem(KEY);
  if (key) options.headers.authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { code: "unreachable", message: "The server cannot be reached." });
  }
  if (response.ok) return response;
  const answer = await response.json().catch(() => null);
  const detail = answer?.error ?? {
    code: "unknown",
    message: `The server answers ${response.status} ${response.statusText}`,
  };
  throw new ApiError(response.status, detail, Number(response.headers.get("retry-after")) || null);
}
