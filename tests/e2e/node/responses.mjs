import { assert, client, listed, model } from "./client.mjs";

const options = { model, input: "Hello", temperature: 0, max_output_tokens: 16 };
const whole = await client.responses.create(options);
assert.ok(["completed", "incomplete"].includes(whole.status));
const events = await listed(await client.responses.create({ ...options, stream: true }));
const deltas = events.filter((event) => event.type === "response.output_text.delta").map((event) => event.delta);
assert.equal(deltas.join(""), whole.output_text);
const next = await client.responses.create({ ...options, input: "Continue", previous_response_id: whole.id });
assert.ok(next.usage.input_tokens > whole.usage.input_tokens);
assert.equal((await client.responses.retrieve(whole.id)).id, whole.id);
