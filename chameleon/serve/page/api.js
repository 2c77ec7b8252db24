// The server's API: plain requests, and streams of server-sent events.

const KEY = "chameleon-key";

function headers() {
  const key = sessionStorage.getItem(KEY);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function askForKey() {
  const dialog = document.getElementById("key-dialog");
  dialog.showModal();
  await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  sessionStorage.setItem(KEY, document.getElementById("key").value);
}

async function send(path, body, signal) {
  const isForm = body instanceof FormData;
  const options = { method: body === undefined ? "GET" : "POST", headers: headers(), signal };
  if (body !== undefined) {
    options.body = isForm ? body : JSON.stringify(body);
    if (!isForm) options.headers["Content-Type"] = "application/json";
  }
  const response = await fetch(path, options);
  if (response.status === 401) {
    await askForKey();
    return send(path, body, signal);
  }
  if (!response.ok) {
    const problem = await response.json().catch(() => ({}));
    throw new Error(problem.error?.message ?? `the server answered with status ${response.status}`);
  }
  return response;
}

/** The JSON answer to a GET (no body) or POST. */
export async function call(path, body) {
  return (await send(path, body)).json();
}

/** The events of a streamed answer, as objects. */
export async function* stream(path, body, signal) {
  const response = await send(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.split("\n").find((line) => line.startsWith("data: "))?.slice(6);
      if (!data || data === "[DONE]") continue;
      const item = JSON.parse(data);
      if (item.error) throw new Error(item.error.message);
      yield item;
    }
  }
}

export const pngUrl = (base64) => `data:image/png;base64,${base64}`;
