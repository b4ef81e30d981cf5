// Vercel's `ai` with its OpenAI-compatible provider.
import { assert, load, model, question, run, url, weather } from "./attempts.mjs";

const { generateText, isStepCount, Output, streamText, tool } = await load("ai");
const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");
const { z } = await load("zod");
const provider = createOpenAICompatible({
  name: "pyllm", baseURL: `${url}/v1`, apiKey: "none", supportsStructuredOutputs: true, includeUsage: true,
});
const options = { model: provider(model), temperature: 0, maxRetries: 0 };
const person = z.object({ name: z.string().max(20), age: z.number().int().min(0).max(150) });
const enough = isStepCount(4);

function tools(asked) {
  const get_weather = tool({
    description: "get the weather in a city",
    inputSchema: z.object({ city: z.string() }),
    execute: async ({ city }) => (asked.push(city), weather),
  });
  return { get_weather };
}

await run({
  "text: whole, stream, stop, usage": async () => {
    const whole = await generateText({ ...options, prompt: "Hello!" });
    assert.ok(whole.text);
    assert.ok(whole.usage.inputTokens > 0 && whole.usage.outputTokens > 0);
    const streamed = streamText({ ...options, prompt: "Hello!" });
    let text = "";
    for await (const piece of streamed.textStream) text += piece;
    assert.equal(text, whole.text);
    assert.equal((await streamed.usage).outputTokens, whole.usage.outputTokens);
    const stop = whole.text.slice(3, 6);
    const cut = await generateText({ ...options, prompt: "Hello!", stopSequences: [stop] });
    assert.equal(cut.text, whole.text.slice(0, whole.text.indexOf(stop)));
    assert.equal((await generateText({ ...options, prompt: "Hello!", maxOutputTokens: 2 })).finishReason, "length");
  },
  "tools: a loop whose answer uses the result, whole and streamed": async () => {
    const asked = [];
    const whole = await generateText({ ...options, prompt: question, tools: tools(asked), stopWhen: enough });
    assert.match(whole.text, /7 degrees/);
    const streamed = streamText({ ...options, prompt: question, tools: tools(asked), stopWhen: enough });
    assert.match(await streamed.text, /7 degrees/);
    assert.deepEqual(asked, ["Paris", "Paris"]);
  },
  "tools: a demanded call": async () => {
    const fields = { ...options, prompt: "Hello!", tools: tools([]), toolChoice: "required" };
    const { toolCalls } = await generateText(fields);
    assert.equal(typeof toolCalls[0].input.city, "string");
  },
  "objects: by a JSON schema, whole and streamed": async () => {
    const fields = { ...options, prompt: "Who are you?", output: Output.object({ schema: person }) };
    const { output } = await generateText(fields);
    person.parse(output);
    assert.deepEqual(await streamText(fields).output, output);
  },
});
