// Runs the attempts of a program inside a client's environment, and prints one line of JSON for each.
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

export const url = process.env.PYLLM_URL ?? "http://127.0.0.1:8000";
export const model = "pyllm-demo";
export const question = "What is the weather in Paris?";
export const weather = { temperature: 7, sky: "cloudy" };
export { assert };

const require = createRequire(`${process.env.CLIENT_FOLDER}/`);
// A package of the environment; it is not next to this file, so a plain import would not find it.
export const load = (name) => import(pathToFileURL(require.resolve(name)));

export async function run(attempts) {
  for (const [tried, attempt] of Object.entries(attempts)) {
    let error = null;
    try {
      await attempt();
    } catch (caught) {
      error = `${caught.stack ?? caught}\n${caught.responseBody ?? ""}`;
      process.exitCode = 1;
    }
    console.log(JSON.stringify({ tried, error }));
  }
}
