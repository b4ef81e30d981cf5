// Tools: the editor in the settings, and the calls in an answer, which the person answers as the program would.

import { button, make, copyButton } from "./dom.js";

export const EXAMPLE = {
  name: "get_weather",
  description: "The weather of a city.",
  parameters: '{\n  "type": "object",\n  "properties": {"city": {"type": "string"}},\n  "required": ["city"]\n}',
};

/** The tools in the API's shape; throws an error that names a wrong tool. */
export function enabledTools(tools) {
  return tools.filter((tool) => !tool.disabled).map(({ name, description, parameters }) => {
    const called = { name };
    if (!name) throw new Error("Tools: a tool has no name.");
    if (description) called.description = description;
    if (parameters?.trim()) {
      try {
        called.parameters = JSON.parse(parameters);
      } catch (error) {
        throw new Error(`Tools: the parameters of ${name} are not valid JSON: ${error.message}`);
      }
    }
    return { type: "function", function: called };
  });
}

/** Draw the editor of a list of tools into `root`; `save` gets the changed list. */
export function drawTools(root, tools, save) {
  const redraw = (changed) => { save(changed); drawTools(root, changed, save); };
  const cards = tools.map((tool, index) => {
    const input = (name, label, tag, attributes) => {
      const id = `tool-${index}-${name}`;
      const element = make(tag, { id, spellcheck: "false", ...attributes });
      element.value = tool[name] ?? "";
      element.addEventListener("input", () => { tool[name] = element.value; save(tools); });
      return make("div", {}, make("label", { for: id }, label), element);
    };
    const used = make("input", { type: "checkbox", id: `tool-${index}-used` });
    used.checked = !tool.disabled;
    used.addEventListener("change", () => { tool.disabled = !used.checked; save(tools); });
    return make("div", { class: "card", role: "group", "aria-label": `Tool ${index + 1}` },
      input("name", "Name of the function", "input", { pattern: "[A-Za-z0-9_\\-]{1,64}" }),
      input("description", "Description", "input", {}),
      input("parameters", "Parameters (JSON schema)", "textarea", { rows: "5" }),
      make("div", { class: "check" }, used, make("label", { for: used.id }, "Offer it to the model"),
        button("Remove", () => redraw(tools.filter((_, other) => other !== index)), { class: "quiet", "aria-label": `Remove tool ${index + 1}` })));
  });
  root.replaceChildren(...cards, button("Add a tool", () => redraw([...tools, { ...EXAMPLE }])));
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;  // it was cut off
  }
}

/**
 * The calls of an answer. `results` maps a call's id to the answer that is in the conversation already;
 * `answer` gets the texts by id, or is null while no answer can be sent.
 */
export function drawCalls(calls, results, answer) {
  const areas = new Map();
  const cards = calls.map((call, index) => {
    const { name, arguments: given } = call.function;
    const card = make("div", { class: "card call" },
      make("div", { class: "call-head" }, make("strong", {}, `Call of ${name}`), copyButton(() => given, `Copy the arguments of ${name}`)),
      make("pre", { tabindex: "0" }, make("code", {}, pretty(given))));
    if (answer && !results.has(call.id)) {
      const area = make("textarea", { rows: "2", id: `call-${call.id}-${index}`, spellcheck: "false" });
      areas.set(call.id, area);
      card.append(make("label", { for: area.id }, `What ${name} returns`), area);
    }
    return card;
  });
  if (!areas.size) return cards;
  const send = () => answer(new Map([...areas].map(([id, area]) => [id, area.value])));
  return [...cards, button(areas.size > 1 ? "Send the results" : "Send the result", send, { class: "main" })];
}
