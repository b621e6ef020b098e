// The server's routes, with the key that this tab holds.

const KEY = "auf.key";
const PATIENCE_MS = 10_000;

export const key = () => sessionStorage.getItem(KEY);
export const useKey = (value) => sessionStorage.setItem(KEY, value);

/** The server answered, but not what was asked for. message: what it said. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** JSON of a route. Throws Refused for a status other than success, and what fetch throws where there is no answer. */
export async function get(path) {
  const reply = await request(path, { signal: AbortSignal.timeout(PATIENCE_MS) });
  return reply.json();
}

/** Data of each event of a streamed reply, as JSON, until [DONE]. Throws as `get` does. */
export async function* post(path, body, headers, signal) {
  const reply = await request(path, {
    method: "POST",
    body: JSON.stringify(body),
    headers: { "Content-Type": "application/json", ...headers },
    signal,
  });
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { done, value } = await reader.read();
    if (done) throw new TypeError("the stream ended before its end");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.match(/^data: ?(.*)$/m)?.[1];
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

async function request(path, options) {
  const headers = { ...options.headers };
  if (key()) headers.Authorization = `Bearer ${key()}`;
  const reply = await fetch(path, { ...options, headers, cache: "no-store" });
  if (!reply.ok) throw new Refused(reply.status, messageIn(await reply.text()) || `HTTP ${reply.status}`);
  return reply;
}

/** What an error's body says, in any of the shapes that SGLang, FastAPI and this server give it. */
export function messageIn(text) {
  try {
    const body = JSON.parse(text);
    const found = body.error?.message ?? body.message ?? body.detail ?? body.error;
    return typeof found === "string" ? found : JSON.stringify(found);
  } catch {
    return text;
  }
}
