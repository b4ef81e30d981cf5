import { assert, client, messages, model, schema, seeded } from "./client.mjs";

let called = [];
const tools = [
  {
    type: "function",
    function: {
      name: "greet",
      description: "Greet someone.",
      parameters: schema,
      parse: JSON.parse,
      function: (person) => {
        called.push(person);
        return `Hello, ${person.name}!`;
      },
    },
  },
];
const tool_choice = { type: "function", function: { name: "greet" } };
const options = { model, messages, tools, tool_choice, ...seeded, max_tokens: 400 };
for (const stream of [false, true]) {
  called = [];
  const runner = client.chat.completions.runTools({ ...options, stream });
  await runner.done();
  assert.equal(called.length, 1);
  assert.ok(["Ann", "Bob"].includes(called[0].name));
  const result = runner.messages.find((message) => message.role === "tool");
  assert.equal(result.content, `Hello, ${called[0].name}!`);
}
