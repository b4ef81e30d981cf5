// The page: connects the list, the messages, the message box and the server.

import { listModels } from "./api.js";
import { Run } from "./answer.js";
import { Composer } from "./composer.js";
import { Library } from "./conversations.js";
import { $, fail, notify, plural } from "./dom.js";
import { applyTheme, drawSettings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { apiKey, isKeyRemembered, onChangeElsewhere, openStore, setApiKey } from "./store.js";
import { Thread } from "./thread.js";

const library = new Library();
let current = null;  // the shown conversation; null: a new one, which the next message begins
let models = [];

const model = () => models.find(({ id }) => id === $("model").value);

const thread = new Thread({
  regenerate(message) {
    const parent = message ? current.messages.get(message.parent) : current.path().at(-1);
    answer(current, parent);
  },
  continueAnswer: (message) => answer(current, current.messages.get(message.parent), message),
  resend(message, text) {
    if (current.run || !model()) return;
    const parent = current.messages.get(message.parent);
    answer(current, current.add("user", parent, { content: text, attachments: message.attachments }));
  },
  change(message, text) {
    Object.assign(message, { content: text, edited: true });
    current.saveMessage(message);
    thread.refresh(current, message);
  },
  save: (message) => current.saveMessage(message),
  remove(message) {
    if (current.run) return;
    const conversation = current;
    const undo = conversation.remove(message);
    thread.show(conversation);
    $("question").focus();
    notify("Deleted the message.", () => { undo(); if (current === conversation) thread.show(conversation); });
  },
  choose(message) {
    if (current.run) return;
    current.choose(message);
    thread.show(current);
    thread.focus(message);
    showContext();
  },
  answerCalls(message, texts) {
    if (current.run || !model()) return;
    let parent = message;
    for (const call of message.calls.filter(Boolean)) {
      if (texts.has(call.id)) parent = current.add("tool", parent, { content: texts.get(call.id), callId: call.id, name: call.function.name });
    }
    thread.refresh(current, message);
    answer(current, parent);
  },
});

const composer = new Composer({
  send(text, files) {
    if (current?.run || !model()) return false;
    current ??= library.create();
    const parent = current.path().at(-1);
    const message = current.add("user", parent, { content: text, ...(files.length ? { attachments: files } : {}) });
    thread.toEnd();
    answer(current, message);
    return true;
  },
  stop: () => current?.run?.stop(),
});

const sidebar = new Sidebar(library, { open: openConversation, current: () => current });

function answer(conversation, parent, message = null) {
  if (conversation.run || !model()) return;
  fail("");
  const run = new Run(conversation, model(), {
    onChange(changed) { thread.changed(conversation, changed); },
    onEnd(changed, error) {
      sidebar.draw();
      if (error) fail(conversation === current ? error.message : `${conversation.title}: ${error.message}`);
      if (error?.status === 401) askForKey();
      if (conversation !== current) return;
      showBusy();
      thread.refresh(conversation, changed);
      showContext();
      announce(changed, error);
    },
  });
  run.start(parent, message);
  thread.show(conversation);
  showTitle();
  sidebar.draw();
  showBusy();
}

/** Tell screen readers how an answer ended: the words themselves, if they are few. */
function announce(message, error) {
  if (error || !message) return;
  const text = message.content.length < 500 ? message.content : `The answer has ${plural(message.content.length, "character")}.`;
  $("status").textContent = [text, message.note].filter(Boolean).join(" ");
}

function showBusy() {
  const isBusy = Boolean(current?.run);
  composer.setBusy(isBusy);
  if (isBusy) $("status").textContent = "The model is answering.";
  if (!isBusy && !document.querySelector("dialog[open]") && document.activeElement === document.body) $("question").focus();
}

function showContext() {
  const last = current?.messages && [...current.path()].reverse().find((message) => message.stats);
  composer.showContext(last ? last.stats.prompt + last.stats.completion : null, model()?.max_model_len ?? 0);
}

function showTitle() {
  $("title").textContent = current?.title ?? "PyLLM";
  document.title = current ? `${current.title} – PyLLM` : "PyLLM";
}

async function openConversation(conversation) {
  if (conversation) await conversation.load();
  if (current !== conversation) fail("");
  current = conversation;
  if (conversation) thread.show(conversation);
  else thread.clear();
  showTitle();
  toggleSidebar(false);
  sidebar.draw();
  showBusy();
  if (!conversation?.run) $("status").textContent = "";
  showContext();
  if (!conversation) $("question").focus();
}

async function loadModels() {
  try {
    models = await listModels();
    const chosen = $("model").value;
    $("model").replaceChildren(...models.map(({ id }) => Object.assign(document.createElement("option"), { value: id, textContent: id })));
    if (models.some(({ id }) => id === chosen)) $("model").value = chosen;
    $("model").disabled = false;
    fail("");
    showContext();
  } catch (error) {
    fail(error.message);
    if (error.status === 401) askForKey();
    else setTimeout(loadModels, error.status === 503 ? 1000 : 3000);
  }
}

function askForKey() {
  if ($("key-dialog").open) return;
  $("key").value = apiKey();
  $("remember").checked = isKeyRemembered() || !apiKey();
  $("key-problem").textContent = $("error-text").textContent;
  $("key-dialog").showModal();
  $("key").select();
}

function toggleSidebar(isOpen) {
  document.body.classList.toggle("with-sidebar", isOpen);
  $("menu").setAttribute("aria-expanded", String(isOpen));
  if (isOpen) $("search").focus();
}

$("menu").addEventListener("click", () => toggleSidebar(!document.body.classList.contains("with-sidebar")));
$("shade").addEventListener("click", () => toggleSidebar(false));
$("settings-open").addEventListener("click", () => { drawSettings(); $("settings").showModal(); });
$("settings-close").addEventListener("click", () => $("settings").close());
$("key-open").addEventListener("click", () => { $("settings").close(); fail(""); askForKey(); });
$("key-form").addEventListener("submit", () => {
  setApiKey($("key").value.trim(), $("remember").checked);
  setTimeout(loadModels);  // once the dialog is closed: it opens again if the key is wrong
});
$("key-dialog").addEventListener("close", () => {
  $("question").blur();  // Chromium returns the focus here without a caret, and typing would do nothing
  $("question").focus();
});
$("error-close").addEventListener("click", () => fail(""));
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
    if (document.body.classList.contains("with-sidebar")) { toggleSidebar(false); $("menu").focus(); } else current?.run?.stop();
  }
  if (event.key === "O" && event.ctrlKey && event.shiftKey) { event.preventDefault(); openConversation(null); }
});
onChangeElsewhere(async () => {
  await library.load();
  sidebar.draw();
  if (!current || current.messages) return;
  const conversation = current;
  await conversation.load();
  if (conversation === current) thread.show(conversation);
});
window.addEventListener("not-kept", ({ detail }) => fail(`The browser did not keep the last change: ${detail}`));

applyTheme();
if (!(await openStore())) notify("This browser does not keep conversations: they end with this page.");
await library.load();
sidebar.draw();
loadModels();
