import { assert, client, listed, messages, model, seeded } from "./client.mjs";

const options = { model, messages, ...seeded, max_tokens: 20, ignore_eos: true };
const whole = await client.chat.completions.create(options);
const streamed = { ...options, stream: true, stream_options: { include_usage: true } };
const chunks = await listed(await client.chat.completions.create(streamed));
const last = chunks.pop();
assert.equal(chunks.map((chunk) => chunk.choices[0].delta.content ?? "").join(""), whole.choices[0].message.content);
assert.equal(chunks[0].choices[0].delta.role, "assistant");
assert.equal(chunks.at(-1).choices[0].finish_reason, "length");
assert.deepEqual(last.choices, []);
assert.equal(last.usage.completion_tokens, 20);
assert.equal(new Set([...chunks, last].map((chunk) => chunk.id)).size, 1);

let heard = "";
const helper = client.chat.completions.stream(options).on("content", (delta) => (heard += delta));
assert.equal(await helper.finalContent(), whole.choices[0].message.content);
assert.equal(heard, whole.choices[0].message.content);
