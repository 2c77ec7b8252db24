// Small helpers for the document.

export const byId = (id) => document.getElementById(id);

/** A new element with properties and children. */
export function element(name, properties = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.includes("-") || key === "role") node.setAttribute(key, value);
    else node[key] = value;
  }
  node.append(...children);
  return node;
}

export function say(text, isError = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("error", isError);
}

/** The number in a field, or undefined where it is empty. */
export function number(id) {
  const value = byId(id).value;
  return value === "" ? undefined : Number(value);
}

export function download(name, type, text) {
  const link = element("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

/** A file as a data URL. */
export function readFile(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("the file cannot be read"));
    reader.readAsDataURL(file);
  });
}

/** Whether a task of this button runs; says so. */
export function isBusy(stopButton) {
  if (!stopButton.disabled) say("Stop what is running first.", true);
  return !stopButton.disabled;
}

/** Run a task that can be stopped; errors are shown. */
export async function task(stopButton, run) {
  const controller = new AbortController();
  const stop = () => controller.abort();
  stopButton.disabled = false;
  stopButton.addEventListener("click", stop);
  try {
    await run(controller.signal);
    say("Done.");
  } catch (error) {
    say(error.name === "AbortError" ? "Stopped." : error.message, error.name !== "AbortError");
  } finally {
    stopButton.disabled = true;
    stopButton.removeEventListener("click", stop);
  }
}
