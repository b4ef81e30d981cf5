// Talking to the server: models, token counts and streamed answers. All addresses are relative to the page.

import { apiKey } from "./store.js";

/** An error that the server returned; `code` is its error code. */
export class ServerError extends Error {
  constructor(message, status = 0, code = "") {
    super(message);
    this.status = status;
    this.code = code;
  }
}

async function refusal(response) {
  const error = await response.json().then((body) => body.error, () => null);
  const said = error?.message;
  const wait = response.headers.get("retry-after");
  let message = said ?? `The server answered with status ${response.status}.`;
  if (response.status === 401) message = apiKey() ? "The server does not accept this API key." : "This server needs an API key.";
  if (response.status === 429) message = `${said ?? "The server is busy."} Try again in ${wait ?? "a few"} seconds.`;
  if (response.status === 503) message = `The server takes no requests at the moment: ${said ?? "it gives no reason."}`;
  return new ServerError(message, response.status, error?.code ?? "");
}

async function call(path, body, signal) {
  if (/[^\x20-\x7e]/.test(apiKey())) throw new ServerError("The API key has a character that a request cannot carry, such as an accent.", 401);
  const headers = apiKey() ? { authorization: `Bearer ${apiKey()}` } : {};
  if (body) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body) });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ServerError("The server cannot be reached.");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

export async function listModels() {
  return (await (await call("v1/models")).json()).data;
}

/** Count the tokens of a prompt made of messages. */
export async function countTokens(body, signal) {
  return (await (await call("tokenize", body, signal)).json()).count;
}

/** Yield the events of a streamed answer. */
export async function* stream(body, signal) {
  const response = await call("v1/chat/completions", body, signal);
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let buffer = "";
  let isComplete = false;
  for (;;) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      if (signal.aborted) throw error;
      throw new ServerError("The connection to the server broke.");
    }
    if (piece.done) break;
    const events = (buffer + decoder.decode(piece.value, { stream: true })).split(/\r?\n\r?\n/);
    buffer = events.pop();
    for (const event of events) {
      const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      const text = data.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
      if (text === "[DONE]") isComplete = true;
      else if (text) {
        const parsed = JSON.parse(text);
        if (parsed.error) throw new ServerError(parsed.error.message, 200, parsed.error.code ?? "");
        yield parsed;
      }
    }
  }
  if (!isComplete) throw new ServerError("The answer ended before it was complete.");
}
