"use strict";
// Texts of the run reach the page as text nodes only (`textContent`), never as HTML.
(() => {
const DATA = JSON.parse(document.getElementById("data").textContent);
const ARRAYS = { uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array, int32: Int32Array, float32: Float32Array };
const STEPS_PER_NAT = 1024, CERTAIN_TO = 65535;
const NEGATIVE = [88, 160, 208], NEUTRAL = [255, 255, 255], POSITIVE = [253, 156, 74], STRONG = [150, 140, 205];
const VERSIONS = ["#cfe3f5", "#fbe3c0", "#d5ecd4", "#f3d3e2", "#e3dcf3", "#f5f0bd", "#d6d6d6"];
const CARD_ROWS = 10;

const el = (tag, className, text) => {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
};
const at = id => document.getElementById(id);

function unpacked(packed) {
  const letters = atob(packed.data), bytes = new Uint8Array(letters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = letters.charCodeAt(i);
  return new ARRAYS[packed.type](bytes.buffer);
}
const unpackAll = record => {
  for (const [name, value] of Object.entries(record)) if (value && value.data !== undefined) record[name] = unpacked(value);
};
unpackAll(DATA);
const T = DATA.pieces.length, K = DATA.numSupport;

const number = (value, digits = 3) => {
  if (!Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  const text = size >= 1000 || size < 0.001 ? value.toExponential(digits - 1) : String(Number(value.toPrecision(digits)));
  return text.replace("-", "−").replace("e+", "e").replace("e-", "e−");
};
const percent = p => (p >= 0.9995 ? "100 %" : p >= 0.1 ? `${(100 * p).toFixed(1)} %` : p >= 1e-4 ? `${(100 * p).toPrecision(2)} %` : "<0.01 %");
// A text on one line, with the spaces at its ends to be seen.
const shown = text => text.replace(/^ +| +$/g, spaces => "␣".repeat(spaces.length)).replaceAll("\n", "↵").replaceAll("\t", "⇥") || "∅";
const probability = steps => (steps === CERTAIN_TO ? 0 : Math.exp(-steps / STEPS_PER_NAT));

// The tokens that take part, and a size that only few exceed.
let use, color = DATA.isGated ? "drift" : "kl", kept = false, current = -1;
const counted = name => Array.from(use[name]).filter((value, i) => use.mask[i] && Number.isFinite(value));
function quantile(values, share) {
  const sorted = values.slice().sort((a, b) => a - b);
  return sorted.length ? sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))] : 0;
}
const mean = values => values.reduce((sum, value) => sum + value, 0) / Math.max(values.length, 1);

const COLORS = {
  drift: { label: "drift", unit: "nats", of: i => use.drift[i], diverging: 0 },
  token_weights: { label: "gate weight", unit: "", of: i => use.token_weights[i], diverging: 1 },
  kl: { label: "KL", unit: "nats", of: i => use.kl[i] },
  losses: { label: "loss", unit: "", of: i => use.losses[i], diverging: 0 },
  versions: { label: "version", unit: "", of: i => DATA.versions[i], isCategory: true },
};
const mixed = (from, to, share) => `rgb(${from.map((value, c) => Math.round(value + (to[c] - value) * share)).join(",")})`;

function scaleOf(name) {
  const kind = COLORS[name], values = kind.isCategory ? [] : counted(name);
  const middle = kind.diverging ?? 0;
  const isDiverging = kind.diverging !== undefined && (middle !== 0 || values.some(value => value < 0));
  const limit = quantile(values.map(value => Math.abs(value - middle)), 0.98) || Math.max(0, ...values.map(value => Math.abs(value - middle)));
  const colorOf = value => {
    if (kind.isCategory) return VERSIONS[versionsThere.indexOf(value) % VERSIONS.length];
    if (!Number.isFinite(value) || !limit) return "";
    const share = Math.max(-1, Math.min(1, (value - middle) / limit));
    if (!isDiverging) return mixed(NEUTRAL, STRONG, Math.max(0, share));
    return mixed(NEUTRAL, share < 0 ? NEGATIVE : POSITIVE, Math.abs(share));
  };
  return { ...kind, middle, limit, isDiverging, colorOf };
}
const versionsThere = [...new Set(DATA.versions)].sort((a, b) => a - b);

function drawLegend(scale) {
  const legend = at("legend");
  legend.replaceChildren();
  if (scale.isCategory) {
    legend.append("policy version");
    for (const version of versionsThere) {
      const swatch = el("span", "swatch", version);
      swatch.style.background = scale.colorOf(version);
      legend.append(swatch);
    }
    return;
  }
  if (!scale.limit) {
    legend.append(scale.label === "gate weight" ? "all weights are 1" : `${scale.label} is 0 or was not measured`);
    return;
  }
  const ramp = el("span", "ramp");
  const low = scale.isDiverging ? scale.middle - scale.limit : scale.middle;
  const ends = scale.isDiverging ? [mixed(NEGATIVE, NEGATIVE, 0), "#fff", mixed(POSITIVE, POSITIVE, 0)] : ["#fff", mixed(STRONG, STRONG, 0)];
  ramp.style.background = `linear-gradient(to right, ${ends.join(",")})`;
  ramp.title = "the 2 % of the tokens beyond the ends have the colour of the ends";
  legend.append(`${scale.label} ≤ ${number(low)}`, ramp, `≥ ${number(scale.middle + scale.limit)} ${scale.unit}`);
}

function drawChoice(id, options, chosen, choose) {
  at(id).replaceChildren(...options.map(({ value, label, title, disabled }) => {
    const button = el("button", "", label);
    button.setAttribute("role", "radio");
    button.setAttribute("aria-checked", String(value === chosen));
    button.dataset.value = value;
    button.title = title || "";
    button.disabled = Boolean(disabled);
    button.onclick = () => choose(value);
    return button;
  }));
}

function drawWords() {
  const drift = counted("drift").map(Math.abs), weights = counted("token_weights"), kl = counted("kl");
  const left = T - use.mask.reduce((sum, value) => sum + value, 0);
  const parts = [`KL ${number(mean(kl))} nats a token`];
  if (use.isFresh) parts.push("first use at staleness 0: drift is zero by definition");
  else parts.push(`|drift| mean ${number(mean(drift))}, largest ${number(Math.max(0, ...drift.slice(0, 1e5)))} nats`,
    `against ${use.behaviorFromEngine ? "the engine's" : "the learner's own first"} log-probs`);
  parts.splice(0, 0, `staleness ${use.staleness}`);
  if (DATA.hasTau && !use.isFresh) parts.push(`τ ${number(use.tau)}`);
  if (weights.length) parts.push(`weight ${number(Math.min(...weights.slice(0, 1e5)))} to ${number(Math.max(...weights.slice(0, 1e5)))}`);
  if (left) parts.push(`${left} tokens masked (struck through)`);
  at("words").textContent = parts.join(" · ");
}

const numSegments = () => use.segmentGate.length;
const segmentWords = s => {
  const drift = use.isFresh ? "drift 0 (fresh)" : use.isMeasured ? `drift ${number(use.segmentDrift[s])} nats` : "drift not measured";
  return `segment ${s}: ${drift}, gate ${number(use.segmentGate[s], 4)}, ${use.segmentTokens[s]} tokens`;
};

function drawText() {
  const box = document.createDocumentFragment();
  const marks = numSegments() * 4 <= T || T < 4;
  for (let i = 0; i < T; i++) {
    const s = use.segments[i];
    if (marks && (i === 0 || s !== use.segments[i - 1])) {
      const mark = el("span", "seg", s);
      mark.title = segmentWords(s);
      mark.dataset.segment = s;
      box.append(mark);
    }
    const token = el("span", use.mask[i] ? "t" : "t masked");
    token.dataset.i = i;
    const lines = DATA.pieces[i].split("\n");
    lines.forEach((line, n) => {
      if (n) token.append(el("i", "", "↵"), "\n");
      token.append(line);
    });
    if (!DATA.pieces[i]) token.append(el("i", "", "·"));
    box.append(token);
  }
  at("text").replaceChildren(box);
  tokens = at("text").getElementsByClassName("t");
}
let tokens = [];

function paint() {
  const scale = scaleOf(color);
  for (let i = 0; i < T; i++) tokens[i].style.background = scale.colorOf(scale.of(i));
  drawLegend(scale);
  drawChoice("colors", Object.entries(COLORS).map(([value, { label }]) => ({ value, label })), color, value => {
    color = value;
    paint();
  });
}

// The card -----------------------------------------------------------------------------------------------------------

function supportRow(label, isSampled, teacher, student) {
  const row = el("tr", isSampled ? "sampled" : "");
  const name = el("td", "name"), bars = el("td"), pair = el("span", "pair"), value = el("td", "value");
  name.append(el("code", "", shown(label)));
  for (const [p, side] of [[teacher, "q"], [student, "s"]]) {
    if (p === null) continue;
    const bar = el("span", side);
    bar.style.width = `${Math.max(1, 100 * p)}%`;
    pair.append(bar);
  }
  bars.append(pair);
  value.textContent = percent(teacher === null ? student : teacher);
  row.append(name, bars, value);
  if (teacher !== null && student !== null) row.append(el("td", "value", percent(student)));
  return row;
}

function table(caption, rows) {
  const node = el("table");
  node.append(el("caption", "", caption), ...rows);
  return node;
}

function lists(i, limit) {
  const both = el("div", "lists"), sampled = DATA.tokenIds[i];
  const inSupport = new Set(), left = [], right = [];
  let teacherMass = 0, studentMass = 0;
  for (let k = i * K; k < (i + 1) * K; k++) {
    const q = probability(DATA.teacherLogprobs[k]), p = probability(use.studentLogprobs[k]);
    teacherMass += q;
    studentMass += p;
    inSupport.add(DATA.teacherIds[k]);
    if (left.length < limit) left.push(supportRow(DATA.texts[DATA.teacherIds[k]], DATA.textIds[DATA.teacherIds[k]] === sampled, q, p));
  }
  for (let k = i * K; k < Math.min((i + 1) * K, i * K + limit); k++) {
    const place = use.ownIds[k];
    const row = supportRow(DATA.texts[place], DATA.textIds[place] === sampled, null, probability(use.ownLogprobs[k]));
    if (!inSupport.has(place)) {
      row.classList.add("outside");
      row.title = "not in the support";
    }
    right.push(row);
  }
  both.append(table(`the support: ${percent(Math.min(teacherMass, 1))} of the teacher, ${percent(Math.min(studentMass, 1))} of the student`, left),
    table("the student's own most probable ids", right));
  return both;
}

function fillCard(i) {
  const card = at("card"), s = use.segments[i];
  const title = el("h3"), numbers = el("div", "numbers"), key = el("div", "note");
  title.append(el("code", "", shown(DATA.pieces[i])), " ",
    el("small", "", `token ${i + 1} of ${T}, id ${DATA.tokenIds[i]}, version ${DATA.versions[i]}${use.mask[i] ? "" : ", masked: not in the loss"}`));
  const rows = [
    ["drift", `${number(use.drift[i])}${use.isFresh ? " (fresh)" : ""}`], ["loss", number(use.losses[i])],
    [`segment ${s} drift`, use.isMeasured || use.isFresh ? number(use.segmentDrift[s]) : "–"], ["KL on the support", number(use.kl[i])],
    [`segment ${s} gate`, number(use.segmentGate[s], 4)], ["entropy", number(use.entropy[i])],
    ["weight", number(use.token_weights[i], 4)], ["log-prob, teacher", number(DATA.teacher_logprobs[i], 4)],
    ["log-prob, engine", number(DATA.engine_logprobs[i], 4)], ["log-prob, behaviour", number(use.behavior_logprobs[i], 4)],
    ["log-prob, now", number(use.current_logprobs[i], 4)], ["now − teacher", number(use.current_logprobs[i] - DATA.teacher_logprobs[i])],
  ];
  for (const [name, value] of rows) numbers.append(el("b", "", name), el("span", "", value));
  const limit = kept ? K : Math.min(K, CARD_ROWS);
  key.append(el("span", "key"), "teacher", el("span", "key s"), "student",
    limit < K ? ` · the first ${limit} of ${K}, click the token for all` : "", " · yellow: the sampled token");
  card.replaceChildren(title, numbers, lists(i, limit), key);
  card.classList.toggle("kept", kept);
}

function placeCard(i) {
  const card = at("card"), box = (tokens[i].getClientRects()[0] || tokens[i].getBoundingClientRect());
  card.hidden = false;
  const height = card.offsetHeight, width = card.offsetWidth, room = 8;
  const below = box.bottom + room + height <= innerHeight;
  card.style.top = `${Math.max(room, below ? box.bottom + room : box.top - room - height)}px`;
  card.style.left = `${Math.max(room, Math.min(box.left, document.documentElement.clientWidth - width - room))}px`;
}

function show(i) {
  if (current >= 0 && tokens[current]) tokens[current].classList.remove("at");
  current = i;
  tokens[i].classList.add("at");
  fillCard(i);
  placeCard(i);
  moveCursor(i);
}

function hide() {
  if (current >= 0 && tokens[current]) tokens[current].classList.remove("at");
  current = -1;
  kept = false;
  at("card").hidden = true;
  moveCursor(-1);
}

function keep(i, scroll) {
  kept = true;
  if (scroll) tokens[i].scrollIntoView({ block: "center" });
  show(i);
}

const tokenOf = event => event.target.closest ? event.target.closest(".t") : null;
at("text").addEventListener("pointerover", event => {
  const token = tokenOf(event);
  if (token && !kept) show(Number(token.dataset.i));
});
at("text").addEventListener("pointerleave", () => { if (!kept) hide(); });
document.addEventListener("click", event => {
  const token = tokenOf(event);
  if (token) keep(Number(token.dataset.i), false);
  else if (kept && !event.target.closest("#card, #plot, .bar")) hide();
});
at("text").addEventListener("keydown", event => {
  const next = { ArrowRight: current + 1, ArrowLeft: current - 1, Home: 0, End: T - 1 }[event.key];
  if (event.key === "Escape") hide();
  if (next === undefined) return;
  event.preventDefault();
  const i = Math.max(0, Math.min(T - 1, next));
  tokens[i].scrollIntoView({ block: "nearest" });
  keep(i, false);
});
addEventListener("scroll", () => {
  if (current < 0) return;
  const box = tokens[current].getBoundingClientRect();
  if (!kept && (box.bottom < 0 || box.top > innerHeight)) hide();
  else placeCard(current);
}, { passive: true });

// The plot -----------------------------------------------------------------------------------------------------------

const WIDTH = 1224, LEFT = 64, RIGHT = 8, PANEL = 74, GAP = 22;
const SVG = "http://www.w3.org/2000/svg";
const svg = (tag, attributes, text) => {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
};
const x = i => LEFT + (WIDTH - LEFT - RIGHT) * (i / T);

// A line through all values; where several fall on one pixel, through the lowest and the highest of them.
function linePath(values, y, isStep) {
  const perPixel = Math.max(1, Math.ceil(T / (WIDTH - LEFT - RIGHT)));
  let path = "", pen = "M";
  for (let i = 0; i < T; i += perPixel) {
    let low = Infinity, high = -Infinity;
    for (let j = i; j < Math.min(T, i + perPixel); j++) {
      if (!Number.isFinite(values[j])) continue;
      low = Math.min(low, values[j]);
      high = Math.max(high, values[j]);
    }
    if (low > high) { pen = "M"; continue; }
    const [from, to] = [x(i).toFixed(1), x(Math.min(T, i + perPixel)).toFixed(1)];
    if (perPixel > 1) path += `${pen}${from} ${y(low).toFixed(1)}L${from} ${y(high).toFixed(1)}`;
    else if (isStep) path += `${pen}${from} ${y(low).toFixed(1)}L${to} ${y(low).toFixed(1)}`;
    else path += `${pen}${x(i + 0.5).toFixed(1)} ${y(low).toFixed(1)}`;
    pen = "L";
  }
  return path;
}

function panels() {
  const bySegment = values => Array.from(use.segments, s => values[s]);
  const unmasked = values => Array.from(values, (value, i) => (use.mask[i] ? value : NaN));
  const drift = [{ values: unmasked(use.drift), color: "#8aa9c9", width: 1 }];
  if (use.isMeasured) drift.push({ values: bySegment(use.segmentDrift), color: "#22252a", width: 1.8, isStep: true });
  return [
    { title: use.isMeasured ? "drift: token (blue) and segment (black), nats" : "drift, nats", lines: drift, symmetric: true, bends: true },
    { title: "gate weight of a token", lines: [{ values: unmasked(use.token_weights), color: "#22252a", width: 1.6, isStep: true }], base: 1 },
    { title: "KL to the teacher on the support, nats", lines: [{ values: unmasked(use.kl), color: "#7a5ca8", width: 1 }], base: 0, bends: true },
  ];
}

// How far up a value stands, 0 to 1. A scale that bends is asinh(value / size): straight for what most values are, so
// that one wild token does not press all others flat.
function heights(panel, [low, high]) {
  let size = Infinity;
  if (panel.bends) {
    const sizes = Array.from(panel.lines[0].values).filter(value => Number.isFinite(value) && value !== 0).map(Math.abs);
    size = Math.max(2 * quantile(sizes, 0.9), high / 1e4);
  }
  const bent = value => (Number.isFinite(size) && size > 0 ? Math.asinh(value / size) : value);
  const straight = value => (Number.isFinite(size) && size > 0 ? size * Math.sinh(value) : value);
  const from = bent(low), to = bent(high);
  return { of: value => (bent(value) - from) / (to - from), at: share => straight(from + share * (to - from)) };
}

function range(panel) {
  let low = Infinity, high = -Infinity;
  for (const line of panel.lines) for (const value of line.values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  if (panel.symmetric) {
    const size = Math.max(Math.abs(low), Math.abs(high));
    [low, high] = Number.isFinite(size) && size > 0 ? [-size, size] : [-1, 1];
  } else {
    low = Math.min(low, panel.base);
    high = Math.max(high, panel.base);
    if (!(high > low)) [low, high] = [panel.base - 0.5, panel.base + 0.5];
  }
  return [low, high];
}

let cursor = null;
function drawPlot() {
  const all = panels(), height = all.length * (PANEL + GAP) + 18;
  const root = svg("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": "drift, gate weight and KL along the response" });
  all.forEach((panel, p) => {
    const top = p * (PANEL + GAP) + GAP - 4, [low, high] = range(panel);
    const scale = heights(panel, [low, high]), y = value => top + PANEL * (1 - scale.of(value));
    root.append(svg("text", { x: LEFT, y: top - 6 }, panel.title + (panel.bends ? " (a scale that bends: mind its numbers)" : "")));
    root.append(svg("rect", { x: LEFT, y: top, width: WIDTH - LEFT - RIGHT, height: PANEL, fill: "#fff", stroke: "#d9dce1" }));
    if (numSegments() <= 80) for (let i = 1; i < T; i++) if (use.segments[i] !== use.segments[i - 1]) {
      root.append(svg("line", { x1: x(i), x2: x(i), y1: top, y2: top + PANEL, stroke: "#e6e8ec" }));
    }
    const middle = panel.symmetric ? 0 : panel.base;
    for (const tick of new Set([low, high, middle, ...(panel.bends ? [scale.at(panel.symmetric ? 0.75 : 0.5)] : [])])) {
      root.append(svg("text", { x: LEFT - 6, y: y(tick) + 4, "text-anchor": "end" }, number(tick)));
    }
    root.append(svg("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(middle), y2: y(middle), stroke: "#c3c8cf", "stroke-dasharray": "3 3" }));
    for (const line of panel.lines) {
      root.append(svg("path", { d: linePath(line.values, y, line.isStep), fill: "none", stroke: line.color, "stroke-width": line.width, "stroke-linejoin": "round" }));
    }
  });
  const step = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000].find(size => T / size <= 12) || Math.ceil(T / 10);
  for (let i = 0; i <= T; i += step) root.append(svg("text", { x: x(i), y: height - 4, "text-anchor": x(i) > WIDTH - 30 ? "end" : "middle" }, i));
  cursor = svg("line", { x1: 0, x2: 0, y1: GAP - 4, y2: height - 18, stroke: "#22252a", visibility: "hidden" });
  root.append(cursor);
  const tokenAt = event => {
    const box = root.getBoundingClientRect();
    const place = (((event.clientX - box.left) / box.width) * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT);
    return Math.max(0, Math.min(T - 1, Math.floor(place * T)));
  };
  root.addEventListener("pointermove", event => moveCursor(tokenAt(event)));
  root.addEventListener("pointerleave", () => moveCursor(current));
  root.addEventListener("click", event => keep(tokenAt(event), true));
  at("plot").replaceChildren(root);
}

function moveCursor(i) {
  if (!cursor) return;
  cursor.setAttribute("visibility", i < 0 ? "hidden" : "visible");
  if (i < 0) return;
  cursor.setAttribute("x1", x(i + 0.5));
  cursor.setAttribute("x2", x(i + 0.5));
}

// ----------------------------------------------------------------------------------------------------------------------

function open(place) {
  const before = kept ? current : -1;
  use = DATA.uses[place];
  unpackAll(use);
  current = -1;
  drawChoice("uses", DATA.uses.map((one, value) => ({
    value, label: `step ${one.step} · use ${one.use}`, title: `staleness ${one.staleness}${one.isFresh ? ", fresh" : ""}`,
  })), place, open);
  drawWords();
  drawText();
  drawPlot();
  paint();
  if (before >= 0) keep(before, false);
  else hide();
}
open(DATA.opensAt);
})();
