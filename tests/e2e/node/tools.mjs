import { assert, client, listed, messages, model, schema, seeded } from "./client.mjs";

const tools = [
  { type: "function", function: { name: "greet", parameters: schema } },
  { type: "function", function: { name: "clock" } },
];
const options = { model, messages, tools, ...seeded, max_tokens: 400, parallel_tool_calls: false };
for (const tool_choice of ["required", { type: "function", function: { name: "clock" } }]) {
  const whole = (await client.chat.completions.create({ ...options, tool_choice })).choices[0];
  const [call] = whole.message.tool_calls;
  assert.equal(typeof JSON.parse(call.function.arguments), "object");
  const chunks = await listed(await client.chat.completions.create({ ...options, tool_choice, stream: true }));
  const pieces = chunks.flatMap((chunk) => chunk.choices[0].delta.tool_calls ?? []);
  assert.equal(pieces.map((piece) => piece.function.arguments ?? "").join(""), call.function.arguments);
  assert.equal(pieces.find((piece) => piece.function.name).function.name, call.function.name);
  assert.equal(whole.finish_reason, tool_choice === "required" ? "tool_calls" : "stop");
  if (call.function.name === "clock") assert.equal(call.function.arguments, "{}");
}
