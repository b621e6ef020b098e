// Drawings as inline SVG, each with its figures in words for those who do not see it.

const SVG = "http://www.w3.org/2000/svg";
const HIDDEN_WIDTH = 560;

/** Draw lines over time into a box. samples: rows with `t` in milliseconds; lines: {field, className, label}; a null
 * breaks a line, and so does `gapMs` without a sample. from: the lowest value of the axis. */
export function drawLines(box, samples, lines, { from, gapMs, spanMs }) {
  const width = widthOf(box), height = 150, left = 34, right = 8, top = 8, bottom = 22;
  const end = samples.at(-1)?.t ?? Date.now();
  const begin = Math.max(end - spanMs, Math.min(samples[0]?.t ?? end, end - 60_000));
  const seen = samples.filter((sample) => sample.t >= begin);
  const values = seen.flatMap((sample) => lines.map((line) => sample[line.field])).filter((value) => value !== null);
  const step = niceStep((Math.max(from, ...values) - from) / 3);
  const highest = from + step * Math.max(1, Math.ceil((Math.max(from, ...values) - from) / step));
  const x = (t) => left + ((t - begin) / (end - begin)) * (width - left - right);
  const y = (value) => height - bottom - ((value - from) / (highest - from)) * (height - top - bottom);
  const parts = [];
  for (let tick = from; tick <= highest + step / 2; tick += step) {
    parts.push(shape("line", { class: "grid", x1: left, x2: width - right, y1: y(tick), y2: y(tick) }));
    parts.push(label(+tick.toPrecision(6), left - 6, y(tick) + 4, "end"));
  }
  parts.push(label(`${duration(end - begin)} ago`, left, height - 4, "start"), label("now", width - right, height - 4, "end"));
  for (const line of lines) {
    for (const run of runs(seen, line.field, gapMs)) {
      const points = run.map((sample) => `${x(sample.t).toFixed(1)},${y(sample[line.field]).toFixed(1)}`);
      if (points.length === 1) points.push(points[0]);
      parts.push(shape("polyline", { class: line.className, points: points.join(" "), "stroke-linecap": "round" }));
    }
  }
  const words = lines.map((line) => `${line.label}: ${inWords(seen.at(-1)?.[line.field])}`).join(", ");
  draw(box, width, height, `Last ${duration(end - begin)}. Now: ${words}`, parts);
}

/** Draw one bar a value. values: numbers from 0 to `highest`, or null for no bar. written: the text above each bar. */
export function drawBars(box, values, { highest, names, written }) {
  const height = 140, top = 20, bottom = 20;
  const width = widthOf(box), place = width / values.length, narrow = place < 30;
  const parts = [shape("line", { class: "grid", x1: 0, x2: width, y1: height - bottom, y2: height - bottom })];
  values.forEach((value, i) => {
    const size = value === null || !highest ? 0 : Math.max(value && 1, (value / highest) * (height - top - bottom));
    const y = height - bottom - size;
    parts.push(shape("rect", { x: i * place + place * 0.15, width: place * 0.7, y, height: size, rx: 2 }));
    const middle = (i + 0.5) * place;
    parts.push(label(short(written[i], narrow), middle, y - 5, "middle", "value"), label(names[i], middle, height - 4, "middle"));
  });
  draw(box, width, height, names.map((name, i) => `${name}: ${written[i]}`).join(", "), parts);
  box.classList.toggle("narrow", narrow);
}

/** A text short enough for a bar: 12K for 12345, and .35 for 0.35 above a narrow bar. */
const compact = new Intl.NumberFormat("en", { notation: "compact" });
const short = (text, narrow) =>
  typeof text === "number" ? compact.format(text) : narrow ? text.replace(/^0\./, ".") : text;

function draw(box, width, height, words, parts) {
  const image = shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": words });
  image.append(...parts);
  box.replaceChildren(image);
}

/** One unit per pixel of the box, so that text has the same size at any width. */
const widthOf = (box) => box.clientWidth || HIDDEN_WIDTH;

function shape(name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [attribute, value] of Object.entries(attributes)) element.setAttribute(attribute, value);
  return element;
}

function label(text, x, y, anchor, className = "") {
  const element = shape("text", { x, y, "text-anchor": anchor, class: className });
  element.textContent = text;
  return element;
}

function runs(samples, field, gapMs) {
  const found = [];
  let before = null;
  for (const sample of samples) {
    if (sample[field] !== null) {
      if (before === null || sample.t - before > gapMs) found.push([]);
      found.at(-1).push(sample);
    }
    before = sample[field] === null ? null : sample.t;
  }
  return found;
}

/** 1, 2 or 5 times a power of ten, at least `rough`. */
function niceStep(rough) {
  if (!(rough > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  return power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
}

const inWords = (value) => (value == null ? "none" : String(+value.toFixed(2)));
const duration = (ms) => (ms < 90_000 ? `${Math.round(ms / 1000)} s` : `${Math.round(ms / 60_000)} min`);
