// Looking inside: tokens with probability, entropy and runners-up; codes over the picture; attention as a heat map.

import { call, pngUrl } from "./api.js";
import { byId, element, say } from "./dom.js";

let tokens = [];
let pictures = [];
let attention = null;
let chosen = null;
let latest = 0;

/** Show a sequence of token ids. */
export async function inspect(ids) {
  say("Looking inside …");
  try {
    const answer = await call("/inspect", { tokens: ids, top: 6 });
    tokens = answer.tokens;
    pictures = answer.pictures;
  } catch (error) {
    return say(error.message, true);
  }
  chosen = attention = null;
  byId("inside-hint").hidden = true;
  byId("inside-body").hidden = false;
  byId("detail").replaceChildren(element("p", { className: "quiet", textContent: "Point at a token, or move to it with Tab." }));
  show();
  say("Done.");
}

const pictureOf = (position) =>
  pictures.find(({ start, grid, row_length: rowLength }) => position >= start && position < start + grid[0] * rowLength);

/** From unlikely or uncertain, red, to likely or certain, green. */
function colour(token) {
  if (token.logprob === undefined) return "#ffffff";
  const share = byId("shade").value === "logprob" ? Math.exp(token.logprob) : 1 - Math.min(1, token.entropy / 6);
  return `hsl(${Math.round(10 + 130 * share)} 75% 82%)`;
}

function show() {
  const shown = tokens.map((token, position) => ({ token, position })).filter(({ position }) => !pictureOf(position));
  byId("tokens").replaceChildren(
    ...shown.map(({ token, position }) => {
      const node = element("button", { type: "button", className: `token ${token.kind}`, textContent: token.text });
      node.style.background = colour(token);
      return prepare(node, position);
    }),
  );
  byId("pictures").replaceChildren(...pictures.map(pictureGrid));
}

function prepare(node, position) {
  node.dataset.position = position;
  node.addEventListener("focus", () => choose(position));
  node.addEventListener("pointerenter", () => choose(position));
  node.addEventListener("click", () => choose(position));
  return node;
}

function pictureGrid({ start, grid: [height, width], row_length: rowLength, b64_json: picture }) {
  const box = element("div", { className: "codes", role: "group", "aria-label": "Picture by its codes" });
  box.style.backgroundImage = `url(${pngUrl(picture)})`;
  box.style.gridTemplateColumns = `repeat(${width}, 1fr)`;
  box.style.aspectRatio = `${width} / ${height}`;
  for (let row = 0; row < height; row++)
    for (let column = 0; column < width; column++) {
      const position = start + row * rowLength + column;
      const label = `Row ${row + 1}, column ${column + 1}: ${tokens[position].text}`;
      box.append(prepare(element("button", { type: "button", "aria-label": label }), position));
    }
  return box;
}

async function choose(position) {
  if (chosen === position) return;
  chosen = position;
  const token = tokens[position];
  for (const node of document.querySelectorAll("[data-position]")) {
    const other = Number(node.dataset.position);
    node.classList.toggle("chosen", other === position);
    node.classList.toggle("same", token.kind === "code" && other !== position && tokens[other].id === token.id);
  }
  const ticket = ++latest;
  const details = [element("h2", { textContent: token.text }), facts(token, position)];
  if (token.top) details.push(runnersUp(token));
  byId("detail").replaceChildren(...details);
  if (token.kind === "code") await showEntry(token, ticket);
  await showAttention(position, ticket);
}

function facts(token, position) {
  const values = [["position", position], ["id", token.id], ["kind", token.kind]];
  if (token.logprob !== undefined) {
    values.push(["probability", Math.exp(token.logprob).toPrecision(3)], ["entropy", `${token.entropy.toFixed(2)} nats`]);
  }
  if (token.kind === "code") {
    values.push(["uses in this sequence", tokens.filter((other) => other.id === token.id).length]);
  }
  return element("table", {}, ...values.map(([name, value]) => row(name, String(value))));
}

const row = (...cells) => element("tr", {}, ...cells.map((cell) => element("td", {}, cell)));

function runnersUp(token) {
  const rows = token.top.map((other) => {
    const probability = Math.exp(other.logprob);
    const meter = element("meter", { min: 0, max: 1, value: probability, "aria-label": "probability" });
    return row(other.text, probability.toPrecision(2), meter);
  });
  return element("table", {}, element("caption", { textContent: "likeliest" }), ...rows);
}

const entries = new Map();

/** What the codebook's entry looks like. */
async function showEntry(token, ticket) {
  const code = Number(token.text.match(/\d+/)[0]);
  if (!entries.has(code)) entries.set(code, call(`/inspect/code/${code}`));
  const entry = await entries.get(code).catch(() => null);
  if (!entry || ticket !== latest) return;
  byId("detail").append(element("p", {}, `entry ${code} `, element("img", { src: pngUrl(entry.b64_json), alt: `Codebook entry ${code}` })));
}

/** The attention of the chosen token over the pictures before it. */
async function showAttention(position, ticket) {
  const layer = Number(byId("layer").value);
  await new Promise((resolve) => setTimeout(resolve, 80)); // pointers pass over many tokens
  if (ticket !== latest) return;
  try {
    attention = await call("/inspect/attention", { tokens: tokens.map((token) => token.id), position, layer });
  } catch (error) {
    return say(error.message, true);
  }
  if (ticket === latest) paintAttention();
}

function paintAttention() {
  if (!attention) return;
  const head = byId("head").value;
  const rows = head === "mean" ? attention.weights : [attention.weights[Number(head)]];
  const weights = rows[0].map((_, index) => rows.reduce((sum, values) => sum + values[index], 0) / rows.length);
  const inPictures = weights.filter((_, index) => pictureOf(index));
  const largest = Math.max(...inPictures, 1e-9);
  for (const node of document.querySelectorAll(".codes button")) {
    const weight = weights[Number(node.dataset.position)] ?? 0;
    node.style.background = weight ? `rgb(40 80 255 / ${(0.75 * weight) / largest})` : "transparent";
  }
  const total = inPictures.reduce((sum, value) => sum + value, 0);
  document.getElementById("attention-note")?.remove();
  byId("detail").append(
    element("p", { id: "attention-note", className: "quiet", textContent: `Layer ${attention.layer}, head ${head}: ${(100 * total).toFixed(0)}% of its attention is on pictures.` }),
  );
}

export function start(model) {
  byId("layer").append(...Array.from({ length: model.layers }, (_, index) => element("option", { textContent: index })));
  byId("layer").value = model.layers - 1;
  byId("head").append(element("option", { textContent: "mean" }), ...Array.from({ length: model.heads }, (_, index) => element("option", { textContent: index })));
  byId("shade").addEventListener("change", show);
  byId("head").addEventListener("change", paintAttention);
  byId("layer").addEventListener("change", () => chosen !== null && showAttention(chosen, ++latest));
}
