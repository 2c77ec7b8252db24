// Tabs, links that reproduce a result, and what connects the parts.

import { call } from "./api.js";
import * as chat from "./chat.js";
import { byId, say } from "./dom.js";
import * as draw from "./draw.js";
import * as inside from "./inside.js";

const MAX_LINK = 60_000;
const tabs = [...document.querySelectorAll("[role=tab]")];
const parts = { chat, draw };
let model = {};

function open(tab) {
  for (const other of tabs) {
    const isOpen = other === tab;
    other.setAttribute("aria-selected", isOpen);
    other.tabIndex = isOpen ? 0 : -1;
    byId(other.getAttribute("aria-controls")).hidden = !isOpen;
  }
}

const isOpen = (name) => byId(`tab-${name}`).getAttribute("aria-selected") === "true";

for (const [index, tab] of tabs.entries()) {
  tab.addEventListener("click", () => open(tab));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs[(index + step + tabs.length) % tabs.length];
    open(next);
    next.focus();
  });
}

function encode(value) {
  const bytes = new TextEncoder().encode(JSON.stringify(value));
  return btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
}

const decode = (text) => JSON.parse(new TextDecoder().decode(Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))));

async function copyLink() {
  const part = isOpen("draw") ? "draw" : "chat";
  const link = `${location.origin}/#${encode({ part, model: model.fingerprint, ...parts[part].state() })}`;
  if (link.length > MAX_LINK) return say("Too long for a link, because of its pictures. Export it instead.", true);
  history.replaceState(null, "", link);
  try {
    await navigator.clipboard.writeText(link);
    say("The link is copied.");
  } catch {
    say("The link is in the address bar.");
  }
}

function openLink() {
  if (location.hash.length < 2) return;
  let saved;
  try {
    saved = decode(location.hash.slice(1));
    if (!parts[saved.part]) throw new Error();
  } catch {
    return say("The link is damaged.", true);
  }
  open(byId(`tab-${saved.part}`));
  parts[saved.part].restore(saved);
  if (saved.model !== model.fingerprint) say(`The link is of another model, ${saved.model}: the result may differ.`, true);
}

async function start() {
  try {
    [model] = (await call("/v1/models")).data;
  } catch (error) {
    return say(error.message, true);
  }
  byId("model").textContent = `${model.id} · ${model.fingerprint} · context ${model.max_model_len} tokens`;
  const inspect = (ids) => {
    open(byId("tab-inside"));
    inside.inspect(ids);
  };
  inside.start(model);
  byId("chat-temperature").value = model.defaults.text.temperature;
  byId("chat-top-p").value = model.defaults.text.top_p;
  chat.start({ inspect, fingerprint: () => model.fingerprint });
  draw.start({
    inspect,
    sizes: model.image_sizes,
    defaults: model.defaults,
    ask: (url) => {
      open(byId("tab-chat"));
      chat.attachUrl(url);
    },
  });
  for (const button of document.querySelectorAll(".copy-link")) button.addEventListener("click", copyLink);
  openLink();
  document.body.dataset.ready = "true";
}

start();
