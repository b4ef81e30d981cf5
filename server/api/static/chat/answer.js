// One answer: the prompt, the turns left out of it, and the stream that becomes a message.

import { countTokens, ServerError, stream } from "./api.js";
import { counters, plural } from "./dom.js";
import { requestFields, settings } from "./settings.js";

const SAVE_EVERY = 1000;  // milliseconds in which a crash may lose text
const TOKENS_PER_MESSAGE = 64;  // at most, of the template around a message
const MAX_SENT = 4096;  // messages in one request

const fence = (text) => "`".repeat(Math.max(3, ...[...text.matchAll(/`+/g)].map(([run]) => run.length + 1)));

/** A message as the API reads it; files come before the text, each in a fence that its own text cannot close. */
export function asSent(message) {
  if (message.role === "tool") return { role: "tool", tool_call_id: message.callId, content: message.content };
  if (message.role === "assistant") {
    const { content, calls } = message;
    return calls?.length ? { role: "assistant", content: content || null, tool_calls: calls } : { role: "assistant", content };
  }
  const files = (message.attachments ?? []).map(({ name, text }) => `File ${name}:\n${fence(text)}\n${text}\n${fence(text)}`);
  return { role: "user", content: [...files, message.content].filter(Boolean).join("\n\n") };
}

function promptOf(path) {
  const messages = path.filter((message) => message.role !== "assistant" || message.content || message.calls?.length).map(asSent);
  return settings.system?.trim() ? [{ role: "system", content: settings.system }, ...messages] : messages;
}

const upperBound = (messages) => {
  const size = messages.reduce((sum, message) => sum + (message.content ?? "").length + JSON.stringify(message.tool_calls ?? "").length, 0);
  return 3 * size + TOKENS_PER_MESSAGE * messages.length;  // a token has a byte at least, and a UTF-16 unit three at most
};

/**
 * Leave out the oldest turns until the rest fits into the context with room for an answer.
 * Returns the messages and how many are missing; the last turn always stays.
 */
async function fit(messages, body, limit, force, signal) {
  const rest = messages[0]?.role === "system" ? messages.slice(1) : messages;
  const system = messages.slice(0, messages.length - rest.length);
  const room = limit - Math.min(body.max_tokens ?? limit / 4, limit / 4);
  const starts = rest.flatMap((message, index) => (message.role === "user" ? [index] : []));
  if (!starts.includes(0)) starts.unshift(0);
  const from = (turn) => [...system, ...rest.slice(starts[turn])];
  const options = { tools: body.tools, continue_final_message: body.continue_final_message, add_generation_prompt: body.add_generation_prompt };
  const fits = async (turn) => {
    const sent = from(turn);
    if (sent.length > MAX_SENT) return false;
    if (!force && !body.tools && upperBound(sent) <= room) return true;
    try {
      return (await countTokens({ model: body.model, messages: sent, ...options }, signal)) <= room;
    } catch (error) {
      if (error.status === 413) return false;
      throw error;
    }
  };
  let low = 0;  // the first turn that may stay
  let high = starts.length - 1;
  if (!limit || (await fits(0))) high = 0;
  else low = Math.min(1, high);
  while (low < high) {
    const middle = (low + high) >> 1;
    if (await fits(middle)) high = middle;
    else low = middle + 1;
  }
  return { messages: from(low), missing: starts[low] };
}

/** An answer being streamed; `onChange(message)` is called for each piece of it, `onEnd(message, error)` once. */
export class Run {
  constructor(conversation, model, { onChange, onEnd }) {
    this.conversation = conversation;
    this.model = model;  // {id, max_model_len}
    this.controller = new AbortController();
    this.onChange = onChange;
    this.onEnd = onEnd;
    conversation.run = this;
  }

  stop() { this.controller.abort(); }

  /** Answer below `parent`, or continue the answer `message`. */
  async start(parent, message = null) {
    const { conversation } = this;
    let failure = null;
    const before = message?.content ?? "";
    const path = pathTo(conversation, parent);
    try {
      const body = { model: this.model.id, ...requestFields(), stream: true, stream_options: { include_usage: true } };
      if (message) Object.assign(body, { continue_final_message: true, add_generation_prompt: false });
      message ??= conversation.add("assistant", parent, { model: this.model.id, partial: true });
      Object.assign(message, { note: "", partial: true });
      if (body.return_dynamics) message.dynamics ??= [];
      this.message = message;
      this.onChange(message);
      await this.#attempt(message, body, promptOf(before ? [...path, message] : path));
    } catch (error) {
      if (this.controller.signal.aborted) note(message, "Stopped.");
      else failure = error;
    }
    conversation.run = null;
    if (message) {
      delete message.partial;
      if (!message.content && !message.reasoning && !message.calls?.length) {
        conversation.remove(message);
        if (conversation.messages.has(parent?.id)) conversation.record.leaf = parent.id;
        conversation.save();
      } else conversation.saveEnd(message);
    }
    this.onEnd(message, failure);
  }

  async #attempt(message, body, messages) {
    const { signal } = this.controller;
    const limit = this.model.max_model_len ?? 0;
    for (const force of [false, true]) {
      const kept = await fit(messages, body, limit, force, signal);
      message.missing = kept.missing;
      try {
        await this.#read(message, { ...body, messages: kept.messages });
        return;
      } catch (error) {
        if (error.code !== "context_length_exceeded") throw error;
        if (force) throw new ServerError(`${error.message} The last message alone is too long: shorten it, or remove a file.`, error.status, error.code);
      }
    }
  }

  async #read(message, body) {
    const begin = performance.now();
    let first = 0;
    let saved = begin;
    const save = () => { this.conversation.saveMessage(message); };
    window.addEventListener("pagehide", save, { signal: this.controller.signal });
    for await (const chunk of stream(body, this.controller.signal)) {
      counters.chunks += 1;
      const choice = chunk.choices?.[0];
      if (choice && addDelta(message, choice) && !first) first = performance.now();
      if (choice?.finish_reason === "length") note(message, "Cut off at the token limit.");
      if (chunk.usage) message.stats = statistics(chunk.usage, begin, first);
      this.onChange(message);
      if (performance.now() - saved > SAVE_EVERY) {
        saved = performance.now();
        save();
      }
    }
    window.removeEventListener("pagehide", save);
  }
}

function pathTo(conversation, message) {
  const found = [];
  for (let each = message; each; each = conversation.messages.get(each.parent)) found.push(each);
  return found.reverse();
}

function note(message, text) {
  if (message) message.note = text;
}

/** Add a piece of an answer; return whether it had anything to show. */
function addDelta(message, { delta = {}, dynamics }) {
  if (dynamics) message.dynamics?.push(...dynamics);
  const reasoning = delta.reasoning_content ?? delta.reasoning;
  if (delta.content) message.content += delta.content;
  if (reasoning) message.reasoning = (message.reasoning ?? "") + reasoning;
  for (const piece of delta.tool_calls ?? []) {
    message.calls ??= [];
    const call = (message.calls[piece.index] ??= { id: "", type: "function", function: { name: "", arguments: "" } });
    if (piece.id) call.id = piece.id;
    call.function.name += piece.function?.name ?? "";
    call.function.arguments += piece.function?.arguments ?? "";
  }
  return Boolean(delta.content || reasoning || delta.tool_calls);
}

function statistics(usage, begin, first) {
  const now = performance.now();
  const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
  return {
    prompt: usage.prompt_tokens, completion: usage.completion_tokens, cached,
    reasoning: usage.completion_tokens_details?.reasoning_tokens ?? 0,
    firstSeconds: ((first || now) - begin) / 1000, seconds: (now - begin) / 1000,
  };
}

export function describe({ prompt, completion, cached, firstSeconds, seconds }, format) {
  const decoding = seconds - firstSeconds;
  const parts = [`${plural(completion, "token")} in ${format(seconds)}`];
  if (completion > 1 && decoding > 0) parts.push(`${((completion - 1) / decoding).toFixed(1)} tokens/s`);
  parts.push(`first token after ${format(firstSeconds)}`, `prompt of ${plural(prompt, "token")}, ${cached} cached`);
  return parts.join(" · ");
}
