import { assert, client, model } from "./client.mjs";

const { data, usage } = await client.embeddings.create({ model, input: ["red", "green", "red"] });
assert.deepEqual(data.map((entry) => entry.index), [0, 1, 2]);
for (const { embedding } of data) assert.ok(Math.abs(Math.hypot(...embedding) - 1) < 1e-4);
// Plain torch rounds by the shape of the step; on the compiled kernels the bits are equal.
const most = process.env.EQUAL_BITS === "true" ? 0 : 1e-5;
const close = (one, other) => one.length === other.length && one.every((value, n) => Math.abs(value - other[n]) <= most);
assert.ok(close(data[0].embedding, data[2].embedding));
assert.notDeepEqual(data[0].embedding, data[1].embedding);
assert.equal(usage.prompt_tokens, 11);
const whole = await client.embeddings.create({ model, input: "red", encoding_format: "float" });
assert.ok(close(whole.data[0].embedding, data[0].embedding));
