// The open conversation: one view per message. Only the message that changes is drawn again.

import { describe } from "./answer.js";
import { $, beforeNextFrame, button, copyButton, counters, make, seconds } from "./dom.js";
import { drawDynamics } from "./dynamics.js";
import { renderAll } from "./markdown.js";
import { StreamingMarkdown } from "./streaming.js";
import { drawCalls } from "./tools.js";

const NAMES = { user: "You", assistant: "Model", tool: "Result" };
const DRAWN_AT_ONCE = 30;  // messages; the older ones follow when there is time

/** A text that may still grow, as Markdown. */
class GrowingText {
  constructor(root) {
    this.root = root;
    this.shown = "";
    this.stream = null;
  }

  show(text, isComplete) {
    if (this.stream && text.startsWith(this.shown)) this.stream.append(text.slice(this.shown.length));
    else if (!isComplete) {
      this.root.replaceChildren();
      this.stream = new StreamingMarkdown(this.root);
      this.stream.append(text);
    }
    if (!isComplete) this.stream.draw();
    else if (this.stream && text.startsWith(this.shown)) this.stream.end(text);
    else if (text !== this.shown || !this.root.hasChildNodes()) this.root.replaceChildren(renderAll(text));
    if (isComplete) this.stream = null;
    this.shown = text;
  }
}

class MessageView {
  constructor(thread, message) {
    this.thread = thread;
    this.message = message;
    this.body = make("div", { class: "body" });
    this.text = new GrowingText(this.body);
    this.extras = make("div");
    this.files = make("div");
    this.foot = make("div", { class: "foot" });
    this.reasoning = null;
    const name = message.role === "tool" ? `Result of ${message.name ?? "a tool"}` : NAMES[message.role];
    this.element = make("article", { class: message.role }, make("h2", {}, name), this.files, this.body, this.extras, this.foot);
    this.draw = () => this.#draw();
    this.isEditing = false;
  }

  #draw() {
    const { message } = this;
    const isComplete = !message.partial;
    if (this.isEditing) return;
    if (message.reasoning) this.#drawReasoning(isComplete);
    if (message.role !== "assistant" || message.raw) this.body.textContent = message.content;
    else this.text.show(message.content, isComplete);
    this.body.classList.toggle("plain", message.role !== "assistant" || Boolean(message.raw));
    this.body.classList.toggle("waiting", !isComplete && !message.content && !message.reasoning);
    this.body.hidden = isComplete && !message.content;
    if (isComplete || message.calls?.length) this.#drawExtras(isComplete);
    if (isComplete) this.drawFoot();
    else this.foot.replaceChildren();
    counters.nodesTouched += 1;
    this.thread.follow();
  }

  #drawReasoning(isComplete) {
    if (!this.reasoning) {
      const inside = make("div", { class: "body" });
      this.reasoning = { text: new GrowingText(inside), summary: make("summary") };
      this.body.before(make("details", { class: "reasoning" }, this.reasoning.summary, inside));
    }
    const isThinking = !isComplete && !this.message.content;
    this.reasoning.summary.textContent = isThinking ? "Reasoning …" : "Reasoning";
    this.reasoning.text.show(this.message.reasoning, !isThinking);
  }

  #drawExtras(isComplete) {
    const { message, thread } = this;
    this.files.replaceChildren(...(message.attachments ?? []).map(({ name, text }) => make("details", { class: "file" },
      make("summary", {}, `${name} (${text.length.toLocaleString("en")} characters)`), make("pre", { tabindex: "0" }, text))));
    const parts = [];
    if (message.missing) parts.push(make("p", { class: "note" }, `The context is full: the oldest ${message.missing} messages were left out of the prompt.`));
    if (message.calls?.length) {
      const results = thread.resultsBelow(message);
      parts.push(...drawCalls(message.calls.filter(Boolean), results, isComplete ? (texts) => thread.actions.answerCalls(message, texts) : null));
    }
    if (isComplete && message.dynamics?.length) parts.push(this.#dynamics());
    this.extras.replaceChildren(...parts);
  }

  #dynamics() {
    const details = make("details", { class: "dynamics" }, make("summary", {}, "What the model did"));
    details.open = this.thread.isLast(this.message);
    const inside = make("div");
    details.append(inside);
    const fill = () => { if (details.open && !inside.hasChildNodes()) drawDynamics(inside, this.message.dynamics); };
    details.addEventListener("toggle", fill);
    fill();
    return details;
  }

  /** The line below a message: notes, figures and actions. */
  drawFoot() {
    const { message, thread } = this;
    if (message.partial || this.isEditing) return;
    const { actions } = thread;
    const quiet = (text, action, label) => button(text, action, { class: "quiet", "aria-label": label });
    const isLast = thread.isLast(message);
    const key = JSON.stringify([isLast, this.#place(), message.note, message.edited, message.raw, message.stats, message.calls?.length]);
    if (key === this.footKey && this.foot.hasChildNodes()) return;
    this.footKey = key;
    const buttons = make("div", { class: "actions" }, this.#branches());
    if (message.content) buttons.append(copyButton(() => message.content, "Copy message"));
    if (message.role === "user") buttons.append(quiet("Edit", () => this.edit(), "Edit and send again"));
    else buttons.append(quiet("Edit", () => this.edit(), message.role === "tool" ? "Edit this result" : "Edit this answer"));
    if (message.role === "assistant") {
      buttons.append(
        quiet("Regenerate", () => actions.regenerate(message), "Regenerate"),
        button("Raw", () => { message.raw = !message.raw; actions.save(message); this.redraw(); }, { class: "quiet", "aria-pressed": String(Boolean(message.raw)), "aria-label": "Raw text" }));
      if (isLast && message.content && !message.calls?.length) buttons.append(quiet("Continue", () => actions.continueAnswer(message), "Continue this answer"));
    } else if (isLast) buttons.append(quiet("Try again", () => actions.regenerate(null), "Try again"));
    buttons.append(quiet("Delete", () => actions.remove(message), "Delete message"));
    const said = [message.note, message.edited && "Edited."].filter(Boolean).join(" ");
    this.foot.replaceChildren(
      ...(said ? [make("p", { class: "note" }, said)] : []),
      ...(message.stats ? [make("p", { class: "note stats" }, describe(message.stats, seconds))] : []),
      buttons);
  }

  /** The number of this message among the versions in its place, and how many there are. */
  #place() {
    const all = this.thread.siblings.get(this.message.parent) ?? [];
    return [all.indexOf(this.message), all.length];
  }

  #branches() {
    const [index, count] = this.#place();
    if (count < 2) return null;
    const all = this.thread.siblings.get(this.message.parent);
    const move = (text, other, label) => button(text, () => this.thread.actions.choose(all[other]), { class: "quiet", "aria-label": label, disabled: !all[other] });
    return make("span", { class: "branches", role: "group", "aria-label": "Versions" },
      move("‹", index - 1, "Version before"), make("span", {}, `${index + 1}/${count}`), move("›", index + 1, "Next version"));
  }

  redraw() {
    this.text = new GrowingText(this.body);
    this.body.replaceChildren();
    this.draw();
  }

  /** Edit in place: a question is sent again as a new branch, anything else is changed. */
  edit() {
    const { message, thread } = this;
    const area = make("textarea", { "aria-label": "Text of the message", rows: String(Math.min(16, message.content.split("\n").length + 1)) });
    area.value = message.content;
    const done = () => { this.isEditing = false; this.redraw(); thread.focus(message); };
    const save = () => {
      done();
      if (message.role === "user") thread.actions.resend(message, area.value);
      else if (area.value !== message.content) thread.actions.change(message, area.value);
    };
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") { event.stopPropagation(); done(); }
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) save();
    });
    this.isEditing = true;
    this.body.hidden = false;
    this.body.replaceChildren(area);
    this.foot.replaceChildren(make("div", { class: "actions" },
      button(message.role === "user" ? "Send" : "Save", save, { class: "main" }), button("Cancel", done)));
    area.focus();
  }
}

export class Thread {
  constructor(actions) {
    this.actions = actions;
    this.conversation = null;
    this.views = new Map();  // of the shown messages, by id
    this.last = null;
    this.follows = true;  // the end of the answer is kept in sight
    $("scroller").addEventListener("scroll", () => {
      const { scrollHeight, scrollTop, clientHeight } = $("scroller");
      this.follows = scrollHeight - scrollTop - clientHeight < 80;
    }, { passive: true });
  }

  isLast(message) { return this.last === message; }

  /** The ids of the calls that the messages below an answer have answered. */
  resultsBelow(message) {
    const path = this.conversation.path();
    const found = new Set();
    for (let index = path.indexOf(message) + 1; path[index]?.role === "tool"; index++) found.add(path[index].callId);
    return found;
  }

  /** Show a conversation; messages that are shown already stay as they are. */
  show(conversation) {
    const isNew = conversation !== this.conversation;
    this.conversation = conversation;
    const path = conversation.path();
    // Of another conversation, or read again from the browser: not the same messages.
    if (path.some((message) => (this.views.get(message.id)?.message ?? message) !== message) || isNew) this.views.clear();
    this.last = path.at(-1) ?? null;
    const before = this.views;
    this.views = new Map(path.map((message) => [message.id, before.get(message.id) ?? new MessageView(this, message)]));
    this.siblings = Map.groupBy(conversation.messages.values(), (message) => message.parent);
    const log = $("log");
    [...this.views.values()].forEach(({ element }, index) => {
      if (log.children[index] !== element) log.insertBefore(element, log.children[index] ?? null);
    });
    while (log.children.length > path.length) log.lastElementChild.remove();
    $("empty").hidden = path.length > 0;
    const fresh = [...this.views.values()].filter((view) => !before.has(view.message.id)).reverse();
    for (const view of [...this.views.values()].filter((each) => before.has(each.message.id))) view.drawFoot();
    for (const view of fresh.slice(0, DRAWN_AT_ONCE)) view.draw();
    this.#drawLater(fresh.slice(DRAWN_AT_ONCE));
    if (isNew) this.toEnd();
  }

  /** Show no conversation. */
  clear() {
    this.conversation = null;
    this.views.clear();
    $("log").replaceChildren();
    $("empty").hidden = false;
  }

  #drawLater(views) {
    if (!views.length) return;
    (window.requestIdleCallback ?? setTimeout)(() => {
      for (const view of views.splice(0, DRAWN_AT_ONCE)) if (this.views.get(view.message.id) === view) view.draw();
      this.#drawLater(views);
    });
  }

  changed(conversation, message) {
    if (conversation !== this.conversation) return;
    const view = this.views.get(message.id);
    if (view) beforeNextFrame(view.draw);
    else this.show(conversation);
  }

  /** Draw the answer to a call's message and all feet again: the last message and the answered calls have changed. */
  refresh(conversation, message) {
    this.show(conversation);
    const view = this.views.get(message?.id);
    if (view) view.draw();
  }

  focus(message) {
    this.views.get(message.id)?.element.querySelector(".actions button:not([disabled])")?.focus();
  }

  follow() {
    if (this.follows) beforeNextFrame(this.toEnd);
  }

  toEnd = () => {
    this.follows = true;
    $("scroller").scrollTop = $("scroller").scrollHeight;
  };
}
