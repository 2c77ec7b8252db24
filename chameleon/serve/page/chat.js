// Conversation: pictures in and out, streamed; stop, edit, again.

import { stream } from "./api.js";
import { byId, download, element, isBusy, number, readFile, say, task } from "./dom.js";

const messages = [];
let attachments = [];
let actions = {};

export const settings = () => ({
  modalities: byId("chat-modalities").value.split(","),
  temperature: number("chat-temperature"),
  top_p: byId("chat-temperature").value === "0" ? undefined : number("chat-top-p"),
  max_tokens: number("chat-max-tokens"),
  seed: number("chat-seed"),
});

export const state = () => ({ messages: messages.map(({ role, content }) => ({ role, content })), settings: settings() });

export function restore({ messages: saved, settings: given }) {
  byId("chat-modalities").value = given.modalities.join(",");
  byId("chat-temperature").value = given.temperature ?? "";
  if (given.top_p !== undefined) byId("chat-top-p").value = given.top_p;
  byId("chat-max-tokens").value = given.max_tokens ?? "";
  byId("chat-seed").value = given.seed ?? "";
  messages.splice(0, messages.length, ...saved);
  if (messages.at(-1)?.role === "assistant") messages.pop();
  show();
  if (messages.length) answer();
}

function show() {
  byId("messages").replaceChildren(...messages.map(messageItem));
  const canRepeat = messages.some((message) => message.role === "user");
  byId("chat-again").disabled = !canRepeat;
}

function messageItem(message, index) {
  const who = element("div", { className: "who" }, message.role === "user" ? "You" : "Model");
  if (message.role === "user") {
    who.append(element("button", { type: "button", textContent: "Edit", onclick: () => edit(index) }));
  } else if (message.token_ids) {
    who.append(element("button", { type: "button", textContent: "Look inside", onclick: () => actions.inspect(message.token_ids) }));
  }
  return element("li", { className: message.role }, who, ...message.content.map(part));
}

function part(item) {
  if (item.type === "text") return element("p", { textContent: item.text });
  const alt = item.type === "partial_image" ? "Picture, being drawn" : "Picture";
  const image = element("img", { className: "picture", src: item.image_url.url, alt });
  if (item.type === "partial_image") image.classList.add("waiting");
  return image;
}

function edit(index) {
  if (isBusy(byId("chat-stop"))) return;
  const [message] = messages.splice(index);
  byId("message").value = message.content.filter((item) => item.type === "text").map((item) => item.text).join("");
  attachments = message.content.filter((item) => item.type === "image_url").map((item) => item.image_url.url);
  messages.length = index;
  show();
  showAttachments();
  byId("message").focus();
}

function showAttachments() {
  byId("attachments").replaceChildren(
    ...attachments.flatMap((url, index) => [
      element("img", { src: url, alt: `Picture ${index + 1} to send` }),
      element("button", {
        type: "button", textContent: "×", "aria-label": `Remove picture ${index + 1}`,
        onclick: () => { attachments.splice(index, 1); showAttachments(); },
      }),
    ]),
  );
}

export async function attach(files) {
  for (const file of files) if (file.type.startsWith("image/")) attachments.push(await readFile(file));
  showAttachments();
}

export function attachUrl(url) {
  attachments.push(url);
  showAttachments();
  byId("message").focus();
}

/** Add a streamed delta to the parts of an answer; a preview is replaced by what comes after it. */
function addDelta(parts, content) {
  const items = typeof content === "string" ? [{ type: "text", text: content }] : content;
  for (const item of items) {
    const last = parts.at(-1);
    if (last?.type === "partial_image") parts.pop();
    if (item.type === "text" && parts.at(-1)?.type === "text") parts.at(-1).text += item.text;
    else if (item.type !== "text" || item.text) parts.push(item);
  }
}

async function answer() {
  const reply = { role: "assistant", content: [] };
  const body = { ...settings(), stream: true, partial_images: 3, return_token_ids: true };
  body.messages = messages.map(({ role, content }) => ({ role, content }));
  messages.push(reply);
  show();
  say("Answering …");
  await task(byId("chat-stop"), async (signal) => {
    for await (const event of stream("/v1/chat/completions", body, signal)) {
      const choice = event.choices[0];
      if (!choice) continue;
      if (choice.delta.content) addDelta(reply.content, choice.delta.content);
      if (choice.token_ids) reply.token_ids = [...choice.prompt_token_ids, ...choice.token_ids];
      byId("messages").lastElementChild.replaceWith(messageItem(reply, messages.length - 1));
    }
  });
  reply.content = reply.content.filter((item) => item.type !== "partial_image");
  if (!reply.content.length && messages.at(-1) === reply) messages.pop();
  show();
}

function exportHtml() {
  const page = document.implementation.createHTMLDocument("Conversation with Open Chameleon");
  const meta = page.createElement("meta");
  meta.setAttribute("charset", "utf-8");
  page.head.prepend(meta);
  page.body.append(page.importNode(byId("messages"), true));
  page.querySelectorAll("button").forEach((button) => button.remove());
  const note = page.createElement("pre");
  note.textContent = JSON.stringify({ model: actions.fingerprint(), ...settings() });
  page.body.append(note);
  download("conversation.html", "text/html", `<!doctype html>\n${page.documentElement.outerHTML}`);
}

export function start(given) {
  actions = given;
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (isBusy(byId("chat-stop"))) return;
    const text = byId("message").value;
    const content = attachments.map((url) => ({ type: "image_url", image_url: { url } }));
    if (text) content.push({ type: "text", text });
    if (!content.length) return;
    messages.push({ role: "user", content });
    byId("message").value = "";
    attachments = [];
    showAttachments();
    answer();
  });
  byId("message").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    byId("composer").requestSubmit();
  });
  byId("file").addEventListener("change", (event) => attach(event.target.files));
  byId("composer").addEventListener("paste", (event) => attach(event.clipboardData.files));
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    attach(event.dataTransfer.files);
  });
  byId("chat-again").addEventListener("click", () => {
    if (isBusy(byId("chat-stop"))) return;
    while (messages.at(-1)?.role === "assistant") messages.pop();
    byId("chat-seed").value = (number("chat-seed") ?? 0) + 1;
    if (byId("chat-temperature").value === "0") byId("chat-temperature").value = 0.7;
    answer();
  });
  byId("chat-new").addEventListener("click", () => {
    if (isBusy(byId("chat-stop"))) return;
    messages.length = 0;
    show();
    say("");
  });
  byId("export-html").addEventListener("click", exportHtml);
  byId("export-json").addEventListener("click", () =>
    download("conversation.json", "application/json", JSON.stringify({ model: actions.fingerprint(), ...state() }, null, 2)),
  );
  show();
}
