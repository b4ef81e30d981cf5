// Vercel's `ai` with a model that reasons, through its providers for chats, responses and messages.
import { assert, load, model, question, run, url, weather } from "./attempts.mjs";

const { generateText, isStepCount, streamText, tool } = await load("ai");
const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");
const { createOpenAI } = await load("@ai-sdk/openai");
const { createAnthropic } = await load("@ai-sdk/anthropic");
const { z } = await load("zod");
const server = { name: "pyllm", baseURL: `${url}/v1`, apiKey: "none" };
const providers = {
  chats: { model: createOpenAICompatible({ ...server, includeUsage: true })(model) },
  responses: {
    model: createOpenAI(server).responses(model),
    providerOptions: { openai: { forceReasoning: true, reasoningSummary: "auto" } },
  },
  messages: { model: createAnthropic(server)(model) },
};
const sum = { prompt: "What is 2 + 3?", maxRetries: 0 };
const enough = isStepCount(4);

function tools(asked) {
  const get_weather = tool({
    description: "get the weather in a city",
    inputSchema: z.object({ city: z.string() }),
    execute: async ({ city }) => (asked.push(city), weather),
  });
  return { get_weather };
}

function checkSum({ text, reasoningText }) {
  assert.equal(reasoningText, "2 and 3 make 5.");
  assert.equal(text, "It is 5.");
}

async function finished(stream) {
  const [text, reasoningText, steps] = await Promise.all([stream.text, stream.reasoningText, stream.steps]);
  return { text, reasoningText, steps };
}

function checkSteps({ text, steps }) {
  assert.deepEqual(steps.map((step) => step.reasoningText), ["I look up Paris.", "It is 7."]);
  assert.equal(text, "It is 7 degrees and cloudy in Paris.");
}

const attempts = {};
for (const [api, provider] of Object.entries(providers)) {
  attempts[`${api}: reasoning apart from the answer, whole and streamed`] = async () => {
    checkSum(await generateText({ ...provider, ...sum }));
    checkSum(await finished(streamText({ ...provider, ...sum })));
  };
  attempts[`${api}: reasoning before a call and after its result, whole and streamed`] = async () => {
    const asked = [];
    const fields = { ...provider, prompt: question, tools: tools(asked), stopWhen: enough, maxRetries: 0 };
    checkSteps(await generateText(fields));
    checkSteps(await finished(streamText(fields)));
    assert.deepEqual(asked, ["Paris", "Paris"]);
  };
}
await run(attempts);
