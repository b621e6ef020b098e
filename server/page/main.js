// The live page: asks the server every second, shows what it says, and says what is wrong when it does not.

import * as answer from "./answer.js";
import { get, key, Refused, useKey } from "./api.js";
import { drawBars, drawLines } from "./charts.js";
import * as samples from "./samples.js";

const EVERY_MS = 1000;
const SLOWEST_MS = 10_000;
const SILENT_S = 20;
const element = (id) => document.getElementById(id);
const server = { model: "", drafts: true, started: null, generation: null };

let timer = 0;
let failures = 0;
let asking = false;
let lastAnswer = new Date();

async function poll() {
  clearTimeout(timer);
  if (asking || document.hidden || !element("key-form").hidden) return;
  asking = true;
  try {
    const load = await get("v1/auf/load");
    if (load.started !== server.started) await meet(load);
    const acceptance = server.drafts ? await get("v1/auf/acceptance") : null;
    if (acceptance && acceptance.swap.generation !== server.generation) await meet(load);
    samples.add(Date.now(), load, acceptance);
    show(load, acceptance);
    failures = 0;
    lastAnswer = new Date();
    if (load.closed_because) say(`No answers right now: ${load.closed_because}`, "bad");
    else if (load.silence > SILENT_S) say(`No step for over ${SILENT_S} s: a very long prompt, or the engine hangs`, "bad");
    else say("Live", "live");
  } catch (error) {
    failures += 1;
    if (error instanceof Refused && error.status === 401) askForKey();
    else if (error instanceof Refused) say(`The server says: ${error.message}; retrying`, "bad");
    else say(`No answer since ${lastAnswer.toLocaleTimeString("en-GB")}; retrying`, "bad");
  } finally {
    asking = false;
    timer = setTimeout(poll, Math.min(EVERY_MS * 2 ** failures, SLOWEST_MS));
  }
}

/** A server or a drafter that this page has not seen yet: the first, or one that was started or swapped in anew. */
async function meet(load) {
  server.model = load.model;
  element("model").textContent = load.model;
  try {
    const card = await get("v1/auf/card");
    showCard(card);
    server.generation = card.swap.generation;
    server.drafts = true;
  } catch (error) {
    if (!(error instanceof Refused && error.status === 404)) throw error;
    server.drafts = false;
  }
  document.body.classList.toggle("plain", !server.drafts);
  element("plain").hidden = server.drafts;
  server.started = load.started;
}

function show(load, acceptance) {
  element("dashboard").hidden = false;
  put("running", load.running);
  put("queued", load.queued);
  put("rate", figure(samples.last().rate, 1));
  drawLines(element("rate-chart"), samples.all(), [{ field: "rate", className: "first", label: "tokens/s" }], {
    from: 0,
    ...samples.KEEPS,
  });
  if (!acceptance) return;
  const { window, total, swap } = acceptance;
  element("swap").hidden = swap.generation === 0;
  put("swap", swapped(swap));
  put("window-size", window.size);
  put("tau-window", figure(window.tau, 2));
  put("tau-total", figure(total.tau, 2));
  put("nodes", figure(window.nodes_per_step, 1));
  const lines = [
    { field: "tau", className: "first", label: `last ${window.size} requests` },
    { field: "tauTotal", className: "second", label: "since start" },
  ];
  drawLines(element("tau-chart"), samples.all(), lines, { from: 1, ...samples.KEEPS });
  // Of the last requests, as the headline is. Before the first request the axis is empty.
  const slots = acceptance.block_size;
  const alpha = window.alpha.length ? window.alpha : Array(slots - 1).fill(null);
  const histogram = window.accepted_histogram.length ? window.accepted_histogram : Array(slots).fill(0);
  drawBars(element("alpha-chart"), alpha, {
    highest: 1,
    names: alpha.map((_, i) => i + 1),
    written: alpha.map((value) => figure(value, 2)),
  });
  drawBars(element("accepted-chart"), histogram, {
    highest: Math.max(...histogram),
    names: histogram.map((_, i) => i),
    written: histogram,
  });
}

/** What became of the last swap of the drafter. */
function swapped({ generation, path, state, other, before, after, watched, watches }) {
  const said = {
    watching: `watched for ${watched} of ${watches} requests, in place of ${other}`,
    kept: before ? "kept" : "kept without a comparison",
    "taken back": `the server went back to it from ${other}`,
  };
  const taus = before ? `: tau ${figure(before.tau, 2)} before, ${figure(after?.tau, 2)} after` : "";
  return `Generation ${generation}, ${path}: ${said[state]}${taus}.`;
}

function showCard({ drafter, block_size, draft_vocabulary, card, unknown, warnings, target }) {
  const { format, derived, block_size: trained, tau, adapted, ...others } = card;
  const fields = { drafter, target: target.name, block: `${block_size} as served, ${trained} as trained` };
  if (draft_vocabulary !== null) fields["draft vocabulary"] = `${draft_vocabulary} tokens`;
  if (tau) fields.tau = `${figure(tau.value, 2)} (${tau.kind}: ${tau.on})`;
  if (adapted) {
    const { generation, old_tau: before, new_tau: after } = adapted;
    fields.adapted = `generation ${generation}: tau ${figure(before, 2)} before, ${figure(after, 2)} after`;
  }
  if (derived) fields.card = "none; this was read off the drafter's configuration";
  for (const [name, value] of Object.entries(others)) if (value !== null) fields[name.replaceAll("_", " ")] = value;
  element("card-fields").replaceChildren(
    ...Object.entries(fields).flatMap(([name, value]) => [textIn("dt", name), textIn("dd", written(value))]),
  );
  element("warnings").replaceChildren(...warnings.map((warning) => textIn("li", `Warning: ${warning}`)));
  const names = unknown.map((name) => name.replaceAll("_", " ")).join(", ");
  put("unknown-fields", unknown.length ? `Not recorded: ${names}.` : "");
}

function askForKey() {
  const refused = key() !== null;
  server.started = null;
  element("dashboard").hidden = true;
  element("key-form").hidden = false;
  put("key-reason", refused ? "The key was refused." : "This server asks for its API key.");
  element("key-reason").dataset.state = refused ? "bad" : "";
  say(refused ? "The key was refused" : "Waiting for the key", refused ? "bad" : "waiting");
  element("key").value = "";
  element("key").focus();
}

element("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const typed = element("key").value;
  useKey(typed);
  // Nothing else can be in an HTTP header, so no server has such a key.
  if (!/^[\x21-\x7e]+$/.test(typed)) return askForKey();
  element("key-form").hidden = true;
  say("Connecting", "waiting");
  poll();
});

const put = (id, text) => {
  if (element(id).textContent !== String(text)) element(id).textContent = text;
};
const figure = (value, digits) => (value == null ? "–" : value.toFixed(digits));

/** A field of the card. A hash is cut to what suffices to compare it. */
function written(value) {
  if (Array.isArray(value)) return value.join(", ");
  if (typeof value === "object") return JSON.stringify(value);
  return /^[0-9a-f]{40,}$/.test(value) ? `${value.slice(0, 12)}…` : value;
}

function textIn(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}

/** Sets the text only when it changes, or a screen reader would read it out every second. */
function say(text, state) {
  put("status", text);
  element("status").dataset.state = state;
}

document.addEventListener("visibilitychange", () => document.hidden || poll());
answer.start(() => server, askForKey);
poll();
