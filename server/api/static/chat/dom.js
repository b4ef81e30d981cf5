// Small helpers: elements, dialogs, the clipboard, downloads, notices, and one redraw per frame.

export const $ = (id) => document.getElementById(id);

/** Make an element; attributes that begin with "on" are listeners, false leaves an attribute out. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

export const button = (text, onclick, attributes = {}) => make("button", { type: "button", onclick, ...attributes }, text);

/** The cost of drawing, for tests and for the curious: compare it between two chunks. */
export const counters = { frames: 0, chunks: 0, charactersParsed: 0, nodesTouched: 0 };
window.pyllmCounters = counters;

const waiting = new Set();

/** Call `draw` before the next frame, once, however often it is asked for until then. */
export function beforeNextFrame(draw) {
  const isFirst = waiting.size === 0;
  waiting.add(draw);
  if (!isFirst) return;
  requestAnimationFrame(() => {
    counters.frames += 1;
    const draws = [...waiting];
    waiting.clear();
    for (const each of draws) each();
  });
}

/** Say something to people and to screen readers; `undo` offers a way back for a while. */
export function notify(text, undo) {
  const box = $("notice");
  clearTimeout(notify.timer);
  box.replaceChildren(text);
  if (undo) {
    box.append(" ", button("Undo", () => { box.hidden = true; undo(); }));
  }
  box.hidden = false;
  notify.timer = setTimeout(() => { box.hidden = true; }, undo ? 12000 : 5000);
}

export function fail(text) {
  $("error-text").textContent = text;
  $("error").hidden = !text;
}

/** Ask before something that cannot be undone. */
export function confirmed(question, action) {
  const dialog = $("confirm");
  $("confirm-text").textContent = question;
  $("confirm-yes").textContent = action;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

/** Copy text. On plain HTTP browsers offer no clipboard, but they still copy a selection. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const parent = document.querySelector("dialog[open]") ?? document.body;
    const focused = document.activeElement;
    const area = make("textarea", { class: "out", "aria-hidden": "true", tabindex: "-1" });
    area.value = text;
    parent.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    focused?.focus();
    return copied;
  }
}

export function copyButton(read, name) {
  const element = button("Copy", async () => {
    element.textContent = (await copy(read())) ? "Copied" : "Copying failed";
    setTimeout(() => { element.textContent = "Copy"; }, 1500);
  }, { class: "quiet", "aria-label": name });
  return element;
}

export function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

/** Ask for files; resolves to a list, which is empty if the person cancels. */
export function chooseFiles(attributes) {
  const input = make("input", { type: "file", ...attributes });
  return new Promise((resolve) => {
    input.addEventListener("change", () => resolve([...input.files]), { once: true });
    input.addEventListener("cancel", () => resolve([]), { once: true });
    input.click();
  });
}

export const plural = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;

export function seconds(value) {
  return value < 1 ? `${Math.max(1, Math.round(1000 * value))} ms` : `${value.toFixed(value < 10 ? 1 : 0)} s`;
}
