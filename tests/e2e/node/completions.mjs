import { assert, client, listed, model, seeded } from "./client.mjs";

const options = { model, prompt: ["Hi", "Ho"], ...seeded, max_tokens: 8, echo: true, logprobs: 1, ignore_eos: true };
const { choices, usage } = await client.completions.create(options);
assert.deepEqual(choices.map((choice) => choice.text.slice(0, 2)), ["Hi", "Ho"]);
assert.equal(choices[1].logprobs.tokens.length, 10);
assert.equal(usage.completion_tokens, 16);
const chunks = await listed(await client.completions.create({ ...options, stream: true }));
for (const { index, text } of choices) {
  const pieces = chunks.flatMap((chunk) => chunk.choices.filter((choice) => choice.index === index));
  assert.equal(pieces.map((piece) => piece.text).join(""), text);
}
