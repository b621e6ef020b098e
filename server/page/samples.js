// What was seen over time: a ring of samples that a reload of the tab keeps.

const STORED = "auf.samples";
const KEPT_MS = 10 * 60_000;
const RATE_MS = 10_000;

let samples = load();

function load() {
  try {
    const stored = JSON.parse(sessionStorage.getItem(STORED));
    return Array.isArray(stored) ? stored : [];
  } catch {
    return [];
  }
}

export const KEEPS = { spanMs: KEPT_MS, gapMs: 15_000 };
export const all = () => samples;
export const last = () => samples.at(-1);

/** Add what the server said just now. acceptance: null where it has no drafter. */
export function add(now, load, acceptance) {
  const sample = {
    t: now,
    started: load.started,
    generated: load.generated_tokens,
    rate: null,
    tau: acceptance?.window.tau ?? null,
    tauTotal: acceptance?.total.tau ?? null,
  };
  // A mean over some seconds, because answers that are not streamed bring the tokens of a second at once. A restarted
  // server counts from 0.
  const base = samples.find((other) => other.t >= now - RATE_MS && other.started === load.started);
  if (base && now > base.t) sample.rate = ((sample.generated - base.generated) * 1000) / (now - base.t);
  samples = [...samples.filter((other) => other.t > now - KEPT_MS && other.t < now), sample];
  sessionStorage.setItem(STORED, JSON.stringify(samples));
}
