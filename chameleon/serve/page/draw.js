// Drawing: a grid of seeds, the likeliest marked; painting into one, and variations.

import { pngUrl, stream } from "./api.js";
import { byId, element, isBusy, number, say, task } from "./dom.js";

const PREVIEWS = 3;
let drawings = [];
let chosen = null;
let actions = {};
let mask = [];
let cursor = { x: 32, y: 32 };

export const settings = () => ({
  prompt: byId("draw-prompt").value,
  n: number("draw-n"),
  seed: number("draw-seed"),
  guidance_scale: number("draw-guidance"),
  temperature: number("draw-temperature"),
  top_p: number("draw-top-p"),
  size: byId("draw-size").value || undefined,
});

export const state = () => settings();

export function restore(given) {
  const fields = { prompt: "prompt", n: "n", seed: "seed", guidance_scale: "guidance", temperature: "temperature", top_p: "top-p", size: "size" };
  for (const [key, id] of Object.entries(fields)) byId(`draw-${id}`).value = given[key] ?? "";
  draw();
}

function show() {
  const scores = drawings.map((drawing) => drawing.log_likelihood).filter((score) => score !== undefined);
  const best = drawings.length > 1 && scores.length === drawings.length ? Math.max(...scores) : undefined;
  byId("grid").replaceChildren(
    ...drawings.map((drawing, index) => {
      const isBest = best !== undefined && drawing.log_likelihood === best;
      const label = `Seed ${drawing.seed}${isBest ? ", likeliest" : ""}`;
      const image = element("img", { src: drawing.url ?? "/page/icon.svg", alt: drawing.prompt });
      if (!drawing.isDone) image.classList.add("waiting");
      const button = element("button", { type: "button", onclick: () => choose(index) }, image, element("span", { className: "seed", textContent: label }));
      button.disabled = !drawing.isDone;
      button.classList.toggle("best", isBest);
      return element("li", {}, button);
    }),
  );
}

/** Run a streamed request for pictures and show them as their rows come. */
async function run(path, body, prompt, seed, count) {
  if (isBusy(byId("draw-stop"))) return;
  drawings = Array.from({ length: count }, (_, index) => ({ seed: seed + index, prompt }));
  byId("easel").hidden = true;
  show();
  say("Drawing …");
  await task(byId("draw-stop"), async (signal) => {
    for await (const event of stream(path, body, signal)) {
      const drawing = drawings[event.index];
      drawing.url = pngUrl(event.b64_json);
      if (event.type.endsWith(".completed")) {
        Object.assign(drawing, { isDone: true, seed: event.seed, log_likelihood: event.log_likelihood });
        drawing.token_ids = event.token_ids && [...event.prompt_token_ids, ...event.token_ids];
      }
      show();
    }
  });
}

function draw() {
  const body = { ...settings(), stream: true, partial_images: PREVIEWS, rank: true, return_token_ids: true };
  return run("/v1/images/generations", body, body.prompt, body.seed ?? 0, body.n ?? 1);
}

// --- the chosen picture ---

function choose(index) {
  chosen = drawings[index];
  byId("easel").hidden = false;
  byId("paint-prompt").value = chosen.prompt;
  const image = new Image();
  image.onload = () => {
    const canvas = byId("canvas");
    canvas.width = image.width;
    canvas.height = image.height;
    chosen.image = image;
    clearMask();
    byId("easel").scrollIntoView({ block: "nearest" });
  };
  image.src = chosen.url;
}

function clearMask() {
  const canvas = byId("canvas");
  mask = new Uint8Array(canvas.width * canvas.height);
  render();
}

function render() {
  const canvas = byId("canvas");
  const context = canvas.getContext("2d");
  context.drawImage(chosen.image, 0, 0);
  context.fillStyle = "rgb(214 0 75 / 0.55)";
  mask.forEach((value, index) => value && context.fillRect(index % canvas.width, Math.floor(index / canvas.width), 1, 1));
  if (document.activeElement === canvas) {
    context.strokeStyle = "#d6004b";
    context.lineWidth = 0.5;
    context.beginPath();
    context.arc(cursor.x, cursor.y, number("brush"), 0, 7);
    context.stroke();
  }
}

function brush(x, y) {
  const { width, height } = byId("canvas");
  const radius = number("brush");
  for (let row = 0; row < height; row++)
    for (let column = 0; column < width; column++)
      if ((column + 0.5 - x) ** 2 + (row + 0.5 - y) ** 2 <= radius ** 2) mask[row * width + column] = 1;
  render();
}

function pointerBrush(event) {
  if (!(event.buttons & 1)) return;
  const box = byId("canvas").getBoundingClientRect();
  brush(((event.clientX - box.left) / box.width) * byId("canvas").width, ((event.clientY - box.top) / box.height) * byId("canvas").height);
}

function keyBrush(event) {
  const step = { ArrowLeft: [-2, 0], ArrowRight: [2, 0], ArrowUp: [0, -2], ArrowDown: [0, 2] }[event.key];
  if (!step && event.key !== " ") return;
  event.preventDefault();
  const { width, height } = byId("canvas");
  if (step) cursor = { x: Math.min(width, Math.max(0, cursor.x + step[0])), y: Math.min(height, Math.max(0, cursor.y + step[1])) };
  if (event.key === " ") brush(cursor.x, cursor.y);
  render();
}

const toBlob = (canvas) => new Promise((resolve) => canvas.toBlob(resolve, "image/png"));

/** The chosen picture, and the mask whose transparent pixels are drawn anew, as files. */
async function files() {
  const { width, height } = byId("canvas");
  const canvas = element("canvas", { width, height });
  const context = canvas.getContext("2d");
  context.drawImage(chosen.image, 0, 0);
  const picture = await toBlob(canvas);
  const pixels = context.getImageData(0, 0, width, height);
  mask.forEach((value, index) => { pixels.data[4 * index + 3] = value ? 0 : 255; });
  context.putImageData(pixels, 0, 0);
  return { picture, mask: await toBlob(canvas) };
}

async function form(withMask) {
  const given = await files();
  const body = new FormData();
  body.append("image", given.picture, "picture.png");
  if (withMask) body.append("mask", given.mask, "mask.png");
  const values = { prompt: byId("paint-prompt").value, n: 4, seed: number("draw-seed") ?? 0, stream: true, partial_images: PREVIEWS, return_token_ids: true };
  for (const [key, value] of Object.entries(values)) body.append(key, value);
  return body;
}

async function redraw(path, withMask) {
  if (withMask && !mask.some(Boolean)) return say("Brush over a part of the picture first.", true);
  if (isBusy(byId("draw-stop"))) return;
  say("Drawing …");
  await run(path, await form(withMask), byId("paint-prompt").value, number("draw-seed") ?? 0, 4);
}

export function start(given) {
  actions = given;
  byId("draw-guidance").value = given.defaults.guidance_scale;
  byId("draw-temperature").value = given.defaults.image.temperature;
  byId("draw-top-p").value = given.defaults.image.top_p;
  byId("draw-size").append(element("option", { value: "", textContent: "auto" }), ...given.sizes.map((size) => element("option", { textContent: size })));
  byId("draw-size-field").hidden = given.sizes.length < 2;
  byId("draw-form").addEventListener("submit", (event) => {
    event.preventDefault();
    draw();
  });
  byId("draw-again").addEventListener("click", () => {
    byId("draw-seed").value = (number("draw-seed") ?? 0) + (number("draw-n") ?? 1);
    draw();
  });
  const canvas = byId("canvas");
  canvas.addEventListener("pointerdown", pointerBrush);
  canvas.addEventListener("pointermove", pointerBrush);
  canvas.addEventListener("keydown", keyBrush);
  for (const name of ["focus", "blur"]) canvas.addEventListener(name, () => chosen?.image && render());
  byId("paint").addEventListener("click", () => redraw("/v1/images/edits", true));
  byId("vary").addEventListener("click", () => redraw("/v1/images/variations", false));
  byId("clear-mask").addEventListener("click", clearMask);
  byId("ask").addEventListener("click", () => actions.ask(chosen.url));
  byId("inside-picture").addEventListener("click", () => chosen.token_ids && actions.inspect(chosen.token_ids));
}
