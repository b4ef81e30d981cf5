// Conversations as trees of messages: a new wording or another answer is a branch, and nothing is overwritten.

import * as store from "./store.js";

export const FORMAT = "pyllm-conversations";
const ROLES = new Set(["user", "assistant", "tool"]);
const MAX_MESSAGES = 20000;
const STATISTICS = ["prompt", "completion", "cached", "firstSeconds", "seconds"];

const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");

export class Conversation {
  constructor(record) {
    this.record = record;  // {id, title, created, updated, leaf}, for the list
    this.messages = null;  // by id, once they are loaded
    this.run = null;  // the answer being streamed
  }

  get id() { return this.record.id; }
  get title() { return this.record.title || "New conversation"; }

  async load() {
    if (this.messages) return;
    const found = await store.loadMessages(this.id);
    for (const message of found.filter((each) => each.partial)) {
      delete message.partial;
      message.note = "Not complete: the page was closed, or another tab is writing it.";
    }
    this.messages ??= new Map(found.sort((a, b) => a.created - b.created).map((message) => [message.id, message]));
  }

  /** The messages from the first to the chosen last one. */
  path() {
    const found = [];
    for (let message = this.messages.get(this.record.leaf); message; message = this.messages.get(message.parent)) found.push(message);
    return found.reverse();
  }

  children(parent) {
    return [...this.messages.values()].filter((message) => message.parent === parent);
  }

  /** Show the branch that a message is on, down to its newest end. */
  choose(message) {
    let leaf = message;
    for (let below = [leaf]; below.length; below = this.children(leaf.id)) leaf = below.at(-1);
    this.record.leaf = leaf.id;
    this.save();
  }

  add(role, parent, fields) {
    const last = [...this.messages.values()].at(-1);
    const created = Math.max(Date.now(), (last?.created ?? 0) + 1);  // the order of branches
    const message = { id: newId(), conversation: this.id, parent: parent?.id ?? null, role, content: "", created, ...fields };
    this.messages.set(message.id, message);
    this.record.leaf = message.id;
    this.record.updated = created;
    if (!this.record.title && role === "user") this.record.title = titleOf(message);
    this.save();
    this.saveMessage(message);
    return message;
  }

  /** Remove one message; its followers move below the message before it. Returns a function that undoes this. */
  remove(message) {
    const below = this.children(message.id);
    const leaf = this.record.leaf;
    this.messages.delete(message.id);
    for (const child of below) child.parent = message.parent;
    if (leaf === message.id) {
      this.record.leaf = message.parent;
      const alternatives = this.children(message.parent);
      if (alternatives.length) this.choose(alternatives.at(-1));
    }
    this.#saveAll(below);
    store.deleteMessage(message.id);
    return () => {
      const all = [...this.messages.values(), message].sort((a, b) => a.created - b.created);
      this.messages = new Map(all.map((each) => [each.id, each]));
      for (const child of below) child.parent = message.id;
      this.record.leaf = leaf;
      this.#saveAll([message, ...below]);
    };
  }

  #saveAll(messages) { store.putAll([this.record], messages); }
  /** Save a complete answer; other tabs then read the conversation again. */
  saveEnd(message) {
    if (!this.messages.has(message.id)) return;
    this.record.updated = Date.now();
    this.#saveAll([message]);
  }

  save() { return store.putConversation(this.record); }
  saveMessage(message) { return this.messages?.has(message.id) ? store.putMessage(message) : undefined; }
}

function titleOf(message) {
  const text = (message.content || message.attachments?.[0]?.name || "").trim().split("\n")[0];
  return text.length > 60 ? `${text.slice(0, 57)}…` : text;
}

/** All conversations, newest first. */
export class Library {
  constructor() { this.all = []; }

  async load() {
    const known = new Map(this.all.map((each) => [each.id, each]));
    const records = await store.listConversations();
    const found = records.map((record) => {
      const before = known.get(record.id);
      if (!before) return new Conversation(record);
      if (!before.run && before.record.updated !== record.updated) before.messages = null;  // another tab added some
      if (!before.run) before.record = record;
      return before;
    });
    const kept = new Set(found);
    this.all = [...found, ...this.all.filter((each) => each.run && !kept.has(each))];
  }

  sorted() { return [...this.all].sort((a, b) => b.record.updated - a.record.updated); }

  create() {
    const now = Date.now();
    const conversation = new Conversation({ id: newId(), title: "", created: now, updated: now, leaf: null });
    conversation.messages = new Map();
    this.all.push(conversation);
    return conversation;
  }

  /** Delete a conversation; returns a function that undoes it. */
  async remove(conversation) {
    conversation.run?.stop();
    await conversation.load();
    this.all = this.all.filter((each) => each !== conversation);
    await store.deleteConversation(conversation.id);
    return async () => {
      this.all.push(conversation);
      await store.putAll([conversation.record], [...conversation.messages.values()]);
    };
  }

  /** Conversations as JSON text. */
  async export(conversations) {
    const out = [];
    for (const conversation of conversations) {
      await conversation.load();
      out.push({ ...conversation.record, messages: [...conversation.messages.values()] });
    }
    return JSON.stringify({ format: FORMAT, version: 1, conversations: out }, null, 1);
  }

  /** Add exported conversations, as new ones; returns how many. Throws an error that describes the problem in the text. */
  async import(text) {
    let parsed;
    try {
      parsed = JSON.parse(text);
    } catch {
      throw new Error("The file is not JSON.");
    }
    if (parsed?.format !== FORMAT || !Array.isArray(parsed.conversations)) throw new Error("The file holds no exported conversations.");
    if (parsed.version !== 1) throw new Error(`The file has version ${parsed.version}; this page reads version 1.`);
    const made = parsed.conversations.map(readConversation);
    await store.putAll(made.map(({ record }) => record), made.flatMap(({ messages }) => messages));
    for (const { record, messages } of made) {
      const conversation = new Conversation(record);
      conversation.messages = new Map(messages.map((message) => [message.id, message]));
      this.all.push(conversation);
    }
    return made.length;
  }
}

/** Check one conversation of a file and give it new ids, so that an import never overwrites anything. */
function readConversation(given, index) {
  const wrong = (what) => new Error(`Conversation ${index + 1} of the file: ${what}`);
  if (!Array.isArray(given?.messages)) throw wrong("it has no list of messages.");
  if (given.messages.length > MAX_MESSAGES) throw wrong(`it has more than ${MAX_MESSAGES} messages.`);
  const id = newId();
  const ids = new Map(given.messages.map((message) => [message?.id, newId()]));
  const time = (value) => (Number.isFinite(value) ? value : Date.now());
  let last = 0;
  const seen = new Set();
  const messages = given.messages.map((message) => {
    if (!ROLES.has(message?.role) || typeof message.content !== "string") throw wrong("a message has no role or no text.");
    // A parent comes before its children, so no message is below itself.
    const parent = seen.has(message.parent) ? ids.get(message.parent) : null;
    seen.add(message.id);
    last = Math.max(time(message.created), last + 1);
    return { ...checkedParts(message, wrong), id: ids.get(message.id), conversation: id, parent, created: last };
  });
  const record = {
    id, title: String(given.title ?? "").slice(0, 200), created: time(given.created), updated: time(given.updated),
    leaf: ids.get(given.leaf) ?? messages.at(-1)?.id ?? null,
  };
  return { record, messages };
}

const isText = (value) => typeof value === "string";

/** The known parts of a message, of the right types. */
function checkedParts({ role, content, reasoning, calls, callId, name, note, raw, edited, model, attachments, stats, dynamics }, wrong) {
  if (calls != null && !(Array.isArray(calls) && calls.every((call) => isText(call?.id) && isText(call.function?.name) && isText(call.function?.arguments)))) {
    throw wrong("a tool call lacks its id, name or arguments.");
  }
  if (attachments != null && !(Array.isArray(attachments) && attachments.every((file) => isText(file?.name) && isText(file?.text)))) {
    throw wrong("an attached file lacks its name or text.");
  }
  const isValue = (value) => typeof value === "boolean" || Number.isFinite(value);
  const lists = (token) => ["experts", "rerouted", "mu_norm", "velocity_norm"].every((key) => Array.isArray(token?.[key]) && token[key].every(isValue));
  const routes = (token) => ["routed_experts", "expert_weights"].every((key) => token[key] == null || (Array.isArray(token[key])
    && token[key].length === token.experts.length && token[key].every((each) => Array.isArray(each) && each.length && each.every(Number.isFinite))));
  if (dynamics != null && !(Array.isArray(dynamics) && dynamics.every((token) => isText(token?.token) && lists(token) && routes(token)))) {
    throw wrong("the dynamics of a token are incomplete.");
  }
  const parts = { role, content, calls, attachments, dynamics };
  for (const [key, text] of Object.entries({ reasoning, callId, name, note, model })) if (isText(text)) parts[key] = text;
  if (raw === true) parts.raw = true;
  if (edited === true) parts.edited = true;
  if (stats && STATISTICS.every((each) => Number.isFinite(stats[each]))) parts.stats = stats;
  return parts;
}
