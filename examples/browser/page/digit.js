// A drawing is kept as strokes in a unit square, and drawn anew in the model's own cells: then neither where it stands in the
// field nor how large it is matters, and the pen is as wide as in the pictures the model learned from.

import { element, find, last } from "./page.js";

const FINE = 8; // dots a cell, each way, that its ink is measured with
const STEP = 0.04; // of the field, that an arrow key moves the pen
const SHOWN = 0.075; // width of the pen in the field
const LARGER = 4; // a drawing is blown up at most so much, or a dot would become a blot

const field = find("field"), seen = find("seen");
let how, graph, ran, strokes = [], stroke = [], pen = null, down = false, busy = false, dirty = false;

export async function start(facts, graphs, timed) {
  [how, graph, ran] = [facts.preparation, graphs.model, timed];
  seen.width = seen.height = how.side;
  find("seen-title").textContent = `What the model sees: ${how.side} × ${how.side}`;
  find("bars").append(...Array.from({ length: 10 }, (_, digit) => element("li", {}, element("b", { textContent: digit }),
    element("span", { className: "track" }, element("span", { className: "fill" })), element("output", {}))));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", changed);
  await changed();
}

// Ink in the model's cells, 0 to 1, row by row.
export function cells(strokes, how) {
  let width = how.pen, ink = rendered(strokes, how, width);
  for (let round = 0; how.ink && round < 6; round++) {
    const all = ink.reduce((sum, cell) => sum + cell, 0);
    if (!all) break;
    width = Math.min(3.2, Math.max(1, width * (how.ink / all)));
    ink = rendered(strokes, how, width);
  }
  return ink;
}

function rendered(strokes, how, width) {
  const place = fitted(strokes, how, width), middle = how.side / 2;
  const ink = inked(strokes, place, how.side, width);
  if (how.centre !== "mass") return ink;
  const all = ink.reduce((sum, cell) => sum + cell, 0) || 1;
  const mean = (along) => ink.reduce((sum, cell, at) => sum + cell * (along(at) + 0.5), 0) / all;
  const [x, y] = [mean((at) => at % how.side), mean((at) => Math.floor(at / how.side))];
  return inked(strokes, { ...place, x: place.x + middle - x, y: place.y + middle - y }, how.side, width);
}

// Scale and shift that bring the box of all strokes, pen included, into the box the model's pictures fill.
function fitted(strokes, how, width) {
  const points = strokes.flat(), most = LARGER * how.side;
  const [xs, ys] = [points.map((p) => p[0]), points.map((p) => p[1])];
  const [left, right, top, bottom] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  let down = Math.min(most, (how.height - width) / Math.max(bottom - top, 1e-6));
  let across = Math.min(most, (how.width - width) / Math.max(right - left, 1e-6));
  if (how.keep) across = down = Math.min(across, down);
  else across = Math.min(across, 2 * down); // an upright stroke stays one
  const middle = how.side / 2;
  return { across, down, x: middle - (across * (left + right)) / 2, y: middle - (down * (top + bottom)) / 2 };
}

function inked(strokes, place, side, width) {
  const size = side * FINE, cells = new Float32Array(side * side);
  const pad = element("canvas", { width: size, height: size }).getContext("2d", { willReadFrequently: true });
  trace(pad, strokes, ([x, y]) => [FINE * (place.across * x + place.x), FINE * (place.down * y + place.y)], FINE * width);
  const dots = pad.getImageData(0, 0, size, size).data;
  for (let y = 0; y < size; y++) {
    for (let x = 0; x < size; x++) cells[Math.floor(y / FINE) * side + Math.floor(x / FINE)] += dots[4 * (y * size + x) + 3];
  }
  return cells.map((sum) => sum / (255 * FINE * FINE));
}

function trace(context, strokes, at, width) {
  Object.assign(context, { lineWidth: width, lineCap: "round", lineJoin: "round" });
  for (const stroke of strokes) {
    context.beginPath();
    context.moveTo(...at(stroke[0]));
    for (const point of stroke) context.lineTo(...at(point)); // of one point alone: a dot
    context.stroke();
  }
}

function draw() {
  const context = field.getContext("2d"), size = field.width, style = getComputedStyle(field);
  context.clearRect(0, 0, size, size);
  context.strokeStyle = style.color;
  trace(context, strokes, ([x, y]) => [x * size, y * size], SHOWN * size);
  if (!pen) return;
  context.beginPath();
  context.arc(pen[0] * size, pen[1] * size, 14, 0, 7);
  Object.assign(context, { lineWidth: 5, strokeStyle: style.outlineColor });
  context.stroke();
}

// While a run is under way, changes wait for the next one.
async function changed() {
  draw();
  dirty = true;
  if (busy) return;
  busy = true;
  field.dataset.busy = "";
  while (dirty) {
    dirty = false;
    await read().catch((error) => say("The model failed", error.message, true));
  }
  busy = false;
  delete field.dataset.busy;
}

async function read() {
  const pixels = strokes.length ? cells(strokes, how) : new Float32Array(how.side ** 2);
  picture(pixels);
  find("undo").disabled = find("wipe").disabled = !strokes.length;
  if (!strokes.length) {
    Object.assign(last, { pixels, probabilities: null });
    bars(new Float32Array(10));
    return say("Nothing drawn yet", "");
  }
  const { name, shape } = graph.facts.inputs[0];
  const { scores } = await graph.run({ [name]: [pixels, [1, ...shape.slice(1)]] });
  const top = Math.max(...scores), parts = Array.from(scores, (score) => Math.exp(score - top));
  const all = parts.reduce((sum, part) => sum + part), probabilities = parts.map((part) => part / all);
  Object.assign(last, { pixels, probabilities });
  const best = probabilities.indexOf(Math.max(...probabilities));
  bars(probabilities, best);
  say(probabilities[best] < 0.5 ? `Perhaps a ${best}` : `This looks like ${best === 8 ? "an" : "a"} ${best}`,
    `${percent(probabilities[best])} · ${graph.ms.toFixed(1)} ms in this browser`);
  ran();
}

const percent = (part) => `${Math.round(100 * part)} %`;

function bars(probabilities, best = -1) {
  [...find("bars").children].forEach((row, digit) => {
    row.classList.toggle("best", digit === best);
    row.querySelector(".fill").style.width = `${100 * probabilities[digit]}%`;
    row.querySelector("output").textContent = best < 0 ? "" : percent(probabilities[digit]);
  });
}

function picture(pixels) {
  const context = seen.getContext("2d"), image = context.createImageData(how.side, how.side);
  const color = getComputedStyle(seen).color.match(/\d+/g).map(Number);
  pixels.forEach((ink, at) => image.data.set([...color.slice(0, 3), 255 * ink], 4 * at));
  context.putImageData(image, 0, 0);
  seen.setAttribute("aria-label", `The drawing in ${how.side} by ${how.side} cells`);
}

function say(heading, text, bad = false) {
  find("digit-answer").textContent = heading;
  find("digit-status").textContent = text;
  find("digit-status").classList.toggle("bad", bad);
}

function begin(at) {
  stroke = [at];
  strokes.push(stroke);
}

function point(event) {
  const box = field.getBoundingClientRect();
  return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
}

field.addEventListener("pointerdown", (event) => {
  if (event.button) return;
  field.setPointerCapture(event.pointerId);
  pen = null;
  down = false;
  begin(point(event));
  changed();
});
field.addEventListener("pointermove", (event) => {
  if (!field.hasPointerCapture(event.pointerId)) return;
  const missed = event.getCoalescedEvents?.() ?? [];
  stroke.push(...(missed.length ? missed : [event]).map(point));
  changed();
});

const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const keys = {
  " ": () => { pen ??= [0.5, 0.2]; down = !down; if (down) begin([...pen]); },
  Backspace: () => { down = false; strokes.pop(); },
  Escape: () => { down = false; strokes = []; },
};

function move([x, y]) {
  const [from, inside] = [pen ?? [0.5, 0.2], (place) => Math.min(0.97, Math.max(0.03, place))];
  pen = [inside(from[0] + STEP * x), inside(from[1] + STEP * y)];
  if (down) stroke.push([...pen]);
}

field.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in arrows || event.key in keys)) return;
  event.preventDefault();
  if (event.key in arrows) move(arrows[event.key]);
  else keys[event.key]();
  changed();
});
field.addEventListener("blur", () => { pen = null; down = false; draw(); });
find("undo").addEventListener("click", () => { keys.Backspace(); changed(); });
find("wipe").addEventListener("click", () => { keys.Escape(); changed(); });
