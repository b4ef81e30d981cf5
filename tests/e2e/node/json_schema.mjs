import { assert, client, messages, model, schema, seeded } from "./client.mjs";

const response_format = { type: "json_schema", json_schema: { name: "person", strict: true, schema } };
const options = { model, messages, ...seeded, max_tokens: 400, response_format };
const { choices } = await client.chat.completions.parse(options);
assert.equal(choices[0].finish_reason, "stop");
const person = choices[0].message.parsed ?? JSON.parse(choices[0].message.content);
assert.ok(["Ann", "Bob"].includes(person.name));
assert.ok(Number.isInteger(person.age) && person.age >= 0 && person.age <= 99);
const streamed = await client.chat.completions.stream(options).finalContent();
assert.deepEqual(JSON.parse(streamed), person);
