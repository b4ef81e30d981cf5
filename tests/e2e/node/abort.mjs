import { assert, client, model, openai } from "./client.mjs";

const endless = { model, prompt: "Hi", max_tokens: 8000, ignore_eos: true };
const stream = await client.completions.create({ ...endless, stream: true });
let count = 0;
for await (const _ of stream) if (++count === 3) break;
assert.equal(count, 3);
await assert.rejects(client.completions.create(endless, { timeout: 300 }), openai.APIConnectionTimeoutError);
