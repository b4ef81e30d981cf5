// The settings dialog: one table of fields, their checks, and their part of a request's body.

import { $, make, button } from "./dom.js";
import { loadSettings, saveSettings } from "./store.js";
import { drawTools, enabledTools } from "./tools.js";

export const settings = { theme: "auto", toolChoice: "auto", format: "text", ...loadSettings() };

const number = (min, max, step, hint) => ({ kind: "number", min, max, step, hint });
const integer = (min, hint) => ({ kind: "number", min, step: 1, hint });
const lines = (hint, most) => ({ kind: "lines", hint, most });
const ids = (hint) => ({ kind: "ids", hint });
const flag = () => ({ kind: "flag" });

// Each name is the API's, so docs/api.md explains it. An empty field is not sent: the model's default applies.
const SAMPLING = {
  temperature: ["Temperature", number(0, 2, 0.05, "0 always takes the most likely token")],
  top_p: ["Top p", number(0.01, 1, 0.01, "the most likely tokens that add up to this probability")],
  top_k: ["Top k", integer(-1, "the k most likely tokens; −1 and 0: all")],
  min_p: ["Min p", number(0, 1, 0.01, "at least this share of the most likely token")],
  repetition_penalty: ["Repetition penalty", number(0.01, 100, 0.01, "above 1 repeats less")],
  presence_penalty: ["Presence penalty", number(-2, 2, 0.1)],
  frequency_penalty: ["Frequency penalty", number(-2, 2, 0.1)],
  seed: ["Seed", { kind: "number", step: 1, hint: "the same seed gives the same answer" }],
};
const LENGTH = {
  max_tokens: ["Most tokens of an answer", integer(1, "empty: all that fit")],
  min_tokens: ["Least tokens of an answer", integer(0)],
  stop: ["Stop texts", lines("one a line, at most 4; \\n is a line end", 4)],
  stop_token_ids: ["Stop token ids", ids("numbers with commas")],
  include_stop_str_in_output: ["Show the stop text", flag()],
  ignore_eos: ["Continue past the end token", flag()],
};
const WORDS = {
  bad_words: ["Words that are never written", lines("one a line", 128)],
  logit_bias: ["Logit bias", { kind: "json", hint: 'token id to −100 … 100, as in {"42": -100}' }],
  allowed_token_ids: ["Allowed token ids", ids("only these are generated")],
};
const OTHER = {
  extra: ["More fields of the request", { kind: "json", hint: 'JSON that is added to every request, as in {"priority": 1}' }],
};
const FORMATS = {
  text: "Any text",
  json_object: "Any JSON object",
  json_schema: "JSON by a schema",
  regex: "A regular expression",
  choice: "One of some texts",
  grammar: "A Lark grammar",
};

/** Read one field; throws an error that names it. */
function value(name, label, kind) {
  const text = settings[name];
  if (text == null || text === "" || text === false) return undefined;
  if (kind === "flag") return true;
  if (kind === "number") return Number(text);
  if (kind === "lines") return text.split("\n").filter(Boolean).map((line) => line.replaceAll("\\n", "\n"));
  if (kind === "ids") {
    const found = text.split(/[\s,]+/).filter(Boolean).map(Number);
    if (!found.every((id) => Number.isInteger(id) && id >= 0)) throw new Error(`${label}: only whole numbers, with commas.`);
    return found;
  }
  const parsed = parseJson(text, label);
  if (typeof parsed !== "object" || parsed === null || Array.isArray(parsed)) throw new Error(`${label}: a JSON object is needed, in { }.`);
  return parsed;
}

export function parseJson(text, label) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`${label} is not valid JSON: ${error.message}`);
  }
}

/** The settings' part of a request's body; throws an error that names a wrong field. */
export function requestFields() {
  const body = {};
  for (const group of [SAMPLING, LENGTH, WORDS]) {
    for (const [name, [label, { kind }]] of Object.entries(group)) {
      const found = value(name, label, kind);
      if (found !== undefined) body[name] = found;
    }
  }
  Object.assign(body, formatFields());
  const tools = enabledTools(settings.tools ?? []);
  if (tools.length) {
    body.tools = tools;
    if (settings.toolChoice !== "auto") body.tool_choice = settings.toolChoice;
    if (settings.singleCall) body.parallel_tool_calls = false;
  }
  if (settings.dynamics) body.return_dynamics = true;
  return Object.assign(body, value("extra", ...[OTHER.extra[0], "json"]));
}

function formatFields() {
  const { format, formatText = "" } = settings;
  if (format === "text") return {};
  if (format === "json_object") return { response_format: { type: format } };
  if (!formatText.trim()) throw new Error(`${FORMATS[format]}: the field in the settings is empty.`);
  if (format === "json_schema") {
    const schema = parseJson(formatText, "The schema");
    return { response_format: { type: format, json_schema: { name: "answer", schema, strict: true } } };
  }
  return { structured_outputs: { [format]: format === "choice" ? formatText.split("\n").filter(Boolean) : formatText } };
}

export function changeSetting(name, changed) {
  settings[name] = changed;
  saveSettings(settings);
}

function field(name, label, { kind, hint, ...limits }) {
  const id = `setting-${name}`;
  const isArea = kind === "lines" || kind === "json" || kind === "text";
  const attributes = { id, "aria-describedby": hint ? `${id}-hint` : null, spellcheck: kind === "text" ? null : "false" };
  const input = isArea ? make("textarea", { ...attributes, rows: "2" })
    : make("input", { ...attributes, type: kind === "flag" ? "checkbox" : kind === "number" ? "number" : "text", ...numberLimits(limits) });
  if (kind === "flag") input.checked = Boolean(settings[name]);
  else input.value = settings[name] ?? "";
  input.addEventListener(kind === "flag" ? "change" : "input", () => {
    if (input.validity.badInput) return;
    changeSetting(name, kind === "flag" ? input.checked : input.value);
    check(input, name, label, kind);
  });
  const note = hint && make("small", { id: `${id}-hint` }, hint);
  if (kind === "flag") return make("div", { class: "check" }, input, make("label", { for: id }, label), note);
  return make("div", { class: isArea ? "wide" : "" }, make("label", { for: id }, label), input, note, make("small", { class: "wrong", role: "alert" }));
}

const numberLimits = ({ min, max, step }) => ({ min, max, step: step && "any", inputmode: step && "decimal" });

function check(input, name, label, kind) {
  const wrong = input.parentElement.querySelector(".wrong");
  if (!wrong) return;
  let message = input.validity.valid ? "" : input.validationMessage;
  try {
    value(name, label, kind);
  } catch (error) {
    message = error.message;
  }
  wrong.textContent = message;
  input.setAttribute("aria-invalid", String(Boolean(message)));
}

function choice(id, label, options, name, after = () => {}) {
  const select = make("select", { id }, ...Object.entries(options).map(([key, text]) => make("option", { value: key }, text)));
  select.value = settings[name];
  select.addEventListener("change", () => { changeSetting(name, select.value); after(); });
  return make("div", {}, make("label", { for: id }, label), select);
}

function group(title, ...children) {
  return make("fieldset", {}, make("legend", {}, title), make("div", { class: "grid" }, ...children));
}

const fields = (table) => Object.entries(table).map(([name, [label, options]]) => field(name, label, options));

export function applyTheme() {
  document.documentElement.dataset.theme = settings.theme;
}

function drawFormat() {
  const area = field("formatText", "Schema, expression, texts (one a line) or grammar", { kind: "text" });
  const show = () => { area.hidden = ["text", "json_object"].includes(settings.format); };
  show();
  return [choice("format", "The answer is", FORMATS, "format", show), area];
}

/** Fill the dialog. */
export function drawSettings() {
  const tools = make("div", { class: "wide" });
  $("settings-body").replaceChildren(
    group("General",
      choice("theme", "Colours", { auto: "As the system", light: "Light", dark: "Dark" }, "theme", applyTheme),
      field("system", "System prompt", { kind: "text" }),
      field("dynamics", "Show what the model did: experts, mu and velocity of each token", { kind: "flag" })),
    group("Sampling", ...fields(SAMPLING)),
    group("Length and stop", ...fields(LENGTH)),
    group("Format of the answer", ...drawFormat()),
    group("Tools", tools,
      choice("tool-choice", "The model calls", { auto: "a tool if it wants", required: "at least one tool", none: "no tool" }, "toolChoice"),
      field("singleCall", "One call at most in an answer", { kind: "flag" })),
    group("Words and tokens", ...fields(WORDS), ...fields(OTHER)),
    make("p", {}, button("Reset all settings", resetAll), " For programs: the ", make("a", { href: "docs" }, "API reference"), "."),
  );
  drawTools(tools, settings.tools ?? [], (changed) => changeSetting("tools", changed));
}

function resetAll() {
  for (const name of Object.keys(settings)) delete settings[name];
  Object.assign(settings, { theme: "auto", toolChoice: "auto", format: "text" });
  saveSettings(settings);
  applyTheme();
  drawSettings();
}
