// Anthropic's client for Node.
import { assert, load, model, question, run, url, weather } from "./attempts.mjs";

const { default: Anthropic } = await load("@anthropic-ai/sdk");
const client = new Anthropic({ baseURL: url, apiKey: "none", maxRetries: 0, timeout: 60_000 });
const greedy = { model, max_tokens: 50, temperature: 0 };
const tool = {
  name: "get_weather",
  description: "get the weather in a city",
  input_schema: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
};
const user = (content) => ({ role: "user", content });
const ask = (messages, fields = {}) => client.messages.create({ ...greedy, messages, ...fields });

await run({
  "messages: whole, stream, stop_sequences, usage": async () => {
    const whole = await ask([user("Hello!")]);
    const text = whole.content[0].text;
    assert.ok(text);
    assert.equal(whole.stop_reason, "end_turn");
    const streamed = await client.messages.stream({ ...greedy, messages: [user("Hello!")] }).finalMessage();
    assert.equal(streamed.content[0].text, text);
    assert.equal(streamed.usage.output_tokens, whole.usage.output_tokens);
    const cut = await ask([user("Hello!")], { stop_sequences: [text.slice(3, 6)] });
    assert.equal(cut.content[0].text, text.slice(0, text.indexOf(text.slice(3, 6))));
    assert.equal(cut.stop_reason, "stop_sequence");
    assert.equal((await ask([user("Hello!")], { max_tokens: 2 })).stop_reason, "max_tokens");
  },
  "tools: a loop whose answer uses the result, streamed": async () => {
    const messages = [user(question)];
    const answer = await client.messages.stream({ ...greedy, messages, tools: [tool] }).finalMessage();
    const use = answer.content.find((block) => block.type === "tool_use");
    assert.deepEqual(use.input, { city: "Paris" });
    const result = { type: "tool_result", tool_use_id: use.id, content: JSON.stringify(weather) };
    messages.push({ role: "assistant", content: answer.content }, user([result]));
    assert.match((await ask(messages, { tools: [tool] })).content[0].text, /7 degrees/);
  },
  "count_tokens agrees with usage": async () => {
    const messages = [user(question)];
    const counted = await client.messages.countTokens({ model, messages, tools: [tool] });
    const { usage } = await ask(messages, { tools: [tool] });
    assert.equal(counted.input_tokens, usage.input_tokens + usage.cache_read_input_tokens);
  },
  "a refusal is the client's own error": async () => {
    await assert.rejects(ask([user("Hello!")], { max_tokens: 0 }), (error) => {
      assert.ok(error instanceof Anthropic.BadRequestError);
      return /max_tokens/.test(error.message);
    });
  },
});
