import { assert, client, model } from "./client.mjs";

const { data, usage } = await client.embeddings.create({ model, input: ["red", "green", "red"] });
assert.deepEqual(data.map((entry) => entry.index), [0, 1, 2]);
for (const { embedding } of data) assert.ok(Math.abs(Math.hypot(...embedding) - 1) < 1e-4);
assert.deepEqual(data[0].embedding, data[2].embedding);
assert.notDeepEqual(data[0].embedding, data[1].embedding);
assert.equal(usage.prompt_tokens, 11);
const whole = await client.embeddings.create({ model, input: "red", encoding_format: "float" });
assert.deepEqual(whole.data[0].embedding.map(Math.fround), data[0].embedding.map(Math.fround));
