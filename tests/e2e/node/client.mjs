// The client of the package in OPENAI_FOLDER, pointed at the server in OPENAI_BASE_URL.
import assert from "node:assert/strict";
import { createRequire } from "node:module";

export const openai = createRequire(`${process.env.OPENAI_FOLDER}/`)("openai");
export const client = new openai.OpenAI({ apiKey: "none", maxRetries: 0, timeout: 60_000 });
export const model = "tiny";
export const messages = [{ role: "user", content: "Who is there?" }];
export const seeded = { temperature: 1, seed: 3 };
export { assert };

export const schema = {
  type: "object",
  properties: { name: { enum: ["Ann", "Bob"] }, age: { type: "integer", minimum: 0, maximum: 99 } },
  required: ["name", "age"],
  additionalProperties: false,
};

export async function listed(stream) {
  const items = [];
  for await (const item of stream) items.push(item);
  return items;
}
