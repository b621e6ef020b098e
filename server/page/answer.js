// The prompt box: streams an answer and shows which of its tokens were drafted.

import { post, Refused } from "./api.js";

const element = (id) => document.getElementById(id);
const [form, prompt, send, stop] = ["ask-form", "prompt", "send", "stop"].map(element);
const [box, status, legend] = ["answer", "answer-status", "answer-legend"].map(element);
const SPANS = { "x-auf-spans": "1" };

let running = null;

/** what(): {model, drafts} of the server as last seen. refusedKey(): called when the server refuses the key. */
export function start(what, refusedKey) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!running) ask(what(), refusedKey);
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  stop.addEventListener("click", () => running?.abort());
}

async function ask({ model, drafts }, refusedKey) {
  running = new AbortController();
  const answer = new Answer();
  swap(send, stop);
  say("Answering…");
  try {
    const body = {
      model,
      messages: [{ role: "user", content: prompt.value }],
      max_tokens: numberIn("max-tokens"),
      temperature: numberIn("temperature"),
      stream: true,
      stream_options: { include_usage: true },
    };
    for await (const event of post("v1/chat/completions", body, SPANS, running.signal)) {
      if (event.error) throw new Refused(event.error.code, event.error.message);
      if (event.usage) answer.usage = event.usage;
      const details = event.sglext?.spec_tokens_details;
      if (details) answer.tau = details.tau;
      if (event.sglext?.spans) answer.add(event.sglext.spans.tokens);
      else if (!drafts) answer.add(event.choices.map((choice) => [choice.delta.content ?? "", false]));
    }
    say(answer.summary());
  } catch (error) {
    if (running.signal.aborted) say(`Stopped. ${answer.summary()}`);
    else if (error instanceof Refused && error.status === 401) refusedKey();
    else if (error instanceof Refused) say(`The server refused: ${error.message}`, "bad");
    else say("The connection to the server broke before the answer was complete. Send it again when it is back.", "bad");
  } finally {
    running = null;
    swap(stop, send);
  }
}

/** The number in a field; undefined where there is none, so that the server takes its default or refuses. */
function numberIn(id) {
  const value = element(id).valueAsNumber;
  return Number.isNaN(value) ? undefined : value;
}

class Answer {
  constructor() {
    this.tokens = 0;
    this.drafted = 0;
    this.usage = this.tau = null;
    this.began = performance.now();
    box.replaceChildren();
    box.hidden = legend.hidden = element("unknown-legend").hidden = true;
  }

  /** tokens: [text, drafted] each. The text is a model's, so it is never read as HTML. */
  add(tokens) {
    const spans = tokens.map(([text, drafted]) => {
      const span = document.createElement("span");
      span.className = drafted === null ? "unknown" : drafted ? "drafted" : "own";
      // A tinted space before a word looks like a fault, so the tint is on the word.
      const [, space, word] = text.match(/^(\s*(?=\S))?([^]*)$/);
      const tinted = document.createElement("span");
      tinted.textContent = word;
      span.append(space ?? "", tinted);
      return span;
    });
    box.append(...spans);
    this.tokens += tokens.length;
    this.drafted += tokens.filter(([, drafted]) => drafted).length;
    box.hidden = legend.hidden = false;
    if (tokens.some(([, drafted]) => drafted === null)) element("unknown-legend").hidden = false;
  }

  summary() {
    const tokens = this.usage?.completion_tokens ?? this.tokens;
    const parts = [`${tokens} tokens`];
    if (this.drafted) parts[0] += `, ${this.drafted} of them drafted`;
    if (this.tau) parts.push(`tau ${this.tau.toFixed(2)}`);
    parts.push(`${((tokens * 1000) / (performance.now() - this.began)).toFixed(1)} tokens/s`);
    return `${parts.join(" · ")}.`;
  }
}

function say(text, state = "") {
  status.textContent = text;
  status.dataset.state = state;
}

/** One button takes the other's place, and the focus with it. */
function swap(from, to) {
  const focused = document.activeElement === from;
  from.hidden = true;
  to.hidden = false;
  if (focused) to.focus();
}
