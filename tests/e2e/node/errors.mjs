import { assert, client, messages, model, openai } from "./client.mjs";

const cases = [
  [() => client.chat.completions.create({ model, messages, temperature: 5 }), openai.BadRequestError, "temperature"],
  [() => client.chat.completions.create({ model, messages, temprature: 1 }), openai.BadRequestError, "temprature"],
  [() => client.chat.completions.create({ model, messages: [] }), openai.BadRequestError, "messages"],
  [() => client.chat.completions.create({ model, messages, n: 0, stream: true }), openai.BadRequestError, "n"],
  [() => client.chat.completions.create({ model: "gpt-4o", messages }), openai.NotFoundError, "model"],
  [() => client.completions.create({ model, prompt: "a", suffix: "b" }), openai.BadRequestError, "suffix"],
  [() => client.models.retrieve("gpt-4o"), openai.NotFoundError, "model"],
  [() => client.files.list(), openai.NotFoundError, null],
];
for (const [call, kind, param] of cases) {
  await assert.rejects(async () => await call(), (error) => {
    assert.ok(error instanceof kind, `${error.constructor.name}: ${error.message}`);
    assert.equal(error.param, param);
    assert.equal(error.type, "invalid_request_error");
    assert.ok(error.requestID);
    return true;
  });
}
