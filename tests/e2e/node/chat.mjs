import { assert, client, messages, model, seeded } from "./client.mjs";

const options = { model, messages, ...seeded, n: 2, logprobs: true, top_logprobs: 2, ignore_eos: true };
const { data, response, request_id } = await client.chat.completions
  .create({ ...options, max_tokens: 8 }, { headers: { "x-request-id": "node-1" } })
  .withResponse();
assert.equal(request_id, "node-1");
assert.equal(response.headers.get("content-type"), "application/json");
assert.deepEqual(data.choices.map((choice) => choice.index), [0, 1]);
for (const choice of data.choices) {
  assert.equal(typeof choice.message.content, "string");
  assert.equal(choice.logprobs.content.length, 8);
  assert.equal(choice.finish_reason, "length");
}
assert.equal(data.usage.completion_tokens, 16);
assert.equal(data.usage.total_tokens, data.usage.prompt_tokens + 16);
